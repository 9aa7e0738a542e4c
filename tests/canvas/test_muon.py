"""Muon: steps whose singular values are alike, the same for a convolution and its matrix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from neuraleraser.canvas.muon import Muon, orthogonalise


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(3, 8, 30), (2, 30, 8), (1, 16, 16)])
def test_singular_values_come_near_one_and_directions_stay(shape: tuple[int, int, int]) -> None:
    x = draw(*shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    y = orthogonalise(x).float()
    # In the matrix's own singular bases the result is nearly diagonal.
    inside = u.mT @ y @ v.mT
    diagonal = inside.diagonal(dim1=1, dim2=2)
    large = s > 0.2 * s.amax(1, keepdim=True)  # the small ones need more iterations
    assert diagonal[large].min() > 0.5 and diagonal.max() < 1.4
    off = inside - torch.diag_embed(diagonal)
    assert off.abs().max() < 0.05


def test_a_step_goes_downhill_by_adams_spread() -> None:
    weight = draw(12, 20).requires_grad_()
    before = weight.detach().clone()
    muon = Muon([weight], weight_decay=0.0)
    gradient = draw(12, 20, seed=1)
    weight.grad = gradient
    muon.step(0.1)
    change = weight.detach() - before
    assert (change * gradient).sum() < 0
    # Twelve singular values of about 1 in 240 entries, scaled by 0.2 sqrt(20).
    want = 0.1 * 0.2 * math.sqrt(20) * math.sqrt(12 / 240)
    assert change.square().mean().sqrt().item() == pytest.approx(want, rel=0.25)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_its_matrix_in_any_memory_format(memory: torch.memory_format) -> None:
    kernel = draw(6, 4, 3, 3).contiguous(memory_format=memory).requires_grad_()
    matrix = draw(6, 4, 3, 3).permute(0, 2, 3, 1).flatten(1).requires_grad_()
    a, b = Muon([kernel]), Muon([matrix])
    for step in range(3):
        gradient = draw(6, 4, 3, 3, seed=step + 1)
        kernel.grad, matrix.grad = gradient, gradient.permute(0, 2, 3, 1).flatten(1)
        a.step(1e-2)
        b.step(1e-2)
    torch.testing.assert_close(kernel.detach().permute(0, 2, 3, 1).flatten(1), matrix.detach())


def test_alike_weights_are_stepped_together_as_alone() -> None:
    together = [draw(5, 7, seed=i).requires_grad_() for i in range(2)]
    alone = [p.detach().clone().requires_grad_() for p in together]
    for i, p in enumerate([*together, *alone]):
        p.grad = draw(5, 7, seed=10 + i % 2)
    Muon(together).step(1e-2)
    for p in alone:
        Muon([p]).step(1e-2)
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q)
