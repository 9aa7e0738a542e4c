"""Everything this package raises on purpose, as one tree.

    NeuralEraserError
    ├── FileError       a file is missing, damaged, of another kind, or could not be written
    ├── SiteError       a site does not exist in this pipeline, or does not fit (width, stream, architecture)
    ├── ConceptError    a concept or phrase is unknown, or has too few prompts
    ├── SplitError      selection and test prompts, phrasings, seeds or concepts overlap
    ├── EraserNotAppliedError      an attached eraser did not act, so no image may be returned
    ├── ConceptRefusedError         an eraser that refuses found its concept, so no image is returned
    ├── MissingDependencyError      a package of an extra is not installed
    ├── DataError       values that cannot be used: NaN, no rows, a wrong shape
    └── SettingsError   settings that are out of range or contradict each other

and the warning UnseenRouteWarning: a call uses a route that no gate of an eraser sees.

Each message is short: what was passed, what was expected, what to do next. Catch
`NeuralEraserError` to catch them all; a bug in this package is never one of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class NeuralEraserError(Exception):
    """The root: any failure that this package foresaw.

    Examples:
        >>> try:
        ...     open_pipeline("no-such-folder")
        ... except NeuralEraserError as error:
        ...     print(error)
        there is no pipeline 'no-such-folder': pass 'canvas', a folder with a model_index.json, or a Hub id ...
    """


class FileError(NeuralEraserError):
    """A file is missing, truncated, of another kind or version, or could not be written.

    Examples:
        >>> Eraser.load("nothing.safetensors")
        Traceback (most recent call last):
        neuraleraser.errors.FileError: nothing.safetensors does not exist...
    """


class SiteError(NeuralEraserError):
    """A site does not exist in this pipeline, or a file made for another one does not fit it.

    Examples:
        >>> with record(pipe, [Site("unet.up_blocks.7")], print):
        ...     generate(pipe, prompts, [0, 1], quick)
        Traceback (most recent call last):
        neuraleraser.errors.SiteError: unet.up_blocks.7:output:image: ... has no module 'unet.up_blocks.7'; ...
    """


class ConceptError(NeuralEraserError):
    """A concept is unknown (the near ones are named), or its prompts are too few to use.

    Examples:
        >>> canvas_concept("Hats")
        Traceback (most recent call last):
        neuraleraser.errors.ConceptError: the canvas has no concept 'Hats'. It knows: ..., Cats, Dogs, ...
    """


class SplitError(NeuralEraserError):
    """Data of selection would also be used for testing.

    Examples:
        >>> evaluate(pipe, [DoNothing("Cubism", "style")], brief, "sealed")
        Traceback (most recent call last):
        neuraleraser.errors.SplitError: Cubism: sealed, that is kept back for ...
    """


class EraserNotAppliedError(NeuralEraserError):
    """An eraser is attached but did not act; raised before an image is returned.

    Examples:
        >>> mine = open_pipeline("canvas", torch.float32)
        >>> with attach(mine, eraser):
        ...     mine.unet = pipe.unet  # has no hooks
        ...     generate(mine, prompts, [0, 1], quick)
        Traceback (most recent call last):
        neuraleraser.errors.EraserNotAppliedError: ...its unet was replaced...
    """


class ConceptRefusedError(NeuralEraserError):
    """An eraser that was attached to refuse found its concept; raised before an image is returned.

    Attributes:
        images: Images of the call in which one did, counted from 0, each with the erasers' names.

    Examples:
        >>> try:
        ...     with attach(pipe, eraser, action="refuse"):
        ...         generate(pipe, prompts, [0, 1], quick)
        ... except ConceptRefusedError as refused:
        ...     print(refused.images)
        {0: ['Van_Gogh']}
    """

    def __init__(self, message: str, images: Mapping[int, Sequence[str]]) -> None:
        super().__init__(message)
        self.images = {image: list(names) for image, names in images.items()}


class MissingDependencyError(NeuralEraserError, ImportError):
    """A package that this work needs is not installed; the message names the extra that brings it.

    Examples:
        >>> try:
        ...     bodies = NudeNetJudge()
        ... except MissingDependencyError:
        ...     bodies = None
        >>> issubclass(MissingDependencyError, ImportError)
        True
    """


class DataError(NeuralEraserError):
    """Values that cannot be used: NaN or infinity, no rows at all, a shape that does not fit.

    Examples:
        >>> sae.encode(torch.zeros(2, 3))
        Traceback (most recent call last):
        neuraleraser.errors.DataError: activations have shape (2, 3): this SAE takes [..., 128]
    """


class SettingsError(NeuralEraserError):
    """A setting is out of its range, or two settings contradict each other.

    Examples:
        >>> Sampling(num_inference_steps=0)
        Traceback (most recent call last):
        neuraleraser.errors.SettingsError: num_inference_steps is 0: pass a whole number from 1 to 1,000
    """


class UnseenRouteWarning(UserWarning):
    """A concept may enter a call by a route that an eraser's gate does not see, such as a start image.

    Given once for an attachment and route. `warnings.simplefilter("error", UnseenRouteWarning)` makes it an error,
    raised before anything is generated.

    Examples:
        >>> warnings.simplefilter("error", UnseenRouteWarning)
        >>> start = AutoPipelineForImage2Image.from_pipe(pipe)
        >>> with attach(start, eraser):
        ...     generate(start, prompts, [0, 1], quick, image=images)
        Traceback (most recent call last):
        neuraleraser.errors.UnseenRouteWarning: ...
    """


class ConceptRemainsWarning(UserWarning):
    """A start image shows a concept, and the call's strength is too low for an eraser to take it out.

    Given once a call and eraser; the action "erase_or_refuse" raises `ConceptRefusedError` in its place.

    Examples:
        >>> warnings.simplefilter("error", ConceptRemainsWarning)  # an error before there is an image
        >>> issubclass(ConceptRemainsWarning, UserWarning)
        True
    """
