"""Run by `test_kills.py` as a process of its own: does a job in a child, to FOLDER/whole, and again in children of
which all but the last get SIGKILL, to FOLDER/killed.

    python -m helpers.killed (train | collect | evaluate) FOLDER KILLS SEED

A child reports each chunk drawn, step done and batch judged by a byte; it is killed a random number of bytes and a
random time later. The parent computes nothing itself, so that its children may start where it is.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from helpers import pipelines
from helpers.canvas_cells import canvas_protocol
from neuraleraser.activations import activation_stream, stream_data, write_shards
from neuraleraser.evaluation.evaluate import evaluate as measure
from neuraleraser.judges import Judgement
from neuraleraser.methods import DoNothing, StringFilter
from neuraleraser.sae import Run, TrainingLog, TrainSettings, train_together
from neuraleraser.settings import EvaluateSettings, Sampling, StreamSettings
from neuraleraser.sites import Site

SITES = [Site("unet.mid_block.attentions.0"), Site("unet.up_blocks.1.attentions.0", "update")]
PROMPTS = ["a b", "c", "d e f"]


def train(folder: Path, tick: Callable[[], None]) -> None:
    """Two SAEs while a thread draws, to the files 0 and 1."""
    pool = stream(
        tick,
        StreamSettings(
            16, 8, buffer_chunks=2, reuse=2, stream_seed=1, sampling=Sampling(num_inference_steps=1, batch_size=2)
        ),
    )
    settings = TrainSettings(
        n_features=24, k=2, steps=30, init_vectors=32, dead_after=64, bf16=False, log_every=1, checkpoint_every=1
    )
    runs = {str(i): Run(settings, str(site), folder / f"{i}.training") for i, site in enumerate(SITES)}
    logs = {name: TrainingLog(folder / f"{name}.jsonl") for name in runs}

    def on_step(name: str, log: Any) -> None:
        logs[name](log)
        tick()

    for name, sae in train_together(pool, runs, on_step).items():
        sae.save(folder / name)


def collect(folder: Path, tick: Callable[[], None]) -> None:
    """Sixty shards."""
    settings = StreamSettings(
        1, 8, num_images=120, buffer_chunks=3, reuse=1, sampling=Sampling(num_inference_steps=1, batch_size=2)
    )
    pool = stream(tick, settings)
    write_shards(pool, folder, 60, stream_data("tiny", PROMPTS, settings), lambda number: tick())


class Judge:
    """Reads an image's first bytes as probabilities."""

    styles, objects, figures = ("Van_Gogh", "Mosaic"), ("Cats", "Dogs"), {}
    thresholds = dict.fromkeys((*styles, *objects), 0.4)
    artefact_threshold = 100.0

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def __call__(self, images: np.ndarray, /) -> Judgement:
        self.tick()
        seen = (images.reshape(len(images), -1)[:, :5] / 255).astype(np.float32)
        return Judgement(seen[:, :2], seen[:, 2:4], 255 * seen[:, 4])


def evaluate(folder: Path, tick: Callable[[], None]) -> None:
    """Two methods, some sixty batches."""
    s = EvaluateSettings(
        grid_rounds=4, target_rounds=4, start_image_rounds=1, held_out_grid_rounds=0, fragment_prompts=4,
        unhooked_checks=4, idle_checks=3, sampling=Sampling(num_inference_steps=4, batch_size=1), styles=Judge.styles,
        objects=Judge.objects,
    )  # fmt: skip
    methods = [StringFilter("Van_Gogh", "style", {"as a Van Gogh painting": ""}), DoNothing("Van_Gogh", "style")]
    protocol = canvas_protocol(["Van_Gogh"], s)
    measure(pipelines.stable_diffusion(), methods, s, folder, judge=Judge(tick), protocol=protocol)


def stream(tick: Callable[[], None], settings: StreamSettings) -> Any:
    pool = activation_stream(pipelines.stable_diffusion(), PROMPTS, SITES, settings)
    draw = pool.chunk

    def chunk(number: int, stopped: Any) -> Any:
        tick()
        return draw(number, stopped)

    pool.chunk = chunk
    return pool


def run(job: Callable[..., None], folder: Path, kills: int, seed: int) -> None:
    """The job in children until one of them is done, which the first `kills` are not given the time to be."""
    rng, done = random.Random(seed), 0
    folder.mkdir()
    while True:
        reads, writes = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reads)
            try:
                job(folder, functools.partial(os.write, writes, b"."))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(writes)
        if done < kills:
            for _ in range(rng.randint(1, 12)):
                if not os.read(reads, 1):
                    break
            time.sleep(rng.random() * 0.01)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reads)
        if not os.WIFSIGNALED(status):
            break
        done += 1
    if os.waitstatus_to_exitcode(status) or done != kills:
        sys.exit(f"exit code {os.waitstatus_to_exitcode(status)} after {done} kills of {kills}")


if __name__ == "__main__":
    job, folder = {"train": train, "collect": collect, "evaluate": evaluate}[sys.argv[1]], Path(sys.argv[2])
    run(job, folder / "whole", 0, 0)
    run(job, folder / "killed", int(sys.argv[3]), int(sys.argv[4]))
