"""Erasers at work: what the hooks of one attachment share, and what they do at each site.

Plain classes that hold no pipeline, so that a model that is copied or pickled carries its own. Strengths lie in
one tensor, and nothing that a compiled graph would look at changes with their values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from neuraleraser.eraser.file import Eraser
from neuraleraser.eraser.parts import Correction
from neuraleraser.eraser.stacked import Gates, Learnt, learnt, numbered, told
from neuraleraser.eraser.trace import Trace
from neuraleraser.errors import NotApplied, SettingsError, SiteError
from neuraleraser.sites import Call, Site


class Acting:
    """Some erasers, their strengths [erasers, images] (or [erasers, 1]: the same for all images), what each does
    ("erase", "detect" or "refuse"), their trace.

    `at` holds the edit of each site.
    """

    def __init__(
        self, erasers: Sequence[Eraser], strengths: Tensor, device: torch.device, trace: Trace, actions: Sequence[str]
    ) -> None:
        self.erasers, self.trace, self.device, self.actions = list(erasers), trace, device, list(actions)
        self.at: dict[Site, At] = {}
        # An order set by content, so that sums have the same bits in whatever order erasers are given.
        for i in sorted(range(len(erasers)), key=lambda i: (erasers[i].key, strengths[i].tolist())):
            self._at(erasers[i].gate.site).gates.append(i)
            for k, c in enumerate(erasers[i].corrections if actions[i] == "erase" else ()):
                self._at(c.site).work.append((i, k))
                for site in c.also:
                    self._at(site)
        self.set(strengths)
        self.place(device)

    def _at(self, site: Site) -> At:
        return self.at.setdefault(site, At(self, site))

    def set(self, strengths: Tensor) -> None:
        """From the next call on. Another tensor of the same shape: a compiled graph does not tell."""
        self.given = strengths.cpu()
        self.strengths = strengths.to(self.device)
        self.idle = (self.given == 0).all(1).tolist()  # known here, so that no device is asked

    def place(self, device: torch.device) -> None:
        """Bring all tensors to `device`."""
        self.device, self.strengths = device, self.strengths.to(device)
        self.placed = [_to(e, device) for e in self.erasers]
        for at in self.at.values():
            at.share()
        for at in self.at.values():
            for made in at.matrices:
                for site in made.also:
                    self.at[site].echo(made)
        for at in self.at.values():
            at.name_changes()

    def amounts(self, erasers: Sequence[int], opening: Tensor) -> Tensor:
        """Strength times opening [rows, erasers]."""
        every = len(erasers) == len(self.strengths) == 1  # nothing to choose from, and choosing is the dearest part
        own, rows = (self.strengths if every else self.strengths[list(erasers)]).mT.to(opening), opening.shape[0]
        images = own.shape[0]
        if images > 1:
            if rows % images:
                raise SettingsError(f"strengths for {images} images, but the denoiser was given {rows} rows: {_ONE}")
            if rows > images:  # guidance halves: image j owns rows j, j + images, ...
                own = own.repeat(rows // images, 1)
        return own * opening

    def check_images(self, drawn: int | None) -> None:
        """SettingsError where strengths by image met a call that drew another number of images."""
        images = self.strengths.shape[1]
        if images > 1 and drawn != images:
            raise SettingsError(f"strengths for {images} images, but this call draws {drawn}: {_ONE}")

    def refused(self, fired: Mapping[int, Sequence[int]]) -> dict[int, list[str]]:
        """Of what fired (image -> erasers), the names of those that refuse, and not at strength 0, by image."""
        images = self.given.shape[1]
        found = {
            image: [
                self.trace.names[i] for i in which if self.actions[i] == "refuse" and self.given[i, image % images] > 0
            ]
            for image, which in fired.items()
        }
        return {image: names for image, names in sorted(found.items()) if names}


_ONE = "set as many strengths as the call draws images, or one for all"


class At:
    """The edit of one site: gates that look here, then corrections that act here.

    What the gates found lies in the memo of the forward: "amounts", eraser -> strength times opening [rows] where
    it may act, and "shut", the erasers of which it is known that they do not. Deltas that other sites add, too, lie
    there under their names.
    """

    def __init__(self, acting: Acting, site: Site) -> None:
        self.acting, self.site = acting, site
        self.gates: list[int] = []  # erasers
        self.work: list[tuple[int, int]] = []  # erasers, and which of their corrections
        self.fits = False  # whether activations of the right width were seen
        self.adds: tuple[str, ...] | None = None  # changes that other sites make or add, where there is nothing else

    def share(self) -> None:
        """Put together what is computed together, once all of `gates` and `work` is known."""
        placed = self.acting.placed
        wide = {placed[i].gate.rows.shape[1]: placed[i] for i in self.gates}
        wide |= {placed[i].corrections[k].width: placed[i] for i, k in self.work}
        self.expects = {width: e.name for width, e in wide.items()}
        self._check_widths()
        stack = Gates([placed[i].gate for i in self.gates]) if self.gates else None
        self.looks = stack
        self.looking = tuple(self.gates[k] for k in stack.order) if stack else ()
        every = [(i, placed[i].corrections[k]) for i, k in self.work]
        self.needs = {i for i, _ in every}
        scaling = [(i, c) for i, c in every if c.mode == "scale"]
        self.scaled = scaling if len(scaling) > 1 else []
        self.once = Once([c for _, c in self.scaled]) if self.scaled else None
        alone = [(i, c) for i, c in every if c.mode == "replace" or (c.mode == "scale" and not self.scaled)]
        matrices = [(i, c) for i, c in every if c.mode == "learnt"]
        # On a CPU one at a time, as most gates are shut there and it is known which; elsewhere all at once. Never
        # by which happen to be open together: an image's bits would depend on its neighbours.
        together = [matrices] if self.acting.device.type != "cpu" and matrices else [[pair] for pair in matrices]
        self.matrices = [
            Shared(f"{self.site} {number}", which, product, also)
            for number, (which, product, also) in enumerate(made for group in together for made in learnt(group))
        ]
        self.echoes: list[Shared] = []
        self.alone = alone

    def echo(self, made: Shared) -> None:
        """Add here, too, what is made at another site."""
        self.echoes.append(made)
        self.needs |= set(made.which)
        self.expects |= {made.product.down.shape[1]: self.acting.erasers[made.which[0]].name}
        self._check_widths()

    def name_changes(self) -> None:
        """Know what is added here by name, once all that is added is known."""
        shared = [made for made in self.matrices if made.also] + self.echoes
        only = len(shared) == len(self.matrices) + len(self.echoes) and not (self.gates or self.alone or self.scaled)
        self.adds = tuple(made.name for made in shared) if only else None

    def _check_widths(self) -> None:
        if len(self.expects) > 1:
            names = ", ".join(f"{name!r} expects {width}" for width, name in sorted(self.expects.items()))
            raise SiteError(f"erasers of different pipelines: at {self.site} that of {names}")

    def rests(self, memo: dict[Any, Any]) -> bool:
        """Whether all that would act here is known to be shut, so that the activations need not even be read."""
        shut = memo.get("shut", _NONE)
        return bool(shut) and self.fits and not self.gates and self.needs <= shut

    def __call__(self, x: Tensor, call: Call) -> Tensor | None:
        acting = self.acting
        if x.device != acting.device and not torch.compiler.is_compiling():
            acting.place(x.device)  # the pipeline was moved
        ((width, told),) = self.expects.items()
        if x.shape[-1] != width:
            raise SiteError(
                f"{self.site} is {x.shape[-1]} wide, and the eraser of {told!r} expects {width}: "
                "use it with the pipeline it was made for"
            )
        if not torch.compiler.is_compiling():
            self.fits = True
        amounts: dict[int, Tensor] = call.memo.setdefault("amounts", {})
        if self.looks is not None:
            self._look(self.looks, x, call, amounts)
        shut: frozenset[int] = call.memo.get("shut", _NONE)
        for i in self.needs:
            if i not in amounts and i not in shut:
                raise NotApplied(
                    f"{self.site} ran before {acting.placed[i].gate.site}, whose gate it waits for: swap the sites"
                )
        parts: list[Tensor] = []
        finite: Tensor | None = None
        for made in self.matrices:
            given = [amounts[i] for i in made.which if i in amounts]
            if len(given) < len(made.which):  # open and shut may stand together in one product
                none = given[0].new_zeros(given[0].shape) if given else None
                given = [amounts[i] if i in amounts else none for i in made.which] if none is not None else []
            if given:
                delta, low = made.product(x, _looked_up(call), torch.stack(given, 1))
                parts.append(delta)
                if made.also:
                    call.memo[made.name] = delta
                # What is not finite in x is not in its projection; only in float16 can a change overflow by itself.
                finite = low if len(self.work) == len(made.which) and x.dtype != torch.float16 else None
        for i, c in self.alone:
            if i in amounts:
                parts.append(c.delta(x, call.timestep) * amounts[i].view(-1, 1, 1))
        if self.once is not None and any(i in amounts for i, _ in self.scaled):
            parts.append(self.once(x, call.timestep, [amounts.get(i) for i, _ in self.scaled]))
        for made in self.echoes:
            delta = call.memo.get(made.name)
            if delta is not None:
                parts.append(self._fitting(delta, x))
            elif any(i in amounts for i in made.which):
                raise NotApplied(
                    f"{self.site} ran before {made.name.split()[0]}, whose change it repeats: swap the sites"
                )
        if not parts:
            return None
        # A sum is nobody else's, and so is a delta that no other site repeats.
        call.finite, call.spare = finite, len(parts) > 1 or not (self.echoes or any(m.also for m in self.matrices))
        return sum(parts[1:], parts[0])

    def _fitting(self, delta: Tensor, x: Tensor) -> Tensor:
        if delta.shape != x.shape:
            raise NotApplied(
                f"{self.site} holds {list(x.shape)}, where the change made for {list(delta.shape)} is to be repeated: "
                "these blocks do not read the same text"
            )
        return delta.to(x.device)

    def _look(self, looks: Gates, x: Tensor, call: Call, amounts: dict[int, Tensor]) -> None:
        """Ask the gates, and put down which of them are open."""
        acting, trace, timestep = self.acting, self.acting.trace, _looked_up(call)
        opening, evidence, z = looks(x, timestep)
        call.finite = evidence
        compiling = torch.compiler.is_compiling()
        # Which are open at all: asking costs nothing on a CPU, and would stall a GPU.
        asked = not compiling and opening.device.type == "cpu"
        opened: list[bool] = opening.any(0).tolist() if asked else [True] * len(self.looking)
        if True in opened:
            trace.note(self.looking, timestep, opening, looks.where(z) if trace.heat else None)
            table = acting.amounts(self.looking, opening)
            for column, i in enumerate(self.looking):
                if opened[column] and (compiling or not acting.idle[i]):
                    amounts[i] = table[:, column]
        if not compiling:
            call.memo["shut"] = call.memo.get("shut", _NONE) | {i for i in self.looking if i not in amounts}


def _looked_up(call: Call) -> Tensor:
    """The timesteps to look up: [B], or [1] where one number stands for all rows."""
    return call.timestep[:1] if call.timestep.stride(0) == 0 else call.timestep.contiguous()


@dataclass(frozen=True)
class Shared:
    """Learnt corrections of the erasers `which` as one product, and the sites that its delta is added at, too."""

    name: str
    which: Sequence[int]
    product: Learnt
    also: tuple[Site, ...]


_NONE: frozenset[int] = frozenset()


class Once:
    """The sum of corrections that scale, in which a feature that several share is changed once, by the largest
    change (law 11).

    A feature is told by its encoder row and bias, in the half precision of files: a number in an SAE would not
    tell two SAEs apart.
    """

    def __init__(self, corrections: Sequence[Correction]) -> None:
        self.corrections = list(corrections)
        numbers: dict[bytes, int] = {}
        self.index: list[Tensor] = []
        decoder: dict[int, Tensor] = {}
        for c in corrections:
            t = c.tensors
            mine = numbered(numbers, told(t["rows"].half(), t["bias"].half()))
            decoder |= {feature: out for feature, out in zip(mine, t["decoder"], strict=True) if feature not in decoder}
            self.index.append(torch.tensor(mine, device=t["rows"].device))
        self.back = torch.stack([decoder[feature] for feature in range(len(decoder))])

    def __call__(self, x: Tensor, timestep: Tensor, amounts: Sequence[Tensor | None]) -> Tensor:
        """x [B, P, d], timestep [B], how much of each correction [B] -> delta [B, P, d]."""
        changes = []
        for c, features, amount in zip(self.corrections, self.index, amounts, strict=True):
            if amount is not None:
                z = c.change(x, timestep) * amount.view(-1, 1, 1)
                changes.append(z.new_zeros(*z.shape[:2], len(self.back)).index_copy(-1, features.to(z.device), z))
        every = torch.stack(changes)
        largest = every.gather(0, every.abs().argmax(0, keepdim=True))[0]
        return largest @ self.back.to(largest)


def _to(eraser: Eraser, device: torch.device) -> Eraser:
    """The eraser with its tensors on `device`."""
    gate = replace(eraser.gate, **{k: v.to(device) for k, v in vars(eraser.gate).items() if isinstance(v, Tensor)})
    edits = tuple(
        Correction(c.site, c.mode, c.times.to(device), {k: v.to(device) for k, v in c.tensors.items()}, c.also)
        for c in eraser.corrections
    )
    return Eraser(gate, edits, eraser.header)
