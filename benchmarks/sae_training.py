"""Time of a step of SAE training: ours and every packaged peer on the same stream.

    python benchmarks/sae_training.py [--peers-python ENV/bin/python] [--json FILE] [--cases canvas wide] [--threads 2]

Peers (eai-sparsify, sae-lens, dictionary-learning, overcomplete) that are not installed are named and skipped. Each
trains in its default and in its best mode (bfloat16 autocast) in a process of its own, on equal batches in equal order,
for equally many steps: few, so nothing here says how soon or how well one learns; `sae_training_whole.py` does. A
step's time is that between two requests for a batch, so it holds all that a trainer does.

- explained variance and dead share: on held-out vectors, with training's own selection, so that L0 is k for all
- peak memory: the largest resident set of the process, batches and libraries included; on a GPU, what torch allocated
- floor: the time in which this device, by its matrix products and memory bandwidth measured in the same run, could make
  one step: one encoder product, three gathers of B * k rows, Adam over both matrices
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from machine import facts, installed
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from sae_peers import TRAINERS, Job

WARM = 3  # steps that are not timed


@dataclass(frozen=True)
class Case:
    """A bank to train on."""

    d: int
    n: int
    steps: int


CASES = {"canvas": Case(128, 2048, 200), "wide": Case(1280, 5120, 30), "tiny": Case(32, 128, 20)}


@dataclass(frozen=True)
class Settings:
    """Compare trainers of SAEs."""

    cases: tuple[Literal["canvas", "wide", "tiny"], ...] = ("canvas", "wide")
    """canvas: activations of the canvas, d 128, n 2048; wide: planted features, d 1280, n 5120; tiny: to try this."""
    only: tuple[str, ...] = ()
    """Train these alone (neuraleraser, sparsify, sae_lens, dictionary_learning, overcomplete); none: all."""
    steps: int | None = None
    """Steps of every run; none: the case's own, 200 for the canvas and 30."""
    batch: int = 4096
    """Vectors a batch."""
    k: int = 32
    """Features that fire for a vector."""
    threads: int = 2
    """Threads of every run on a CPU."""
    device: str = "cpu"
    """Where to train."""
    vectors: int = 2**16
    """Vectors to train on, repeated in a new order every epoch; a quarter more is held out."""
    peers_python: Path | None = None
    """The Python that has the peers; none: this one."""
    bank: Path | None = None
    """Where the canvas's activations are kept between runs (safetensors); none: they are made anew."""
    json: Path | None = None
    """Where the figures go."""
    worker: str = ""
    """Used by the script itself."""


def planted(d: int, vectors: int) -> Tensor:
    """[vectors, d]: sums of 5 * d unit directions, d / 32 at a time, at rates by Zipf's law; noise; an offset."""
    g = torch.Generator().manual_seed(0)
    true, active = 5 * d, d / 32
    directions = torch.nn.functional.normalize(torch.randn(true, d, generator=g), dim=1)
    rates = 1 / torch.arange(1, true + 1) ** 0.7
    rates *= active / rates.sum()
    out = []
    for start in range(0, vectors, 4096):
        m = min(4096, vectors - start)
        z = (torch.rand(m, true, generator=g) < rates) * (1 + 0.5 * torch.rand(m, true, generator=g))
        out.append(z @ directions + 0.5 * torch.randn(m, d, generator=g) / d**0.5)
    return torch.cat(out) + torch.randn(d, generator=g) / d**0.5


def canvas(vectors: int, path: Path | None) -> Tensor:
    """[vectors, 128] activations of the canvas at the site of its reference, drawn or read from `path`."""
    if path and path.exists():
        kept = load_file(path)["x"]
        if len(kept) < vectors:
            raise SystemExit(f"{path} holds {len(kept)} vectors, {vectors} are wanted: delete it, or ask for fewer")
        return kept[:vectors]
    from neuraleraser.activations import activation_matrix
    from neuraleraser.canvas.words import VOCABULARY
    from neuraleraser.families.canvas import GATE
    from neuraleraser.families.opening import open_pipeline
    from neuraleraser.settings import Sampling
    from neuraleraser.vocabulary import labelled_prompts

    per_image = 1600
    prompts = [p for p, _ in labelled_prompts(VOCABULARY, -(-vectors // per_image), 1)]
    sampling = Sampling(batch_size=min(40, len(prompts)))
    seeds = range(300, 300 + len(prompts))
    x = activation_matrix(open_pipeline("canvas"), prompts, seeds, [GATE], per_image, sampling)
    x = x[GATE][:vectors].contiguous()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": x}, path)
    return x


def make_bank(name: str, s: Settings) -> Tensor:
    """Vectors to train on, then the held-out ones, scaled to E||x||^2 = d, for which learning rates are made."""
    total = s.vectors + s.vectors // 4
    x = canvas(total, s.bank) if name == "canvas" else planted(CASES[name].d, total)
    return x * (x.shape[1] / x.square().sum(1).mean()).sqrt()


def work(s: Settings) -> dict[str, Any]:
    """Train what `s.worker` says, "case|trainer|mode|bank file", and measure it."""
    name, trainer, mode, path = s.worker.split("|")
    case = CASES[name]
    torch.set_num_threads(s.threads)
    x = load_file(path)["x"].to(s.device)
    x, held = x.split([s.vectors, len(x) - s.vectors])
    steps = s.steps or case.steps
    stamps: list[float] = []

    def stream(step: int) -> Iterator[Tensor]:
        stamps.clear()  # ours reads its first batches twice
        per_epoch = len(x) // s.batch
        while True:
            g = torch.Generator().manual_seed(step // per_epoch)
            order = torch.randperm(len(x), generator=g)
            for i in range(step % per_epoch, per_epoch):
                batch = x[order[i * s.batch : (i + 1) * s.batch].to(x.device)]
                if x.is_cuda:
                    torch.cuda.synchronize()
                stamps.append(time.perf_counter())
                yield batch
                step += 1

    codes = TRAINERS[trainer][1](Job(case.d, case.n, s.k, s.batch, steps, s.device, stream), mode == "best")
    times = [b - a for a, b in zip(stamps[WARM:], stamps[WARM + 1 : steps], strict=False)]
    peak = torch.cuda.max_memory_allocated() if x.is_cuda else resident_peak()
    unexplained = total = fired = 0.0
    seen = torch.zeros(case.n, dtype=torch.bool, device=x.device)
    with torch.no_grad():
        mean = held.mean(0)
        for part in held.split(min(s.batch, 4096)):
            x_hat, on = codes(part)
            unexplained += float((part - x_hat.float()).square().sum())
            total += float((part - mean).square().sum())
            fired += float(on.sum())
            seen |= on.any(0)
    return {
        "step_seconds": statistics.median(times),
        "explained_variance": 1 - unexplained / total,
        "dead_share": 1 - float(seen.float().mean()),
        "l0": fired / len(held),
        "peak_bytes": peak,
    }


def resident_peak() -> int:
    """Bytes of the largest resident set of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage there counts what the parent held when it started this process
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fastest(run: Any, device: str, times: int = 5) -> float:
    """Least seconds of some runs, after one that is not counted."""
    best = float("inf")
    for i in range(times + 1):
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        if i:
            best = min(best, time.perf_counter() - start)
    return best


def roofline(case: Case, s: Settings) -> tuple[str, float]:
    """(what this device does, seconds that a step takes at least), measured now."""
    torch.set_num_threads(s.threads)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, w = (torch.randn(m, case.d).to(s.device, dtype) for m in (s.batch, case.n))
        seconds = fastest(lambda a=a, w=w: a @ w.T, s.device)
        rates[dtype] = 2 * s.batch * case.n * case.d / seconds
    a = torch.randn(2**26, device=s.device)
    b = torch.empty_like(a)
    bandwidth = 2 * a.numel() * 4 / fastest(lambda: b.copy_(a), s.device)
    low = 2 if rates[torch.bfloat16] > rates[torch.float32] else 4  # bytes a value of what is gathered
    product = 2 * s.batch * case.n * case.d / max(rates.values())
    gathers = 3 * s.batch * s.k * case.d * low / bandwidth
    adam = 2 * case.n * case.d * 28 / bandwidth  # gradient, weight and two moments read, the last three written
    told = (
        f"products {rates[torch.float32] / 1e9:.0f} GFLOP/s float32, {rates[torch.bfloat16] / 1e9:.0f} bfloat16; "
        f"memory {bandwidth / 1e9:.1f} GB/s (a copy, read and written)\n"
        f"floor: product {product * 1e3:.1f} + gathers {gathers * 1e3:.1f} + Adam {adam * 1e3:.1f} ms"
    )
    return told, product + gathers + adam


def run_case(name: str, s: Settings, folder: Path) -> list[dict[str, Any]]:
    """Every trainer in every mode on one bank; prints a table."""
    case = CASES[name]
    path = folder / f"{name}.safetensors"
    save_file({"x": make_bank(name, s)}, path)
    told, floor = roofline(case, s)
    steps = s.steps or case.steps
    print(f"\n{name}: d {case.d}, n {case.n}, k {s.k}, batch {s.batch}, {steps} steps, {s.threads} threads\n{told}")
    print(f"{'':34} {'ms/step':>8} {'vectors/s':>10} {'floor':>6} {'peak GB':>8} {'EV':>7} {'dead':>6} {'L0':>6}")
    rows = []
    for trainer, (package, _) in TRAINERS.items():
        if s.only and trainer not in s.only:
            continue
        if trainer != "neuraleraser" and s.peers_python is None and installed(package) is None:
            print(f"{package}: not installed, skipped")
            continue
        for mode in ("default", "best"):
            label = f"{package} {mode}"
            if trainer == "neuraleraser":  # bfloat16 is our default
                label = "neuraleraser" if mode == "best" else "neuraleraser float32"
            python = sys.executable if trainer == "neuraleraser" else str(s.peers_python or sys.executable)
            made = measured(f"{name}|{trainer}|{mode}|{path}", s, python)
            if isinstance(made, str):
                print(f"{label}: failed, {made}", flush=True)
                continue
            seconds = made["step_seconds"]
            print(
                f"{label:34} {seconds * 1e3:8.1f} {s.batch / seconds:10.0f} {floor / seconds:6.0%} "
                f"{made['peak_bytes'] / 1e9:8.2f} {made['explained_variance']:7.4f} {made['dead_share']:6.1%} "
                f"{made['l0']:6.2f}",
                flush=True,
            )
            rows.append(
                {
                    "name": label,
                    "d": case.d,
                    "n": case.n,
                    "tokens_per_second": s.batch / seconds,
                    "explained_variance": made["explained_variance"],
                    "dead_share": made["dead_share"],
                    "peak_bytes": made["peak_bytes"],
                }
            )
    return rows


def measured(job: str, s: Settings, python: str) -> dict[str, Any] | str:
    """What a process of its own measured of one job, or why it failed."""
    command = [python, __file__, "--worker", job, "--batch", str(s.batch), "--k", str(s.k)]
    command += ["--threads", str(s.threads), "--device", s.device, "--vectors", str(s.vectors)] + (
        ["--steps", str(s.steps)] if s.steps else []
    )
    env = os.environ | {"OMP_NUM_THREADS": str(s.threads), "WANDB_MODE": "disabled", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    return json.loads(lines[-1])


def main(s: Settings) -> None:
    if s.worker:
        print(json.dumps(work(s)))
        return
    if s.steps is not None and s.steps < WARM + 2:
        raise SystemExit(f"steps is {s.steps}: pass at least {WARM + 2}, of which {WARM} are not timed")
    if s.batch > s.vectors:
        raise SystemExit(f"batch is {s.batch}: pass at most the {s.vectors} vectors, or more vectors")
    started = time.time()
    where = facts(["torch", *(p for p, _ in TRAINERS.values())])
    print("; ".join(where.values()))
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for name in s.cases for row in run_case(name, s, Path(folder))]
    for name in s.cases:
        case = CASES[name]
        rates = {r["name"]: r["tokens_per_second"] for r in rows if (r["d"], r["n"]) == (case.d, case.n)}
        peers = {k: v for k, v in rates.items() if "neuraleraser" not in k}
        if peers and "neuraleraser" in rates:
            best = max(peers, key=lambda k: peers[k])
            print(f"\n{name}: {rates['neuraleraser'] / peers[best]:.2f} times the fastest peer ({best})")
    print(f"{time.time() - started:.0f} s")
    if s.json:
        s.json.parent.mkdir(parents=True, exist_ok=True)
        aside = s.json.with_suffix(".part")
        aside.write_text(json.dumps([row | where for row in rows], indent=1))
        aside.replace(s.json)


if __name__ == "__main__":
    main(tyro.cli(Settings))
