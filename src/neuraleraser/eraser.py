"""The eraser: a few features that detect a concept, a gate, and an edit; attached to a pipeline in one line.

    eraser = Eraser.load("van-gogh.safetensors")
    with attach(pipe, eraser):
        image = pipe("a cat in Van Gogh style").images[0]

The law of the edit (DESIGN.md, law 2): x' = x + strength * gate * delta. The gate looks at one site with a few
SAE features, each firing against its own threshold, and pools their evidence over the image's own positions;
where it stays shut nothing is added, and the image keeps its bits. No row sees another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuraleraser import artifact
from neuraleraser.errors import FileError, NotApplied, SettingsError
from neuraleraser.sites import Call, Site, edit

MODES = ("scale", "replace", "learnt")
MAX_STRENGTH = 2.0


def nearest(times: Tensor, timestep: Tensor) -> Tensor:
    """Index of the nearest entry of ascending `times` [T] for each timestep [B] -> int64 [B], on the device."""
    middles = (times[1:] + times[:-1]) / 2
    return torch.bucketize(timestep.contiguous(), middles.to(timestep.device))


@dataclass(frozen=True)
class Gate:
    """When an eraser acts: selected features at one site, their pooled evidence, and its bounds by timestep.

    evidence = sum_i weight_i * (mean of z_i over its strongest `share` of positions), with
    z_i = pre_i where pre_i = row_i . x + bias_i exceeds threshold_i, else 0;
    gate = clamp((evidence - low_t) / (high_t - low_t), 0, 1): exactly 0 up to low_t.

    features int64 [f]: the features' numbers in their SAE; rows [f, d], bias [f], threshold [f] (>= 0),
    weight [f] (>= 0); times [T] ascending, low and high [T], 0 <= low < high.
    """

    site: Site
    features: Tensor
    rows: Tensor
    bias: Tensor
    threshold: Tensor
    weight: Tensor
    share: float
    times: Tensor
    low: Tensor
    high: Tensor

    def fires(self, x: Tensor) -> Tensor:
        """Activation of each selected feature: x [B, P, d] -> z [B, P, f]."""
        pre = torch.nn.functional.linear(x, self.rows.to(x.dtype), self.bias.to(x.dtype))
        return torch.where(pre > self.threshold.to(x.dtype), pre, torch.zeros_like(pre))

    def evidence(self, x: Tensor) -> Tensor:
        """x [B, P, d] -> pooled evidence [B]."""
        z = self.fires(x)
        if self.share < 1:
            z = z.topk(max(1, round(z.shape[1] * self.share)), 1).values
        return z.mean(1) @ self.weight.to(x.dtype)

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        """How far the gate is open for each row: x [B, P, d], timestep [B] -> [B] in 0..1."""
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()  # a bound a few bits wide would flicker
        index = nearest(self.times, timestep)
        low, high = (v.to(x.dtype).index_select(0, index) for v in (self.low, self.high))
        return ((self.evidence(x) - low) / (high - low)).clamp(0, 1)


@dataclass(frozen=True)
class Correction:
    """What an eraser changes at one site. Tensors by mode, T' time bins `times` [T'] ascending:

    scale    delta = sum_i (factor_ti - 1) z_i d_i: rows [f, d], bias, threshold [f], decoder [f, d],
             factor [T', f].
    replace  delta = (c_t - x) Q Q^T at positions where a selected feature fires: rows, bias, threshold,
             basis Q [d, q] (orthonormal, spans the selected decoder rows), centre [T', d].
    learnt   delta = x V_t U_t + b_t: down V [T', d, r], up U [T', r, d], bias_out b [T', d].
    """

    site: Site
    mode: str
    times: Tensor
    tensors: Mapping[str, Tensor]

    def delta(self, x: Tensor, timestep: Tensor) -> Tensor:
        """x [B, P, d], timestep [B] -> delta [B, P, d]; reads no other row and copies no other position."""
        t = {k: v.to(x.dtype) for k, v in self.tensors.items()}
        index = nearest(self.times, timestep)
        if self.mode == "learnt":
            low = torch.bmm(x, t["down"].index_select(0, index))
            return torch.baddbmm(
                t["bias_out"].index_select(0, index).unsqueeze(1), low, t["up"].index_select(0, index)
            )
        pre = torch.nn.functional.linear(x, t["rows"], t["bias"])
        z = torch.where(pre > t["threshold"], pre, torch.zeros_like(pre))
        if self.mode == "scale":
            factor = t["factor"].index_select(0, index).unsqueeze(1)
            return (z * (factor - 1)) @ t["decoder"]
        fires = (z > 0).any(-1, keepdim=True)
        gap = (t["centre"].index_select(0, index).unsqueeze(1) - x) @ t["basis"] @ t["basis"].T
        return torch.where(fires, gap, torch.zeros_like(gap))


@dataclass(frozen=True)
class Eraser:
    """The gate and the corrections of one concept, with all that is needed to apply them; a file of kilobytes.

    `header` holds what a reader wants to know: concept, kind, base model, time scale, how it was fitted and
    what was measured. Plain JSON values.
    """

    gate: Gate
    corrections: tuple[Correction, ...]
    header: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The concept's name."""
        return str(self.header["concept"])

    @property
    def key(self) -> str:
        """A hash of everything that acts: erasers are added in its order, whatever order they are given in."""
        h = hashlib.sha256()
        for name, tensor in sorted(self._tensors().items()):
            h.update(name.encode())
            h.update(tensor.detach().cpu().float().numpy().tobytes())
        return h.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        g = self.gate
        names = ("features", "rows", "bias", "threshold", "weight", "times", "low", "high")
        out = {f"gate/{n}": getattr(g, n) for n in names}
        for i, c in enumerate(self.corrections):
            out[f"edit{i}/times"] = c.times
            out |= {f"edit{i}/{k}": v for k, v in c.tensors.items()}
        return out

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; floats in half precision but for the gate, whose bounds are exact."""
        tensors = {
            k: v.half() if v.is_floating_point() and k.startswith("edit") and not k.endswith("times") else v
            for k, v in self._tensors().items()
        }
        header = dict(self.header) | {
            "gate": {"site": str(self.gate.site), "share": self.gate.share},
            "edits": [{"site": str(c.site), "mode": c.mode} for c in self.corrections],
        }
        artifact.save(path, "eraser", tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> Eraser:
        """Read an eraser. Raises FileError for a file that is not one, or one whose parts do not fit."""
        tensors, header = artifact.load(path, "eraser")
        try:
            t = {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}
            names = ("features", "rows", "bias", "threshold", "weight", "times", "low", "high")
            gate = Gate(
                site=Site.parse(header["gate"]["site"]),
                share=float(header["gate"]["share"]),
                **{n: t[f"gate/{n}"] for n in names},
            )
            edits = tuple(
                Correction(
                    Site.parse(e["site"]),
                    str(e["mode"]),
                    t[f"edit{i}/times"],
                    {
                        k.split("/", 1)[1]: v
                        for k, v in t.items()
                        if k.startswith(f"edit{i}/") and not k.endswith("/times")
                    },
                )
                for i, e in enumerate(header["edits"])
            )
            str(header["concept"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"{path} is no complete eraser ({error!r} is missing or malformed): make it again"
            ) from error
        eraser = cls(gate, edits, {k: v for k, v in header.items() if k not in ("gate", "edits")})
        eraser._check(path)
        return eraser

    def _check(self, path: str | Path) -> None:
        g = self.gate
        f, n = len(g.features), len(g.times)
        ok = g.rows.ndim == 2 and all(v.shape == (f,) for v in (g.rows[:, 0], g.bias, g.threshold, g.weight))
        ok = ok and n > 0 and g.low.shape == g.high.shape == g.times.shape and bool((g.high > g.low).all())
        ok = ok and bool((g.low >= 0).all()) and bool((g.times.diff() > 0).all()) and 0 < g.share <= 1
        ok = ok and bool((g.threshold >= 0).all()) and bool((g.weight >= 0).all())
        for c in self.corrections:
            shapes = {k: tuple(v.shape) for k, v in c.tensors.items()}
            bins = len(c.times)
            if c.mode == "learnt" and shapes.keys() == {"down", "up", "bias_out"}:
                d, r = shapes["down"][1:] if len(shapes["down"]) == 3 else (0, 0)
                ok = ok and shapes == {"down": (bins, d, r), "up": (bins, r, d), "bias_out": (bins, d)}
            elif c.mode == "scale" and shapes.keys() == {"rows", "bias", "threshold", "decoder", "factor"}:
                ok = (
                    ok
                    and shapes["rows"] == shapes["decoder"]
                    and shapes["factor"] == (bins, shapes["rows"][0])
                )
            elif c.mode == "replace" and shapes.keys() == {"rows", "bias", "threshold", "basis", "centre"}:
                ok = (
                    ok
                    and shapes["centre"] == (bins, shapes["rows"][1])
                    and shapes["basis"][0] == shapes["rows"][1]
                )
            else:
                ok = False
        if not ok:
            raise FileError(
                f"{path} is an eraser whose parts do not fit together: it is damaged, make it again"
            )


@dataclass
class Trace:
    """What fired while erasers were attached: for each denoiser call the timestep and how far each gate opened.

    Rows are images; with guidance in one batch a call has twice as many rows, and image i owns rows i and i + B.
    """

    names: list[str]
    batch: int = 0
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(timestep [], opening [images of the batch, erasers]) for each call of the current batch."""
    fired: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    """Image -> eraser -> the timesteps at which its gate opened."""
    _first: int = 0
    _real: int = 0

    def begin(self, first: int, real: int) -> None:
        """A batch starts: images `first` ... `first + real - 1` (pass as `generate(on_batch=...)`)."""
        self.finish()
        self._first, self._real, self.calls = first, real, []

    def note(self, timestep: Tensor, opening: Tensor) -> None:
        """opening [rows, erasers] at `timestep` [rows]."""
        self.calls.append((timestep.detach(), opening.detach()))

    def finish(self) -> None:
        """Turn the calls of the last batch into `fired`."""
        for timestep, opening in self.calls:
            rows = opening.shape[0]
            if not self._real:
                self._real = rows
            for row, which in (opening > 0).nonzero().tolist():
                # Padding rows belong to no image; the guidance halves of an image share its index.
                for size in (rows // 2, rows):
                    image = row % size if size else row
                    if rows == size or rows == 2 * self.batch:
                        break
                if image < self._real:
                    entry = self.fired.setdefault(self._first + image, {})
                    entry.setdefault(self.names[which], []).append(float(timestep[row]))
        self.calls = []


def _strengths(erasers: Sequence[Eraser], strength: float | Sequence[float]) -> list[float]:
    values = (
        [float(strength)] * len(erasers)
        if isinstance(strength, (int, float))
        else [float(s) for s in strength]
    )
    if len(values) != len(erasers) or not all(0 <= s <= MAX_STRENGTH for s in values):
        raise SettingsError(
            f"strengths {values} for {len(erasers)} erasers: pass one each, from 0 to {MAX_STRENGTH:g}"
        )
    return values


@contextmanager
def attach(
    pipe: Any,
    erasers: Eraser | Sequence[Eraser],
    strength: float | Sequence[float] = 1.0,
    *,
    detect_only: bool = False,
    batch: int = 0,
) -> Iterator[Trace]:
    """Context manager: erase while it is open; afterwards the pipeline gives the bits it gave before.

    `strength` (one, or one an eraser) is 0 for nothing, 1 as fitted, up to 2. `detect_only` changes nothing
    and only notes what would have fired. `batch` is the number of images in a call where it is known, so that
    the trace can tell guidance halves from images. Yields the `Trace`.

    Raises SettingsError for a strength out of range, SiteError for a site the pipeline has not, NotApplied
    before an image is returned if an eraser did not run.
    """
    many = [erasers] if isinstance(erasers, Eraser) else list(erasers)
    values = _strengths(many, strength)
    order = sorted(range(len(many)), key=lambda i: many[i].key)
    trace = Trace([e.name for e in many], batch)
    if not many:
        yield trace
        return
    device = next(
        iter(pipe.components[n] for n in ("unet", "transformer") if pipe.components.get(n) is not None)
    )
    placed = [_to(e, next(device.parameters()).device) for e in many]
    gates: dict[Site, list[int]] = {}
    edits: dict[Site, list[tuple[int, Correction]]] = {}
    for i in order:
        gates.setdefault(placed[i].gate.site, []).append(i)
        for c in placed[i].corrections if not detect_only else ():
            edits.setdefault(c.site, []).append((i, c))
    last = len(gates)

    def at(site: Site) -> Callable[[Tensor, Call], Tensor | None]:
        here, work = gates.get(site, []), edits.get(site, [])

        def change(x: Tensor, call: Call) -> Tensor | None:
            memo: dict[int, Tensor] = call.memo.setdefault("gates", {})
            for i in here:
                memo[i] = placed[i].gate(x, call.timestep)
            if here:
                call.memo["seen"] = call.memo.get("seen", 0) + 1
                if call.memo["seen"] == last:
                    trace.note(call.timestep, torch.stack([memo[i] for i in range(len(placed))], -1))
            total: Tensor | None = None
            for i, c in work:
                if i not in memo:
                    raise NotApplied(
                        f"{site} ran before {placed[i].gate.site}, whose gate it waits for: swap the sites"
                    )
                if values[i] == 0 or (
                    x.device.type == "cpu" and not torch.compiler.is_compiling() and not memo[i].any()
                ):
                    continue  # exactly 0; asking costs nothing on a CPU, and would stall a GPU
                part = c.delta(x, call.timestep) * (values[i] * memo[i].to(x.dtype)).view(-1, 1, 1)
                total = part if total is None else total + part
            return total

        return change

    with edit(pipe, {site: at(site) for site in {**gates, **edits}}):
        yield trace
    trace.finish()


def _to(eraser: Eraser, device: torch.device) -> Eraser:
    """The eraser with its tensors on `device`."""
    g = eraser.gate
    gate = Gate(
        g.site,
        *(v.to(device) for v in (g.features, g.rows, g.bias, g.threshold, g.weight)),
        g.share,
        *(v.to(device) for v in (g.times, g.low, g.high)),
    )
    edits = tuple(
        Correction(c.site, c.mode, c.times.to(device), {k: v.to(device) for k, v in c.tensors.items()})
        for c in eraser.corrections
    )
    return Eraser(gate, edits, eraser.header)
