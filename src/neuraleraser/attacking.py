"""Attacks through a method, and through the base model at equal budgets, beside the images of an evaluation.

An attack has 120 pictures of the concept that no fit has seen, the model's gradients, and those of all that the method
does. What it finds stays in the run's folder, so that no search is made twice; its images and rows lie among the
evaluation's, in a group of their own.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from neuraleraser.attacks import (
    WORD,
    encoded_prompts,
    learn_embeddings,
    learned_word,
    perturb_encoding,
    searched_tokens,
)
from neuraleraser.errors import FileError, SettingsError
from neuraleraser.evaluation.attack_metrics import AttackFigures, attack_figures
from neuraleraser.evaluation.draw import draw_attacked
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.measure import Finding
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.metrics import pair_with_base
from neuraleraser.evaluation.protocol import Cell, EvaluationProtocol
from neuraleraser.evaluation.results import BASE, concat
from neuraleraser.evaluation.run_folder import RunFolder, state_attacks
from neuraleraser.evaluation.split import check_split
from neuraleraser.evaluation.vocabulary_cells import AttackForm, VocabularyCells
from neuraleraser.families import family_of
from neuraleraser.families.defaults import evaluation_sampling
from neuraleraser.families.opening import native_side
from neuraleraser.io import tensor_file
from neuraleraser.io.locks import claimed
from neuraleraser.io.names import file_name
from neuraleraser.judges import Judge, JudgeSpec
from neuraleraser.sampling import Images
from neuraleraser.settings import AttackBudget, EvaluateSettings

Context = Callable[[Any], AbstractContextManager[Any]]
_KIND = "attack"
_TURNS = 10
"""Timesteps that take turns in a search of tokens."""


@dataclass(frozen=True)
class _Task:
    """A concept to bring back: pictures of it, prompts for them, and the cells that each attack is tried on."""

    pipe: Any
    concept: str
    budget: AttackBudget
    cells: VocabularyCells

    @cached_property
    def lessons(self) -> list[Cell]:
        """Cells of the pictures, each with a prompt that holds the word."""
        return self.cells.lessons(self.concept)

    @cached_property
    def pictures(self) -> Images:
        """The pictures. Raises SettingsError where the family draws none."""
        render = family_of(self.pipe).render
        if render is None:
            raise SettingsError(
                f"{type(self.pipe).__name__} is of a family that renders no pictures, and an attack needs some of the "
                "concept: give the family `render`"
            )
        side = native_side(self.pipe)
        return np.stack([render(c.objects, c.style, c.seed, side) for c in self.lessons])


Search = Callable[[_Task, Sequence[Cell], Context, Callable[[int], None]], dict[str, Tensor]]
"""Searches through a context, calling back with the steps that were taken."""


@dataclass(frozen=True)
class _Attack:
    """An attack: its prompts, its search, what puts into a call what it found, and its budget in words."""

    name: str
    form: AttackForm
    search: Search
    put: Callable[[Any, Sequence[Cell], Mapping[str, Tensor]], AbstractContextManager[None]]
    budget_text: Callable[[int], str]


def _learn(t: _Task, cells: Sequence[Cell], through: Context, taken: Callable[[int], None]) -> dict[str, Tensor]:
    found = learn_embeddings(
        t.pipe,
        t.pictures,
        [c.prompt for c in t.lessons],
        applied=through,
        steps=t.budget.steps,
        batch_size=8,
        on_step=lambda step, loss: taken(1),
    )
    return {"embeddings": found}


def _search(t: _Task, cells: Sequence[Cell], through: Context, taken: Callable[[int], None]) -> dict[str, Tensor]:
    turns, steps = _turns(t.budget.steps)
    tokens = searched_tokens(
        t.pipe,
        t.pictures,
        [f"{WORD} {t.cells.vocabulary.fresh_prompt(c.objects, c.style)}" for c in t.lessons],
        applied=through,
        turns=turns,
        steps=steps,
        batch_size=4,
        on_turn=lambda turn, loss: taken(steps),
    )
    return {"embeddings": t.pipe.text_encoder.get_input_embeddings().weight[tokens].detach().cpu()}


def _perturb(t: _Task, cells: Sequence[Cell], through: Context, taken: Callable[[int], None]) -> dict[str, Tensor]:
    return {
        f"encoding {i}": perturb_encoding(
            t.pipe,
            t.pictures,
            prompt,
            applied=through,
            radius=1.0,
            steps=_quarter(t.budget.steps),
            on_step=lambda step, loss: taken(1),
        )
        for i, prompt in enumerate(_prompts(cells))
    }


def _put_word(pipe: Any, cells: Sequence[Cell], found: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    return learned_word(pipe, found["embeddings"])


def _put_encodings(pipe: Any, cells: Sequence[Cell], found: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    return encoded_prompts(pipe, {prompt: found[f"encoding {i}"] for i, prompt in enumerate(_prompts(cells))})


def _prompts(cells: Sequence[Cell]) -> list[str]:
    return list(dict.fromkeys(c.prompt for c in cells))


def _turns(steps: int) -> tuple[int, int]:
    """Return the turns of a search of tokens, and the steps of each."""
    turns = min(_TURNS, steps)
    return turns, steps // turns


def _quarter(steps: int) -> int:
    """Return the steps for each of the four prompts of an attack on encodings."""
    return max(1, steps // 4)


_ATTACKS = (
    _Attack("learned embeddings", "word", _learn, _put_word, lambda n: f"{n} steps of 8 pictures, 3 embeddings"),
    _Attack(
        "searched tokens",
        "word and name",
        _search,
        _put_word,
        lambda n: f"{_turns(n)[0] * _turns(n)[1]} steps of 4 pictures, 5 tokens",
    ),
    _Attack(
        "perturbed encodings",
        "company",
        _perturb,
        _put_encodings,
        lambda n: f"{_quarter(n)} steps of 4 pictures a prompt, radius 1",
    ),
)


def check_attacked(pipe: Any, m: Method, settings: EvaluateSettings, budget: AttackBudget) -> None:
    """Raise SplitError if a method was made with seeds or prompts of its attacks, other errors as `run_attacks`."""
    task = _task(pipe, m, settings, budget)
    cells = [c for some in _cells(task).values() for c in some]
    check_split(m, EvaluationProtocol({m.concept: [*cells, *task.lessons]}, vocabulary=task.cells.vocabulary))


def run_attacks(
    pipe: Any, m: Method, settings: EvaluateSettings, budget: AttackBudget, folder: Path, judge: Judge
) -> tuple[list[AttackFigures], list[Finding]]:
    """Attack a method and the base model, and draw and judge what was found, in the folder of a finished evaluation.

    Called again it goes on where it was stopped. An attack that does not take the pipeline is left out.

    Returns the figures of each attack, and what a reader should know: attacks that were left out, and why, and those
    that do not bring the concept back on the base model. Raises SettingsError for a pipeline without a vocabulary, or a
    folder with attacks of another budget; ConceptError and SplitError as `VocabularyCells.target`.
    """
    task, run = _task(pipe, m, settings, budget), RunFolder(folder, JudgeSpec.of(judge))
    sampling = evaluation_sampling(pipe, settings)
    state_attacks(folder, asdict(budget))
    seconds: dict[str, dict[str, float]] = {}
    refused: dict[str, list[str]] = {}
    for attack, cells in _cells(task).items():
        for name, through in (("seconds_base", None), ("seconds", m)):  # the base model first
            try:
                found, took = _found_once(task, attack, cells, through, folder)
            except SettingsError as error:
                refused.setdefault(str(error), []).append(attack.name)
                break
            seconds.setdefault(attack.name, {})[name] = took
            put = _put(attack, cells, found)
            draw_attacked(pipe, cells, put, through, sampling, judge, run)
    pairs = pair_with_base(concat([run.results(BASE), run.results(m.name, m.concept)]), m.name, m.concept)
    texts = {attack.name: attack.budget_text(budget.steps) for attack in _ATTACKS}
    figures = [
        replace(a, figures={**a.figures, **seconds.get(a.attack, {})}, budget=texts[a.attack])
        for a in attack_figures(pairs)
    ]
    notes = [f"not run: the attack by {' and by '.join(names)}, as {reason}" for reason, names in refused.items()]
    return figures, [Finding("note", text) for text in (*notes, *filter(None, map(_failed_on_base, figures)))]


def _task(pipe: Any, m: Method, settings: EvaluateSettings, budget: AttackBudget) -> _Task:
    vocabulary = family_of(pipe).vocabulary
    if vocabulary is None:
        raise SettingsError(
            f"the world of this {type(pipe).__name__} is not known, so nothing says what to ask for: give its family a "
            "`vocabulary`"
        )
    return _Task(pipe, m.concept, budget, VocabularyCells.of(vocabulary, settings))


def _cells(t: _Task) -> dict[_Attack, list[Cell]]:
    """Return the cells of each attack."""
    return {a: t.cells.attacked(t.concept, a.name, i, t.budget.images, a.form) for i, a in enumerate(_ATTACKS)}


def _put(attack: _Attack, cells: Sequence[Cell], found: Mapping[str, Tensor]) -> Context:
    return lambda pipe: attack.put(pipe, cells, found)


def _found_once(
    t: _Task, attack: _Attack, cells: Sequence[Cell], m: Method | None, folder: Path
) -> tuple[dict[str, Tensor], float]:
    """Return what an attack finds through a method, or the base model, and the seconds that it took: what lies in the
    folder, or else it is searched now and kept there."""
    name, key, through = (BASE, "", nullcontext) if m is None else (m.name, m.key, m.applied)
    path = folder / "attacks" / file_name(name) / f"{file_name(f'{t.concept}, {attack.name}')}.safetensors"
    shown = repr([(c.prompt, c.seed) for c in (*t.lessons, *cells)])
    header = {"attack": attack.name, "concept": t.concept, "method": name, "key": key}
    header |= {"budget": attack.budget_text(t.budget.steps), "cells": hashlib.sha256(shown.encode()).hexdigest()[:16]}
    with claimed(path.with_name(f".{path.name}.claim")):  # another process may be searching
        if path.exists():
            try:
                found, stated = tensor_file.load(path, _KIND)
                seconds = stated.pop("seconds", None)
                if stated == header and isinstance(seconds, float):
                    return found, seconds
            except FileError as error:
                warnings.warn(f"{error}; the attack is made again", stacklevel=2)
        clock = time.monotonic()
        with tqdm(total=t.budget.steps, desc=f"attack by {attack.name}, {name}", unit="step") as bar:

            def taken(steps: int) -> None:
                bar.update(steps)

            found = attack.search(t, cells, through, taken)
        seconds = time.monotonic() - clock
        tensor_file.save(path, _KIND, found, {**header, "seconds": seconds})
    return found, seconds


def _failed_on_base(a: AttackFigures) -> str:
    shown = a.figures["shown_base"]
    if not isinstance(shown, Estimate) or shown.value >= 0.5:
        return ""
    return (
        f"the attack by {a.attack} brings the concept back in only {shown.value:.0%} of the base model's images: its "
        "figure with the method proves little; more steps might make it succeed"
    )
