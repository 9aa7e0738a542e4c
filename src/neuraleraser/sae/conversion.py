"""Conversion of another library's SAE into one whose features stand alone."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from neuraleraser.errors import DataError, FileError, SettingsError
from neuraleraser.sae.model import SAE

_NORM_TOLERANCE = 1e-5  # rows nearer than this to norm 1 are left as they are
_CHUNK = 2**24  # activations of features held at a time


@dataclass(frozen=True)
class Source:
    """An SAE as its own library runs it on x [M, d], in float64:

        u     = x, or standardised for each vector by itself (`scaling`)
        pre   = (u - b_dec) W_enc^T + b_enc       without - b_dec where `subtracts` is False
        rank  = pre, or pre * ||row of W_dec|| where `by_norm`
        z     = rank where rank > threshold and rank > 0; with no threshold, where it is one of the k largest
        x_hat = z W_dec + b_dec, standardising undone; rows of W_dec divided by their norms where `by_norm`

    `scaling` "layer_norm" takes a vector's mean away and divides by its standard deviation (+ 1e-5); "norm"
    divides by ||x|| / sqrt(d).
    """

    W_enc: Tensor  # [n, d]
    b_enc: Tensor  # [n]
    W_dec: Tensor  # [n, d]
    b_dec: Tensor  # [d]
    threshold: Tensor | None = None  # [n]
    k: int | None = None
    subtracts: bool = True
    by_norm: bool = False
    scaling: Literal["none", "layer_norm", "norm"] = "none"

    def like(self, x: Tensor) -> Source:
        """The same in the dtype and on the device of x."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v.to(x) for name, v in tensors.items() if isinstance(v, Tensor)})

    def standardise(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [M, d], and the scale and mean [M, 1] that it was made with."""
        mean = x.mean(1, keepdim=True) if self.scaling == "layer_norm" else torch.zeros_like(x[:, :1])
        if self.scaling == "layer_norm":
            scale = x.std(1, keepdim=True) + 1e-5
        elif self.scaling == "norm":
            scale = x.norm(dim=1, keepdim=True) / x.shape[1] ** 0.5
        else:
            scale = torch.ones_like(mean)
        return (x - mean) / scale, scale, mean

    def encode(self, u: Tensor) -> Tensor:
        """Standardised u [M, d] -> z [M, n]."""
        pre = linear(u - self.b_dec if self.subtracts else u, self.W_enc, self.b_enc)
        rank = pre * self.W_dec.norm(dim=1) if self.by_norm else pre
        if self.threshold is not None:
            return torch.where(rank > self.threshold, rank, 0.0).relu()
        top = rank.topk(self.k or 1, dim=1)
        return torch.zeros_like(rank).scatter(1, top.indices, top.values.relu())

    def decode(self, z: Tensor) -> Tensor:
        """z [M, n] -> standardised x_hat [M, d]."""
        rows = torch.nn.functional.normalize(self.W_dec, dim=1) if self.by_norm else self.W_dec
        return z @ rows + self.b_dec


def to_sae(source: Source, path: Path, x: Tensor | None, header: dict[str, Any]) -> SAE:
    """The SAE that `source`, read from `path`, is; thresholds of its own come from activations x [M, d].

    With thresholds in the file and no scaling of single vectors the two are equal, and x is not used. Else every
    feature's threshold is set so that it fires as often on x as the source says (law 4: features stand alone), and
    the header gets what was measured on the quarter of x that was held out. Raises SettingsError where x is needed
    and None, DataError where it is no activations, FileError where the weights overflow.
    """
    if source.threshold is not None and source.scaling == "none":
        tensors, unit = _fold_statistics(source, 1.0, 0.0)
        return _sae(tensors, source.threshold * unit, header, path)
    if x is None:
        rule = "scales every vector by itself" if source.scaling != "none" else f"keeps the {source.k} largest features"
        raise SettingsError(
            f"{path} {rule}, so it has no thresholds for features to fire by: "
            f"pass calibrate=activations [M, {source.W_enc.shape[1]}] recorded at its site"
        )
    if x.ndim != 2 or x.shape[1] != source.W_enc.shape[1] or len(x) < 4 or not x.is_floating_point():
        raise DataError(
            f"calibrate has shape {tuple(x.shape)}, {x.dtype}: {path} takes activations [M, {source.W_enc.shape[1]}], "
            "M >= 4 and better tens of thousands"
        )
    if bad := int((~torch.isfinite(x)).sum()):
        raise DataError(f"{bad} of {x.numel()} values in calibrate are NaN or infinite")
    with torch.no_grad():
        return _calibrate(source, path, x.float(), header)


def _fold_statistics(source: Source, scale: float, mean: float) -> tuple[dict[str, Tensor], Tensor]:
    """Our tensors for a source that standardises every vector by this scale and mean; `unit` [n], what 1 in
    the source's ranking is in our activations.

    A row of W_dec of norm 0 shows nothing when its feature fires: it becomes a feature that never does.
    """
    norm = source.W_dec.norm(dim=1)
    norm = torch.where((norm - 1).abs() <= _NORM_TOLERANCE, 1.0, norm)
    void = norm == 0
    rows = source.W_dec / torch.where(void, 1.0, norm)[:, None]
    rows[void, 0] = 1.0
    W, gain = source.W_enc * norm[:, None], scale * norm
    bias = source.b_enc
    if not source.subtracts:
        bias = bias + source.W_enc @ source.b_dec
    b, b_dec = bias * gain, source.b_dec
    if source.scaling != "none":
        if source.scaling == "layer_norm":
            centred = W - W.mean(1, keepdim=True)  # (x - its mean) W^T = x centred^T
            b = b + scale * ((centred - W) @ source.b_dec)
            W = centred
        b_dec = scale * b_dec + mean
    unit = torch.full_like(gain, scale) if source.by_norm else gain
    return {"W_enc": W, "b_enc": b, "W_dec": rows, "b_dec": b_dec}, unit


def _calibrate(source: Source, path: Path, x: Tensor, header: dict[str, Any]) -> SAE:
    """The SAE with thresholds from three quarters of x, and how far it and the source differ on the last quarter."""
    held = torch.arange(len(x), device=x.device) % 4 == 3
    fit, rest = x[~held], x[held]
    _, scales, means = source.standardise(fit)
    typical = (1.0, 0.0) if source.scaling == "none" else (float(scales.median()), float(means.mean()))
    tensors, unit = _fold_statistics(source, *typical)
    here = source.like(x)
    count = torch.zeros(len(unit), dtype=torch.int64, device=x.device)
    cut = 0.0
    for part in fit.split(_rows_at_once(len(unit))):
        z = here.encode(here.standardise(part)[0])
        count += (z > 0).sum(0)
        cut += float(torch.where(z > 0, z, torch.inf).amin(1).nan_to_num(posinf=0.0).sum())
    # A feature that never fired has to beat all it showed, and what a feature had to beat on average.
    own = cut / len(fit) if source.threshold is None else source.threshold
    floor = (own * unit).to(x)
    ours = {name: t.to(x) for name, t in tensors.items()}
    centred = (fit - ours["b_dec"]).T
    threshold = []
    for part in torch.arange(len(unit), device=x.device).split(_rows_at_once(len(fit))):
        pre = ours["W_enc"][part] @ centred + ours["b_enc"][part, None]
        c = count[part, None]
        top = pre.topk(min(len(fit), int(c.max()) + 1), dim=1).values
        inside = top.gather(1, (c - 1).clamp(min=0))[:, 0]
        outside = top.gather(1, c.clamp(max=top.shape[1] - 1))[:, 0]
        between = torch.where(count[part] == len(fit), 0.0, (inside + outside) / 2)
        threshold.append(torch.where(count[part] == 0, torch.maximum(outside, floor[part]), between))
    sae = _sae(tensors, torch.cat(threshold).cpu(), header, path).to(x.device)
    sae.header["calibration"] = {"vectors": len(fit), **_measure_difference(here, sae, rest)}
    return sae.cpu()


def _measure_difference(source: Source, sae: SAE, x: Tensor) -> dict[str, float]:
    """Return how a source and its SAE differ on x [M, d] that neither was made from."""
    both = either = theirs = ours = 0
    error = error_theirs = total = 0.0
    mean = x.double().mean(0)
    for part in x.split(_rows_at_once(sae.n_features)):
        u, scale, shift = source.standardise(part)
        a, z = source.encode(u), sae.encode(part)
        both += int(((a > 0) & (z > 0)).sum())
        theirs, ours = theirs + int((a > 0).sum()), ours + int((z > 0).sum())
        either += int(((a > 0) | (z > 0)).sum())
        error += float((part - sae.decode(z)).double().square().sum())
        error_theirs += float((part - (source.decode(a) * scale + shift)).double().square().sum())
        total += float((part.double() - mean).square().sum())
    return {
        "held_out": len(x),
        "disagreement": 1 - both / max(1, either),
        "missed": 1 - both / max(1, theirs),
        "added": 1 - both / max(1, ours),
        "l0": ours / len(x),
        "l0_source": theirs / len(x),
        "explained_variance": 1 - error / max(total, 1e-30),
        "explained_variance_source": 1 - error_theirs / max(total, 1e-30),
    }


def _rows_at_once(width: int) -> int:
    return max(1, _CHUNK // width)


def _sae(tensors: dict[str, Tensor], threshold: Tensor, header: dict[str, Any], path: Path) -> SAE:
    """The five tensors in float32, checked."""
    five = {name: t.float() for name, t in {**tensors, "threshold": threshold.clamp(min=0)}.items()}
    for name, t in five.items():
        if not bool(torch.isfinite(t).all()):
            raise FileError(f"{path} gives a {name} beyond float32 once row norms and scales are folded in")
    try:
        return SAE(**five, header=header)
    except DataError as e:
        raise FileError(f"{path} is not a sound SAE: {e}") from e
