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


def added(out: Tensor, delta: Tensor, spare: bool = False) -> Tensor:
    """`out` plus delta [B, positions, d], in the dtype and the strides of `out`, with its very bits where delta is 0.

    Of -0.0 + 0.0 the sign would be lost. 0 - delta is +0.0 for either zero, and what +0.0 is taken from keeps its bits;
    other values are added exactly as by a plus, and so are gradients. A delta that is `spare` may be written into:
    where nothing learns, the sum takes its memory, since new memory costs as much as the arithmetic.
    """
    delta = from_positions(delta, out).to(out.dtype)
    overlapping = any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True))
    alike = delta.stride() == out.stride() and not overlapping
    learns = torch.is_grad_enabled() and (out.requires_grad or delta.requires_grad)
    if spare and alike and not learns and not torch.compiler.is_compiling():
        return torch.sub(out, torch.sub(delta.new_zeros(()), delta, out=delta), out=delta)
    new = out - (0 - delta)
    # Kernels are chosen by strides, and another kernel gives other bits: keep the layout of the output.
    if new.stride() != out.stride() and not overlapping:
        new = out.new_empty_strided(out.shape, out.stride()).copy_(new)
    return new


def swapped(output: Any, old: Tensor, new: Tensor) -> Any:
    """`output` with `new` wherever it held `old`: a down block returns its output twice, once as a skip."""
    if output is old:
        return new
    if isinstance(output, tuple):
        return tuple(swapped(part, old, new) for part in output)
    if isinstance(output, dict):  # diffusers' and transformers' output classes
        return type(output)(**{key: swapped(part, old, new) for key, part in output.items()})
    return output
