"""The layouts of activations: to [B, positions, d] and back, and a sum that keeps bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import SiteError


def to_positions(tensor: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H*W, C], [B, N, d] as it is; a view where strides allow. SiteError otherwise."""
    if tensor.ndim == 4:
        return tensor.flatten(2).transpose(1, 2)
    if tensor.ndim == 3:
        return tensor
    raise SiteError(
        f"Activations of shape {list(tensor.shape)} have no known layout: "
        "expected [B, C, H, W] or [B, N, d]. Choose a block, not a part of it."
    )


def from_positions(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_positions`, for a tensor shaped as `like`."""
    return x.transpose(1, 2).reshape(like.shape) if like.ndim == 4 else x


def add_keeping_bits(out: Tensor, delta: Tensor, owned: bool = False) -> Tensor:
    """Return `out` plus delta [B, positions, d], in the dtype and strides of `out`, bit-identical where delta is 0.

    Adding +0.0 to -0.0 changes the sign bit. `out - (0 - delta)` leaves `out` bit-identical where delta is zero; other
    values, and gradients, are those of a plain sum. The memory of a delta that is `owned` is reused where no gradient
    is needed: allocating costs as much as the arithmetic.
    """
    delta = from_positions(delta, out).to(out.dtype)
    overlapping = any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True))
    alike = delta.stride() == out.stride() and not overlapping
    learns = torch.is_grad_enabled() and (out.requires_grad or delta.requires_grad)
    if owned and alike and not learns and not torch.compiler.is_compiling():
        return torch.sub(out, torch.sub(delta.new_zeros(()), delta, out=delta), out=delta)
    new = out - (0 - delta)
    # Kernels are chosen by strides, and another kernel gives other bits: keep the layout of the output.
    if new.stride() != out.stride() and not overlapping:
        new = out.new_empty_strided(out.shape, out.stride()).copy_(new)
    return new


def replace_tensor(output: Any, old: Tensor, new: Tensor) -> Any:
    """Return `output` with `new` wherever it held `old`: a down block returns its output twice, once as a skip."""
    if output is old:
        return new
    if isinstance(output, tuple):
        return tuple(replace_tensor(part, old, new) for part in output)
    if isinstance(output, dict):  # diffusers' and transformers' output classes
        return type(output)(**{key: replace_tensor(part, old, new) for key, part in output.items()})
    return output
