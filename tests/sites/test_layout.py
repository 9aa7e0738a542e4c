"""Layouts: positions and channels there and back, and additions that keep bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuraleraser.sites.layout import add_keeping_bits, from_positions, to_positions


@pytest.mark.parametrize("owned", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_addition_keeps_bits_and_strides(layout: str, owned: bool) -> None:
    if layout == "slice":  # FLUX's single blocks return slices of one sequence
        out = torch.randn(2, 9, 4)[:, 3:]
    else:
        out = torch.randn(2, 4, 3, 5)
        out = out.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else out
    out[0, 0] = -0.0
    x = to_positions(out)
    delta = torch.zeros_like(x)
    delta[0] = -0.0
    delta[1, 2] = 1.0
    moved, before = from_positions(delta, out) != 0, out.clone()
    new = add_keeping_bits(out, delta, owned)
    assert new.stride() == out.stride() and torch.equal(out, before)
    assert torch.equal(new[moved], out[moved] + 1)
    assert torch.equal(new[~moved], out[~moved]) and torch.equal(new.signbit()[~moved], out.signbit()[~moved])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 5), min_size=3, max_size=4), st.booleans())
def test_layouts_there_and_back(shape: list[int], channels_last: bool) -> None:
    out = torch.randn(shape)
    if channels_last and len(shape) == 4:
        out = out.contiguous(memory_format=torch.channels_last)
    x = to_positions(out)
    positions = shape[1] if len(shape) == 3 else shape[2] * shape[3]
    assert x.shape == (shape[0], positions, shape[2] if len(shape) == 3 else shape[1])
    assert x.data_ptr() == out.data_ptr()  # a view, not a copy
    assert torch.equal(from_positions(x, out), out)
    assert torch.equal(from_positions(x.contiguous(), out), out)
