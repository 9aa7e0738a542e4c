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


class _Add(torch.autograd.Function):
    """out + delta, with the very bits of out (-0.0 too) where delta is 0.

    The gradient is that of out + delta everywhere. torch.where alone would cut it wherever delta is 0: an
    edit that starts from zero could never be learnt, and an attack would not see a gate nearly open.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(out: Tensor, delta: Tensor) -> Tensor:
        return torch.where(delta != 0, out + delta, out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], grads[0]


def added(out: Tensor, delta: Tensor) -> Tensor:
    """`out` plus delta [B, positions, d], in the dtype and the strides of `out`."""
    delta = from_positions(delta, out).to(out.dtype)
    new: Any = _Add.apply(out, delta) if torch.is_grad_enabled() else _Add.forward(out, delta)
    # Kernels are chosen by strides, and another kernel gives other bits: keep the layout of the output.
    overlapping = any(step == 0 and size > 1 for step, size in zip(out.stride(), out.shape, strict=True))
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
