"""Whole trainings of SAEs, with dead features revived: how soon, how well and in how much memory ours and peers learn.

    python -m venv peers && peers/bin/pip install torch tyro eai-sparsify
    python benchmarks/sae_training_whole.py --peers-python peers/bin/python --base OLD_CHECKOUT/src --json FILE

Peers train by the loops of `sae_peers.py` in an environment of their own, since what they install may break ours; ours
also as of another checkout (`--base`). Every training is a process, on equal batches in equal order. First each trainer
tries the same factors of its own learning rate on the same steps, in its fastest mode, and keeps the one that reaches
the quality soonest on tuning vectors, or, where none does, explains most. Then all train `repeats` times, in turns, and
are measured on other vectors: every so many steps what the SAE then explains of held-out vectors, and the share of
features that none of them makes fire, by training's own selection. The clock starts with the first vector asked for and
stands while it is measured; with one thread it is the processor's time of the process, which others on the machine
disturb least. Ours reaches the quality only with at most 1 % dead; peers with as many as they have.

- seconds_to_quality: median over repeats, null where one did not reach it
- seconds_to_best_peer: the same for the highest explained variance that a peer's repeats end with
- peak_bytes: largest resident set of the process, libraries and bank included; start_bytes: before the first batch
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from machine import facts
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import sae_training
from sae_peers import TRAINERS, Codes, Job, Snapshot
from sae_training import resident_peak

MAX_DEAD = 0.01
"""Share of ours that may be dead where the quality counts as reached."""
PART = 1024
"""Vectors measured at a time: little beside what training needs."""
TUNING = 5
"""One in so many held-out vectors is for choosing learning rates; the others are measured on."""


@dataclass(frozen=True)
class Case:
    """A bank, what to train on it, and the explained variance to reach."""

    k: int
    steps: int
    quality: float


CASES = {"canvas": Case(16, 1000, 0.998), "wide": Case(32, 1000, 0.8), "tiny": Case(4, 60, 0.3)}
PLAN = (
    ("neuraleraser", "neuraleraser", "best"),
    ("neuraleraser float32", "neuraleraser", "default"),
    ("eai-sparsify best", "sparsify", "best"),
    ("eai-sparsify default", "sparsify", "default"),
    ("overcomplete best", "overcomplete", "best"),
    ("dictionary-learning best", "dictionary_learning", "best"),
    ("sae-lens best", "sae_lens", "best"),
)
"""Name, entry of `TRAINERS`, mode; "best" is bfloat16."""


@dataclass(frozen=True)
class Settings:
    """Compare whole trainings."""

    cases: tuple[Literal["canvas", "wide", "tiny"], ...] = ("canvas",)
    """canvas: activations of the canvas, d 128, n 2048; wide: planted features, d 1280, n 5120; tiny: to try this."""
    only: tuple[str, ...] = ()
    """Names that start with one of these alone; none: all."""
    peers_python: Path | None = None
    """The Python that has the peers; none: this one."""
    base: Path | None = None
    """The src folder of another checkout of ours."""
    steps: int | None = None
    """Steps of every run; none: the case's own."""
    quality: float | None = None
    """Explained variance to reach; none: the case's own."""
    rates: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    """Factors of its own learning rate that each trainer tries."""
    repeats: int = 2
    """Trainings of each at its best rate."""
    every: int = 20
    """Steps from one measurement to the next; after twenty of them, five times as many."""
    batch: int = 4096
    """Vectors a batch."""
    threads: int = 1
    """Threads of every run."""
    vectors: int = 163_840
    """Vectors to train on; a quarter more is held out."""
    bank: Path | None = None
    """Where the canvas's activations are kept between runs (safetensors); none: they are made anew."""
    json: Path | None = None
    """Where the figures go."""
    worker: str = ""
    """Used by the script itself."""


@dataclass(frozen=True)
class Training:
    """One process: what `--worker` is given in JSON."""

    trainer: str
    mode: str
    rate: float
    file: str
    n: int
    k: int
    steps: int
    every: int
    batch: int
    vectors: int
    threads: int
    seed: int
    tuning: bool


def measure(codes: Codes, held: Tensor) -> tuple[float, float]:
    """(explained variance, share of features that never fire) of held [N, d]."""
    unexplained, seen = 0.0, torch.zeros((), dtype=torch.bool)
    for part in held.split(PART):
        x_hat, on = codes(part)
        unexplained += float((part - x_hat.float()).square().sum())
        seen = seen | on.any(0)
    return 1 - unexplained / float((held - held.mean(0)).square().sum()), 1 - float(seen.float().mean())


def work(job: Training) -> dict[str, Any]:
    """Train, and give back the curve of (steps, seconds, explained variance, dead share)."""
    torch.set_num_threads(job.threads)
    clock = time.process_time if job.threads == 1 else time.perf_counter
    x, held = load_file(job.file)["x"].split([job.vectors, job.vectors // 4])
    tuning, test = held.tensor_split([len(held) // TUNING])
    held = tuning if job.tuning else test
    curve: list[tuple[int, float, float, float]] = []
    snapshots: list[Snapshot] = []
    started, stood = 0.0, 0.0

    def note(step: int, now: float, codes: Codes) -> None:
        with torch.no_grad():
            curve.append((step, now - started - stood, *measure(codes, held)))

    def stream(step: int) -> Iterator[Tensor]:
        nonlocal started, stood
        per_epoch = len(x) // job.batch
        while True:
            g = torch.Generator().manual_seed(job.seed * 10_000 + step // per_epoch)
            order = torch.randperm(len(x), generator=g)
            for i in range(step % per_epoch, per_epoch):
                now = clock()
                started = started or now
                if step and step % (job.every if step <= 20 * job.every else 5 * job.every) == 0 and step < job.steps:
                    note(step, now, snapshots[-1]())
                    stood += clock() - now
                yield x[order[i * job.batch : (i + 1) * job.batch]]
                step += 1

    d = x.shape[1]
    start = resident_peak()
    run = Job(d, job.n, job.k, job.batch, job.steps, "cpu", stream, job.rate, snapshots.append)
    codes = TRAINERS[job.trainer][1](run, job.mode == "best")
    now, peak = clock(), resident_peak()
    note(job.steps, now, codes)
    return {"curve": curve, "peak_bytes": peak, "start_bytes": start}


def run(job: Training, python: Path, src: Path | None) -> dict[str, Any] | str:
    """What a process of its own measured, or why it failed."""
    env = os.environ | {"OMP_NUM_THREADS": str(job.threads), "WANDB_MODE": "disabled"}
    if src is not None:
        env["PYTHONPATH"] = str(src)
    command = [str(python), __file__, "--worker", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return (done.stderr.strip().splitlines() or ["no output"])[-1]
    return json.loads(lines[-1])


def reached(curve: list[list[float]], quality: float, max_dead: float) -> float | None:
    """Seconds until a curve is at the quality with so few dead, at a measured point; None: never."""
    return next((seconds for _, seconds, ev, dead in curve if ev >= quality and dead <= max_dead), None)


def run_case(name: str, s: Settings, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Every trainer on one bank: a row each, once more after each training."""
    case = CASES[name]
    steps, quality = s.steps or case.steps, s.quality or case.quality
    d, n = sae_training.CASES[name].d, sae_training.CASES[name].n
    path = folder / f"{name}.safetensors"
    save_file({"x": sae_training.make_bank(name, sae_training.Settings(vectors=s.vectors, bank=s.bank))}, path)
    here = Path(__file__).parents[1] / "src"
    plan = [(*entry, here) for entry in PLAN] + ([("neuraleraser before", *PLAN[0][1:], s.base)] if s.base else [])
    plan = [entry for entry in plan if not s.only or entry[0].startswith(s.only)]
    print(f"\n{name}: d {d}, n {n}, k {case.k}, {steps} steps of {s.batch}, {s.threads} threads, quality {quality}")

    def train(entry: tuple[str, str, str, Path | None], rate: float, seed: int, tuning: bool) -> dict[str, Any] | None:
        label, trainer, mode, src = entry
        job = Training(
            trainer, mode, rate, str(path), n, case.k, steps, s.every, s.batch, s.vectors, s.threads, seed, tuning
        )
        mine = ours(label)
        made = run(job, Path(sys.executable) if mine or not s.peers_python else s.peers_python, src if mine else None)
        if isinstance(made, str):
            print(f"{label}: failed, {made}", flush=True)
            return None
        made |= {"rate": rate, "seconds": reached(made["curve"], quality, MAX_DEAD if mine else 1.0)}
        _, total, ev, dead = made["curve"][-1]
        soon = "never" if made["seconds"] is None else f"{made['seconds']:.1f} s"
        print(
            f"{label:26} rate x{rate:<5.3g} {'tuning' if tuning else f'seed {seed}':7} to quality {soon:>7}, "
            f"whole {total:6.1f} s, explained {ev:.5f}, dead {dead:6.2%}, peak {made['peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
        return made

    rows: dict[str, dict[str, Any]] = {}
    tuned: dict[tuple[str, Path | None], list[dict[str, Any]]] = {}
    for entry in plan:
        label, trainer, _, src = entry
        rates: tuple[float, ...] = s.rates if src != s.base else (1.0,)  # as it was
        if (trainer, src) not in tuned:
            tried = [made for rate in rates if len(rates) > 1 and (made := train(entry, rate, 0, tuning=True))]
            tuned[trainer, src] = [{key: made[key] for key in ("rate", "seconds", "curve")} for made in tried]
        tried = sorted(tuned[trainer, src], key=lambda made: (made["seconds"] or math.inf, -made["curve"][-1][2]))
        rows[label] = {"rate": tried[0]["rate"] if tried else next(iter(rates)), "tuning": tried, "runs": []}
    commits = {entry[0]: commit_of(entry[3]) for entry in plan if entry[1] == "neuraleraser"}
    shape = {"case": name, "d": d, "n": n, "k": case.k, "steps": steps, "quality": quality}
    for seed in range(1, s.repeats + 1):
        for entry in plan:
            if made := train(entry, rows[entry[0]]["rate"], seed, tuning=False):
                rows[entry[0]]["runs"].append(made)
            done = {key: row for key, row in rows.items() if row["runs"]}
            yield [{"name": key} | shape | summary(row) | {"commit": commits.get(key)} for key, row in done.items()]


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Medians over the repeats, and all that they were made of."""
    runs = row["runs"]
    last = [made["curve"][-1] for made in runs]
    return {
        "seconds_to_quality": median([made["seconds"] for made in runs]),
        "seconds": statistics.median(end[1] for end in last),
        "explained_variance": statistics.median(end[2] for end in last),
        "dead_share": statistics.median(end[3] for end in last),
        "peak_bytes": max(made["peak_bytes"] for made in runs),
        "start_bytes": max(made["start_bytes"] for made in runs),
        **row,
    }


def commit_of(src: Path | None) -> str | None:
    """The commit of the checkout that holds this folder."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=src, capture_output=True, text=True)
    return git.stdout.strip() or None


def main(s: Settings) -> None:
    if s.worker:
        print(json.dumps(work(Training(**json.loads(s.worker)))))
        return
    torch.set_num_threads(s.threads)
    where = facts(["torch"]) | {"versions": versions(s.peers_python or Path(sys.executable))}
    print("; ".join(where.values()), flush=True)
    done: dict[str, list[dict[str, Any]]] = {}
    said: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in s.cases:
            for rows in run_case(name, s, Path(folder)):
                said = compare(name, rows)
                done[name] = [where | row | {"commit": row["commit"] or where["commit"]} for row in rows]
                if s.json:
                    s.json.parent.mkdir(parents=True, exist_ok=True)
                    s.json.write_text(json.dumps([row for each in done.values() for row in each]))
            print(*said, sep="\n", flush=True)


def ours(label: str) -> bool:
    """True for ours, of any commit."""
    return label.startswith("neuraleraser")


def compare(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """Add to each row when it explained as much as the best peer in the end; return what ours gains, in words."""
    most = max((row["explained_variance"] for row in rows if not ours(row["name"])), default=math.inf)
    for row in rows:
        times = [reached(made["curve"], most, MAX_DEAD if ours(row["name"]) else 1.0) for made in row["runs"]]
        row["seconds_to_best_peer"] = median(times)
    mine, said = next((row for row in rows if row["name"] == "neuraleraser"), {}), []
    for key in ("seconds_to_quality", "seconds_to_best_peer"):
        peers = {row["name"]: row[key] for row in rows if not ours(row["name"]) and row[key]}
        if peers and mine.get(key):
            best = min(peers, key=lambda label: peers[label])
            said.append(f"{name}, {key}: {mine[key]:.1f} s, {peers[best] / mine[key]:.2f} times as soon as {best}")
    return said


def median(seconds: list[float | None]) -> float | None:
    """The median, None where one is missing."""
    known = [t for t in seconds if t is not None]
    return statistics.median(known) if len(known) == len(seconds) else None


def versions(python: Path) -> str:
    """Versions of torch and the peers that this Python has."""
    names = ["torch", *(package for package, _ in TRAINERS.values())]
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from machine import installed\n"
    code += f"print(', '.join(f'{{p}} {{v}}' for p in {names} if (v := installed(p))))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main(tyro.cli(Settings))
