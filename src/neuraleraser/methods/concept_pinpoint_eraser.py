"""Concept Pinpoint Eraser (CPE), Lee, Lim, Lee, Kang and Chun, ICLR 2025, arXiv 2506.22806: residual attention gates.

Published (abstract, and Hyun1A/CPE at 4d35d02; formulas are the code's). With E [tokens, d] the encoded text, W_l the
weight of layer l, each of all cross-attentions' keys and values, a gate adds to W_l E

    R_l(E) = s (A E) D_l U_l,    A = softmax(Q Q'), Q = E Q0,    s = sigmoid(A E u),

with softmax over tokens, s of each token, D_l and U_l of rank 1 for each layer, Q0 [d, 16] and u [d] of all layers
alike. So no linear change of W_l is made, which the paper shows to harm what stays. With c a text of the concept, g the
same with something else in its place, a the anchors, and k_l the layer's Lipschitz factor (of keys |O V| |Q| / tokens,
of values |O|, by the largest singular values of the attention's weights), the gates are trained by

    L_erase(c)  = sum_l k_l mean |W_l c + R_l(c) - (W_l g + beyond (W_l g - W_l c))|^2 / layers,
    L_anchor    = sum_l k_l mean |R_l(a)|^2 / layers,
    L           = L_erase(c) + L_erase(c + p) + anchor_weight L_anchor,

where the adversarial embeddings p are trained by turns with the gates to bring the concept back,

    L_attack(p) = sum_l k_l mean |W_l (c + p) + R_l(c + p) - W_l c|^2 / layers.

Anchors are the empty text and 16 mixtures of two texts of what stays, mixed evenly at random, after noise of 0.001 of a
text's norm. AdamW: first 1,800 steps at 3e-4, then in each of 10 stages for artists (5 for celebrities) 450 of 16 new
embeddings at 0.01 and 450 of the gates at 3e-5, all with a warm-up of 5 and a cosine, twice restarted in the first
stage's middle; `beyond` 0.5, `anchor_weight` 1e4 for artists and 1e5 for celebrities. What stays: general words and the
50 names most like the concept, in templates. In the code's gate keys are the queries, as above.

Not confirmed: the paper's own tables of settings, and whether its gate has a second matrix for keys.

Ours: one concept, so no largest gate of several; AdamW of 32 bits; what stays is passed, and so are the pairs; the last
stage ends with the gates, as what is learnt after them would not be used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import get_cosine_with_hard_restarts_schedule_with_warmup

from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import MadeWith
from neuraleraser.methods.attention_gates import (
    AttentionGate,
    GatedLayer,
    anchor_loss,
    attack_loss,
    erase_loss,
    lipschitz_factors,
)
from neuraleraser.methods.fine_tuning import check_prompts
from neuraleraser.methods.unified_concept_editing import text_projections
from neuraleraser.methods.untraced import Untraced
from neuraleraser.methods.weights import weights_digest
from neuraleraser.settings import check_number, check_seed, check_whole
from neuraleraser.sites import EditContext, Site, edit
from neuraleraser.sites.modules import denoiser_name

_WARM_UP = 5
"""Steps in which the learning rate rises."""


@dataclass(frozen=True)
class CPESettings:
    """Settings of CPE.

    Raises:
        SettingsError: A value is out of range.

    Examples:
        >>> CPESettings(anchor_weight=1e5).gate_rank
        16
    """

    first_steps: int = 1800
    """Steps of the gates before the first attack."""
    first_rate: float = 3e-4
    stages: int = 5
    """Stages after that, of an attack and the gates' answer each."""
    steps: int = 450
    """Steps of a stage: of the attack, and of the gates."""
    learning_rate: float = 3e-5
    attack_rate: float = 0.01
    embeddings: int = 16
    """Adversarial embeddings of a stage."""
    beyond: float = 0.5
    """Share of the way beyond what stands in the concept's place (the code's guidance scale)."""
    anchor_weight: float = 1e4
    """Weight of the anchors (lambda in the paper)."""
    anchors: int = 16
    """Mixtures of texts in a step."""
    noise: float = 1e-3
    """Noise of an anchor, as a share of its norm, on each of its numbers."""
    gate_rank: int = 16
    """Width of the gate's queries."""
    rank: int = 1
    """Rank of what is added at a layer."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("first_steps", "steps", "embeddings", "anchors", "gate_rank", "rank"):
            check_whole(name, getattr(self, name), 1, 1_000_000)
        check_whole("stages", self.stages, 0, 1000)
        for name in ("first_rate", "learning_rate", "attack_rate"):
            check_number(name, getattr(self, name), 0, 1, above=True)
        check_number("beyond", self.beyond, 0, 100)
        check_number("anchor_weight", self.anchor_weight, 0, 1e9)
        check_number("noise", self.noise, 0, 1)
        check_seed(self.seed)


@dataclass(frozen=True, eq=False)
class ConceptPinpointEraser(Untraced):
    """CPE: gates in the text add to keys and values what makes the concept read as another. Every image changes.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        gate: The gate of all layers.
        layers: What each layer, by its name in the UNet, makes of the gated text: D [d, rank] and U [rank, out].
        prompts: Texts that it was trained on.

    Examples:
        >>> pairs, stays = [("a cat in Van Gogh style", "a cat")], ["a dog", "in mosaic style"]
        >>> few = CPESettings(first_steps=20, steps=2, stages=1)
        >>> method = ConceptPinpointEraser.train(pipe, "Van_Gogh", "style", pairs, stays, few)
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    concept: str
    kind: str
    gate: AttentionGate
    layers: Mapping[str, tuple[Tensor, Tensor]]
    prompts: tuple[str, ...] = ()
    name: str = "cpe"

    @property
    def key(self) -> str:
        """Digest of the gate and the layers."""
        parts = {f"{name} {i}": x for name, pair in self.layers.items() for i, x in enumerate(pair)}
        return weights_digest({"query": self.gate.query, "scaler": self.gate.scaler, **parts})

    @property
    def made_with(self) -> MadeWith:
        """Its texts; no images."""
        return MadeWith(prompts=self.prompts)

    def applied(self, pipe: Any) -> AbstractContextManager[None]:
        """Add to keys and values of the cross-attentions.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields None: the method acts everywhere.

        Raises:
            SiteError: The pipeline does not have the layers.
        """
        part = denoiser_name(pipe)
        edits: dict[Site, Callable[[Tensor, EditContext[_Read]], Tensor | None]] = {}
        for name, (down, up) in self.layers.items():
            edits[Site(f"{part}.{name.rpartition('.')[0]}", "input", "text")] = self._read
            edits[Site(f"{part}.{name}")] = _added(down, up)
        return edit(pipe, edits, _Read)

    def _read(self, text: Tensor, context: EditContext[_Read]) -> None:
        if context.forward.text is not text:  # all layers of a forward read the same
            context.forward.text, context.forward.gated = text, self.gate(text)

    @classmethod
    def train(
        cls,
        pipe: Any,
        concept: str,
        kind: str,
        pairs: Sequence[tuple[str, str]],
        stays: Sequence[str],
        settings: CPESettings | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> ConceptPinpointEraser:
        """Train CPE, on texts alone.

        Args:
            pipe: The diffusers pipeline; it is not changed.
            concept: Name of the concept.
            kind: "style" or "object".
            pairs: Prompts that show the concept, each with what stands in its place.
            stays: Prompts of what stays, like and unlike the concept.
            settings: Settings of the training; None: the defaults.
            progress: Called with the share that is done.

        Returns:
            The method.

        Raises:
            SettingsError: There are no pairs or no prompts that stay, or the pipeline has no UNet with cross-attention
                to one text encoder.
        """
        s = settings or CPESettings()
        if not pairs:
            raise SettingsError(f"there is nothing to erase: pass pairs of a prompt of {concept!r} and another")
        check_prompts(stays=stays)
        lesson = _Lesson.of(pipe, pairs, stays, s, progress)
        lesson.train_gates(s.first_steps, s.first_rate, None, cycles=2)
        for _ in range(s.stages):
            lesson.train_gates(s.steps, s.learning_rate, lesson.attack())
        prompts = tuple(dict.fromkeys([text for pair in pairs for text in pair] + list(stays)))
        gate = AttentionGate(*(x.detach() for x in (lesson.gate.query, lesson.gate.scaler)))
        layers = {one.name: (one.down.detach(), one.up.detach()) for one in lesson.layers}
        return cls(concept, kind, gate, layers, prompts)


@dataclass
class _Read:
    """Text of one forward, and what the gate makes of it."""

    text: Tensor | None = None
    gated: Tensor | None = None


def _added(down: Tensor, up: Tensor) -> Callable[[Tensor, EditContext[_Read]], Tensor | None]:
    """Return the edit of a layer: what it adds to its keys or values [B, tokens, out]."""

    def added(x: Tensor, context: EditContext[_Read]) -> Tensor:
        gated = context.forward.gated
        assert gated is not None  # its block has read the text
        return (gated @ down.to(gated) @ up.to(gated)).to(x)

    return added


@dataclass
class _Lesson:
    """Training of the gates: texts [N, tokens, d] of the concept, of what stands in its place, and of what stays."""

    s: CPESettings
    layers: Sequence[GatedLayer]
    gate: AttentionGate
    shown: Tensor
    instead: Tensor
    stays: Tensor
    empty: Tensor
    random: torch.Generator
    progress: Callable[[float], None] | None = None
    done: int = field(default=0)

    @classmethod
    def of(
        cls,
        pipe: Any,
        pairs: Sequence[tuple[str, str]],
        stays: Sequence[str],
        s: CPESettings,
        progress: Callable[[float], None] | None,
    ) -> _Lesson:
        """Return a training before its first step."""
        layers, random = text_projections(pipe), torch.Generator().manual_seed(s.seed)
        texts = ([c for c, _ in pairs], [g for _, g in pairs], stays, [""])
        shown, instead, kept, empty = (_encoded(pipe, some) for some in texts)
        tokens, width = shown.shape[1:]
        query = _uniform((width, s.gate_rank), 1 / math.sqrt(width * s.gate_rank) / width**2, random)
        gate = AttentionGate(query, torch.zeros(width, requires_grad=True))
        factors = lipschitz_factors(pipe.unet, layers, tokens)
        made = [
            GatedLayer(
                name,
                layer.weight.detach().float().cpu(),
                factors[name],
                _uniform((width, s.rank), 1 / math.sqrt(width * s.rank), random),
                torch.zeros(s.rank, layer.out_features, requires_grad=True),
            )
            for name, layer in layers.items()
        ]
        return cls(s, made, gate, shown, instead, kept, empty, random, progress)

    def train_gates(self, steps: int, rate: float, attacks: Tensor | None, cycles: int = 1) -> None:
        """Train the gates, against attacks [N, tokens, d] where there are some."""
        learnt = [self.gate.query, self.gate.scaler, *(x for one in self.layers for x in (one.down, one.up))]

        def loss() -> Tensor:
            shown, instead = self._pair()
            found = erase_loss(self.layers, self.gate, shown, shown, instead, self.s.beyond)
            if attacks is not None:
                found = found + erase_loss(self.layers, self.gate, shown + attacks, shown, instead, self.s.beyond)
            return found + self.s.anchor_weight * anchor_loss(self.layers, self.gate, self._anchors())

        self._descend(learnt, loss, steps, rate, cycles)

    def attack(self) -> Tensor:
        """Return new embeddings [N, tokens, d] that, added to the concept's texts, bring it back."""
        _, tokens, width = self.shown.shape
        spread = 1 / math.sqrt(tokens * width) / width**2
        found = _uniform((self.s.embeddings, tokens, width), spread, self.random)

        def loss() -> Tensor:
            shown, _ = self._pair()
            return attack_loss(self.layers, self.gate, shown + found, shown)

        self._descend([found], loss, self.s.steps, self.s.attack_rate, 1)
        return found.detach()

    def _descend(
        self, learnt: Sequence[Tensor], loss: Callable[[], Tensor], steps: int, rate: float, cycles: int
    ) -> None:
        optimizer = torch.optim.AdamW(learnt, lr=rate)
        schedule = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, _WARM_UP, steps, cycles)
        for _ in range(steps):
            gradients = torch.autograd.grad(loss(), learnt)
            for x, gradient in zip(learnt, gradients, strict=True):
                x.grad = gradient
            optimizer.step()
            schedule.step()
            self.done += 1
            if self.progress:
                self.progress(self.done / (self.s.first_steps + 2 * self.s.stages * self.s.steps))

    def _pair(self) -> tuple[Tensor, Tensor]:
        """Return the texts [1, tokens, d] of a pair at random."""
        at = int(torch.randint(len(self.shown), (), generator=self.random))
        return self.shown[at : at + 1], self.instead[at : at + 1]

    def _anchors(self) -> Tensor:
        """Return the empty text and mixtures of what stays [1 + anchors, tokens, d]."""
        at = torch.randint(len(self.stays), (2, self.s.anchors), generator=self.random)
        texts = self.stays[at]
        size = self.s.noise * texts.flatten(2).norm(dim=2)[..., None, None]
        texts = texts + size * torch.randn(texts.shape, generator=self.random)
        share = torch.rand(self.s.anchors, 1, 1, generator=self.random)
        return torch.cat([self.empty, share * texts[0] + (1 - share) * texts[1]])


def _uniform(shape: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    """Return what is learnt, drawn evenly from -bound to bound."""
    return ((2 * torch.rand(shape, generator=generator) - 1) * bound).requires_grad_()


@torch.no_grad()
def _encoded(pipe: Any, texts: Sequence[str]) -> Tensor:
    """Return what the text encoder makes of texts, float32 [N, tokens, d] on the CPU."""
    return pipe.encode_prompt(list(texts), pipe.unet.device, 1, False)[0].float().cpu()
