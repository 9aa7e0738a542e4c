"""An SAE from scratch, streaming from a running pipeline: how long it takes, and how good it is.

    python benchmarks/sae_streaming.py --json                  # the canvas, at its gate's site, width and steps
    python benchmarks/sae_streaming.py --json --stream.ahead 0 # drawing and training take turns

Figures are of images that no SAE has seen, of other captions and noise; a feature is dead if it fires on none of their
vectors, with thresholds as saved. `--json` prints one object with what was asked, found, and run on.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import tyro
from machine import facts

from neuraleraser.activations import activation_matrix, activation_stream, measure_loss_recovered
from neuraleraser.canvas.words import VOCABULARY
from neuraleraser.families.canvas import GATE
from neuraleraser.families.defaults import default_sampling
from neuraleraser.families.opening import open_pipeline
from neuraleraser.sae import Run, StepLog, TrainSettings, measure_sae, train_together
from neuraleraser.settings import Sampling, StreamSettings
from neuraleraser.sites import Site
from neuraleraser.vocabulary import labelled_prompts

HELD = 1024
"""Vectors of an image that are measured on."""


@dataclass
class Settings:
    """An SAE from scratch, streaming."""

    site: str = str(GATE)
    """Where."""
    n: tuple[int, ...] = (512,)
    """Features; several widths are trained from one pass."""
    k: int = 12
    """Features that fire for a vector."""
    steps: int = 1500
    """Batches to train on."""
    vectors: int = 1_000_000
    """Vectors to measure on."""
    images: int = 40
    """Images of the substitution test."""
    json: bool = False
    """Print one JSON object, and nothing else."""
    stream: StreamSettings = field(default_factory=lambda: StreamSettings(sampling=Sampling(batch_size=40)))
    """How activations are drawn and mixed."""


def main(s: Settings) -> None:
    pipe = open_pipeline("canvas")
    prompts = [p for p, _ in labelled_prompts(VOCABULARY, 4000, 1)]
    site = Site.parse(s.site)
    sampling = s.stream.sampling or default_sampling(pipe)
    pool = activation_stream(pipe, prompts, [site], s.stream)
    draw, drawn, first = pool.chunk, 0, 0.0

    def chunk(number: int, stopped: Any) -> Any:
        nonlocal drawn
        drawn += sampling.batch_size
        return draw(number, stopped)

    def on_step(name: str, log: StepLog) -> None:
        nonlocal first
        first = first or time.monotonic()

    pool.chunk = chunk
    runs = {str(n): Run(TrainSettings(n_features=n, k=s.k, steps=s.steps, log_every=1), s.site) for n in s.n}
    started = time.monotonic()
    saes = train_together(pool, runs, on_step)
    seconds, images = time.monotonic() - started, drawn
    count = -(-s.vectors // HELD)
    held = [p for p, _ in labelled_prompts(VOCABULARY, count, 2)]
    x = activation_matrix(pipe, held, range(300_000, 300_000 + count), [site], HELD, sampling)[site][: s.vectors]
    found = []
    for sae in saes.values():
        texts = [p for p, _ in labelled_prompts(VOCABULARY, s.images, 3)]
        lost = measure_loss_recovered(pipe, sae, site, texts, range(200_000, 200_000 + s.images))
        figures = measure_sae(sae, x)
        found.append(
            {
                "n": sae.n_features,
                **{key: figures[key] for key in ("explained_variance", "l0", "dead_share", "vectors")},
                "kept": {t.time: t.recovered if t.loss_mean > t.loss else None for t in lost.by_timestep},
                "image_difference": lost.difference,
            }
        )
    out = {
        "seconds": seconds,
        "seconds_to_first_step": first - started,
        "images": images,
        "vectors_a_second": s.steps * s.stream.train_batch_size * len(runs) / seconds,
        "saes": found,
        "settings": asdict(s),
        **facts(),
    }
    if s.json:
        print(json.dumps(out))
        return
    print(f"{seconds:.0f} s ({out['seconds_to_first_step']:.0f} s to the first step), {images} images")
    for one in found:
        print(
            f"{one['n']} features: {one['explained_variance']:.2%} of the variance explained, {one['l0']:.1f} fire, "
            f"{one['dead_share']:.2%} dead on {one['vectors']:,} vectors"
        )


if __name__ == "__main__":
    main(tyro.cli(Settings))
