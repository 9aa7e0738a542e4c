"""Which sites of the canvas detect concepts, and how much an edit there could do at best.

    python benchmarks/sites.py [--pipeline canvas] [--out benchmarks/results/sites.json]

For the output and the cross-attention of every text-conditioned block, on development concepts:

- detect: share of rows (image, step) with the concept above the 99.5th percentile of rows without it, for the
  phrasings that the features were chosen on and for held-out ones;
- ceiling: of the images that show the concept, the share that no longer do (first judge) when the site's conditional
  activations come from the matched prompt; also for all sites of its kind from this one on;
- following: text-conditioned blocks that run after it.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from ceilings import transplant

from neuraleraser.activations import ActivationBatch, activation_matrix, collect
from neuraleraser.canvas import words
from neuraleraser.canvas.canvas_judge import CanvasJudge
from neuraleraser.canvas.words import VOCABULARY
from neuraleraser.concepts import Pair, canvas_concept
from neuraleraser.families.opening import open_pipeline
from neuraleraser.fitting.detector import choose_features
from neuraleraser.fitting.trajectories import SHARES, pool
from neuraleraser.sae import SAE, TrainSettings, pool_batches, train
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site, candidate_sites, cross_attention_sites
from neuraleraser.vocabulary import HELD_OUT as HELD_OUT_PHRASINGS
from neuraleraser.vocabulary import labelled_prompts


@dataclass(frozen=True)
class Settings:
    """Measure the canvas's sites."""

    pipeline: str = "canvas"
    """The pipeline to measure."""
    out: Path = Path("benchmarks/results/sites.json")
    """Where the figures go."""
    images: int = 20
    """Images a concept for the ceilings."""
    n: int = 512
    """Features of each site's SAE."""
    ceilings: bool = True
    """Measure ceilings too (slower)."""


def pooled(pipe, saes: dict[Site, SAE], prompts: list[str], seed: int, sampling: Sampling) -> dict[Site, torch.Tensor]:
    """{site: [N, T, branches, shares, n]}"""
    seen: dict[tuple[Site, float, int], list[torch.Tensor]] = {}

    def on(s: ActivationBatch) -> None:
        z = saes[s.site].encode(s.x.float())
        seen.setdefault((s.site, s.timestep, s.branch), []).append(torch.stack([pool(z, q) for q in SHARES], 1).half())

    collect(pipe, prompts, range(seed, seed + len(prompts)), list(saes), on, sampling)
    times = sorted({t for _, t, _ in seen}, reverse=True)
    return {
        site: torch.stack([torch.stack([torch.cat(seen[site, t, b]) for b in (0, 1)], 1) for t in times], 1)
        for site in saes
    }


def ceilings(pipe, kinds: list[list[Site]], rows: dict[str, dict], images: int) -> None:
    """Adds "ceiling" and "ceiling_from_here" to `rows`, and how many images showed each concept."""
    judge = CanvasJudge.load("first")
    for name in ("Cartoon", "Rust", "Trees", "Towers"):
        pairs = canvas_concept(name).pairs
        pairs = [pairs[i] for i in np.random.default_rng(1).permutation(len(pairs))[:images]]

        def shows(which: list[Site], name: str = name, pairs: list[Pair] = pairs) -> np.ndarray:
            v = judge(transplant(pipe, pairs, range(200, 200 + images), which, Sampling(batch_size=2 * images)))
            style = name in judge.styles
            return (v.p_style[:, judge.styles.index(name)] if style else v.p_object[:, judge.objects.index(name)]) > 0.5

        base = shows([])
        for kind in kinds:
            for k, site in enumerate(kind):
                row = rows[str(site)]
                row.setdefault("shown", {})[name] = int(base.sum())
                for key, which in (("ceiling", [site]), ("ceiling_from_here", kind[k:])):
                    row.setdefault(key, {})[name] = float(1 - shows(which)[base].mean())
                print(name, row["site"], row["ceiling"][name], row["ceiling_from_here"][name], flush=True)


def main(s: Settings) -> None:
    started = time.time()
    pipe = open_pipeline(s.pipeline)
    sampling = Sampling(batch_size=40)
    kinds = [candidate_sites(pipe), cross_attention_sites(pipe)]
    sites = [site for kind in kinds for site in kind]
    background = labelled_prompts(VOCABULARY, 120, 1)
    prompts = [p for p, _ in background]
    vectors = activation_matrix(pipe, prompts[:80], range(600, 680), sites, 1600, sampling)
    saes = {x: train(pool_batches(v, 4096), TrainSettings(n_features=s.n, k=12, steps=500)) for x, v in vectors.items()}
    print(f"SAEs trained, {time.time() - started:.0f} s", flush=True)
    off = pooled(pipe, saes, prompts, 800, sampling)
    concepts = [*words.DEV_STYLES, *words.DEV_OBJECTS]
    own, held = [], []
    for name in concepts:
        pairs = canvas_concept(name).pairs
        own += [pairs[i].positive for i in np.random.default_rng(0).permutation(len(pairs))[:10]]
        pairs = canvas_concept(name, HELD_OUT_PHRASINGS).pairs
        held += [pairs[i].positive for i in np.random.default_rng(0).permutation(len(pairs))[:10]]
    on, on_held = pooled(pipe, saes, own, 0, sampling), pooled(pipe, saes, held, 100, sampling)
    rows = []
    following = {site: len(kind) - 1 - i for kind in kinds for i, site in enumerate(kind)}
    for site in sites:
        detect = {}
        for i, name in enumerate(concepts):
            keep = [j for j, (_, shown) in enumerate(background) if name not in shown]
            lacks = off[site][keep].movedim(2, 1).flatten(0, 1)
            d = choose_features(on[site][i * 10 : i * 10 + 10, :, 1], lacks)
            e = [
                (v[i * 10 : i * 10 + 10, :, 1, d.share][..., d.features].float() @ d.weight)
                for v in (on[site], on_held[site])
            ]
            bound = (lacks[:, :, d.share][..., d.features].float() @ d.weight).quantile(0.995, 0)
            detect[name] = [float((x > bound).float().mean()) for x in e]
        rows.append({"site": str(site), "following": following[site], "detect": detect})
        mean = np.mean(list(detect.values()), 0)
        print(
            f"{site.path:62} follow {rows[-1]['following']}  detect seen {mean[0]:.3f} held-out {mean[1]:.3f}",
            {k: round(v[1], 2) for k, v in detect.items()},
            flush=True,
        )
    print(f"{time.time() - started:.0f} s", flush=True)
    if s.ceilings:
        ceilings(pipe, kinds, {row["site"]: row for row in rows}, s.images)
    s.out.parent.mkdir(parents=True, exist_ok=True)
    s.out.write_text(json.dumps({"rows": rows, "machine": platform.processor(), "torch": torch.__version__}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Settings))
