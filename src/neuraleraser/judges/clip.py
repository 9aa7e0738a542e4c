"""CLIP as a judge: it tells a concept from its neighbours by their names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neuraleraser.errors import ConceptError, DataError, FileError
from neuraleraser.io.digests import weights_digest
from neuraleraser.io.names import printable
from neuraleraser.judges.judgement import Judgement, check

CLIP = "openai/clip-vit-large-patch14"
MIN_IMAGES = 8
"""Images of each name that a calibration needs: half of them set the threshold, half test it."""
MIN_ACCURACY = 0.8
"""Balanced accuracy against the most confusable neighbour below which CLIP cannot tell the concept."""
_BATCH = 32
NO_CONCEPT = ""
"""The name, in a calibration, of images that show neither the concept nor a neighbour."""


class ClipJudge:
    """CLIP zero-shot: is this image the concept, rather than one of its neighbours?

    An image's logits are CLIP's similarities to one sentence per name. A name's margin is its log-odds among all names,
    l_k - log sum_(j != k) exp l_j, less the threshold that `calibrate` found for it. So every probability is compared
    with 0.5. For a style, `p_style` is the softmax in which only the concept's threshold is taken off; for anything
    else, `p_object` is each name's sigmoid by itself.

    Attributes:
        styles: The names, the concept first, if it is a style; else none.
        objects: The names, the concept first, if it is no style; else none.
        thresholds: 0.5 for every name.
        artefact_threshold: None, as CLIP measures no artefacts.
        figures: On images that the threshold was not set on, "recall" of the concept, "false_alarms" by neighbour, and
            "balanced_accuracy" against the worst of them.
        margin_thresholds: Thresholds of the margins, [names].

    Examples:
        >>> drawn = {name: generate(pipe, [name] * 8, range(8), quick) for name in ("a cat", "a dog")}
        >>> judge = ClipJudge.calibrate("a cat", "object", drawn, clip)
        >>> judge(drawn["a cat"]).p_object.shape  # of each image, a cat and a dog
        (8, 2)
    """

    artefact_threshold = None

    def __init__(self, clip: Clip, names: Sequence[str], kind: str, thresholds: Sequence[float]) -> None:
        own, none = tuple(names), ()
        self.styles, self.objects = (own, none) if kind == "style" else (none, own)
        self.thresholds = dict.fromkeys(own, 0.5)
        self.margin_thresholds = np.array(thresholds, np.float64)
        self.figures: dict[str, Any] = {}
        self._clip, self._texts = clip, [clip_sentence(name, kind) for name in own]

    @classmethod
    def calibrate(
        cls,
        concept: str,
        kind: str,
        images: Mapping[str, NDArray[np.uint8]],
        model: str | Clip = CLIP,
        device: str = "cpu",
    ) -> ClipJudge:
        """Set the thresholds on images of the concept and of each neighbour.

        Every second image sets them, the others test them.

        Args:
            concept: Name of the concept.
            kind: Kind of the concept: "style", or anything else.
            images: Images by name, uint8 [N, H, W, 3], of the concept and of each neighbour. Images under the name ""
                show none of the names: it is set apart from them, too.
            model: A CLIP checkpoint: a folder, a Hub id, or one that is open.
            device: Device to open it on.

        Returns:
            The judge.

        Raises:
            ConceptError: CLIP cannot tell the concept from a neighbour on images of this model, or concept or
                neighbours are missing.
            DataError: There are too few images.
            FileError: The checkpoint cannot be opened.
        """
        names = [concept, *(name for name in images if name not in (concept, NO_CONCEPT))]
        if concept not in images or len(names) < 2:
            raise ConceptError(
                f"CLIP judges {concept!r} against its neighbours, and images of {sorted(images)} were given: "
                "pass images of the concept and of one neighbour at least"
            )
        for name, some in images.items():
            check(some)
            if len(some) < MIN_IMAGES:
                raise DataError(
                    f"{len(some)} images of {name or 'none of the names'!r}: pass at least {MIN_IMAGES} of each name"
                )
        clip = Clip(model, device) if isinstance(model, str) else model
        judge = cls(clip, names, kind, [0.0] * len(names))
        margins = {name: judge._margins(judge._logits(some)) for name, some in images.items()}
        fitted = {name: m[::2] for name, m in margins.items()}
        judge.margin_thresholds = np.array(
            [
                _best_threshold(fitted[name][:, k], [m[:, k] for n, m in fitted.items() if n != name])
                for k, name in enumerate(names)
            ]
        )
        shown = {name: float((m[1::2, 0] > judge.margin_thresholds[0]).mean()) for name, m in margins.items()}
        recall = shown.pop(concept)
        worst = max(shown, key=lambda name: shown[name])
        accuracy = (recall + 1 - shown[worst]) / 2
        if accuracy < MIN_ACCURACY:
            raise ConceptError(
                f"{clip.name} cannot tell {concept!r} from {worst or 'images without it'!r} on this model's images: it "
                f"sees it in {recall:.0%} of its own and in {shown[worst]:.0%} of the others (balanced accuracy "
                f"{accuracy:.2f}, at least {MIN_ACCURACY} is needed): use a larger CLIP, or other neighbours"
            )
        judge.figures = {"recall": recall, "false_alarms": shown, "balanced_accuracy": accuracy}
        return judge

    def __call__(self, images: NDArray[np.uint8]) -> Judgement:
        """Judge images.

        An image's figures do not depend on its neighbours, but for rounding.

        Args:
            images: RGB images, uint8 [N, H, W, 3] of any size; N may be 0.

        Returns:
            The probabilities.

        Raises:
            DataError: `images` is anything else.
        """
        check(images)
        logits = self._logits(images)
        nothing = np.zeros((len(images), 0), np.float32)
        if self.styles:
            logits[:, 0] -= self.margin_thresholds[0]
            return Judgement(_softmax(logits).astype(np.float32), nothing, None)
        apart = 1 / (1 + np.exp(np.clip(self.margin_thresholds - self._margins(logits), -500, 500)))
        return Judgement(nothing, apart.astype(np.float32), None)

    def _logits(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """uint8 [N, H, W, 3] -> [N, names]."""
        return self._clip(images, self._texts)

    @staticmethod
    def _margins(logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """[N, names] -> the log-odds of each name among all."""
        others = [np.logaddexp.reduce(np.delete(logits, k, axis=1), axis=1) for k in range(logits.shape[1])]
        return logits - np.stack(others, 1)


def clip_sentence(name: str, kind: str) -> str:
    """Return the sentence that CLIP compares an image with."""
    phrase = " ".join(name.replace("_", " ").split())
    if kind == "style":
        return f"a picture in the style of {phrase.removesuffix(' style')}"
    return f"a picture of {phrase}"


class Clip:
    """A CLIP checkpoint that is open.

    Args:
        name: A folder or a Hub id.
        device: Device to open it on.

    Attributes:
        name: As it was given.
        digest: SHA-256 of its weights.

    Raises:
        FileError: It cannot be opened, or is no whole CLIP.

    Examples:
        >>> from neuraleraser.judges import Clip
        >>> model = Clip("small-clip")  # a folder
        >>> model(images, ["a cat", "a dog"]).shape
        (2, 2)
    """

    def __init__(self, name: str = CLIP, device: str = "cpu") -> None:
        import transformers

        # transformers 5 has two; the one here needs no torchvision, as the only one of transformers 4
        processor: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        if Path(name).is_file():
            raise FileError(f"the CLIP model {name!r} is a file: pass the folder that it lies in, or a Hub id")
        try:
            kind = transformers.AutoConfig.from_pretrained(name).model_type
            found: Any = transformers.CLIPModel.from_pretrained(name, use_safetensors=True, output_loading_info=True)
            model, loaded = found
            self.tokenizer = transformers.CLIPTokenizer.from_pretrained(name)
            self.processor = processor.from_pretrained(name)
        except Exception as error:  # transformers and the Hub's client each raise kinds of their own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise FileError(
                f"the CLIP model {name!r} could not be opened ({printable(reason, 200)}): pass a folder, or a Hub id "
                f"such as {CLIP!r}"
            ) from error
        lacking = sorted(loaded["missing_keys"]) + [str(key) for key in loaded["mismatched_keys"]]
        if kind != "clip" or lacking:  # transformers makes up at random what a checkpoint lacks
            what = f"a model of type {kind!r}" if kind != "clip" else f"without {printable(', '.join(lacking), 120)}"
            raise FileError(f"{name!r} is no whole CLIP ({what}): pass a folder, or a Hub id such as {CLIP!r}")
        self.model: Any = model.to(device).eval()
        self.name, self.device = name, device
        self.digest = weights_digest(self.model.state_dict())
        try:  # an error now, and not after everything is drawn
            self.features(np.zeros((1, 8, 8, 3), np.uint8))
            words = self.text_features(["a cat", "a dog on a boat"])
        except (ValueError, RuntimeError) as error:
            raise FileError(f"the CLIP model {name!r} does not run ({printable(error, 200)}): pass another") from error
        if np.array_equal(words[0], words[1]):
            raise FileError(f"the CLIP model {name!r} reads every sentence alike: its tokenizer's files are missing")

    def __call__(self, images: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float64]:
        """Return CLIP's scaled cosines.

        Args:
            images: RGB images, uint8 [N, H, W, 3].
            texts: Sentences.

        Returns:
            Scaled cosines, [N, sentences].
        """
        scale = float(self.model.logit_scale.detach().double().exp())
        return scale * self.features(images).astype(np.float64) @ self.text_features(texts).astype(np.float64).T

    @torch.no_grad()
    def features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return images as vectors of length 1.

        Args:
            images: RGB images, uint8 [N, H, W, 3]; N may be 0.

        Returns:
            Vectors, [N, D].

        Raises:
            DataError: `images` is anything else.
        """
        check(images)
        found = [np.zeros((0, self.model.config.projection_dim), np.float32)]
        for start in range(0, len(images), _BATCH):
            part = list(images[start : start + _BATCH])
            pixels = self.processor(images=part, input_data_format="channels_last", return_tensors="pt")
            seen = self.model.vision_model(pixel_values=pixels["pixel_values"].to(self.device))
            found.append(_unit(self.model.visual_projection(seen.pooler_output)))
        return np.concatenate(found)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return sentences as vectors of length 1.

        Args:
            texts: Sentences; what is longer than CLIP's context is cut off.

        Returns:
            Vectors, [N, D].
        """
        longest = self.model.config.text_config.max_position_embeddings
        found = [np.zeros((0, self.model.config.projection_dim), np.float32)]
        for start in range(0, len(texts), _BATCH):
            part = list(texts[start : start + _BATCH])
            words = self.tokenizer(part, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            read = self.model.text_model(**words.to(self.device))
            found.append(_unit(self.model.text_projection(read.pooler_output)))
        return np.concatenate(found)


def _unit(x: torch.Tensor) -> NDArray[np.float32]:
    x = x.float()
    found = (x / x.norm(dim=-1, keepdim=True)).cpu().numpy()
    if not np.isfinite(found).all():
        raise DataError("CLIP gives vectors of length 0, or that are not finite: its weights are damaged")
    return found


def _best_threshold(own: NDArray[np.float64], others: Sequence[NDArray[np.float64]]) -> float:
    """The threshold with the best balanced accuracy against the worst of `others`; of equals the widest gap's."""
    every = np.unique(np.concatenate([own, *others]))
    cuts = (every[1:] + every[:-1]) / 2
    if not len(cuts):  # all the same
        return float(every[0])
    worst = np.max([(o[:, None] > cuts).mean(0) for o in others], axis=0)
    score = (own[:, None] > cuts).mean(0) - worst
    best = np.flatnonzero(score >= score.max() - 1e-9)
    return float(cuts[best[np.diff(every)[best].argmax()]])


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)
