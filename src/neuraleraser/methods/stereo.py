"""STEREO: Srivatsan, Shamshad, Naseer, Patel and Karthik Nandakumar, CVPR 2025, arXiv 2408.16807.

Published (paper, and koushiksrivats/robust-concept-erasing), in two stages, with v the predictions of the weights in
training and v0 those of the model itself. Stage 1, search thoroughly enough: by turns the weights are trained as in
Erased Stable Diffusion, away from the concept's prompt at first and then from the word that the last attack found, and
attacked by textual inversion on pictures of the concept, which finds the next word. Stage 2, robustly erase once: the
model is trained anew. With n_1 the concept's prompt, n_2 to n_k the words that were found, s one of the k prompts, and
a an anchor, a prompt that shows the concept among other things,

    loss = |v(x, s) - (v0(x, "") + toward (v0(x, a) - v0(x, "")) - away mean_i (v0(x, n_i) - v0(x, "")))|^2,

at states x of images that v draws of s. So of the anchor what is not the concept is left. Two rounds, inversions of
3,000 steps, 200 steps of each erasure, rates of 5e-6 and 2e-5; cross-attentions alone, or all but these. The code's one
scale of 2 makes `toward` 1 and `away` 3, and its target of stage 1 is the empty prompt's prediction (strength 0).

Ours: cross-attentions alone, as for concepts that prompts name; several states a step, as in ESD-x here; the pictures
that attacks learn from are the model's own; a word may be of several embeddings, and learns as `learn_embeddings` does.
The prompts, the anchors among them, are all passed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuraleraser.attacks import WORD, learn_embeddings, learned_word
from neuraleraser.attacks.learned_embeddings import check_inversion
from neuraleraser.errors import SettingsError
from neuraleraser.fitting.prompt_texts import prompt_texts
from neuraleraser.methods.erased_stable_diffusion import negative_guidance_loss
from neuraleraser.methods.fine_tuning import (
    DrawnState,
    StateBatch,
    TrainedWeights,
    Weights,
    check_prompts,
    cross_attentions,
    detached,
    drawn_states,
    fine_tune,
)
from neuraleraser.methods.weights import changed_weights
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import MAX_SEED, Sampling, check_number, check_whole
from neuraleraser.sites import Text, denoiser, unwrap


@dataclass(frozen=True)
class StereoSettings:
    """Settings of STEREO.

    Raises:
        SettingsError: A value is out of range.

    Examples:
        >>> StereoSettings(rounds=3).last_seed  # of the images that it is trained on
        151
    """

    rounds: int = 2
    """Rounds of stage 1, of an erasure and an attack each."""
    erase_steps: int = 60
    """Steps of an erasure of stage 1."""
    erase_rate: float = 1e-4
    """Learning rate of stage 1."""
    strength: float = 1.0
    """Share of the way beyond the empty prompt's prediction, in stage 1."""
    attack_steps: int = 100
    """Steps of a textual inversion."""
    attack_batch: int = 8
    """Pictures in a step of it."""
    embeddings: int = 1
    """Embeddings of a learned word."""
    pictures: int = 16
    """Pictures of the concept that attacks learn from."""
    steps: int = 150
    """Steps of stage 2."""
    learning_rate: float = 1e-4
    """Learning rate of stage 2."""
    away: float = 3.0
    """Guidance away from the concept and the learned words."""
    toward: float = 1.0
    """Guidance toward the anchor."""
    batch: int = 8
    """States of a step, in both stages."""
    refresh: int = 20
    """Steps after which images are drawn anew."""
    images: int = 8
    """Images that are drawn each time."""
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("erase_steps", "attack_steps", "attack_batch", "pictures", "steps", "batch", "refresh", "images")
        for name in counts:
            check_whole(name, getattr(self, name), 1, 1_000_000)
        check_whole("rounds", self.rounds, 1, 100)
        check_whole("embeddings", self.embeddings, 1, 100)
        check_number("erase_rate", self.erase_rate, 0, 1, above=True)
        check_number("learning_rate", self.learning_rate, 0, 1, above=True)
        for name in ("strength", "away", "toward"):
            check_number(name, getattr(self, name), 0, 100)
        check_whole("seed", self.seed, 0, MAX_SEED)
        check_whole("the last seed", self.last_seed, 0, MAX_SEED)

    @property
    def last_seed(self) -> int:
        """Last seed of the images that it is trained on; the first is `seed`."""
        draws = [*[self.erase_steps] * self.rounds, self.steps]
        return self.seed + self.pictures + sum(-(-steps // self.refresh) for steps in draws) * self.images - 1


@dataclass(frozen=True, eq=False)
class Stereo(TrainedWeights):
    """STEREO: cross-attentions that were trained away from the concept, and from learned words that bring it back.

    For pipelines with one text encoder, as Stable Diffusion 1 and 2 are. Every image changes, if often little.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        weights: The trained weights of the denoiser, by name.
        prompts: Prompts that it was trained on, those with learned words left out.
        seeds: First and last seed of images that it was trained on.
        words: The learned words, [embeddings, d] of each round.

    Examples:
        >>> few = StereoSettings(
        ...     rounds=1, erase_steps=1, attack_steps=1, attack_batch=1, pictures=1, steps=1, batch=1, images=2
        ... )
        >>> anchors = ["a cat in Van Gogh style"]
        >>> method = Stereo.train(pipe, "Van_Gogh", "style", ["in Van Gogh style"], anchors, quick, few)
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    name: str = "stereo"
    words: tuple[Tensor, ...] = ()

    @classmethod
    def train(
        cls,
        pipe: Any,
        concept: str,
        kind: str,
        phrases: Sequence[str],
        anchors: Sequence[str],
        sampling: Sampling,
        settings: StereoSettings | None = None,
        progress: Callable[[float], None] | None = None,
        *,
        templates: Sequence[str] = (),
    ) -> Stereo:
        """Train STEREO.

        Args:
            pipe: The diffusers pipeline; it is not changed.
            concept: Name of the concept.
            kind: "style" or "object".
            phrases: Prompts that show the concept.
            anchors: Prompts that show the concept among other things; what is not the concept is to stay.
            sampling: How images are generated.
            settings: Settings of the training; None: the defaults.
            progress: Called with the share of all steps that is done, from one erasure or attack to the next.
            templates: Each phrase with "<learned>" where the concept stands; none: that word alone for each.

        Returns:
            The method.

        Raises:
            SettingsError: There are no phrases or no anchors, not as many templates as phrases, a template lacks the
                word, the pipeline has several text encoders, or its denoiser no cross-attentions of diffusers' names.
        """
        s = settings or StereoSettings()
        check_prompts(phrases=phrases, anchors=anchors)
        templates = tuple(templates) or (WORD,) * len(phrases)
        if len(templates) != len(phrases):
            raise SettingsError(f"{len(phrases)} phrases, {len(templates)} templates: pass one for each, or none")
        # Attacks come late: what they would refuse is refused now.
        check_inversion(pipe, np.zeros((len(templates), 1, 1, 3), np.uint8), templates, s.embeddings)
        module = unwrap(denoiser(pipe))
        weights = cross_attentions(module, "STEREO")
        empty, *further = prompt_texts(pipe, ["", *anchors], sampling)
        lesson = _Lesson(pipe, module, sampling, s)
        parts = [s.erase_steps, s.attack_steps] * s.rounds + [s.steps]

        def reported(part: int) -> Callable[[float], None]:
            before, whole = sum(parts[:part]), sum(parts)
            return lambda share: progress((before + share * parts[part]) / whole) if progress else None

        named = lesson.group(phrases)
        numbers = [i % len(phrases) for i in range(s.pictures)]
        pictures = generate(pipe, [phrases[i] for i in numbers], lesson.seeds(s.pictures), sampling)
        words: list[Tensor] = []
        groups = [named]
        for turn in range(s.rounds):
            before = detached(weights)

            def erasure(batch: StateBatch, asked: _Asked, before: Weights = before) -> Tensor:
                shown = [group.texts[x.prompt] for group, x in asked]
                return negative_guidance_loss(batch, weights, before, empty, shown, s.strength)

            lesson.train(weights, groups[-1:], erasure, s.erase_steps, s.erase_rate, reported(2 * turn))
            found = lesson.attack(weights, pictures, [templates[i] for i in numbers], turn, reported(2 * turn + 1))
            words.append(found)
            groups.append(lesson.group(templates, found))
        weights = cross_attentions(module, "STEREO")

        def erasure_at_once(batch: StateBatch, asked: _Asked) -> Tensor:
            own = [group.texts[x.prompt] for group, x in asked]
            negatives = [[lesson.text(group, mine, x) for mine, x in asked] for group in groups]
            anchored = [lesson.rng.choice(further) for _ in asked]
            return compositional_loss(batch, weights, empty, own, negatives, anchored, s.away, s.toward)

        lesson.train(weights, groups, erasure_at_once, s.steps, s.learning_rate, reported(2 * s.rounds))
        return cls(concept, kind, detached(weights), (*phrases, *anchors), (s.seed, s.last_seed), words=tuple(words))


def compositional_loss(
    batch: StateBatch,
    weights: Weights,
    empty: Text,
    own: Sequence[Text],
    negatives: Sequence[Sequence[Text]],
    anchors: Sequence[Text],
    away: float,
    toward: float,
) -> Tensor:
    """Return the loss of `weights` at states of images of the texts `own`.

    negatives: the texts that each state is guided away from, one list for each of the concept's prompts and words.
    anchors: the text that each is guided toward. empty: the empty prompt's text.
    """
    with torch.no_grad():
        without = batch.predict({}, [empty] * len(own))
        concept = torch.stack([batch.predict({}, texts) - without for texts in negatives]).mean(0)
        target = without + toward * (batch.predict({}, anchors) - without) - away * concept
    return (batch.predict(weights, own) - target).float().square().mean()


@dataclass(frozen=True, eq=False)
class _Group:
    """Prompts that are drawn by turns, what the denoiser is given for them, and the word that they may hold."""

    prompts: Sequence[str]
    texts: Sequence[Text]
    word: Tensor | None = None

    def spoken(self, pipe: Any) -> AbstractContextManager[None]:
        """Return a context in which the prompts are read."""
        return nullcontext() if self.word is None else learned_word(pipe, self.word)


_Asked = Sequence[tuple[_Group, DrawnState]]
"""States, each with the group that its prompt is of."""


class _Lesson:
    """A training of a pipeline's weights: its settings, its seeds, and the order of all that is random."""

    def __init__(self, pipe: Any, module: nn.Module, sampling: Sampling, s: StereoSettings) -> None:
        self.pipe, self.module, self.sampling, self.s = pipe, module, sampling, s
        self.rng, self.next_seed, self.turn = random.Random(s.seed), s.seed, 0

    def seeds(self, count: int) -> range:
        """Return the next seeds of images."""
        self.next_seed += count
        return range(self.next_seed - count, self.next_seed)

    def group(self, prompts: Sequence[str], word: Tensor | None = None) -> _Group:
        """Return prompts with their texts."""
        group = _Group(prompts, (), word)
        with group.spoken(self.pipe):
            return replace(group, texts=prompt_texts(self.pipe, prompts, self.sampling))

    def text(self, group: _Group, mine: _Group, state: DrawnState) -> Text:
        """Return the text of a state's own prompt where the group is its own, of another group one at random."""
        return group.texts[state.prompt if group is mine else self.rng.randrange(len(group.texts))]

    def train(
        self,
        weights: Weights,
        groups: Sequence[_Group],
        loss: Callable[[StateBatch, _Asked], Tensor],
        steps: int,
        learning_rate: float,
        progress: Callable[[float], None],
    ) -> None:
        """Train weights in place at states of images that they draw of the groups, by turns."""
        states: list[tuple[_Group, DrawnState]] = []

        def step_loss(step: int) -> Tensor:
            if step % self.s.refresh == 0:
                with changed_weights(self.module, weights):
                    states[:] = self._drawn(groups)
            asked = self.rng.sample(states, min(self.s.batch, len(states)))
            return loss(StateBatch.of(self.module, [x for _, x in asked]), asked)

        fine_tune(weights, step_loss, steps, learning_rate, progress=progress)

    def _drawn(self, groups: Sequence[_Group]) -> list[tuple[_Group, DrawnState]]:
        found: list[tuple[_Group, DrawnState]] = []
        turns = range(self.turn, self.turn + self.s.images)  # goes on, for where images are fewer than groups
        self.turn = turns.stop
        unpadded = replace(self.sampling, pad_last_batch=False)  # a group's images fill no batch
        for k, group in enumerate(groups):
            seeds = self.seeds(sum(turn % len(groups) == k for turn in turns))
            numbers = [self.rng.randrange(len(group.prompts)) for _ in seeds]
            with group.spoken(self.pipe):
                found += [(group, x) for x in drawn_states(self.pipe, group.prompts, numbers, seeds, unpadded)]
        return found

    def attack(
        self,
        weights: Weights,
        pictures: Images,
        prompts: Sequence[str],
        turn: int,
        progress: Callable[[float], None],
    ) -> Tensor:
        """Return the word [embeddings, d] that brings the pictures back through these weights."""
        s = self.s
        return learn_embeddings(
            self.pipe,
            pictures,
            prompts,
            applied=lambda pipe: changed_weights(self.module, weights),
            count=s.embeddings,
            steps=s.attack_steps,
            batch_size=s.attack_batch,
            seed=s.seed + turn,
            on_step=lambda step, loss: progress((step + 1) / s.attack_steps),
        )
