"""Corrections of the text, in closed form: least squares from what a prompt with the concept reads as to what the
matched prompt without it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.activations import CONDITIONAL, ActivationBatch, collect
from neuraleraser.concepts import Pair
from neuraleraser.eraser import LowRank
from neuraleraser.fitting.trajectories import calls_by_image
from neuraleraser.settings import Sampling
from neuraleraser.sites import DenoiserCall, Site

RIDGE = 1e-2
"""Weight of the penalty on the map, relative to the texts' mean variance of a dimension (docs/LOG.md)."""
_AT_ONCE = 32
"""Pairs of texts that are aligned together: memory goes by their number times tokens squared."""


@dataclass(frozen=True)
class ReadPrompts:
    """Prompts as the denoiser reads them: the text [n, d] at a site, and a call of one row with its conditioning, by
    prompt."""

    texts: Mapping[str, Tensor]
    calls: Mapping[str, DenoiserCall]


class _BatchRead(Exception):
    """Raised to leave a pipeline's call: the autoencoder would take as long again."""


def read_prompts(pipe: Any, site: Site, prompts: Sequence[str], sampling: Sampling, seed: int = 0) -> ReadPrompts:
    """Read prompts in one step of sampling each, and leave before the autoencoder."""
    some = list(dict.fromkeys(prompts))
    once = dataclasses.replace(sampling, num_inference_steps=1, pad_last_batch=False)
    texts: dict[str, Tensor] = {}
    calls: dict[str, DenoiserCall] = {}
    for first in range(0, len(some), sampling.batch_size):
        part = some[first : first + sampling.batch_size]

        def on_text(seen: ActivationBatch, part: list[str] = part) -> None:
            if seen.branch == CONDITIONAL:
                texts.update(zip(part, seen.x.float().clone(), strict=True))

        def on_call(image: int, call: DenoiserCall, part: list[str] = part) -> None:
            calls[part[image]] = call
            if image == len(part) - 1:
                raise _BatchRead

        with suppress(_BatchRead), calls_by_image(pipe, on_call):
            collect(pipe, part, [seed] * len(part), [site], on_text, once)
    return ReadPrompts(texts, calls)


@dataclass(frozen=True)
class TextFit:
    """A correction of the text, and the share of the squared distance between the prompts' texts that it leaves."""

    correction: LowRank
    left: float


def fit_text_correction(
    sites: Sequence[Site], pairs: Sequence[Pair], texts: Mapping[str, Tensor], time: float, rank: int
) -> TextFit:
    """Fit delta(x) = x V U + b, so that the text x of a prompt with the concept becomes that of the one without.

    Images attend to all tokens of a text. So each token of the one prompt is aligned with a token of the other
    (`align`); then this is ridge regression of reduced rank (Izenman 1975). UCE (arXiv 2308.14761) maps the text in
    closed form as well, by phrases alone, and for all prompts.

    Args:
        sites: Sites that read the text.
        pairs: Prompts with the concept, and without.
        texts: The text [n, d] of each prompt at the first site.
        time: A timestep, for the correction's only time bin.
        rank: Rank of the map.

    Returns:
        The correction, and what it leaves.
    """
    shown = torch.stack([texts[pair.positive] for pair in pairs])
    plain = torch.stack([texts[pair.negative] for pair in pairs])
    wanted = torch.cat([_aligned(x, y) for x, y in zip(shown.split(_AT_ONCE), plain.split(_AT_ONCE), strict=True)])
    down, up, bias = reduced_rank_map(shown.flatten(0, 1), (wanted - shown).flatten(0, 1), rank)
    left = wanted - shown - (shown @ down @ up + bias)
    times = torch.tensor([time], device=shown.device)
    first, *others = sites
    correction = LowRank(first, times, down[None], up[None], bias[None], also=tuple(others))
    apart = (wanted - shown).square().sum()
    return TextFit(correction, float(left.square().sum() / apart) if apart > 0 else 0.0)


def _aligned(x: Tensor, y: Tensor) -> Tensor:
    """Return for each token of texts x [N, n, d] the token of y [N, m, d] that it is aligned with: [N, n, d]."""
    return y.gather(1, align(x, y).unsqueeze(2).expand(-1, -1, y.shape[2]))


def align(x: Tensor, y: Tensor) -> Tensor:
    """Return for each token of texts x [N, n, d] the last token of y [N, m, d] that it is aligned with, int64 [N, n].

    Dynamic time warping (Sakoe and Chiba 1978): tokens are aligned in order, each with at least one, the first with the
    first and the last with the last, so that the sum of squared distances is least. Of equal sums the one that goes on
    in both texts is taken, then the one that goes on in x.
    """
    (count, n, _), m = x.shape, y.shape[1]
    costs = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    never = costs.new_full((count, 1), torch.inf)
    moves = torch.zeros(count, n, m, dtype=torch.int8, device=x.device)
    i = torch.arange(n, device=x.device)
    # Sums [N, 1 + n] of the last two diagonals i + j, behind a border: cells that are reached from them alone.
    before, last = never.expand(count, n + 1), never.expand(count, n + 1)
    for diagonal in range(n + m - 1):
        j = diagonal - i
        inside = (j >= 0) & (j < m)
        cost = costs[:, i, j.clamp(0, m - 1)]
        ways = torch.stack([before[:, :-1], last[:, :-1], last[:, 1:]], 2)  # in both, in x, in y
        best, move = ways.min(2)
        now = torch.where(inside, cost + (best if diagonal else 0), torch.inf)
        moves[:, i[inside], j[inside]] = move[:, inside].to(torch.int8)
        before, last = last, torch.cat([never, now], 1)
    found = torch.zeros(count, n, dtype=torch.long, device=x.device)
    every = torch.arange(count, device=x.device)
    row, column = torch.full_like(every, n - 1), torch.full_like(every, m - 1)
    for _ in range(n + m - 1):
        # Met from the end: the last token of y that a token of x is aligned with comes first, and stays.
        found[every, row] = torch.maximum(found[every, row], column)
        move = moves[every, row, column]
        start = (row == 0) & (column == 0)
        row, column = row - ((move != 2) & ~start).long(), column - ((move != 1) & ~start).long()
    return found


def reduced_rank_map(x: Tensor, delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return V [d, r], U [r, d] and b [d] with x V U + b nearest to delta: x, delta [n, d], in least squares.

    A ridge penalty keeps the map small; the best map of full rank is projected on the leading axes of what it adds,
    which is the best of that rank (Izenman 1975). Computed in float64, where the device has it.
    """
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    mean, shift = x.mean(0, dtype=exact), delta.mean(0, dtype=exact)
    inputs, outputs = x.to(exact) - mean, delta.to(exact) - shift
    gram = inputs.T @ inputs
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=exact, device=x.device)
    best = torch.linalg.solve(gram + penalty, inputs.T @ outputs)
    axes = torch.linalg.eigh(best.T @ gram @ best).eigenvectors.flip(1)[:, :rank]
    down, up = best @ axes, axes.T
    size = down.norm(dim=0).sqrt().clamp_min(torch.finfo(torch.float32).eps)  # as large below as above: half precision
    down, up = (down / size).float(), (up * size[:, None]).float()
    return down, up, (shift - mean @ best @ axes @ axes.T).float()
