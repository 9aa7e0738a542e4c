"""What the picture's part of an eraser costs: a denoiser step with image gates shut and open, and the first look.

    OMP_NUM_THREADS=1 python benchmarks/overhead_picture.py --sizes canvas sd15 --json overhead_picture.json

Erasers are those of `overhead.py`, with an image gate (64 features of 3 x 3 windows at `default_image_site`) and a
guided correction; prompt gates are shut. A step is one forward under guidance, two rows an image.

Rows of the results:

- "prompt shut": an eraser of prompts alone. "style shut", "object shut": both gates are read, and stay shut; an
  object's features are pooled over few positions. "shut by bounds": the image gate's bounds at this timestep cannot be
  reached (`SHUT_BOUND`), so that it need not be read. Time is taken around the hooks, and the ratio is that of a step
  to its rest without them: the difference of two steps would drown in noise.
- "open": the image gate of an object is open for all images; whole steps with and without the eraser, in turn.
- "first look": the same of the first step of a call with a start image, gates shut; `share_of_call` is what it adds to
  a call at strength 0.5 with the default number of steps.

Seconds are of the wall and of the processor. On a machine with other work to do the second is the one to trust, and
ratios are made of it; `load` is the machine's load average (jobs that run or wait) at that time.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import overhead
import torch
import tyro
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from machine import facts
from overhead import NEVER_REACHED, Bench, hooked, make_eraser, widths, with_image_gate
from torch import Tensor

from neuraleraser.eraser import Eraser, Trace
from neuraleraser.eraser.gate import SHUT_BOUND
from neuraleraser.eraser.runtime import ErasureCall, ErasureRuntime
from neuraleraser.eraser.traces import OneTrace
from neuraleraser.fitting.image_gate import LOCAL_SHARE, SHARE_OF_KIND
from neuraleraser.sites import Call, HookedEdits

STEPS = {"canvas": 25, "sd15": 50}
"""Default number of steps of a call."""
STRENGTH = 0.5


@dataclass(frozen=True)
class Settings:
    """Measure what the picture's part of an eraser costs."""

    sizes: tuple[Literal["canvas", "sd15"], ...] = ("canvas", "sd15")
    """Which denoisers."""
    batches: tuple[int, ...] = (1,)
    """Images in a step."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations."""
    repeats: int = 100
    """Timed steps of each kind; medians count."""
    json: Path | None = None
    """Where the figures go."""


class Loop(DiffusionPipeline):
    """A pipeline whose call is one step, so that erasers know the rows."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(
        self, latents: Tensor, prompt_embeds: Tensor, negative_prompt_embeds: Tensor, guidance_scale: float = 3.0
    ) -> Tensor:
        return self.unet(torch.cat([latents] * 2), torch.tensor(500), prompt_embeds, return_dict=False)[0]


class StartImages(ErasureRuntime):
    """A runtime whose calls start from images."""

    def on_call_start(self, call: Call) -> ErasureCall:
        config = call.pipeline.unet.config
        latents = torch.randn(call.images, config.in_channels, config.sample_size, config.sample_size)
        return super().on_call_start(replace(call, strength=STRENGTH, start=latents))


Seconds = tuple[float, float]
"""Of the wall, and of the processor."""


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(then: Seconds) -> Seconds:
    wall, processor = now()
    return wall - then[0], processor - then[1]


def medians(found: list[Seconds]) -> dict[str, float]:
    wall, processor = (statistics.median(column) for column in zip(*found, strict=True))
    return {"wall_seconds": wall, "processor_seconds": processor}


class Spans:
    """Time in the hooks of a step."""

    def __init__(self) -> None:
        self.found: list[Seconds] = []
        self.last = now()

    def start(self, *_: Any) -> None:
        self.last = now()

    def stop(self, *_: Any) -> None:
        self.found.append(since(self.last))

    def take(self) -> Seconds:
        found, self.found = self.found, []
        return sum(wall for wall, _ in found), sum(processor for _, processor in found)


@torch.no_grad()
def timed(run: Callable[[], Any]) -> Seconds:
    started = now()
    run()
    return since(started)


def build(size: str, batch: int, s: Settings) -> Bench:
    """Return the denoiser in a loop of one step."""
    plain = overhead.build(size, batch, overhead.Settings(dtype=s.dtype))
    unet = plain.pipe.components["unet"]
    pipe, dtype = Loop(unet, DDIMScheduler()), unet.dtype
    pipe.scheduler.set_timesteps(STEPS[size])
    side, channels = unet.config.sample_size, unet.config.in_channels
    latents = torch.randn(batch, channels, side, side, dtype=dtype)
    text = torch.randn(2 * batch, *plain.text, dtype=dtype)
    negative = text[:batch].clone()
    run = lambda: pipe(latents.clone(), text, negative)  # noqa: E731  # each a step of its own
    return replace(plain, pipe=pipe, run=run)


def runtime_of(eraser: Eraser, kind: type[ErasureRuntime] = ErasureRuntime) -> ErasureRuntime:
    return kind([eraser], torch.ones(1, 1), torch.device("cpu"), OneTrace(Trace([eraser])), ["erase"])


def in_hooks(bench: Bench, eraser: Eraser, repeats: int) -> dict[str, Any]:
    """Time the hooks of a step."""
    spans, runtime = Spans(), runtime_of(eraser)
    with hooked(bench, runtime.edits, runtime, spans.start, spans.stop):
        timed(bench.run)  # the first looks at widths, too
        spans.take()
        whole, inside = [], []
        for _ in range(repeats):
            whole.append(timed(bench.run))
            inside.append(spans.take())
    ratio = statistics.median(w[1] / (w[1] - i[1]) for w, i in zip(whole, inside, strict=True))
    return {"ratio_to_plain": ratio, **{f"hook_{k}": v for k, v in medians(inside).items()}}


def in_turn(bench: Bench, runtime: ErasureRuntime, repeats: int, first: bool = False) -> dict[str, Any]:
    """Time whole steps with and without the eraser: the second of a call each, or the first."""
    plain, own = [], []
    for _ in range(repeats):
        plain.append(timed(bench.run))
        with closing(HookedEdits(bench.pipe, runtime.edits, runtime)):
            if not first:
                timed(bench.run)
            own.append(timed(bench.run))
    ratios = [[b[k] / a[k] for a, b in zip(plain, own, strict=True)] for k in (0, 1)]
    wall, processor = (statistics.median(r) for r in ratios)
    return {"ratio_to_plain": processor, "wall_ratio_to_plain": wall, **medians(own)}


def measure(size: str, batch: int, s: Settings) -> list[dict[str, Any]]:
    bench = build(size, batch, s)
    site = bench.image_gate
    shapes = widths(bench, site)
    eraser = make_eraser(bench, shapes, 0, shut=True)

    def with_picture(low: float, share: float = LOCAL_SHARE) -> Eraser:
        return with_image_gate(eraser, bench, site, shapes[site][1], low=low, share=share)

    shared = {"size": size, "batch": batch, "dtype": s.dtype, "site": str(site), "repeats": s.repeats, **facts()}
    rows: list[dict[str, Any]] = []

    def add(name: str, found: dict[str, Any]) -> None:
        rows.append(shared | {"load": round(os.getloadavg()[0], 2), "name": name} | found)
        print(json.dumps(rows[-1]), flush=True)

    add("plain", {"ratio_to_plain": 1.0, **medians([timed(bench.run) for _ in range(s.repeats)])})
    add("prompt shut", in_hooks(bench, eraser, s.repeats))
    add("style shut", in_hooks(bench, with_picture(NEVER_REACHED, SHARE_OF_KIND["style"]), s.repeats))
    add("object shut", in_hooks(bench, with_picture(NEVER_REACHED), s.repeats))
    add("shut by bounds", in_hooks(bench, with_picture(SHUT_BOUND), s.repeats))
    add("open", in_turn(bench, runtime_of(with_picture(0.0)), s.repeats))
    look = in_turn(bench, runtime_of(with_picture(NEVER_REACHED), StartImages), s.repeats, first=True)
    add("first look", look | {"share_of_call": (look["ratio_to_plain"] - 1) / int(STRENGTH * STEPS[size])})
    return rows


def main(s: Settings) -> None:
    rows: list[dict[str, Any]] = []
    for size in s.sizes:
        for batch in s.batches:
            rows += measure(size, batch, s)
            gc.collect()
    if s.json:
        s.json.parent.mkdir(parents=True, exist_ok=True)
        s.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings))
