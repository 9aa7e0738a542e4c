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

from neuraleraser.eraser.decisions import Decisions
from neuraleraser.eraser.eraser import Eraser
from neuraleraser.eraser.guided import HELD
from neuraleraser.eraser.plan import Plan, make_plan
from neuraleraser.eraser.site_edit import ErasureForward, SiteEdit, scales_at
from neuraleraser.eraser.trace import Opening, Trace, TracedCall
from neuraleraser.eraser.traces import Traces
from neuraleraser.errors import (
    ConceptRefusedError,
    ConceptRemainsWarning,
    SettingsError,
    UnseenRouteWarning,
)
from neuraleraser.sites import Begin, Call, FinishedForward, Rows, Step, match_rows

ERASING = ("erase", "erase_or_refuse")
"""Actions that correct."""
_STRENGTHS_HINT = "set as many strengths as the call draws images, or one for all"


@dataclass
class ErasureCall:
    """State of one call: its images in the trace, those that are refused, and its last step.

    delta: change of the prediction in that step [images, ...], None for none. Where guidance takes two forwards, the
    second repeats what the first found, so that both move alike.
    held: part -> how far its image gate has been open for each image [images], at most, times the strength. warned:
    parts whose concept stays in a start image, of which was warned. decisions: of prompt gates that hold.
    """

    call: Call
    trace: Trace
    images: TracedCall
    refused: dict[int, set[int]] = field(default_factory=dict)
    step: Step | None = None
    delta: Tensor | None = None
    held: dict[int, Tensor] = field(default_factory=dict)
    warned: set[int] = field(default_factory=set)
    looked: bool = False  # at its start images
    decisions: Decisions = field(default_factory=Decisions)


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

    repeats = True
    """Its corrections act in a forward that another attachment takes again, too."""

    def new_state(self, begin: Begin) -> ErasureForward:
        """Return the state of a new forward, in which gates that hold are as far open as `on_forward_start` said."""
        return ErasureForward(dict(begin), {i for i in self.plan.holding if i not in begin})

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

    def on_forward_start(self, call: ErasureCall, rows: Rows, text: Tensor | None, compiled: bool) -> Begin:
        """Return strength times opening [rows] of each part whose gate holds and was open; of all such if compiled.

        SettingsError where strengths by image meet a call that draws another number of images.
        """
        images = self.strengths_cpu.shape[1]
        if images > 1 and rows.images != images:
            raise SettingsError(f"strengths for {images} images, but this call draws {rows.images}: {_STRENGTHS_HINT}")
        if self.plan.holding:
            call.decisions.follow(rows, text)
        return self._begin(call, rows, compiled)

    def _begin(self, call: ErasureCall, rows: Rows, compiled: bool = False) -> Begin:
        """Return what a forward's edits begin with: see `on_forward_start`."""
        begin: dict[int, Tensor] = {}
        known = call.decisions.openings
        held = self.plan.holding if compiled else [i for i in known if not self.zero_strength[i]]
        for plan in self.plan.sites.values() if held else ():
            parts = plan.gate_erasers
            if set(parts).intersection(held):
                opening = call.decisions.by_row(rows, parts, self.plan.device)
                table = scales_at(plan, self.scaled_openings(parts, opening, rows))
                begin |= {i: table[:, column] for column, i in enumerate(parts) if i in held}
        return begin

    def on_forward_end(
        self, call: ErasureCall, rows: Rows, state: ErasureForward, finished: FinishedForward
    ) -> Tensor | None:
        """Note what fired, and return the change of the prediction [rows, ...] that open image gates make.

        Raises ConceptRefusedError where a refusing eraser fired, as soon as it does, in a pipeline's call.
        """
        state, delta = self._take_again(call, rows, state, finished)
        guided = self._guided(call, rows, state, finished)
        if delta is None or guided is None:
            return delta if guided is None else guided
        return delta + guided

    def _take_again(
        self, call: ErasureCall, rows: Rows, state: ErasureForward, finished: FinishedForward
    ) -> tuple[ErasureForward, Tensor | None]:
        """Note what fired. Take a forward in which gates that hold opened again, corrected from its first block on.

        Returns the edits' state, and the change of the prediction [rows, ...], None for none.
        """
        change: Tensor | None = None
        if state.found:
            again = call.decisions.add(rows, state.found, self.strengths_cpu > 0)
            if again is not None:
                # What others found before the correction does not count, but where one refuses.
                seen = [o for o in state.openings if self.refusing or not self.plan.holding.isdisjoint(o.erasers)]
                self._note(call, rows, ErasureForward(openings=seen))
                state, change = finished.take_again(self._begin(call, rows), again)
        parts = tuple(i for i in self.plan.holding if i in call.decisions.openings and not self.zero_strength[i])
        if parts:
            opening = call.decisions.by_row(rows, parts, finished.call.state.device)
            state.openings.append(Opening(parts, finished.call.timestep.float().view(-1), opening))
        self._note(call, rows, state)
        return state, change

    def _guided(self, call: ErasureCall, rows: Rows, state: ErasureForward, finished: FinishedForward) -> Tensor | None:
        """Return the change of the prediction [rows, ...] that open image gates make; None for none."""
        if any(len(held) != rows.images for held in call.held.values()):  # a loop of one's own that stopped guiding
            call.held = {}
        if self.plan.first_look and call.call.start is not None and not call.looked:
            call.looked = True
            found = finished.look(call.call.pipeline.scheduler, call.call.start, self.plan.first_look)
            if found is not None:
                self._note(call, *found)
                self._hold(call, *found)
        if not self.plan.guided:
            return None
        if call.step is None or not call.step.is_of(finished.call):
            call.step, call.delta = finished.step, self._guide(call, rows, state, finished)
        else:  # what a second pass sees acts from the next step on
            self._hold(call, rows, state)
        return None if call.delta is None else torch.cat([call.delta] * len(rows.counts))

    def _note(self, call: ErasureCall, rows: Rows, state: ErasureForward) -> None:
        """Note what fired. Raises ConceptRefusedError where a refusing eraser did, in a pipeline's call."""
        if state.openings:
            call.trace.add(call.images, rows, state.openings)
            if self.refusing and self._refuse(call, rows, state.openings) and call.call.pipeline is not None:
                self._raise_refused(call)

    def _hold(self, call: ErasureCall, rows: Rows, state: ErasureForward) -> dict[int, Tensor]:
        """Note how far each image gate is open for each image [images], and return that, of those that are."""
        now: dict[int, Tensor] = {}
        for part in self.plan.guided:
            scale = state.scales.get(part)
            if scale is not None:
                now[part] = match_rows(scale, rows.size).view(-1, rows.images).amax(0)  # an image's rows alike
                before = call.held.get(part)
                call.held[part] = now[part] if before is None else torch.maximum(now[part], before)
        return now

    def _guide(self, call: ErasureCall, rows: Rows, state: ErasureForward, finished: FinishedForward) -> Tensor | None:
        """Return the sum of the changes of the prediction [images, ...]; None where no image gate is or was open."""
        now = self._hold(call, rows, state)
        total: Tensor | None = None
        for part, guided in self.plan.guided.items():
            images = call.held[part].nonzero()[:, 0].tolist() if part in call.held else []
            if images:
                self._check_start(call, part, images)
                first = (len(rows.counts) - 1) * rows.images
                delta = guided.delta(finished, [first + image for image in images])
                if total is None:
                    total = delta.new_zeros(rows.images, *delta.shape[1:])
                factor = self._push(call.held[part], now.get(part), part, finished.call.timestep)[images]
                factor = factor.to(delta).view(-1, *[1] * (delta.ndim - 1))
                total = total.index_add(0, torch.tensor(images, device=delta.device), factor * delta)
        return total

    def _push(self, held: Tensor, now: Tensor | None, part: int, timestep: Tensor) -> Tensor:
        """Return the share of its weight with which a guided correction acts on each image [images].

        Where its gate is shut again, `HELD` of what it was: it may miss what it saw, and too long a push leaves nothing
        but the push. Where it is blind, all of it.
        """
        low = held * HELD
        seeing = low if now is None else torch.maximum(now, low)
        return torch.where(self.parts[part].gate.is_blind(timestep.flatten()[:1]).to(held.device), held, seeing)

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
                f"{len(shown)} of these images show {self.parts[part].name}, and at strength {strength:g} some of what "
                f"a start image shows of it stays: from {least:g} on it was erased. Pass that strength, or the action "
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
            f"refused, as an erased concept fired ({which}), and no image is returned: pass another prompt or picture, "
            "or draw the other images again without it",
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
