"""The verbs that make, use and measure erasers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from neuraleraser.cli.operating import calibrated
from neuraleraser.cli.verbs import Flat, app, verb
from neuraleraser.errors import SettingsError
from neuraleraser.settings import DemoSettings, EvaluateSettings, FitSettings, Sampling


@verb(app, "demo")
def demo(settings: Annotated[DemoSettings, Flat]) -> None:
    """Erase five concepts from the canvas, one at a time, from phrases; measure and show it."""
    from neuraleraser.demo import demo as run

    run(settings)


@verb(app, "erase")
def erase(
    phrase: Positional[str],
    /,
    settings: Annotated[FitSettings, Flat],
    model: str = "canvas",
    out: Path | None = None,
    kind: Literal["style", "object"] | None = None,
    dictionary: Path | None = None,
    neighbours: tuple[str, ...] = (),
    site: str | None = None,
    images: int = 160,
    sampling_steps: int | None = None,
    guidance: float | None = None,
    images_at_once: int | None = None,
) -> None:
    """Make an eraser for a concept.

    On other models than the canvas, where no dictionary is given, a published one is fetched if one is known for the
    model and the site. Else one is made first, from the model's own images of the concept and its neighbours; what that
    takes is said before. Interrupted and run again, it goes on.

    Args:
        phrase: What to erase: "Van Gogh style", "a cat", or a JSON file {"name", "kind", "pairs": [[with, without]]}.
        model: The pipeline: canvas, a folder, or a Hub id.
        out: The eraser's file; None: the concept's name, such as van-gogh.safetensors.
        kind: What the phrase names, where it does not say so itself (not needed on the canvas).
        dictionary: Folder of the SAE and its background for this model; None: the canvas's own, or one made here.
        neighbours: What the concept could be mistaken for, as phrases; none named: those of a list that ships.
        site: Where a dictionary made here looks; None: the site that is known to be good in the model's family.
        images: Images that a dictionary made here learns from; half as many more show how it fires.
        sampling_steps: Denoising steps; None: the model's usual.
        guidance: Classifier-free guidance scale; None: the model's usual.
        images_at_once: Images drawn together; None: 4, on the canvas 20.
    """
    from neuraleraser.bench.report import size_text
    from neuraleraser.concepts import shipped_neighbours, with_neighbours
    from neuraleraser.demo import concept_of, doubt, neighbours_of, progress_bar
    from neuraleraser.fit import fit
    from neuraleraser.fit.dictionary import load_dictionary
    from neuraleraser.models import default_sampling, open_pipeline, speaks_canvas

    if images < 5:
        raise SettingsError(f"images is {images}: pass at least 5, hundreds are good")
    pipe = open_pipeline(model)
    concept = concept_of(pipe, phrase, kind)
    sampling = default_sampling(pipe, sampling_steps, guidance, images_at_once)
    name = concept.name.replace("_", "-").replace(" ", "-").lower()
    path = out or Path(f"{name}.safetensors")
    near = neighbours_of(pipe, concept, neighbours) if neighbours else list(shipped_neighbours(concept))
    concept = with_neighbours(concept, near)
    if dictionary is None and not speaks_canvas(pipe):
        known = _dictionary_for(pipe, model, concept, near, site, images, sampling, name)
    else:
        known = load_dictionary(dictionary) if dictionary else load_dictionary()
    with progress_bar(concept.name) as told:
        eraser = fit(pipe, concept, settings, told, known=known, sampling=sampling)
    eraser.save(path)
    print(f"{path}: erases {concept.name}, {size_text(path.stat().st_size)}, {len(eraser.gate.features)} features")
    if said := doubt(eraser):
        print(said)
    example = concept.pairs[0].shows
    print(f'Try it: neuraleraser generate "{example}" --model {model} --eraser {path}')


def _dictionary_for(
    pipe: Any,
    model: str,
    concept: Any,
    near: Sequence[Any],
    site: str | None,
    images: int,
    sampling: Sampling,
    name: str,
) -> Any:
    """The dictionary that is known for this model and site, or else one made here; what that takes is said first."""
    from neuraleraser.bench.report import size_text
    from neuraleraser.demo import progress_bar
    from neuraleraser.errors import FileError
    from neuraleraser.fit.own import expect, own_dictionary
    from neuraleraser.fit.published import published, published_dictionary
    from neuraleraser.models import default_gate_site
    from neuraleraser.sites import Site

    where = Site.parse(site) if site else default_gate_site(pipe, concept.kind)
    # A Hub id keeps its owner: two models may share a last name. Of a folder the last name is enough to tell.
    owner = Path(model).name if Path(model).is_dir() else model.replace("/", "--")
    root = Path("runs/dictionaries")
    if theirs := published(model, where):
        print(f"A dictionary for {model} at {where} is published: {theirs.repo}, of {theirs.source}.")
        try:
            folder = root / f"{owner}-{name}-published"
            return published_dictionary(pipe, theirs, concept, near, folder, images, sampling)
        except FileError as error:
            print(f"It cannot be had: {error}.")
    folder = root / f"{owner}-{name}"
    if not (folder / "background.safetensors").exists():
        cost = expect(pipe, where, images, sampling)
        print(
            f"Making a dictionary for {model} at {where} from {images + images // 2} of its own images, of "
            f"{concept.name} and {', '.join(n.name for n in near) or 'no neighbours'}.\n"
            f"About {cost.seconds / 60:.0f} minutes of drawing, and {size_text(cost.bytes)} in {folder} until it is "
            "made. Ctrl-C stops; the same command goes on."
        )
    with progress_bar("dictionary") as told:
        return own_dictionary(pipe, concept, near, where, folder, images=images, sampling=sampling, say=told)


@verb(app, "generate")
def generate(
    prompt: Positional[str],
    /,
    model: str = "canvas",
    seed: int = 0,
    eraser: tuple[str, ...] = (),
    out: Path = Path("image.png"),
    action: Literal["erase", "detect", "refuse"] = "erase",
    calibrate: bool = False,
    record: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
) -> None:
    """Draw one image, with any erasers attached.

    Args:
        prompt: What to draw.
        model: The pipeline: canvas, a folder, or a Hub id.
        seed: Seed of the noise that the image starts from.
        eraser: Eraser files, each with its strength after a colon if not 1: van-gogh.safetensors:0.5 (0 to 2).
        out: Where the image goes (PNG).
        action: What erasers do. erase; detect, change nothing and say what would have fired; refuse, end with an error
            and write no image where one would have.
        calibrate: Fit the erasers' gates to this pipeline's weights first (nothing is written).
        record: Write what fired, at which timesteps and where, to this file, as JSON Lines.
        steps: Denoising steps; None: the model's usual (canvas: 25).
        guidance: Classifier-free guidance scale, 1 draws without guidance; None: the model's usual (canvas: 3).
    """
    from neuraleraser import sampling
    from neuraleraser.bench.files import write_bytes
    from neuraleraser.bench.pictures import png
    from neuraleraser.eraser import Eraser, attach
    from neuraleraser.models import default_sampling, open_pipeline

    if not prompt.strip():
        raise SettingsError("the prompt is empty: say what to draw, such as 'a cat in Van Gogh style'")
    if (steps is not None and steps < 1) or seed < 0:
        raise SettingsError(f"steps is {steps} and seed {seed}: pass at least 1 step, and a seed of 0 or more")
    named = [parse_eraser(text) for text in eraser]
    erasers = [Eraser.load(path) for path, _ in named]
    pipe = open_pipeline(model)
    chosen = default_sampling(pipe, steps, guidance, batch=1)
    if calibrate:
        erasers = calibrated(pipe, erasers)
    strengths = [strength for _, strength in named]
    with attach(pipe, erasers, strengths, action=action, heat=record is not None) as trace:
        try:
            images = sampling.generate(pipe, [prompt], [seed], chosen)
        finally:
            if record:
                write_bytes(record, trace.jsonl().encode())
    write_bytes(out, png(images[0]))
    fired = trace.fired.get(0, {})
    for e in erasers:
        times = fired.get(e.name, [])
        done = "would have acted" if action == "detect" else "acted"
        when = (
            f"{done} at {len(times)} of {chosen.steps} steps (t = {times[0]:g} to {times[-1]:g})"
            if times
            else "did not fire"
        )
        print(f"{e.name}: {when}")
    print(f"{out}: {prompt!r}, seed {seed}")


def parse_eraser(text: str) -> tuple[Path, float]:
    """ "a.safetensors:0.5" -> (path, 0.5); without a number the strength is 1. Raises SettingsError out of range."""
    path, colon, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        return Path(text), 1.0
    if not colon:
        return Path(text), 1.0
    if not 0 <= strength <= 2:
        raise SettingsError(f"{text!r} asks for strength {number}: pass a strength from 0 (nothing) to 2")
    return Path(path), strength


@verb(app, "evaluate")
def evaluate(
    erasers: tuple[Path, ...],
    settings: Annotated[EvaluateSettings, Flat],
    model: str = "canvas",
    out: Path = Path("runs/evaluate"),
    calibrate: bool = False,
) -> None:
    """Measure erasers with the second judge, on prompts and seeds that none was made with.

    Args:
        erasers: Eraser files.
        model: The pipeline: canvas, or a folder with another canvas.
        out: Folder for pictures, verdicts and the report; run again with it to go on.
        calibrate: Fit the erasers' gates to this pipeline's weights first (nothing is written).
    """
    from neuraleraser.bench.evaluate import evaluate as run
    from neuraleraser.bench.panels import write_report
    from neuraleraser.bench.report import terminal_table
    from neuraleraser.eraser import Eraser
    from neuraleraser.models import open_pipeline

    if not erasers:
        raise SettingsError("there are no erasers to measure: pass their files with --erasers")
    loaded = [Eraser.load(path) for path in erasers]
    pipe = open_pipeline(model)
    report = run(pipe, calibrated(pipe, loaded) if calibrate else loaded, settings, out)
    paths = write_report(report, out)
    print("\n" + terminal_table(report.concepts) + "\n")
    print("\n".join(map(str, paths)))
