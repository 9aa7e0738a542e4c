"""Everything this package raises on purpose, as one tree.

    NeuralEraserError
    ├── FileError       a file is missing, damaged, of another kind, or could not be written
    ├── SiteError       a site does not exist in this pipeline, or does not fit (width, stream, architecture)
    ├── ConceptError    a concept or phrase is unknown, or has too few prompts
    ├── SplitError      selection and test prompts, phrasings, seeds or concepts overlap
    ├── EraserNotAppliedError      an attached eraser did not act, so no image may be returned
    ├── ConceptRefusedError         an eraser that refuses found its concept, so no image is returned
    ├── DataError       values that cannot be used: NaN, no rows, a wrong shape
    └── SettingsError   settings that are out of range or contradict each other

and the warning UnseenRouteWarning: a call uses a route that no gate of an eraser sees.

Each message is one sentence: what was passed, what was expected, what to do next. Catch
`NeuralEraserError` to catch them all; a bug in this package is never one of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class NeuralEraserError(Exception):
    """The root: any failure that this package foresaw."""


class FileError(NeuralEraserError):
    """A file is missing, truncated, of another kind or version, or could not be written."""


class SiteError(NeuralEraserError):
    """A site does not exist in this pipeline, or an artifact made for another one does not fit it."""


class ConceptError(NeuralEraserError):
    """A concept is unknown (the near ones are named), or its prompts are too few to use."""


class SplitError(NeuralEraserError):
    """Data of selection would also be used for testing."""


class EraserNotAppliedError(NeuralEraserError):
    """An eraser is attached but did not act; raised before an image is returned."""


class ConceptRefusedError(NeuralEraserError):
    """An eraser that was attached to refuse found its concept; raised before an image is returned.

    `images`: the images of the call in which one did, counted from 0, each with the erasers' names.
    """

    def __init__(self, message: str, images: Mapping[int, Sequence[str]]) -> None:
        super().__init__(message)
        self.images = {image: list(names) for image, names in images.items()}


class DataError(NeuralEraserError):
    """Values that cannot be used: NaN or infinity, no rows at all, a shape that does not fit."""


class SettingsError(NeuralEraserError):
    """A setting is out of its range, or two settings contradict each other."""


class UnseenRouteWarning(UserWarning):
    """A concept may enter a call by a route that an eraser's gate does not see, such as a start image.

    Given once for an attachment and route. `warnings.simplefilter("error", UnseenRouteWarning)` makes it an error,
    raised before anything is drawn.
    """
