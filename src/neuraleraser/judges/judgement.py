"""The contract of a judge: its input, its output, and how its numbers are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from neuraleraser.errors import DataError


@dataclass(frozen=True)
class Judgement:
    """A judge's class probabilities for N images, float32.

    Attributes:
        p_style: [N, styles], each row sums to 1 over the styles.
        p_object: [N, objects], each object by itself.
        artefact: [N], the distance to the nearest kind of real image; None from a judge that measures none.

    Examples:
        >>> seen = CanvasJudge.load("second")(images)
        >>> seen.p_style.shape, seen.p_object.shape, seen.artefact.shape
        ((2, 25), (2, 20), (2,))
    """

    p_style: NDArray[np.float32]
    p_object: NDArray[np.float32]
    artefact: NDArray[np.float32] | None


class Judge(Protocol):
    """A function from images to class probabilities, with what is needed to read them.

    Attributes:
        styles: Names of the styles, in the order of the columns; may be empty.
        objects: Names of the objects, in the order of the columns; may be empty.
        thresholds: For every class, the probability above which an image shows it.
        artefact_threshold: The distance above which an image counts as an artefact; None from a judge that measures
            none.
        figures: How accurate it is, or which version of a detector it is, as plain values.

    Examples:
        >>> judge: Judge = CanvasJudge.load("first")  # as are ClipJudge, NudeNetJudge and any class of this shape
        >>> judge(images).p_style.shape == (len(images), len(judge.styles))
        True
    """

    @property
    def styles(self) -> Sequence[str]: ...
    @property
    def objects(self) -> Sequence[str]: ...
    @property
    def thresholds(self) -> Mapping[str, float]: ...
    @property
    def artefact_threshold(self) -> float | None: ...
    @property
    def figures(self) -> Mapping[str, Any]: ...

    def __call__(self, images: NDArray[np.uint8], /) -> Judgement:
        """Judge images.

        Args:
            images: RGB images, uint8 [N, H, W, 3].

        Returns:
            The probabilities.
        """
        ...


@runtime_checkable
class FeatureJudge(Protocol):
    """A judge that also shows the features that it judges by, in which sets of images are compared (KID, FID).

    Examples:
        >>> from neuraleraser.judges import FeatureJudge
        >>> isinstance(CanvasJudge.load("second"), FeatureJudge)
        True
    """

    def features(self, images: NDArray[np.uint8], /) -> NDArray[np.float32]:
        """Return the features of images.

        Args:
            images: RGB images, uint8 [N, H, W, 3].

        Returns:
            Features, [N, D].
        """
        ...


@runtime_checkable
class ImageTextModel(Protocol):
    """A model that puts images and sentences into one space, as CLIP does: how well they agree is the cosine.

    Attributes:
        name: Its checkpoint.
        digest: Digest of its weights: figures of two digests do not compare.

    Examples:
        >>> from neuraleraser.judges import Clip, ImageTextModel
        >>> model: ImageTextModel = Clip("small-clip")  # a folder
        >>> model.features(images).shape[1] == model.text_features(["a cat"]).shape[1]
        True
    """

    @property
    def name(self) -> str: ...
    @property
    def digest(self) -> str: ...

    def features(self, images: NDArray[np.uint8], /) -> NDArray[np.float32]:
        """Return images as vectors of length 1.

        Args:
            images: RGB images, uint8 [N, H, W, 3].

        Returns:
            Vectors, [N, D].
        """
        ...

    def text_features(self, texts: Sequence[str], /) -> NDArray[np.float32]:
        """Return sentences as vectors of length 1.

        Args:
            texts: Sentences; what is longer than the model's context is cut off.

        Returns:
            Vectors, [N, D].
        """
        ...


@runtime_checkable
class CountingJudge(Protocol):
    """A judge that also counts: how often each of its classes is in an image, above its threshold.

    Attributes:
        classes: Names of what it counts, in the order of the columns.

    Examples:
        >>> from neuraleraser.judges import CountingJudge
        >>> isinstance(NudeNetJudge(), CountingJudge), isinstance(CanvasJudge.load("second"), CountingJudge)
        (True, False)
    """

    @property
    def classes(self) -> Sequence[str]: ...

    def count(self, images: NDArray[np.uint8], /) -> NDArray[np.int64]:
        """Count detections in images.

        Args:
            images: RGB images, uint8 [N, H, W, 3].

        Returns:
            Detections of each class in each image, [N, classes].
        """
        ...


@dataclass(frozen=True)
class JudgeSpec:
    """Names and thresholds of a judge's classes, checked: all that is needed to read stored probabilities.

    Raises DataError for no class at all, names that are empty or repeated, a class without a threshold in [0, 1), a
    threshold of no class, or an artefact threshold that is not a positive number.
    """

    styles: tuple[str, ...]
    objects: tuple[str, ...]
    thresholds: Mapping[str, float]
    artefact_threshold: float | None

    def __post_init__(self) -> None:
        names = (*self.styles, *self.objects)
        if not names or "" in names or len(set(names)) < len(names):
            raise DataError(
                f"the judge's classes are the styles {list(self.styles)} and the objects {list(self.objects)}: "
                "expected at least one, none empty and none twice"
            )
        if differ := sorted(set(names) ^ set(self.thresholds)):
            raise DataError(f"the judge's classes and thresholds differ in {differ}: expected one threshold a class")
        if wrong := {name: value for name, value in self.thresholds.items() if not 0 <= value < 1}:
            raise DataError(f"the judge's thresholds {wrong} are out of range: expected 0 <= threshold < 1")
        limit = self.artefact_threshold
        if limit is not None and not 0 < limit < float("inf"):
            raise DataError(f"the judge's artefact threshold is {limit}: expected a positive finite distance, or None")

    @classmethod
    def of(cls, judge: Judge) -> JudgeSpec:
        """Return the specification of `judge`."""
        limit = judge.artefact_threshold
        thresholds = {name: float(value) for name, value in judge.thresholds.items()}
        return cls(tuple(judge.styles), tuple(judge.objects), thresholds, None if limit is None else float(limit))

    def classes(self, kind: str) -> tuple[str, ...]:
        """Return the class names of a domain, "style" or "object". Raises DataError for another."""
        if kind not in ("style", "object"):
            raise DataError(f"there is no domain {kind!r}: expected 'style' or 'object'")
        return self.styles if kind == "style" else self.objects


def check(images: Any, size: int | None = None) -> None:
    """Raise DataError unless `images` is uint8 [N, size, size, 3]; of any height and width where `size` is None."""
    shape = f"[N, {size}, {size}, 3]" if size else "[N, H, W, 3]"
    wanted = f"pass a uint8 array {shape}"
    if not isinstance(images, np.ndarray):
        raise DataError(f"the judge was given a {type(images).__name__}: {wanted}")
    if images.dtype != np.uint8:
        raise DataError(f"the judge was given {images.dtype} {list(images.shape)}: {wanted} with values 0-255")
    shaped = images.ndim == 4 and images.shape[3] == 3
    if not shaped or 0 in images.shape[1:3] or (size and images.shape[1:3] != (size, size)):
        raise DataError(f"the judge was given uint8 of shape {list(images.shape)}: {wanted}")
