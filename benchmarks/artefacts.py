"""Does the artefact distance see the damage that erasers do when they go wrong?

    python benchmarks/artefacts.py [--pipeline canvas] [--out benchmarks/results/artefacts.json]

The share of images that the second judge flags, of one image for each style and some objects:

- base: as the pipeline draws them;
- sign-flipped: the output of every text-conditioned block plus 2 (x_hat - x), where x_hat is an SAE's
  reconstruction: its error added with the wrong sign, as one published system does. At a good SAE that error is
  small, so it is measured at several sizes of SAE, with how much of the variance each explains;
- edit x 30: a fitted eraser whose corrections are thirty times too strong, on prompts that show its concept.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro
from machine import facts
from torch import Tensor

from neuraleraser.activations import activation_matrix
from neuraleraser.canvas import words
from neuraleraser.canvas.canvas_judge import CanvasJudge
from neuraleraser.canvas.words import VOCABULARY
from neuraleraser.concepts import canvas_concept
from neuraleraser.eraser import Correction, Eraser, attach
from neuraleraser.families.opening import open_pipeline
from neuraleraser.fitting import fit
from neuraleraser.sae import SAE, TrainSettings, measure_sae, pool_batches, train
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import EditContext, Site, candidate_sites, edit
from neuraleraser.vocabulary import labelled_prompts


@dataclass(frozen=True)
class Settings:
    """Measure the artefact distance."""

    pipeline: str = "canvas"
    """The pipeline to draw with."""
    out: Path = Path("benchmarks/results/artefacts.json")
    """Where the figures go."""
    images: int = 80
    """Images of each kind."""
    concept: str = "Cartoon"
    """A development style, whose eraser is made thirty times too strong."""


def flipped(sae: SAE) -> Callable[[Tensor, EditContext[None]], Tensor]:
    """The edit that adds the SAE's error with the wrong sign."""

    def add(x: Tensor, context: EditContext[None]) -> Tensor:
        return (2 * (sae(x.float()) - x.float())).to(x)

    return add


def stronger(eraser: Eraser, factor: float) -> Eraser:
    """The eraser with its corrections' outputs times `factor`."""

    def scaled(c: Correction) -> Correction:
        larger = {name: v * factor if name in ("up", "bias") else v for name, v in c.tensors().items()}
        return type(c).from_tensors(c.site, larger, c.also)

    return replace(eraser, corrections=tuple(map(scaled, eraser.corrections)))


def main(s: Settings) -> None:
    pipe, judge, sampling = open_pipeline(s.pipeline), CanvasJudge.load("second"), Sampling(batch_size=40)
    cells = [(words.OBJECTS[(7 * i) % 20], words.STYLES[i % 25]) for i in range(s.images)]
    prompts, seeds = (
        [words.VOCABULARY.prompt([o], st, i % 2) for i, (o, st) in enumerate(cells)],
        range(600, 600 + s.images),
    )
    rows = []

    def tell(name: str, images: Images, **more: float) -> None:
        share = float((np.asarray(judge(images).artefact) > judge.artefact_threshold).mean())
        rows.append({"name": name, "flagged": share, "n": len(images), **more})
        print(rows[-1], flush=True)

    tell("base", generate(pipe, prompts, seeds, sampling))
    sites = candidate_sites(pipe)
    vectors = activation_matrix(
        pipe, [p for p, _ in labelled_prompts(VOCABULARY, 60, 1)], range(700, 760), sites, 1600, sampling
    )
    for steps in (20, 100, 400):
        saes: dict[Site, SAE] = {}
        for site, x in vectors.items():
            saes[site] = train(pool_batches(x, 4096), TrainSettings(n_features=512, k=12, steps=steps))
        explained = [measure_sae(sae, vectors[site][:20_000])["explained_variance"] for site, sae in saes.items()]
        with edit(pipe, {site: flipped(sae) for site, sae in saes.items()}):
            images = generate(pipe, prompts, seeds, sampling)
        tell("sign-flipped", images, explained_variance=sum(explained) / len(explained))
    eraser = stronger(fit(pipe, canvas_concept(s.concept)), 30)
    prompts = [words.VOCABULARY.prompt([words.OBJECTS[i % 20]], s.concept, i % 2) for i in range(s.images)]
    with attach(pipe, eraser):
        tell("edit x 30", generate(pipe, prompts, seeds, sampling))
    s.out.parent.mkdir(parents=True, exist_ok=True)
    s.out.write_text(json.dumps({"rows": rows, **facts()}, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings))
