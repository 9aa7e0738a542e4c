"""Erasers at work: a plan of what is done at each site, and the runtime that does it.

Plain classes that hold no pipeline, so that a model that is copied or pickled carries its own. Strengths lie in one
tensor, and nothing that a compiled graph would look at changes with their values.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuraleraser.eraser.batched import BatchedGates
from neuraleraser.eraser.eraser import Eraser
from neuraleraser.eraser.plan import Plan, SitePlan, make_plan
from neuraleraser.eraser.trace import Opening, Trace, TracedCall
from neuraleraser.eraser.traces import Traces
from neuraleraser.errors import (
    ConceptRefusedError,
    ConceptRemainsWarning,
    EraserNotAppliedError,
    SettingsError,
    SiteError,
    UnseenRouteWarning,
)
from neuraleraser.sites import Call, Change, EditContext, FinishedForward, Rows, Site, Step, match_rows

ERASING = ("erase", "erase_or_refuse")
"""Actions that correct."""
_STRENGTHS_HINT = "set as many strengths as the call draws images, or one for all"


@dataclass
class ErasureForward:
    """State of one forward: what its gates found.

    Parts of erasers (`Eraser.parts`) go by their numbers.

    scales: part -> strength times opening [rows], of those that may act. closed: parts that are known not to.
    deltas: by number of its group, what was made at one site and is added at others, too. openings: for the trace.
    """

    scales: dict[int, Tensor] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)
    deltas: dict[int, Tensor] = field(default_factory=dict)
    openings: list[Opening] = field(default_factory=list)


@dataclass
class ErasureCall:
    """State of one call: its images in the trace, those that are refused, and its last step.

    delta: change of the prediction in that step [images, ...], None for none. Where guidance takes two forwards, the
    second repeats what the first found, so that both move alike.
    held: part -> how far its image gate has been open for each image [images], at most, times the strength. warned:
    parts whose concept stays in a start image, of which was warned.
    """

    call: Call
    trace: Trace
    images: TracedCall
    refused: dict[int, set[int]] = field(default_factory=dict)
    step: Step | None = None
    delta: Tensor | None = None
    held: dict[int, Tensor] = field(default_factory=dict)
    warned: set[int] = field(default_factory=set)


class ErasureRuntime:
    """Some erasers, what each does (`attach.ACTIONS`), their strengths, and their traces.

    edits: the edit of each site. strengths: [parts, images], or [parts, 1]: the same for all images.
    """

    def __init__(
        self, erasers: Sequence[Eraser], strengths: Tensor, device: torch.device, traces: Traces, actions: Sequence[str]
    ) -> None:
        self.erasers, self.actions, self.traces = list(erasers), list(actions), traces
        self.parts = [part for e in erasers for part in e.parts]
        self.eraser_of = [i for i, e in enumerate(erasers) for _ in e.parts]
        self.part_actions = ["erase" if actions[i] in ERASING else actions[i] for i in self.eraser_of]
        self.refusing = {k for k, action in enumerate(self.part_actions) if action == "refuse"}
        # An order set by content, so that sums have the same bits in whatever order erasers are given.
        keys = [(e.content_hash, strengths[i].tolist()) for i, e in enumerate(erasers)]
        self.order = sorted(range(len(self.parts)), key=lambda k: keys[self.eraser_of[k]])
        self.plans: dict[torch.device, Plan] = {}
        self.plan = self.plan_for(device)
        self.edits = {site: SiteEdit(self, site, plan) for site, plan in self.plan.sites.items()}
        self.set_strengths(strengths)
        self.named_routes: set[str] = set()  # those that were warned of

    def plan_for(self, device: torch.device) -> Plan:
        """Return the plan with tensors on `device`, made once."""
        if device not in self.plans:
            self.plans[device] = make_plan(self.parts, self.part_actions, self.order, device)
        return self.plans[device]

    def set_strengths(self, strengths: Tensor) -> None:
        """Take these strengths from the next call on. Values change in a tensor, so no graph is compiled again."""
        self.strengths_cpu = strengths.cpu()[self.eraser_of]  # of each part
        self.strengths = self.strengths_cpu.to(self.plan.device)
        self.zero_strength = (self.strengths_cpu == 0).all(1).tolist()  # known here, so that no device is asked

    def move(self, device: torch.device) -> None:
        """Follow the pipeline to another device."""
        self.plan = self.plan_for(device)
        self.strengths = self.strengths.to(device)
        for site, edit in self.edits.items():
            edit.plan = self.plan.sites[site]

    # --- calls: the observer of `HookedEdits`

    def new_state(self) -> ErasureForward:
        """Return the state of a new forward."""
        return ErasureForward()

    def on_call_start(self, call: Call) -> ErasureCall:
        """Number the images of a new call in its trace."""
        if not call.routes <= self.named_routes:
            self._name_routes(call.routes)
        trace = self.traces.of(call.pipeline)
        return ErasureCall(call, trace, trace.start_call(call))

    def _name_routes(self, routes: frozenset[str]) -> None:
        """Warn once of each route that not all gates see."""
        for route in sorted(routes - self.named_routes):
            blind = [e.name for e in self.erasers if route not in e.routes]
            if blind:
                warnings.warn(
                    f"this call uses a route that the gate of {', '.join(blind[:8])} does not see ({route}): what "
                    "comes in by it stays in the picture. Look at the picture with a judge, or withhold it",
                    UnseenRouteWarning,
                    stacklevel=2,
                )
        self.named_routes |= routes

    def on_forward_start(self, call: ErasureCall, rows: Rows) -> None:
        """SettingsError where strengths by image meet a call that draws another number of images."""
        images = self.strengths_cpu.shape[1]
        if images > 1 and rows.images != images:
            raise SettingsError(f"strengths for {images} images, but this call draws {rows.images}: {_STRENGTHS_HINT}")

    def on_forward_end(
        self, call: ErasureCall, rows: Rows, state: ErasureForward, finished: FinishedForward
    ) -> Tensor | None:
        """Note what fired, and return the change of the prediction [rows, ...] that open image gates make.

        Raises ConceptRefusedError where a refusing eraser fired, as soon as it does, in a pipeline's call.
        """
        if state.openings:
            call.trace.add(call.images, rows, state.openings)
            if self.refusing and self._refuse(call, rows, state.openings) and call.call.pipeline is not None:
                self._raise_refused(call)
        if not self.plan.guided:
            return None
        if call.step is None or not call.step.is_of(finished.call):
            call.step, call.delta = finished.step, self._guide(call, rows, state, finished)
        return None if call.delta is None else torch.cat([call.delta] * len(rows.counts))

    def _guide(self, call: ErasureCall, rows: Rows, state: ErasureForward, finished: FinishedForward) -> Tensor | None:
        """Return the sum of the changes of the prediction [images, ...]; None where no image gate is or was open.

        Once open, an image stays open: what the gate saw in one step it may miss in the next, when less of it is left.
        """
        total: Tensor | None = None
        for part, guided in self.plan.guided.items():
            scale = state.scales.get(part)
            if scale is not None:
                scale = match_rows(scale, rows.size).view(-1, rows.images).amax(0)  # an image's rows alike
                before = call.held.get(part)
                call.held[part] = scale if before is None else torch.maximum(scale, before)
            images = call.held[part].nonzero()[:, 0].tolist() if part in call.held else []
            if images:
                self._check_start(call, part, images)
                first = (len(rows.counts) - 1) * rows.images
                delta = guided.delta(finished, [first + image for image in images])
                if total is None:
                    total = delta.new_zeros(rows.images, *delta.shape[1:])
                factor = call.held[part][images].to(delta).view(-1, *[1] * (delta.ndim - 1))
                total = total.index_add(0, torch.tensor(images, device=delta.device), factor * delta)
        return total

    def _check_start(self, call: ErasureCall, part: int, images: Sequence[int]) -> None:
        """Warn, or raise ConceptRefusedError, where these images start from too much of the concept to erase it."""
        eraser = self.eraser_of[part]
        least, strength = self.erasers[eraser].header.least_strength, call.call.strength
        shown = [image for image in images if image < call.images.real]
        if least is None or strength is None or strength >= least or not shown:
            return
        if self.actions[eraser] == "erase_or_refuse":
            for image in shown:
                call.refused.setdefault(image, set()).add(part)
            self._raise_refused(call)
        if part not in call.warned:
            call.warned.add(part)
            warnings.warn(
                f"the start image of {len(shown)} of these images shows {self.parts[part].name}, and at strength "
                f"{strength:g} some of it stays: from {least:g} on it was erased. Pass that strength, or the action "
                '"erase_or_refuse"',
                ConceptRemainsWarning,
                stacklevel=2,
            )

    def on_decode(self, call: ErasureCall) -> None:
        """Raise ConceptRefusedError for a loop over the modules, which may go on after a forward that is refused, but
        not draw."""
        if call is not None and call.refused:
            self._raise_refused(call)

    def _refuse(self, call: ErasureCall, rows: Rows, openings: Sequence[Opening]) -> bool:
        """Note the images in which an eraser refuses; return True if there are any."""
        for o in openings:
            if self.refusing.isdisjoint(o.erasers):
                continue
            image_of, images = rows.image_of(len(o.opening)), self.strengths_cpu.shape[1]
            for row, column in o.opening.detach().cpu().nonzero().tolist():  # waits for the device
                image, eraser = image_of[row], o.erasers[column]
                if eraser in self.refusing and self.strengths_cpu[eraser, image % images] > 0:
                    call.refused.setdefault(image, set()).add(eraser)
        return bool(call.refused)

    def _raise_refused(self, call: ErasureCall) -> None:
        names = {
            image: list(dict.fromkeys(call.trace.names[self.eraser_of[part]] for part in sorted(found)))
            for image, found in sorted(call.refused.items())
            if image < call.images.real
        }
        which = "; ".join(f"image {image}: {', '.join(found)}" for image, found in list(names.items())[:8])
        raise ConceptRefusedError(
            f"refused, as an erased concept fired ({which}), and no image is returned: pass another prompt, or draw "
            "the other images again without it",
            names,
        )

    # --- forwards

    def scaled_openings(self, erasers: Sequence[int], opening: Tensor, rows: Rows) -> Tensor:
        """Return strength times opening [rows, erasers]."""
        every = len(erasers) == len(self.strengths) == 1  # nothing to choose from, and choosing is the dearest part
        own = (self.strengths if every else self.strengths[list(erasers)]).mT.to(opening)
        if own.shape[0] > 1:
            own = own[torch.tensor(rows.image_of(len(opening)), device=own.device)]
        return own * opening


class SiteEdit:
    """The edit of one site: gates that look here, then corrections that act here."""

    def __init__(self, runtime: ErasureRuntime, site: Site, plan: SitePlan) -> None:
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

    def _run_gates(self, plan: SitePlan, x: Tensor, context: EditContext[ErasureForward]) -> Tensor:
        """Ask the gates, note which are open, and return their evidence."""
        runtime, forward = self.runtime, context.forward
        assert plan.gates is not None
        erasers, timestep = plan.gate_erasers, _looked_up(context.timestep)
        opening, evidence, z = plan.gates(x, timestep, context.grid)
        for tokens, columns in plan.gate_tokens:
            if context.text_tokens is not None and context.text_tokens > tokens:
                opening, evidence = self._read_in_parts(plan.gates, tokens, columns, context, opening, evidence)
        mask = self._drawn_rows(context.rows, opening)
        if mask is not None:
            opening = opening * (mask if plan.pictures is None else torch.maximum(mask, plan.pictures.to(mask)))
        compiling = torch.compiler.is_compiling()
        # Which are open at all: asking costs nothing on a CPU, and would stall a GPU.
        asked = not compiling and opening.device.type == "cpu"
        opened: list[bool] = opening.any(0).tolist() if asked else [True] * len(erasers)
        if True in opened:
            heat = None
            if runtime.traces.heat:
                heat = torch.where(opening.unsqueeze(1) > 0, plan.gates.evidence_by_position(z), 0)
            forward.openings.append(Opening(erasers, timestep, opening, heat))
            table = runtime.scaled_openings(erasers, opening, context.rows)
            for group in plan.same_features:
                table = _largest_alone(table, group)
            for column, i in enumerate(erasers):
                if opened[column] and (compiling or not runtime.zero_strength[i]):
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
        opening: Tensor,
        evidence: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return opening and evidence [rows, erasers], those of `columns` (bool [erasers]) the largest of all parts of
        the text."""
        timestep = _looked_up(context.timestep)
        found = [gates(x, timestep) for x in context.read_chunks(tokens)]
        widest = torch.stack([part for part, _, _ in found]).amax(0)
        strongest = torch.stack([part for _, part, _ in found]).amax(0)
        return torch.where(columns, widest, opening), torch.where(columns, strongest, evidence)

    def _drawn_rows(self, rows: Rows, opening: Tensor) -> Tensor | None:
        """Return 1 for rows whose prompt is drawn and 0 for others [rows, 1]; None if all are drawn."""
        if all(rows.counts):
            return None
        if not torch.compiler.is_compiling() and self.mask is not None and self.mask[0] is rows:
            known = self.mask[1]
            if len(known) == len(opening) and known.device == opening.device:
                return known
        mask = torch.tensor(rows.rows_with_prompt(len(opening)), device=opening.device).to(opening).unsqueeze(1)
        if not torch.compiler.is_compiling():
            self.mask = rows, mask
        return mask


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
