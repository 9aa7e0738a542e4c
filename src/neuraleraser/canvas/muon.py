"""Muon: momentum made orthogonal, for the matrices of a network (Jordan et al. 2024, "Muon").

A convolution's weight counts as the matrix [out, in * kernel]. Steps are scaled so that their spread is Adam's
(Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), and one learning rate serves both.
"""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the odd polynomial; Jordan et al. 2024


def orthogonalise(matrices: Tensor, steps: int = 4) -> Tensor:
    """The nearest half-orthogonal matrices, roughly: [M, R, C] -> [M, R, C] with singular values near 1.

    Newton-Schulz iterations in bfloat16; values under a twentieth of the largest stay below 0.7.
    """
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Steps for `params`, each a linear or convolution weight; `momentum` is at hand for checkpoints."""

    def __init__(self, params: list[Tensor], beta: float = 0.95, weight_decay: float = 0.01) -> None:
        self.params, self.beta, self.weight_decay = params, beta, weight_decay
        self.momentum = [torch.zeros_like(p) for p in params]
        shapes: dict[torch.Size, list[int]] = defaultdict(list)
        for i, p in enumerate(params):
            shapes[p.shape].append(i)
        self._alike = list(shapes.values())

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step from the gradients at hand (Nesterov momentum)."""
        for same in self._alike:
            updates = []
            for i in same:
                g = self.params[i].grad
                assert g is not None
                self.momentum[i].lerp_(g, 1 - self.beta)
                updates.append(_channels_last(g.lerp(self.momentum[i], self.beta)))
            stack = torch.stack(updates)
            steps = orthogonalise(stack.flatten(2)).view(stack.shape)
            size = 0.2 * math.sqrt(max(stack.flatten(2).shape[1:]))
            for i, u in zip(same, steps, strict=True):
                p = _channels_last(self.params[i])
                p.mul_(1 - lr * self.weight_decay).add_(u.to(p.dtype), alpha=-size * lr)


def _channels_last(weight: Tensor) -> Tensor:
    """Input channels moved behind the kernel's axes: in memory, that is where convolutions have them here."""
    return weight.permute(0, *range(2, weight.ndim), 1)
