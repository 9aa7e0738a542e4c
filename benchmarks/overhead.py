"""What erasers cost: a denoiser step plain, with 1, 20 and 200 erasers, and with a hook that runs a whole SAE.

    python benchmarks/overhead.py --sizes canvas sd15 --json overhead.json
    python benchmarks/overhead.py --sizes sd15 sdxl flux --device cuda --dtype bf16 --batches 1 16 --json gpu.json

Denoisers have the published sizes and random weights (the canvas its own). An eraser has a gate of 64 features (on
the canvas of one, as those that are made there) and low-rank corrections of rank 32 of what later blocks read of the
prompt; "eraser" is timed with every gate open, "eraser-shut" with every gate shut; "eraser-shut, image gate shut" has
an image gate, too, that is read and stays shut. "full-sae-hook" is SAeUron's shape:
16 features a dimension, the 32 largest kept, at the gate's site alone: three dense products, as its published code has
them.

Time in hooks is taken around each hook, those of the denoiser itself included, in the step itself: events on a GPU, a
clock on a CPU. `seconds` is the plain
step plus that time, `ratio_to_plain` its ratio to the plain step: the difference of two whole steps would drown in
their noise (`step_seconds` has it all the same). FLUX has 19 double and 38 single blocks, which float32 on a machine of
24 GB does not hold: --flux-blocks 1 1 times one of each, and the plain step is reckoned from them.
"""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from machine import facts
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from neuraleraser.eraser import Eraser, EraserHeader, Gate, Guided, LowRank, Trace
from neuraleraser.eraser.runtime import ErasureRuntime
from neuraleraser.eraser.traces import OneTrace
from neuraleraser.families.canvas import CANVAS, GATE
from neuraleraser.families.opening import open_pipeline
from neuraleraser.fitting.image_gate import LOCAL_SHARE
from neuraleraser.fitting.learnt_features import COUNT, WINDOW
from neuraleraser.sites import (
    EditContext,
    HookedEdits,
    Site,
    candidate_sites,
    cross_attention_sites,
    default_image_site,
    denoiser,
    edit,
    edits_for,
)
from neuraleraser.sites.edit import Edit, FunctionEdit
from neuraleraser.sites.edits import no_state
from neuraleraser.sites.guard import Observer, Unobserved
from neuraleraser.sites.modules import resolve

RANK, BINS = 32, 13
NEVER_REACHED = 1e8
"""Lower bound of a shut gate: evidence is looked at, and stays below."""
EXPANSION, KEPT = 16, 32  # of SAeUron's SAEs


@dataclass(frozen=True)
class Settings:
    """Measure what erasers cost."""

    sizes: tuple[Literal["tiny", "canvas", "sd15", "sdxl", "flux"], ...] = ("canvas", "sd15")
    """Which denoisers."""
    device: str = "cpu"
    """cpu or cuda."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of weights and activations."""
    batches: tuple[int, ...] = (1,)
    """Images in a step; UNets get two rows an image, as under guidance."""
    erasers: tuple[int, ...] = (1, 20, 200)
    """How many erasers are attached together."""
    repeats: int = 7
    """Timed steps of each kind; the median counts."""
    full_sae: bool = True
    """Time the whole SAE, too."""
    flux_blocks: tuple[int, int] = (19, 38)
    """Double and single blocks of FLUX that are built; with fewer, the plain step is reckoned from them."""
    json: Path | None = None
    """Where the figures go."""


@dataclass
class Bench:
    """A denoiser, how to call it, where erasers look and act, and what its plain step must be multiplied with."""

    pipe: Any
    run: Callable[[], Any]
    gate: Site
    edits: tuple[Site, ...]
    image_gate: Site
    text: tuple[int, int]
    """Tokens of a prompt, and how wide they are."""
    factor: float = 1.0
    features: int = 64


def build(size: str, batch: int, s: Settings) -> Bench:
    device, dtype = (
        torch.device(s.device),
        {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[s.dtype],
    )
    torch.manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    if size == "flux":
        return _flux(batch, s, device, dtype, random)
    more: dict[str, Any] = {}
    if size == "canvas":
        unet = open_pipeline("canvas").unet
    else:
        unet = _made(lambda: _unet(size), device, dtype)
    unet = unet.to(device, dtype).eval()
    side, width, rows = unet.config.sample_size, unet.config.cross_attention_dim, 2 * batch
    if size == "sdxl":
        more = {"added_cond_kwargs": {"text_embeds": random(rows, 1280), "time_ids": random(rows, 6)}}
    words = 32 if size == "canvas" else 77
    state, text, t = random(rows, unet.config.in_channels, side, side), random(rows, words, width), torch.tensor(500)
    pipe = _pipe(unet=unet)
    at = {"sd15": "up_blocks.1.attentions.1", "sdxl": "up_blocks.0.attentions.1"}.get(size)
    gate = GATE if size == "canvas" else Site(f"unet.{at}") if at else cross_attention_sites(pipe)[0]
    run = lambda: unet(state, t, text, return_dict=False, **more)  # noqa: E731
    image_gate = CANVAS.image_site if size == "canvas" else default_image_site(pipe)
    assert image_gate is not None
    edits = edits_for(pipe, gate)
    return Bench(pipe, run, gate, edits, image_gate, (words, width), features=1 if size == "canvas" else 64)


def _unet(size: str) -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    if size == "tiny":
        blocks: Any = {"down_block_types": ("CrossAttnDownBlock2D",) * 2, "up_block_types": ("CrossAttnUpBlock2D",) * 2}
        return UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=16, **blocks
        )  # type: ignore[arg-type]
    if size == "sd15":
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),  # type: ignore[arg-type]
        attention_head_dim=(5, 10, 20),  # type: ignore[arg-type]
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )


def _flux(batch: int, s: Settings, device: torch.device, dtype: torch.dtype, random: Callable[..., Tensor]) -> Bench:
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    double, single = s.flux_blocks
    model = _made(
        lambda: FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True), device, dtype
    ).eval()
    ids = torch.zeros(64 * 64, 3, device=device)  # 1024 x 1024 pixels
    call = {
        "hidden_states": random(batch, 64 * 64, 64),
        "encoder_hidden_states": random(batch, 512, 4096),
        "pooled_projections": random(batch, 768),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "guidance": torch.full((batch,), 3.5, device=device),
        "img_ids": ids,
        "txt_ids": torch.zeros(512, 3, device=device),
    }
    pipe = _pipe(transformer=model)
    sites = candidate_sites(pipe)
    gate = sites[double - 1]  # the last of the double blocks, as in sdxl-unbox
    # Blocks are nearly all of a step, and a token meets as much arithmetic in a single block as in a double one.
    factor = (19 + 38) / (double + single)
    run, edits = lambda: model(**call, return_dict=False), edits_for(pipe, gate)
    return Bench(pipe, run, gate, edits, default_image_site(pipe), (512, 4096), factor)


def _made(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """A model made on its device in its dtype, never twice in memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return make()
    finally:
        torch.set_default_dtype(before)


def _pipe(**parts: nn.Module) -> Any:
    """A pipeline that holds a denoiser and nothing else."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    class Bare(DiffusionPipeline):
        def __init__(self, unet: Any = None, transformer: Any = None) -> None:
            super().__init__()
            self.register_modules(**parts)

        @property
        def components(self) -> dict[str, Any]:
            return parts

    return Bare(**parts)


def widths(bench: Bench, *more: Site) -> dict[Site, tuple[int, int]]:
    """(positions, width) of the gate's site, of the first that is edited, and of `more`."""
    seen: dict[Site, tuple[int, int]] = {}

    def note(site: Site) -> Callable[[Tensor, EditContext[None]], None]:
        return lambda x, call: seen.update({site: (x.shape[1], x.shape[2])})

    with torch.no_grad(), edit(bench.pipe, {site: note(site) for site in {bench.gate, bench.edits[0], *more}}):
        bench.run()
    return seen


def make_eraser(bench: Bench, shapes: dict[Site, tuple[int, int]], seed: int, shut: bool) -> Eraser:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    d, f = shapes[bench.gate][1], bench.features
    scale = 1.0 if bench.gate.path.startswith("transformer.") else 1000.0
    times = torch.linspace(0, scale, BINS)
    low = torch.full((BINS,), NEVER_REACHED) if shut else torch.zeros(BINS)
    gate = Gate(
        bench.gate, torch.arange(f), random(f, d), torch.zeros(f), torch.zeros(f), torch.ones(f), 1.0,
        times, low, 2 * low + 1e-3, holds=True,
    )  # fmt: skip
    site, *also = bench.edits
    w = shapes[site][1]
    down, up, bias = random(1, w, RANK) / w**0.5, 1e-4 * random(1, RANK, w), 1e-4 * random(1, w)
    correction = LowRank(site, times[:1], down, up, bias, tuple(also))
    return Eraser(gate, (correction,), EraserHeader(str(seed)))


def with_image_gate(
    eraser: Eraser,
    bench: Bench,
    site: Site,
    width: int,
    *,
    low: float,
    share: float = LOCAL_SHARE,
    window: int = WINDOW,
) -> Eraser:
    """The eraser with an image gate whose lower bound is `low`, and a guided correction."""
    rows, times = torch.randn(COUNT, width * window**2), eraser.gate.times
    bound = torch.full((len(times),), low)
    gate = Gate(
        site, torch.arange(COUNT), rows, torch.zeros(COUNT), torch.zeros(COUNT), torch.ones(COUNT),
        share, times, bound, 2 * bound + 1e-3, picture=True, window=window,
    )  # fmt: skip
    without, shown = ({"encoder_hidden_states": words} for words in torch.randn(2, 1, *bench.text))
    return replace(eraser, image_gate=gate, guided=Guided(1e-3, without, shown))


class FullSAE:
    """SAeUron's hook: encode every position by every feature, keep the largest, decode them as they are and scaled."""

    def __init__(self, d: int, device: torch.device, dtype: torch.dtype) -> None:
        n = EXPANSION * d
        self.w_enc = torch.randn(n, d, device=device, dtype=dtype) / d**0.5
        self.w_dec = self.w_enc.clone()
        self.b_enc, self.b_dec = (torch.zeros(k, device=device, dtype=dtype) for k in (n, d))
        self.factor = torch.ones(n, device=device, dtype=dtype)
        self.factor[:16] = -5

    def __call__(self, x: Tensor, context: EditContext[None]) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        pre = torch.relu(nn.functional.linear(flat - self.b_dec, self.w_enc, self.b_enc))
        top = pre.topk(KEPT, -1)
        z = torch.zeros_like(pre).scatter_(-1, top.indices, top.values)
        return (z * self.factor @ self.w_dec - z @ self.w_dec).view_as(x)


class Clock:
    """Time in the hooks of a step: started before and stopped after those of each module."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.spans: list[tuple[Any, Any]] = []
        self.last: Any = None

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, *_: Any) -> None:
        self.last = self.now()

    def stop(self, *_: Any) -> None:
        self.spans.append((self.last, self.now()))

    def seconds(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        spans, self.spans = self.spans, []
        return sum(a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in spans)


@contextmanager
def hooked(
    bench: Bench,
    edits: Mapping[Site, Edit[Any]],
    observer: Observer[Any, Any],
    start: Callable[..., None],
    stop: Callable[..., None],
) -> Iterator[None]:
    """Context manager: edits are attached, `start` runs before and `stop` after their hooks of each module."""

    def hang(what: Callable[..., None]) -> list[Any]:
        root = denoiser(bench.pipe)
        modules = [(resolve(bench.pipe, site), site.tap) for site in edits]
        return [
            root.register_forward_pre_hook(what),
            root.register_forward_hook(what),
            *(
                m.register_forward_pre_hook(what) if tap == "input" else m.register_forward_hook(what)
                for m, tap in modules
            ),
        ]

    handles = hang(start)
    hooks = HookedEdits(bench.pipe, edits, observer)
    handles += hang(stop)
    try:
        yield
    finally:
        hooks.close()
        for handle in handles:
            handle.remove()


@torch.no_grad()
def step(bench: Bench, device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started = time.perf_counter()
    bench.run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(size: str, batch: int, s: Settings) -> list[dict[str, Any]]:
    bench = build(size, batch, s)
    device = torch.device(s.device)
    shapes = widths(bench, bench.image_gate)
    positions, d = shapes[bench.gate]
    rows = batch * (1 if size == "flux" else 2)
    dtype = next(iter(bench.pipe.components.values())).dtype
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        bench.run()
    plain_flops = counter.get_total_flops() * bench.factor
    plain = statistics.median(step(bench, s.device) for _ in range(s.repeats)) * bench.factor
    shared = {"size": size, "batch": batch, "dtype": s.dtype, **facts()}
    out = [shared | {"name": "plain", "erasers": 0, "ratio_to_plain": 1.0, "seconds": plain, "flops": plain_flops}]

    def add(
        name: str, count: int, edits: dict[Site, Edit[Any]], observer: Observer[Any, Any], flops: float, size_: int,
        file: int | None,
    ) -> None:  # fmt: skip
        clock = Clock(s.device)
        with hooked(bench, edits, observer, clock.start, clock.stop):
            step(bench, s.device)
            clock.seconds()
            whole, inside = [], []
            for _ in range(s.repeats):
                whole.append(step(bench, s.device))
                inside.append(clock.seconds())
        hook = statistics.median(inside)
        row = {
            "name": name, "erasers": count, "ratio_to_plain": (plain + hook) / plain, "seconds": plain + hook,
            "hook_seconds": hook, "step_seconds": statistics.median(whole), "flops": flops,
            "flops_share": flops / plain_flops, "bytes": size_, "file_bytes": file,
        }  # fmt: skip
        out.append(shared | row)
        print(json.dumps(out[-1]), flush=True)

    print(json.dumps(out[0]), flush=True)
    for count in s.erasers:
        for shut in (False, True):
            erasers = [make_eraser(bench, shapes, seed, shut) for seed in range(count)]
            traces, actions = OneTrace(Trace(erasers)), ["erase"] * count
            runtime = ErasureRuntime(erasers, torch.ones(count, 1), device, traces, actions)
            flops = 2.0 * rows * positions * d * bench.features * count
            if not shut:
                tokens, width = shapes[bench.edits[0]]
                flops += 4.0 * rows * tokens * width * RANK * count
            tensors = [t for e in erasers for t in _tensors(e)]
            file = None
            if count == 1:
                with tempfile.TemporaryDirectory() as folder:
                    erasers[0].save(Path(folder) / "e.safetensors")
                    file = (Path(folder) / "e.safetensors").stat().st_size
            bytes_ = sum(t.numel() * t.element_size() for t in tensors)
            add("eraser-shut" if shut else "eraser", count, dict(runtime.edits), runtime, flops, bytes_, file)
            del runtime, erasers, tensors
            gc.collect()
    site = bench.image_gate
    where, wide = shapes[site]
    window = 1 if size == "flux" else WINDOW  # FLUX's latents are a sequence, of no known grid
    made = make_eraser(bench, shapes, 0, shut=True)
    eraser = with_image_gate(made, bench, site, wide, low=NEVER_REACHED, window=window)
    runtime = ErasureRuntime([eraser], torch.ones(1, 1), device, OneTrace(Trace([eraser])), ["erase"])
    flops = 2.0 * rows * (positions * d * bench.features + where * wide * COUNT * window**2)
    bytes_ = sum(t.numel() * t.element_size() for t in _tensors(eraser))
    add("eraser-shut, image gate shut", 1, dict(runtime.edits), runtime, flops, bytes_, None)
    if s.full_sae:
        sae = FullSAE(d, device, dtype)
        flops = 3 * 2.0 * rows * positions * d * EXPANSION * d
        bytes_ = 2 * sae.w_enc.numel() * sae.w_enc.element_size()
        add("full-sae-hook", 1, {bench.gate: FunctionEdit(sae)}, Unobserved(no_state), flops, bytes_, None)
    return out


def _tensors(e: Eraser) -> list[Tensor]:
    gates = [part.gate for part in e.parts]
    return [t for part in (*gates, *e.corrections) for t in part.tensors().values()]


def main(s: Settings) -> None:
    rows: list[dict[str, Any]] = []
    for size in s.sizes:
        for batch in s.batches:
            rows += measure(size, batch, s)
            gc.collect()
    if s.json:
        s.json.parent.mkdir(parents=True, exist_ok=True)
        s.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("size", "batch", "name", "erasers", "ratio", "in hooks, ms", "of the step's arithmetic")
    lines: list[tuple[str, ...]] = [head]
    for r in rows:
        hook = f"{1000 * r['hook_seconds']:.3f}" if "hook_seconds" in r else f"(step {1000 * r['seconds']:.1f})"
        share = f"{r.get('flops_share', 1):.2%}"
        lines.append(
            (r["size"], str(r["batch"]), r["name"], str(r["erasers"]), f"{r['ratio_to_plain']:.4f}", hook, share)
        )
    wide = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, wide, strict=True)) for line in lines)


if __name__ == "__main__":
    main(tyro.cli(Settings))
