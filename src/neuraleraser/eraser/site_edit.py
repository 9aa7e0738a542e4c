"""The edit of one site: gates that look there, then corrections that act there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from neuraleraser.eraser.batched import BatchedGates
from neuraleraser.eraser.gate import SHUT_BOUND
from neuraleraser.eraser.part import Part
from neuraleraser.eraser.plan import Plan, SitePlan
from neuraleraser.eraser.trace import Opening
from neuraleraser.eraser.traces import Traces
from neuraleraser.errors import EraserNotAppliedError, SiteError
from neuraleraser.sites import Change, EditContext, Rows, Site, match_rows


@dataclass
class ErasureForward:
    """State of one forward: what its gates found.

    Parts of erasers (`Eraser.parts`) go by their numbers.

    scales: part -> strength times opening [rows], of those that may act. closed: parts that are known not to. Of gates
    that hold both are known from the start, and what they find in this forward is in `found`: part -> opening [rows].
    deltas: by number of its group, what was made at one site and is added at others, too. openings: for the trace.
    """

    scales: dict[int, Tensor] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)
    found: dict[int, Tensor] = field(default_factory=dict)
    deltas: dict[int, Tensor] = field(default_factory=dict)
    openings: list[Opening] = field(default_factory=list)


class EditOwner(Protocol):
    """Owner of the edits of all sites: `ErasureRuntime`."""

    plan: Plan
    parts: list[Part]
    traces: Traces
    zero_strength: list[bool]

    def move(self, device: torch.device) -> None:
        """Follow the pipeline to another device."""
        ...

    def scaled_openings(self, erasers: Sequence[int], opening: Tensor, rows: Rows) -> Tensor:
        """Return strength times opening [rows, erasers]."""
        ...


class SiteEdit:
    """The edit of one site: gates that look here, then corrections that act here."""

    def __init__(self, runtime: EditOwner, site: Site, plan: SitePlan) -> None:
        self.runtime, self.site, self.plan = runtime, site, plan
        self.width_checked = False
        self.mask: tuple[Rows, Tensor] | None = None

    def can_skip(self, forward: ErasureForward) -> bool:
        """Return True if all that would act here is known to be shut, so that x need not be read."""
        closed, plan = forward.closed, self.plan
        return bool(closed) and self.width_checked and plan.gates is None and plan.waits_for <= closed

    def shared_key(self) -> tuple[int, ...] | None:
        """Return the numbers of all deltas added here, if they are added at other sites, too, and nothing else is."""
        return self.plan.shared_key

    def __call__(self, x: Tensor, context: EditContext[ErasureForward], /) -> Change | None:
        runtime, forward = self.runtime, context.forward
        if not torch.compiler.is_compiling():
            if x.device != runtime.plan.device:
                runtime.move(x.device)
            self.width_checked = True
        plan = self.plan
        if x.shape[-1] != plan.width:
            raise SiteError(
                f"{self.site} is {x.shape[-1]} wide, and the eraser of {plan.width_of!r} expects {plan.width}: use it "
                "with the pipeline it was made for"
            )
        probe = None
        if plan.gates is not None:
            probe = self._run_gates(plan, x, context)
        for i in plan.waits_for:
            if i not in forward.scales and i not in forward.closed:
                raise EraserNotAppliedError(
                    f"{self.site} ran before {runtime.parts[i].gate.site}, whose gate it waits for: swap the sites"
                )
        parts: list[Tensor] = []
        for group in plan.corrections:
            scales = self._scales(forward, group.erasers, len(x))
            if scales is not None:
                delta, projected = group.correction(x, _looked_up(context.timestep), scales)
                parts.append(delta)
                if group.also:
                    forward.deltas[group.number] = delta
                if len(plan.corrections) == 1:
                    probe = projected
        for group in plan.repeated:
            delta = forward.deltas.get(group.number)
            if delta is not None:
                parts.append(self._check_same_text(delta, x))
            elif any(i in forward.scales for i in group.erasers):
                raise EraserNotAppliedError(
                    f"{self.site} ran before {group.site}, whose change it repeats: swap the sites"
                )
        if not parts:
            return None if probe is None else Change(None, probe)
        if len(parts) > 1 or len(plan.corrections) != 1:
            probe = None
        # A sum, or a delta used at this site alone, may be changed in place.
        owned = len(parts) > 1 or not (plan.repeated or any(group.also for group in plan.corrections))
        return Change(sum(parts[1:], parts[0]), probe, owned)

    def _scales(self, forward: ErasureForward, erasers: Sequence[int], rows: int) -> Tensor | None:
        """Return strength times opening [rows, erasers] of a group; None if all its gates are shut."""
        found = [forward.scales[i] for i in erasers if i in forward.scales]
        if not found:
            return None
        if len(found) < len(erasers):  # open and shut may stand together in one product
            shut = torch.zeros_like(found[0])
            found = [forward.scales.get(i, shut) for i in erasers]
        return torch.stack([match_rows(scale, rows) for scale in found], 1)

    def _check_same_text(self, delta: Tensor, x: Tensor) -> Tensor:
        if delta.shape != x.shape:
            raise EraserNotAppliedError(
                f"{self.site} holds {list(x.shape)}, where the change made for {list(delta.shape)} is to be repeated: "
                "these blocks do not read the same text"
            )
        return delta.to(x.device)

    def _run_gates(self, plan: SitePlan, x: Tensor, context: EditContext[ErasureForward]) -> Tensor | None:
        """Ask the gates, note which are open, and return their evidence; None if none need be asked."""
        runtime, forward = self.runtime, context.forward
        assert plan.gates is not None
        erasers, timestep = plan.gate_erasers, _looked_up(context.timestep)
        compiling = torch.compiler.is_compiling()
        known = not compiling and x.device.type == "cpu"  # what is in a tensor; to ask would stall a GPU
        lows = plan.gates.lows_at(timestep) if known else []
        if known and min(lows) >= SHUT_BOUND:
            forward.closed.update(i for i in erasers if i not in forward.scales)
            return None
        evidence, pre = plan.gates.evidence(x, context.grid)
        for tokens, columns in plan.gate_tokens:
            if context.text_tokens is not None and context.text_tokens > tokens:
                evidence = self._read_in_parts(plan.gates, tokens, columns, context, evidence)
        if known and all(most <= low for most, low in zip(evidence.amax(0).tolist(), lows, strict=True)):
            forward.closed.update(i for i in erasers if i not in forward.scales)
            return evidence
        low, width = plan.gates.bounds_at(timestep)
        opening = ((evidence - low) / width).clamp(0, 1)
        counts = self._rows_that_count(context.rows, opening)
        if counts is not None:
            opening = opening * counts
        opened: list[bool] = opening.any(0).tolist() if known else [True] * len(erasers)
        if True in opened:
            heat = None
            if runtime.traces.heat:
                heat = torch.where(opening.unsqueeze(1) > 0, plan.gates.evidence_by_position(pre), 0)
            forward.openings.append(Opening(erasers, timestep, opening, heat))
            table = scales_at(plan, runtime.scaled_openings(erasers, opening, context.rows))
            for column, i in enumerate(erasers):
                if opened[column] and (compiling or not runtime.zero_strength[i]):
                    if i in runtime.plan.holding:
                        forward.found[i] = opening[:, column]
                    else:
                        forward.scales[i] = table[:, column]
        if not compiling:
            forward.closed |= {i for i in erasers if i not in forward.scales}
        return evidence

    def _read_in_parts(
        self,
        gates: BatchedGates,
        tokens: int,
        columns: Tensor,
        context: EditContext[ErasureForward],
        evidence: Tensor,
    ) -> Tensor:
        """Return evidence [rows, erasers], that of `columns` (bool [erasers]) the largest of all parts of the text."""
        found = [gates.evidence(x)[0] for x in context.read_chunks(tokens)]
        return torch.where(columns, torch.stack(found).amax(0), evidence)

    def _rows_that_count(self, rows: Rows, opening: Tensor) -> Tensor | None:
        """Return 1 for rows that count and 0 for others [rows, 1 or erasers]; None if all do.

        Rows whose prompt is drawn count for all gates, others for image gates alone.
        """
        if all(rows.counts):
            return None
        kept = None if torch.compiler.is_compiling() else self.mask  # read once: threads share it
        if kept is not None and kept[0] is rows:
            known = kept[1]
            if known.shape[0] == opening.shape[0] and known.device == opening.device:
                return known
        mask = torch.tensor(rows.rows_with_prompt(len(opening)), device=opening.device).to(opening).unsqueeze(1)
        if self.plan.pictures is not None:
            mask = torch.maximum(mask, self.plan.pictures.to(mask))
        if not torch.compiler.is_compiling():
            self.mask = rows, mask
        return mask


def scales_at(plan: SitePlan, table: Tensor) -> Tensor:
    """Return strengths times openings [rows, erasers] of a site's gates, of those that are to act."""
    for group in plan.same_features:
        table = _largest_alone(table, group)
    return table


def _largest_alone(table: Tensor, columns: Sequence[int]) -> Tensor:
    """Return the table [rows, erasers] in which of these columns only the largest entry of each row is left.

    Of equal entries the first is.
    """
    part = table[:, list(columns)]
    largest = part == part.amax(1, keepdim=True)
    first = largest & (largest.cumsum(1) == 1)
    return table.index_copy(1, torch.tensor(list(columns), device=table.device), part * first)


def _looked_up(timestep: Tensor) -> Tensor:
    """Return the timesteps to look up: [B], or [1] where one number stands for all rows."""
    return timestep[:1] if timestep.stride(0) == 0 else timestep.contiguous()
