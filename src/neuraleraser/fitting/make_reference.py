"""A reference for a pipeline that has none: learnt from its own images of a concept and of what resembles it.

The concept and its neighbours each get a feature of their own, set in closed form (`sae.supervised.discriminants`), so
that the gate is one feature; the others are learnt around them.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neuraleraser.activations import activation_stream, stream_data, write_shards
from neuraleraser.concepts import Concept
from neuraleraser.eraser import Provenance, check_nothing_acts
from neuraleraser.errors import ConceptError, SettingsError
from neuraleraser.families.defaults import default_sampling, model_name
from neuraleraser.fitting.import_reference import shapes_of
from neuraleraser.fitting.reference import Reference, reference_from_sae
from neuraleraser.sae import Run, TrainSettings, measure_sae, train_together
from neuraleraser.sae.train_settings import StepLog
from neuraleraser.sampling import generate
from neuraleraser.settings import STREAM_SEEDS, Sampling, StreamSettings
from neuraleraser.sites import Site, edits_for

VECTORS_PER_IMAGE = 1024
"""Activation vectors kept of an image, at most."""
VECTORS_PER_MAP = 16
"""Vectors of one image and step that stay together, as they share their labels, at most."""
TRAINING_STEPS = 400
"""Training steps of up to 4,096 vectors: the features that detect are there before the first."""
ACTIVE_FEATURES = 16
"""Features that fire for a vector, on average."""


@dataclass(frozen=True)
class CostEstimate:
    """Cost of a reference: seconds of drawing, and bytes of activations on disk until it is made."""

    seconds: float
    bytes: int


def estimate_cost(pipe: Any, site: Site, num_images: int, sampling: Sampling) -> CostEstimate:
    """Return what `make_reference` will take, from a few steps that are drawn and timed."""
    shape = shapes_of(pipe, [site], sampling)[site]  # warms up, too
    took = []
    for steps in (1, 3):
        started = time.monotonic()
        prompts = ["a picture"] * sampling.batch_size
        one = Sampling(steps, sampling.guidance_scale, sampling.batch_size, sampling.height, sampling.width)
        generate(pipe, prompts, range(sampling.batch_size), one)
        took.append(time.monotonic() - started)
    step = max(0.0, took[1] - took[0]) / 2
    batches = -(-num_images // sampling.batch_size) + -(-max(1, num_images // 2) // sampling.batch_size)
    return CostEstimate(
        batches * (took[0] + (sampling.num_inference_steps - 1) * step),
        num_images * _kept(shape, sampling)[0] * shape[1] * 4,
    )


def _kept(shape: tuple[int, int], sampling: Sampling) -> tuple[int, int]:
    """Return how many vectors of an image are kept, and how many stay together, at a site of (positions, width)."""
    together = min(VECTORS_PER_MAP, shape[0])
    return min(VECTORS_PER_IMAGE // together, shape[0] // together * sampling.num_inference_steps) * together, together


def own_prompts(
    concept: Concept, neighbours: Sequence[Concept], count: int, seed: int
) -> list[tuple[str, tuple[str, ...]]]:
    """`count` prompts with the names of what they show: of five, two show the concept, two a neighbour (by turns), one
    neither. Where all are objects, one in two of those that show one shows a second beside it: a feature has to tell
    two objects of one picture apart."""
    rng = random.Random(seed)
    out: list[tuple[str, tuple[str, ...]]] = []
    turn = 0
    for i in range(count):
        if i % 5 == 4 or (i % 5 > 1 and not neighbours):
            out.append((rng.choice(concept.pairs).negative, ()))
            continue
        other = neighbours[turn % len(neighbours)] if neighbours else concept
        shown, beside = (concept, other) if i % 5 < 2 else (other, concept)
        turn += i % 5 > 1
        prompt, names = rng.choice(shown.pairs).positive, (shown.name,)
        objects = shown is not beside and shown.kind == beside.kind == "object"
        if objects and shown.name in prompt and rng.random() < 0.5:
            if shown is not concept:
                beside = rng.choice([n for n in (concept, *neighbours) if n is not shown])
            pair = rng.sample([shown.name, beside.name], 2)
            prompt, names = prompt.replace(shown.name, " and ".join(pair), 1), (shown.name, beside.name)
        out.append((prompt, names))
    return out


def make_reference(
    pipe: Any,
    concept: Concept,
    neighbours: Sequence[Concept],
    site: Site,
    folder: Path,
    *,
    num_images: int = 160,
    sampling: Sampling | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Reference:
    """Make a reference of `pipe` at `site`, with one feature for `concept` and one for each neighbour.

    A reference that is in the folder already is opened. If it is interrupted, the same call goes on.

    Args:
        pipe: The diffusers pipeline; it is not changed.
        concept: The concept to erase.
        neighbours: Concepts that it could be mistaken for.
        site: The site whose activations the reference's SAE reads.
        folder: Folder into which it is written.
        num_images: Images to learn from; half as many more show how the features fire.
        sampling: How images are generated; None: as `default_sampling` says.
        progress: Called as `progress(what, share)` as the work goes on.

    Returns:
        The reference.

    Raises:
        SiteError: The pipeline does not have the site.
        ConceptError: A name is given twice.
        SettingsError: An eraser acts on the pipeline, or the folder holds another reference, of other names or another
            site, finished or not.

    Examples:
        >>> cat, dog = Concept.from_phrase("a cat"), Concept.from_phrase("a dog")
        >>> known = make_reference(pipe, cat, [dog], site, Path("cats"), num_images=4, sampling=quick)
        >>> known.sae.header["labels"]
        ['a cat', 'a dog']
    """
    check_nothing_acts(pipe, "a reference")
    s, tell = sampling or default_sampling(pipe), progress or (lambda what, share: None)
    names = [concept.name, *(n.name for n in neighbours)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConceptError(f"{', '.join(sorted(twice))} is named twice: neighbours must differ, and not be the concept")
    if (folder / "background.safetensors").exists():
        known = Reference.load(folder)
        if known.site != site or known.sae.header.get("labels") != names:
            of = ", ".join(known.sae.header.get("labels") or ["no labels"])
            raise SettingsError(f"{folder} holds a reference of {of} at {known.site}: pass those, or delete it")
        return known
    edits_for(pipe, site)  # raises where no eraser could edit
    shape = shapes_of(pipe, [site], s)[site]
    per_image, together = _kept(shape, s)
    shown = own_prompts(concept, neighbours, num_images, 1)
    labels = torch.tensor([[name in of for name in names] for _, of in shown], dtype=torch.uint8)
    texts = [prompt for prompt, _ in shown]
    stream = StreamSettings(together, per_image, num_images, buffer_chunks=16, group_size=together, reuse=1, sampling=s)
    data = stream_data(model_name(pipe), texts, stream) | {"site": str(site), "labels": names}
    count = -(-num_images // s.batch_size)
    pool = activation_stream(pipe, texts, [site], stream, labels)
    shards = write_shards(
        pool, folder / "activations", count, data, lambda k: tell("drawing to learn from", 0.6 * (k + 1) / count)
    )
    n = max(2 * shape[1], len(names))
    settings = TrainSettings(
        n_features=n,
        k=min(ACTIVE_FEATURES, n),
        steps=TRAINING_STEPS,
        fisher_features=True,
        init_vectors=2**17,
        log_every=10,
    )
    run = Run(settings, str(site), folder / "training.safetensors", data)

    def on_step(_: str, log: StepLog) -> None:
        tell("learning features", 0.6 + 0.1 * log.step / TRAINING_STEPS)

    sae = train_together(shards.batches(min(4096 // together, shards.rows) * together), {"sae": run}, on_step)["sae"]
    sae.header["labels"] = names
    x = shards.load(0)[str(site)][0].flatten(0, 1).float()
    sae.header["measures"] = measure_sae(sae, x)
    tell("seeing how they fire", 0.7)
    seen = own_prompts(concept, neighbours, max(1, num_images // 2), 2)
    background = [(prompt, frozenset(of)) for prompt, of in seen]
    learnt_from = Provenance(((STREAM_SEEDS[0], STREAM_SEEDS[-1]),), tuple(dict.fromkeys(texts)), labels=tuple(names))
    known = reference_from_sae(pipe, sae, site, background, s, learnt_from=learnt_from)
    known.save(folder)
    shutil.rmtree(folder / "activations")
    (folder / "training.safetensors").unlink(missing_ok=True)
    tell("done", 1.0)
    return known
