"""Fingerprint of the model that an eraser was made for: its class, the shapes at its sites, some of its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuraleraser.io.fields import are_numbers, is_line
from neuraleraser.site import Site
from neuraleraser.sites.modules import resolve

_TENSORS, _EACH = 64, 4  # weights that are looked at: of so many tensors, so many values
_MIN_TENSORS = 8  # tensors that can be compared at all (quantised and offloaded ones cannot)


@dataclass(frozen=True)
class Fingerprint:
    """Marks by which a model is known again. A mark that is empty says nothing."""

    component: str = ""
    """Name of the component that the sites lie in, such as "unet"."""
    model_class: str = ""
    """Class of the component; "class" in JSON."""
    shapes: str = ""
    """Digest of the shapes of the weights at the sites."""
    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Four values of each of some tensors, by digests of the tensors' names."""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON; `parse` reads it."""
        return {
            "component": self.component,
            "class": self.model_class,
            "shapes": self.shapes,
            "weights": {key: list(values) for key, values in self.weights.items()},
        }

    @classmethod
    def parse(cls, data: Any) -> Fingerprint:
        """Read what `as_json` returned, or a part of it. Raises ValueError for anything else."""
        if not isinstance(data, Mapping) or not data.keys() <= {"component", "class", "shapes", "weights"}:
            raise ValueError("expected component, class, shapes and weights")
        component, model_class, shapes = (data.get(name, "") for name in ("component", "class", "shapes"))
        weights = data.get("weights", {})
        if not (is_line(component) and is_line(model_class) and is_line(shapes)):
            raise ValueError("its component, class and shapes are no printable lines")
        if not isinstance(weights, Mapping) or not all(map(_are_values, weights.values())):
            raise ValueError(f"its weights are no lists of {_EACH} numbers")
        return cls(component, model_class, shapes, {key: tuple(values) for key, values in weights.items()})


def made_for(pipe: Any, sites: Sequence[Site]) -> Fingerprint:
    """Return a fingerprint of the model that a file is made for.

    It has the class of the component that `sites` lie in, a digest of the shapes of their weights, and 256 of the
    component's weights.
    """
    name = sites[0].path.split(".")[0]
    component = resolve(pipe, Site(name))
    known = {_key(path): p for path, p in _weights(component)}
    chosen = {key: known[key] for key in sorted(known)[:_TENSORS]}
    values = {key: tuple(float(f"{v:.4g}") for v in _sample_values(p)) for key, p in chosen.items() if _is_readable(p)}
    return Fingerprint(name, type(component).__name__, _shapes(pipe, sites), values)


def find_difference(pipe: Any, sites: Sequence[Site], made: Fingerprint) -> tuple[str, str]:
    """Return how the pipeline differs from the one that `made` is of.

    ("architecture", what), ("weights", what) or ("", "").

    Two sets of weights are the same where 98 in 100 of the values looked at agree to 1 %, as they do between
    float32 and bfloat16. LoRAs that are not fused count as nothing; weights that cannot be read (quantised, or
    offloaded to the meta device) count as the same. Raises SiteError where the pipeline has not the sites' component.
    """
    component = resolve(pipe, Site(sites[0].path.split(".")[0]))
    kind = type(component).__name__
    if made.model_class not in ("", kind):
        return "architecture", f"it was made for a {made.model_class[:60]}, and this is a {kind}"
    if made.shapes not in ("", _shapes(pipe, sites)):
        return "architecture", "the weights at its sites have other shapes"
    pairs = [
        (made.weights[key], _sample_values(p))
        for path, p in _weights(component)
        if (key := _key(path)) in made.weights and _is_readable(p)
    ]
    if len(pairs) < max(1, min(_MIN_TENSORS, len(made.weights))):
        return "", ""
    there, here = (np.array([pair[i] for pair in pairs], np.float64) for i in (0, 1))
    near = np.abs(there - here) <= 0.01 * np.abs(there) + 1e-3 * np.abs(there).mean()
    if near.mean() >= 0.98:
        return "", ""
    return "weights", f"{1 - near.mean():.0%} of the weights looked at are others"


def _weights(component: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Matrices and kernels by the names that they have without torch.compile and peft; no adapters."""
    for path, p in component.named_parameters():
        if p.ndim >= 2 and "lora_" not in path and ".processor." not in f".{path}":
            yield ".".join(part for part in path.split(".") if part not in ("_orig_mod", "base_layer")), p


def _key(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:8]


def _are_values(known: Any) -> bool:
    """True where these can be values of a float32 tensor, so that sums of them stay finite."""
    return are_numbers(known) and len(known) == _EACH


def _is_readable(p: Tensor) -> bool:
    plain = type(p.data) is torch.Tensor  # a subclass is packed
    return plain and p.is_floating_point() and not p.is_meta and p.numel() >= _EACH


def _sample_values(p: Tensor) -> list[float]:
    """Values at places spread over the tensor, whatever its strides."""
    flat = np.linspace(0, p.numel() - 1, _EACH + 2).astype(np.int64)[1:-1] if p.numel() > _EACH else np.arange(_EACH)
    places = tuple(torch.from_numpy(axis).to(p.device) for axis in np.unravel_index(flat, p.shape))
    return p.detach()[places].double().cpu().tolist()


def _shapes(pipe: Any, sites: Sequence[Site]) -> str:
    """A digest of the shapes of the weights in the sites' modules."""
    identity = [
        (str(site), [(path, list(p.shape)) for path, p in sorted(_weights(resolve(pipe, site)), key=lambda w: w[0])])
        for site in sorted(set(sites))
    ]
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
