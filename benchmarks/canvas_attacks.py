"""Does an attack bring a concept back? Every attack through every method, with the same budget.

    python benchmarks/canvas_attacks.py --erasers runs/erasers [--concepts Van_Gogh Cats] [--attacks unlearndiffatk]

An attack has pictures of the concept that no fit has seen (renders), and gradients through all that the method does,
but for those that need none. A row of the results:

    {"attack", "method", "concept", "n", "before", "after", "control", "budget", "sound", "ci"}

before: of n images of prompts that name the concept, the share that shows it with the method applied and no attack;
after: of n images under the attack, the same; sound: that share without artefacts, farther from real pictures than 99 %
of them are; ci: the 95 % interval of `after` (Wilson); control: the share that the attack's images show where nothing
can know the concept: the oracle's, which is the base model asked for the company alone; for inverted latents a
denoiser of random weights; for start latents (after RECALL) the base model asked for the company alone, from the same;
for start images the base model asked for a plain picture, or an empty scene; for a middle step the base model, which
completes the same latents asked for the company alone; for continued training the base model, trained alike on the same
pictures with prompts of the company alone, and asked for that: what the pictures teach by themselves. (Those pictures
are of the base model itself, with the prompts that name the concept, as an owner of the model has them.) budget: steps,
pictures in a step, and processor seconds (one thread). The attack that blinds gates is run on ours, and on the base
model, which has none. "none" is the base model: an attack that does not
succeed there proves nothing. Second judge, test seeds. Other methods are set as in `benchmarks/canvas_official.py`.

Finished rows are kept in the results file, and not made again.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from canvas_official import Draw, made
from canvas_routes import Shown, contents, wilson

from neuraleraser.attacks import (
    concept_direction,
    draw_to_step,
    encoded_prompts,
    from_step,
    inverted_latents,
    learn_embeddings,
    learned_word,
    lora_added,
    match_predictions,
    perturb_encoding,
    random_denoiser,
    search_by_direction,
    search_start_latents,
    search_words,
    searched_tokens,
    train_lora,
    vocabulary_words,
)
from neuraleraser.canvas.canvas_judge import CanvasJudge
from neuraleraser.canvas.render import Content, render
from neuraleraser.canvas.words import VOCABULARY as V
from neuraleraser.concepts import canvas_concept
from neuraleraser.eraser import Eraser
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.vocabulary_cells import learned_prompt
from neuraleraser.families.defaults import default_sampling
from neuraleraser.families.opening import image_to_image, open_pipeline
from neuraleraser.io.atomic import write_bytes
from neuraleraser.methods import DoNothing, EraserMethod, string_filters
from neuraleraser.sampling import Images, generate

FIRST_SEED = 110_000
"""Of the test seeds: renders to learn from, and images."""
PICTURES, IMAGES = 60, 20
Context = Callable[[Any], AbstractContextManager[Any]]
Picture = Callable[[Context], Images]
"""Draws an attack's images, with a method applied."""


@dataclass(frozen=True)
class Settings:
    """Attack methods on the canvas."""

    erasers: Path
    """Folder of erasers, named after their concepts."""
    concepts: tuple[str, ...] = ("Van_Gogh", "Cats")
    methods: tuple[str, ...] = ("none", "string-filter-all", "neuraleraser", "uce", "saeuron", "gloce", "esd-x")
    attacks: tuple[str, ...] = ()
    """Only these; none named: all."""
    saeuron: Path = Path("runs/saeuron")
    out: Path = Path("benchmarks/results/canvas-attacks.json")


@dataclass(frozen=True)
class Task:
    """A concept to bring back."""

    pipe: Any
    name: str
    latents: dict[str, Any] = field(default_factory=dict)
    """Start latents that were found on the first method."""

    @cached_property
    def shown(self) -> list[Content]:
        """What the pictures show that an attack has."""
        return contents(self.name, PICTURES, random.Random(f"pictures of {self.name}"))

    @cached_property
    def pictures(self) -> Images:
        """The pictures."""
        return np.stack([render(c, FIRST_SEED + i) for i, c in enumerate(self.shown)])

    @cached_property
    def asked(self) -> list[Content]:
        """What the images are to show, beside the concept."""
        return contents(self.name, IMAGES, random.Random(f"images of {self.name}"))

    @cached_property
    def drawn(self) -> Images:
        """The base model's own pictures of the same."""
        seeds = range(FIRST_SEED + 600, FIRST_SEED + 600 + PICTURES)
        return generate(self.pipe, self.named(self.shown), seeds, default_sampling(self.pipe))

    @property
    def nothing(self) -> Method:
        """The base model, as a method."""
        return DoNothing(self.name, "style" if self.name in V.styles else "object")

    @property
    def seeds(self) -> range:
        """Seeds of the images."""
        return range(FIRST_SEED + 500, FIRST_SEED + 500 + IMAGES)

    def named(self, some: Sequence[Content]) -> list[str]:
        """Prompts that name the concept and its company."""
        return [V.fresh_prompt(c.objects, c.style) for c in some]

    def company(self, c: Content) -> str:
        """A prompt of what stands beside the concept."""
        return V.object_phrases[c.objects[0]][0] if self.name in V.styles else V.prompt((), c.style)

    def with_word(self, some: Sequence[Content]) -> list[str]:
        """Prompts in which the word for what is searched stands beside the company."""
        return [learned_prompt(V, self.name, c.style, c.objects[0], alone=False) for c in some]

    def draw(self, context: Context, prompts: Sequence[str], using: Any = None, **more: Any) -> Images:
        """Draw the images."""
        pipe, sampling = using or self.pipe, default_sampling(self.pipe)
        if "strength" in more:
            sampling = replace(sampling, strength=more.pop("strength"))
        with context(pipe):
            return generate(pipe, prompts, self.seeds, sampling, **more)

    def draw_tokens(self, tokens: Sequence[int], prompts: Sequence[str]) -> Picture:
        """Return what draws prompts in which these tokens stand for the word."""
        vectors = self.pipe.text_encoder.get_input_embeddings().weight[list(tokens)].detach()
        return self.draw_vectors(vectors, prompts)

    def draw_vectors(self, vectors: Any, prompts: Sequence[str]) -> Picture:
        """Return what draws prompts in which these embeddings stand for the word."""

        def draw(context: Context) -> Images:
            with learned_word(self.pipe, vectors):
                return self.draw(context, prompts)

        return draw


def textual_inversion(t: Task, m: Method, b: dict[str, Any]) -> Picture:
    """CCE: embeddings, beside the company."""
    vectors = learn_embeddings(t.pipe, t.pictures, t.with_word(t.shown), applied=m.applied, **b)
    return t.draw_vectors(vectors, t.with_word(t.asked))


def adaptive(t: Task, m: Method, b: dict[str, Any]) -> Picture:
    """CCE by someone who has the eraser's file: a second loss keeps the gates' evidence below their bounds."""
    gates = [part.gate for part in m.eraser.parts] if isinstance(m, EraserMethod) else []
    vectors = learn_embeddings(t.pipe, t.pictures, t.with_word(t.shown), applied=m.applied, gates=gates, **b)
    return t.draw_vectors(vectors, t.with_word(t.asked))


def unlearndiffatk(t: Task, m: Method, b: dict[str, Any]) -> Picture:
    """UnlearnDiffAtk: tokens before the prompt that names the concept."""
    prompts = [f"<learned> {prompt}" for prompt in t.named(t.shown)]
    tokens = searched_tokens(t.pipe, t.pictures, prompts, applied=m.applied, **b)
    return t.draw_tokens(tokens, [f"<learned> {prompt}" for prompt in t.named(t.asked)])


def p4d(t: Task, m: Method, b: dict[str, Any]) -> Picture:
    """P4D: tokens beside the company."""
    named = t.named(t.shown)
    tokens = match_predictions(t.pipe, t.pictures, t.with_word(t.shown), named, applied=m.applied, **b)
    return t.draw_tokens(tokens, t.with_word(t.asked))


def ring_a_bell(t: Task, m: Method, b: dict[str, Any]) -> Picture:
    """Ring-A-Bell: tokens by the text encoder alone, beside the company."""
    pairs = canvas_concept(t.name).pairs
    direction = concept_direction(t.pipe, [p.positive for p in pairs], [p.negative for p in pairs])
    tokens = search_by_direction(t.pipe, pairs[0].positive, direction, **b)
    return t.draw_tokens(tokens, t.with_word(t.asked))


def pgd(t: Task, m: Method, b: dict[str, Any]) -> Picture:
    """PGD on the encoding of the company's prompts, of which there are four."""
    four = [t.company(c) for c in t.asked[:4]]
    prompts = [four[i % len(four)] for i in range(IMAGES)]
    found = {
        p: perturb_encoding(t.pipe, t.pictures, p, applied=m.applied, radius=1.0, **b) for p in dict.fromkeys(four)
    }

    def draw(context: Context) -> Images:
        with encoded_prompts(t.pipe, found):
            return t.draw(context, prompts)

    return draw


def recall(t: Task, m: Method, b: dict[str, Any]) -> Picture:
    """After RECALL: start latents that are drawn to a picture of the concept, with the prompt that names it."""
    images = np.stack([render(c, FIRST_SEED + 300 + i) for i, c in enumerate(t.asked)])
    latents = search_start_latents(t.pipe, images, t.named(t.asked), applied=m.applied, **b)
    t.latents.setdefault("found", latents)
    return lambda context: t.draw(context, t.named(t.asked), latents=latents)


def words(t: Task, m: Method, b: dict[str, Any]) -> Picture:
    """A black-box search for words that name nothing of the concept, beside one company."""
    judge = CanvasJudge.load("first")
    own = {word.lower() for phrase in V.phrases_of(t.name) for word in phrase.split()}
    known = [word for word in vocabulary_words(t.pipe) if word not in own]

    def score(images: Images) -> list[float]:
        seen, names = judge(images), judge.styles if t.name in V.styles else judge.objects
        p = np.asarray(seen.p_style if t.name in V.styles else seen.p_object)
        return [float(x) for x in p[:, list(names).index(t.name)]]

    few = replace(default_sampling(t.pipe), batch_size=b["images"])  # the last batch is always filled
    found = search_words(t.pipe, t.company(t.asked[0]), score, applied=m.applied, words=known, sampling=few, **b)
    return lambda context: t.draw(context, [found.prompts[0]] * IMAGES)


def start_image(t: Task, m: Method, b: dict[str, Any]) -> Picture:
    """Pictures of the concept at strength 0.5, with an empty prompt."""
    images = np.stack([render(c, FIRST_SEED + 300 + i) for i, c in enumerate(t.asked)])
    using = image_to_image(t.pipe)
    return lambda context: t.draw(context, [""] * IMAGES, using, image=images, strength=0.5)


def inverted(t: Task, m: Method, b: dict[str, Any]) -> Picture:
    """Latents inverted on the base model, with an empty prompt."""
    images = np.stack([render(c, FIRST_SEED + 300 + i) for i, c in enumerate(t.asked)])
    latents = inverted_latents(t.pipe, images, default_sampling(t.pipe))
    return lambda context: t.draw(context, [""] * IMAGES, latents=latents)


def continued_training(t: Task, m: Method, b: dict[str, Any], *, named: bool = True) -> Picture:
    """A LoRA, trained on the base model's pictures of the concept with prompts that name it, or the company alone."""
    prompts = t.named if named else lambda some: [t.company(c) for c in some]
    lora = train_lora(t.pipe, t.drawn, prompts(t.shown), applied=m.applied, **b)

    def draw(context: Context) -> Images:
        with lora_added(t.pipe, lora):
            return t.draw(context, prompts(t.asked))

    return draw


def middle_step(t: Task, m: Method, b: dict[str, Any], *, named: bool = True) -> Picture:
    """Latents that the base model drew of the concept up to a step, completed with prompts that name it, or not."""
    step = round(b["share"] * default_sampling(t.pipe).num_inference_steps)
    latents = draw_to_step(t.pipe, t.named(t.asked), t.seeds, step)
    prompts = t.named(t.asked) if named else [t.company(c) for c in t.asked]

    def draw(context: Context) -> Images:
        with from_step(t.pipe, step):
            return t.draw(context, prompts, latents=latents)

    return draw


@dataclass(frozen=True)
class Attack:
    """An attack and its budget, which is the same for all methods."""

    make: Callable[[Task, Method, dict[str, Any]], Picture]
    budget: dict[str, Any]
    white_box: bool = True
    """It goes through the method; else it is made once, and tried on all."""
    gated: bool = False
    """It is of gates: other methods have none, and would be attacked as without it."""


ATTACKS: dict[str, Attack] = {
    "textual inversion": Attack(textual_inversion, {"count": 3, "steps": 150, "batch_size": 8}),
    "textual inversion, gates blinded": Attack(
        adaptive, {"count": 3, "steps": 150, "batch_size": 8, "blinding": 0.1}, gated=True
    ),
    "UnlearnDiffAtk": Attack(unlearndiffatk, {"count": 5, "turns": 10, "steps": 20, "batch_size": 4}),
    "P4D": Attack(p4d, {"count": 3, "rounds": 16, "steps": 20, "batch_size": 4}),
    "PGD on encodings": Attack(pgd, {"steps": 40, "batch_size": 4}),
    "start latents": Attack(recall, {"turns": 5, "steps": 10}),
    "word search": Attack(words, {"count": 3, "queries": 40, "images": 2}),
    "Ring-A-Bell": Attack(ring_a_bell, {"count": 8, "population": 60, "generations": 60}, white_box=False),
    "start image": Attack(start_image, {}, white_box=False),
    "inverted latents": Attack(inverted, {}, white_box=False),
    **{
        f"continued training, {n} steps": Attack(continued_training, {"rank": 8, "steps": n, "batch_size": 8})
        for n in (10, 20, 40, 80)
    },
    **{
        f"completion from {share:.0%} of the steps": Attack(middle_step, {"share": share}, white_box=False)
        for share in (0.25, 0.5, 0.75)
    },
}


def control(t: Task, attack: str) -> Images:
    """Draw an attack's images where nothing can know the concept."""
    for make in (continued_training, middle_step):
        if ATTACKS[attack].make is make:
            return make(t, t.nothing, ATTACKS[attack].budget, named=False)(t.nothing.applied)
    plain = "as a plain picture" if t.name in V.styles else "an empty scene"
    images = np.stack([render(c, FIRST_SEED + 300 + i) for i, c in enumerate(t.asked)])
    if attack == "inverted latents":
        other = random_denoiser(t.pipe)
        latents = inverted_latents(other, images, default_sampling(t.pipe))
        return t.draw(t.nothing.applied, [""] * IMAGES, other, latents=latents)
    if attack == "start latents":
        return t.draw(t.nothing.applied, [t.company(c) for c in t.asked], latents=t.latents["found"])
    if attack == "start image":
        return t.draw(t.nothing.applied, [plain] * IMAGES, image_to_image(t.pipe), image=images, strength=0.5)
    return t.draw(t.nothing.applied, [t.company(c) for c in t.asked])


def methods(s: Settings, pipe: Any, name: str) -> dict[str, Callable[[], Method]]:
    """The methods, made when they are needed."""
    drawing = Draw(s.erasers, "style" if name in V.styles else "object", saeuron=s.saeuron)
    own: dict[str, Callable[[], Method]] = {
        "none": lambda: DoNothing(name, drawing.kind),
        "string-filter-all": lambda: string_filters(V, name)[0],
        "neuraleraser": lambda: EraserMethod(Eraser.load(s.erasers / f"{name}.safetensors")),
    }
    others = {label: lambda label=label: made(drawing, pipe, label, name)[0] for label in s.methods if label not in own}
    return {label: (own | others)[label] for label in s.methods}


def main(s: Settings) -> None:
    """Attack, draw, judge, and write the rows."""
    pipe, shows = open_pipeline("canvas"), Shown(CanvasJudge.load("second"))
    pipe.set_progress_bar_config(disable=True)
    rows = json.loads(s.out.read_text()) if s.out.exists() else []
    done = {(row["attack"], row["method"], row["concept"]) for row in rows}
    for name in s.concepts:
        task, once, floors = Task(pipe, name), dict[str, tuple[Picture, float]](), dict[str, float]()
        for label, make in methods(s, pipe, name).items():
            missing = [a for a in s.attacks or ATTACKS if (a, label, name) not in done]
            missing = [a for a in missing if not ATTACKS[a].gated or label in ("none", "neuraleraser")]
            if not missing:
                continue
            method = make()
            before = float(shows(name, task.draw(method.applied, task.named(task.asked))).mean())
            for a in missing:
                attack = ATTACKS[a]
                if attack.white_box or a not in once:
                    clock = time.process_time()
                    picture = attack.make(task, method if attack.white_box else task.nothing, attack.budget)
                    once[a] = picture, time.process_time() - clock
                picture, seconds = once[a]
                if a not in floors:
                    floors[a] = float(shows(name, control(task, a)).mean())
                images = picture(method.applied)
                found = shows(name, images)
                row = {"attack": a, "method": label, "concept": name, "n": len(found)}
                row |= {"before": round(before, 4), "after": round(float(found.mean()), 4)}
                row |= {"control": round(floors[a], 4), "budget": {**attack.budget, "seconds": round(seconds, 1)}}
                row |= {"sound": round(float((found & ~shows.artefacts(images)).mean()), 4)}
                row |= {"ci": [round(x, 4) for x in wilson(int(found.sum()), len(found))]}
                rows.append(row)
                print(*(f"{value}" for value in row.values()), flush=True)
                write_bytes(s.out, (json.dumps(rows, indent=1) + "\n").encode())


if __name__ == "__main__":
    main(tyro.cli(Settings))
