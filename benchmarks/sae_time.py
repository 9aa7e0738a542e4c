"""What time does to an SAE: activations standardised by timestep, FiLM on the timestep, and neither.

    python benchmarks/sae_time.py --json        # the canvas, at its gate's site

A timestep's activations have a mean and a size of their own. `standardised` trains on (x - m_t) / s_t, with m_t the
mean and s_t the root mean square distance from it at that timestep, and multiplies back afterwards; `film` gives the
encoder x * (1 + g_t) + b_t, g and b linear in sines and cosines of t (as DiT's conditioning, Peebles and Xie 2023), and
is trained to reconstruct x itself; `plain` knows no time. All three are BatchTopK from the same rows, trained here by
one naive dense step on the same batches, so that they differ in nothing else.

Measured on images held out: explained variance of raw activations, over all and at the worst timestep; the share of
features that never fire by the threshold learnt; and, for the canvas's development concepts, how often the one feature
that tells a concept best on some images tells it on others (share of pairs, with the concept and without, that its
mean over positions and timesteps puts in the right order).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import tyro
from machine import facts
from torch import Tensor
from torch.nn.functional import linear, normalize

from neuraleraser.activations import CONDITIONAL, ActivationBatch, collect
from neuraleraser.canvas import words
from neuraleraser.canvas.words import VOCABULARY
from neuraleraser.concepts import canvas_concept
from neuraleraser.families.canvas import GATE
from neuraleraser.families.opening import open_pipeline
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site
from neuraleraser.vocabulary import labelled_prompts

WAVES = 8
"""Frequencies of the timestep that FiLM is linear in."""
LAST = 8
"""Batches at the end whose mean cut is the threshold."""


@dataclass
class Settings:
    """Ablate what an SAE knows of time."""

    site: str = str(GATE)
    """Where."""
    n: int = 512
    """Features."""
    k: int = 12
    """Features that fire for a vector, on average."""
    steps: int = 1500
    """Batches to train on."""
    batch: int = 4096
    """Vectors in a batch."""
    lr: float = 2e-3
    """Adam's learning rate, to zero over the last fifth."""
    images: int = 800
    """Images to train on, and a fifth as many to measure on."""
    pairs: int = 24
    """Pairs of prompts for each development concept: half to choose its feature, half to measure it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """A training each."""
    json: bool = False
    """Print a list of objects, one a training, and nothing else."""
    sampling: Sampling = field(default_factory=lambda: Sampling(batch_size=40))
    """How images are drawn."""


@dataclass
class Time:
    """What a variant does before the encoder, and after the decoder, with time: x [B, d], step [B]."""

    film: bool
    mean: Tensor  # [T, d]
    size: Tensor  # [T]
    waves: Tensor  # [T, 2 * WAVES]
    weight: Tensor  # [2 * WAVES, 2 * d], learnt for FiLM, else zero

    def into(self, x: Tensor, step: Tensor) -> Tensor:
        x = self.target(x, step)
        if not self.film:
            return x
        gain, shift = (self.waves[step] @ self.weight).chunk(2, 1)
        return x * (1 + gain) + shift

    def target(self, x: Tensor, step: Tensor) -> Tensor:
        return (x - self.mean[step]) / self.size[step, None]

    def back(self, x_hat: Tensor, step: Tensor) -> Tensor:
        return x_hat * self.size[step, None] + self.mean[step]


Features = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [B, d], step [B]) -> (z [B, n], x_hat [B, d])."""


def variant(name: str, x: Tensor, step: Tensor, times: Tensor) -> Time:
    """Statistics of the training vectors x [N, d]: per timestep where they are standardised, else over all."""
    count, d = len(times), x.shape[1]
    mean, size = x.mean(0).expand(count, d).clone(), torch.ones(count)
    if name == "standardised":
        mean = torch.stack([x[step == t].mean(0) for t in range(count)])
        size = torch.stack([(x[step == t] - mean[t]).square().mean().sqrt() for t in range(count)])
    else:
        size *= (x - mean[0]).square().mean().sqrt()
    angle = times[:, None] / times.max() * math.pi * 2.0 ** torch.arange(WAVES)
    waves = torch.cat([angle.sin(), angle.cos()], 1)
    return Time(name == "film", mean, size, waves, torch.zeros(2 * WAVES, 2 * d))


def train(s: Settings, time: Time, x: Tensor, step: Tensor, seed: int) -> Features:
    """BatchTopK with Adam, dense. Of the features that no batch of the last 50 had, those of the largest
    pre-activations explain the residual, weighed 1/32 (Gao et al. 2024)."""
    g = torch.Generator().manual_seed(seed)
    d = x.shape[1]
    rows = normalize(torch.randn(s.n, d, generator=g), dim=1)
    w_enc, w_dec, b_enc, b_dec = rows.clone(), rows.clone(), torch.zeros(s.n), torch.zeros(d)
    learnt = [w_enc, w_dec, b_enc, b_dec, *([time.weight] if time.film else [])]
    adam = torch.optim.Adam([p.requires_grad_() for p in learnt], lr=s.lr)
    idle, cuts = torch.zeros(s.n), list[float]()
    for i in range(s.steps):
        at = torch.randint(len(x), (s.batch,), generator=g)
        target = time.target(x[at], step[at])
        pre = linear(time.into(x[at], step[at]) - b_dec, w_enc, b_enc)
        cut = pre.detach().relu().flatten().topk(s.batch * s.k).values[-1]
        z = torch.where(pre > cut, pre, 0.0).relu()
        error = target - z @ w_dec - b_dec
        loss = error.square().sum() / target.square().sum()
        idle = torch.where((z > 0).any(0), 0, idle + 1)
        dead = (idle > 50).nonzero()[:, 0]
        if len(dead):
            top = pre[:, dead].topk(min(len(dead), d // 2))
            again = torch.zeros_like(pre[:, dead]).scatter(1, top.indices, top.values) @ w_dec[dead]
            loss = loss + (error.detach() - again).square().sum() / error.detach().square().sum() / 32
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = s.lr * min(1.0, (s.steps - i) / (0.2 * s.steps))
        adam.step()
        with torch.no_grad():
            w_dec /= w_dec.norm(dim=1, keepdim=True)
        cuts.append(float(cut))
    threshold = sum(cuts[-LAST:]) / len(cuts[-LAST:])

    def features(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        pre = linear(time.into(x, step) - b_dec, w_enc, b_enc)
        z = torch.where(pre > threshold, pre, 0.0)
        return z, time.back(z @ w_dec + b_dec, step)

    return features


def drawn(pipe, site: Site, prompts: list[str], seeds: range, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """(x [images, T, P, d], times [T]) of the conditional branch, and of the unconditional [images, T, P, d]."""
    seen: dict[tuple[int, float], list[Tensor]] = {}

    def on(one: ActivationBatch) -> None:
        seen.setdefault((one.branch, one.timestep), []).append(one.x.float().cpu())

    collect(pipe, prompts, seeds, [site], on, sampling)
    times = sorted({t for _, t in seen}, reverse=True)
    branches = sorted({b for b, _ in seen}, reverse=True)
    assert branches[0] == CONDITIONAL
    stacks = [torch.stack([torch.cat(seen[b, t]) for t in times], 1) for b in branches]
    return stacks[0], torch.tensor(times), stacks[-1]


def flat(*parts: Tensor) -> tuple[Tensor, Tensor]:
    """[images, T, P, d] -> (vectors [N, d], steps [N])."""
    steps = [torch.arange(x.shape[1])[None, :, None].expand(x.shape[:3]).flatten() for x in parts]
    return torch.cat([x.flatten(0, 2) for x in parts]), torch.cat(steps)


@torch.no_grad()
def quality(features: Features, x: Tensor, step: Tensor, count: int) -> dict[str, float]:
    """On vectors x [N, d]: explained variance over all and at the worst of `count` steps, L0, dead share."""
    error, total = torch.zeros(count), torch.zeros(count)
    counts = torch.zeros(0, dtype=torch.int64)
    for t in range(count):
        own = x[step == t]
        total[t] = (own - own.mean(0)).square().sum()
        for part in own.split(8192):
            z, x_hat = features(part, torch.full((len(part),), t))
            error[t] += (part - x_hat).square().sum()
            counts = (z > 0).sum(0) + (counts if len(counts) else 0)
    whole = float((x - x.mean(0)).square().sum())
    return {
        "explained_variance": 1 - float(error.sum()) / whole,
        "explained_variance_worst_timestep": float((1 - error / total).min()),
        "l0": int(counts.sum()) / len(x),
        "dead_share": float((counts == 0).float().mean()),
    }


@torch.no_grad()
def told(features: Features, shows: Tensor, lacks: Tensor) -> float:
    """Share of pairs [images, T, P, d] that the best feature, chosen on the first half, orders on the second."""

    def pooled(x: Tensor) -> Tensor:
        vectors, steps = flat(x)
        z = torch.cat([features(v, i)[0] for v, i in zip(vectors.split(8192), steps.split(8192), strict=True)])
        return z.unflatten(0, (len(x), -1)).mean(1)

    a, b = pooled(shows), pooled(lacks)
    ordered = (a[:, None] > b[None]).float() + 0.5 * (a[:, None] == b[None]).float()
    half = len(a) // 2
    best = int(ordered[:half, :half].mean((0, 1)).argmax())
    return float(ordered[half:, half:, best].mean())


def main(s: Settings) -> None:
    pipe, site = open_pipeline("canvas"), Site.parse(s.site)
    held = max(s.images // 5, 1)
    prompts = [p for p, _ in labelled_prompts(VOCABULARY, s.images + held, 1)]
    cond, times, uncond = drawn(pipe, site, prompts, range(300, 300 + len(prompts)), s.sampling)
    x, step = flat(cond[: s.images], uncond[: s.images])
    x_held, step_held = flat(cond[s.images :], uncond[s.images :])
    pairs = {}
    for name in (*words.DEV_STYLES, *words.DEV_OBJECTS):
        some = canvas_concept(name).pairs
        some = [some[i * len(some) // s.pairs] for i in range(s.pairs)]
        texts = [p.positive for p in some] + [p.negative for p in some]
        seen, _, _ = drawn(pipe, site, texts, range(len(texts)), s.sampling)
        pairs[name] = seen.chunk(2)
    rows = []
    for seed in s.seeds:
        for name in ("plain", "standardised", "film"):
            features = train(s, variant(name, x, step, times), x, step, seed)
            row = {"name": name, "seed": seed, **quality(features, x_held, step_held, len(times))}
            row |= {"told": {concept: told(features, *both) for concept, both in pairs.items()}}
            row["told_mean"] = sum(row["told"].values()) / len(row["told"])
            rows.append(row)
            shown = {key: value for key, value in row.items() if key != "told"}
            print(shown, file=sys.stderr if s.json else sys.stdout, flush=True)
    if s.json:
        print(json.dumps([row | {"settings": asdict(s), **facts()} for row in rows]))


if __name__ == "__main__":
    main(tyro.cli(Settings))
