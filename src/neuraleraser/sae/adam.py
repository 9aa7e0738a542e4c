"""Adam over what is learnt, by torch's own function.

`torch.optim.Adam` calls the same one, and imports torch's compiler with its first instance: a second of processor time,
where a small SAE takes six to train.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim.adam import adam

EPSILON = 6.25e-10
"""Added to the root of the second moment: gradients of features that hardly fire are small."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""State of each tensor, as torch names it."""


class Adam:
    """Adam over some tensors, which become leaves; `state` has the moments of each."""

    def __init__(self, learnt: Iterable[Tensor]) -> None:
        self.learnt = [p.requires_grad_() for p in learnt]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        for p in self.learnt:
            zeros = torch.zeros_like(p, requires_grad=False)
            self.state[p] = {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": zeros.new_zeros(())}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move each tensor by its `grad` [its shape], in place."""
        moments = [[self.state[p][name] for p in self.learnt] for name in MOMENTS]
        grads = [p.grad for p in self.learnt if p.grad is not None]
        adam(
            self.learnt,
            grads,
            moments[0],
            moments[1],
            [],
            moments[2],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )
