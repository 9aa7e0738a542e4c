"""A CLIP judge for a pipeline, calibrated on the pipeline's own images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from neuraleraser.concepts import Concept, neighbours_of
from neuraleraser.eraser import check_nothing_acts
from neuraleraser.families.defaults import default_sampling
from neuraleraser.judges import CLIP, NO_CONCEPT, Clip, ClipJudge
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling


def calibrate_clip_judge(
    pipe: Any,
    concept: Concept,
    neighbours: Sequence[str | Concept] = (),
    model: str = CLIP,
    num_images: int = 24,
    seed: int = 70_000,
    sampling: Sampling | None = None,
) -> ClipJudge:
    """Return a `ClipJudge` calibrated on the pipeline's own images.

    Images are generated of the concept, of each neighbour, and of the prompts that match the concept's without it.

    Args:
        pipe: The diffusers pipeline, without erasers that act.
        concept: The concept to judge.
        neighbours: Concepts to tell it from, as phrases or concepts; none: all others of its kind in the pipeline's
            vocabulary.
        model: A CLIP checkpoint: a folder or a Hub id.
        num_images: Images per concept.
        seed: First seed; the others follow.
        sampling: How images are generated; None: as `default_sampling` says.

    Returns:
        The judge.

    Raises:
        SettingsError: An eraser acts on the pipeline.
        NeuralEraserError: As for `ClipJudge.calibrate`.

    Examples:
        >>> dog = Concept.from_phrase("a dog")
        >>> judge = calibrate_clip_judge(pipe, Concept.from_phrase("a cat"), [dog], clip, num_images=8, sampling=quick)
        >>> judge.objects
        ('a cat', 'a dog')
    """
    check_nothing_acts(pipe, "calibrating a judge")
    clip = Clip(model, str(pipe.device))  # before anything is generated: one that is not there is an error at once
    prompts = {concept.name: [pair.positive for pair in concept.pairs]}
    prompts |= {
        other.name: [pair.positive for pair in other.pairs]
        for other in neighbours_of(pipe, concept, neighbours)
        if other.name != concept.name
    }
    prompts[NO_CONCEPT] = [pair.negative for pair in concept.pairs]
    sampling = sampling or default_sampling(pipe)
    drawn = {
        name: generate(
            pipe, [texts[i % len(texts)] for i in range(num_images)], range(seed, seed + num_images), sampling
        )
        for name, texts in prompts.items()
    }
    return ClipJudge.calibrate(concept.name, concept.kind, drawn, clip)
