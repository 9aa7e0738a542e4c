"""The gate of CPE's text, the layers that add what it lets through, and the losses that train both.

Formulas and their source stand in `concept_pinpoint_eraser`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class AttentionGate:
    """Gate of a text: E [..., tokens, d] -> s (A E), which all layers map to what they add.

    query [d, g]: A = softmax((E query) (E query)'). scaler [d]: s = sigmoid(A E scaler).
    """

    query: Tensor
    scaler: Tensor

    def __call__(self, text: Tensor) -> Tensor:
        """Return the gated text, in float32 at least."""
        text = text.to(torch.promote_types(text.dtype, torch.float32))
        q = text @ self.query.to(text)
        gathered = (q @ q.mT).softmax(-1) @ text
        return torch.sigmoid(gathered @ self.scaler.to(text))[..., None] * gathered


@dataclass
class GatedLayer:
    """Layer in training: its weight [out, d] and Lipschitz factor, D [d, rank] and U [rank, out]."""

    name: str
    weight: Tensor
    factor: float
    down: Tensor
    up: Tensor

    def plain(self, text: Tensor) -> Tensor:
        """Return what the layer itself makes of texts: [..., tokens, d] -> [..., tokens, out]."""
        return text @ self.weight.T

    def added(self, gated: Tensor) -> Tensor:
        """Return what is added, given the gated text: [..., tokens, d] -> [..., tokens, out]."""
        return gated @ self.down @ self.up


def erase_loss(
    layers: Sequence[GatedLayer], gate: AttentionGate, texts: Tensor, shown: Tensor, instead: Tensor, beyond: float
) -> Tensor:
    """Return L_erase (a scalar) of texts [B, tokens, d]: the concept's, `shown` [1, tokens, d], or attacks on it."""
    gated = gate(texts)

    def apart(layer: GatedLayer) -> Tensor:
        target = layer.plain(instead) + beyond * (layer.plain(instead) - layer.plain(shown))
        return layer.plain(texts) + layer.added(gated) - target

    return _over_layers(layers, apart)


def anchor_loss(layers: Sequence[GatedLayer], gate: AttentionGate, anchors: Tensor) -> Tensor:
    """Return L_anchor (a scalar) of texts [B, tokens, d] that stay."""
    gated = gate(anchors)
    return _over_layers(layers, lambda layer: layer.added(gated))


def attack_loss(layers: Sequence[GatedLayer], gate: AttentionGate, texts: Tensor, shown: Tensor) -> Tensor:
    """Return L_attack (a scalar) of attacked texts [B, tokens, d] on the concept's, `shown` [1, tokens, d]."""
    gated = gate(texts)
    return _over_layers(layers, lambda layer: layer.plain(texts) + layer.added(gated) - layer.plain(shown))


def _over_layers(layers: Sequence[GatedLayer], apart: Callable[[GatedLayer], Tensor]) -> Tensor:
    return torch.stack([layer.factor * apart(layer).square().mean() for layer in layers]).mean()


def lipschitz_factors(unet: nn.Module, layers: Mapping[str, nn.Linear], tokens: int) -> dict[str, float]:
    """Return the factor k of each layer, a cross-attention's to_k or to_v, by the largest singular values of the
    attention's weights: of keys |O V| |Q| / tokens, of values |O|."""
    found: dict[str, float] = {}
    for name in layers:
        block, _, end = name.rpartition(".")
        q, v, o = (
            unet.get_submodule(f"{block}.{part}").weight.detach().double().cpu()  # type: ignore[union-attr]
            for part in ("to_q", "to_v", "to_out.0")
        )

        def largest(matrix: Tensor) -> float:
            return float(torch.linalg.matrix_norm(matrix, 2))

        found[name] = largest(o @ v) * largest(q) / tokens if end == "to_k" else largest(o)
    return found
