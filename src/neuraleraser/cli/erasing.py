"""The verbs that make, use and measure erasers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional

from neuraleraser.cli.operating import calibrated
from neuraleraser.cli.verbs import Flat, app, check_sampling, verb
from neuraleraser.errors import SettingsError
from neuraleraser.io.atomic import write_bytes
from neuraleraser.io.names import prompt_error
from neuraleraser.io.outputs import check_outputs, save_or_keep
from neuraleraser.settings import MANY, DemoSettings, EvaluateSettings, FitSettings, check_seed, check_whole


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
    reference: str | None = None,
    neighbours: tuple[str, ...] = (),
    site: str | None = None,
    num_images: int = 160,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
) -> None:
    """Make an eraser for a concept.

    On other models than the canvas, where no reference is given, a published one is fetched if one is known for the
    model and the site. Else one is made first, from the model's own images of the concept and its neighbours; what that
    takes is said before. Interrupted and run again, it goes on.

    Args:
        phrase: What to erase: "Van Gogh style", "a cat", or a JSON file {"name", "kind", "pairs": [[with, without]]}.
        model: The pipeline: canvas, a folder, or a Hub id.
        out: The eraser's file; None: the concept's name, such as van-gogh.safetensors.
        kind: What the phrase names, where it does not say so itself (not needed on the canvas).
        reference: The SAE and its background for this model, a folder or a Hub id; None: the canvas's own, or one made
            here.
        neighbours: What the concept could be mistaken for, as phrases; none named: those of a list that ships.
        site: Where a reference made here looks; None: the site that is known to be good in the model's family.
        num_images: Images that a reference made here learns from; half as many more show how it fires.
        num_inference_steps: Denoising steps; None: the model's usual.
        guidance_scale: Classifier-free guidance scale; None: the model's usual.
        batch_size: Images drawn together; None: 4, on the canvas 20.
    """
    from tqdm import tqdm

    from neuraleraser.demo import progress_bar, separability_warning
    from neuraleraser.evaluation.report import size_text
    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.families.naming import concept_of
    from neuraleraser.families.opening import open_pipeline
    from neuraleraser.fitting import from_phrase
    from neuraleraser.fitting.reference import Reference

    check_whole("num_images", num_images, 5, MANY)  # hundreds are good
    read = {"the phrase": phrase if phrase.endswith(".json") else None, "--reference": reference, "--model": model}
    check_outputs({"--out": out}, read)
    check_sampling(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, batch_size=batch_size)
    pipe = open_pipeline(model)
    concept = concept_of(pipe, phrase, kind)
    path = out or Path(f"{from_phrase.eraser_file_name(concept.name)}.safetensors")
    check_outputs({"--out": path}, read)
    known = Reference.from_pretrained(reference) if reference else None
    with progress_bar(concept.name) as progress:
        eraser = from_phrase.erase(
            pipe,
            concept,
            neighbours=neighbours,
            reference=known,
            site=site,
            num_images=num_images,
            settings=settings,
            sampling=default_sampling(pipe, num_inference_steps, guidance_scale, batch_size),
            progress=progress,
            announce=tqdm.write,
        )
    save_or_keep(path, eraser.save)
    print(f"{path}: erases {concept.name}, {size_text(path.stat().st_size)}, {len(eraser.gate.features)} features")
    if said := separability_warning(eraser):
        print(said)
    example = concept.pairs[0].positive
    print(f'Try it: neuraleraser generate "{example}" --model {model} --eraser {path}')


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
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
) -> None:
    """Draw one image, with any erasers attached.

    Args:
        prompt: What to draw.
        model: The pipeline: canvas, a folder, or a Hub id.
        seed: Seed of the noise that the image starts from.
        eraser: Erasers: files, folders or Hub ids, each with its strength after a colon if not 1:
            van-gogh.safetensors:0.5, owner/name:0.5, owner/name@revision:0.5 (0 to 2).
        out: Where the image goes (PNG).
        action: What erasers do. erase; detect, change nothing and say what would have fired; refuse, end with an error
            and write no image where one would have.
        calibrate: Fit the erasers' gates to this pipeline's weights first (nothing is written).
        record: Write what fired, at which timesteps and where, to this file, as JSON Lines.
        num_inference_steps: Denoising steps; None: the model's usual (canvas: 25).
        guidance_scale: Classifier-free guidance scale, 1 draws without guidance; None: the model's usual (canvas: 3).
    """
    from neuraleraser import sampling
    from neuraleraser.eraser import Eraser, attach
    from neuraleraser.evaluation.figures import png
    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.families.opening import open_pipeline

    if not prompt.strip():
        raise SettingsError("the prompt is empty: say what to draw, such as 'a cat in Van Gogh style'")
    if error := prompt_error(prompt):
        raise SettingsError(f"{error}: pass another prompt")
    check_seed(seed)
    check_sampling(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
    named = [parse_eraser(text) for text in eraser]
    read = {f"--eraser {source}": source for source, _ in named} | {"--model": model}
    check_outputs({"--out": out, "--record": record}, read)
    erasers = [Eraser.from_pretrained(source) for source, _ in named]
    pipe = open_pipeline(model)
    chosen = default_sampling(pipe, num_inference_steps, guidance_scale, batch_size=1)
    if calibrate:
        erasers = calibrated(pipe, erasers)
    strengths = [strength for _, strength in named]
    labels = _labels([e.name for e in erasers], [source for source, _ in named])
    with attach(pipe, erasers, strengths, action=action, heat=record is not None) as trace:
        trace.names = labels  # so that two erasers of one concept are two in what it says
        try:
            images = sampling.generate(pipe, [prompt], [seed], chosen)
        finally:
            if record:
                write_bytes(record, trace.jsonl().encode())
    image = png(images[0])
    save_or_keep(out, lambda path: write_bytes(path, image))
    fired = trace.fired.get(0, {})
    for label, strength in zip(labels, strengths, strict=True):
        print(f"{label}: {_what_happened(fired.get(label, []), strength, action, chosen.num_inference_steps)}")
    print(f"{out}: {prompt!r}, seed {seed}")


def _labels(names: Sequence[str], sources: Sequence[str]) -> list[str]:
    """Names to tell erasers apart by: those of one concept get their source beside it, and one source that is given
    twice a number."""
    both = zip(names, sources, strict=True)
    labels = [name if names.count(name) == 1 else f"{name} ({source})" for name, source in both]
    return [
        label if labels.count(label) == 1 else f"{label} {labels[: i + 1].count(label)}"
        for i, label in enumerate(labels)
    ]


def _what_happened(times: Sequence[float], strength: float, action: str, steps: int) -> str:
    """Say what an eraser did to an image whose gate opened at timesteps `times`."""
    if not times:
        return "did not fire, so nothing was refused" if action == "refuse" else "did not fire"
    # Schedulers of higher order call the denoiser more than once a step.
    count = f"{len(times)} of {steps} steps" if len(times) <= steps else f"{len(times)} timesteps"
    when = f"at {count} (t = {times[0]:g} to {times[-1]:g})"
    if strength == 0:
        done = {"erase": "did not act", "detect": "would not have acted", "refuse": "did not refuse"}[action]
        return f"{done} (strength 0); its gate opened {when}"
    return f"would have acted {when}" if action == "detect" else f"acted {when}"


def parse_eraser(text: str) -> tuple[str, float]:
    """ "a.safetensors:0.5" -> ("a.safetensors", 0.5), and so of folders and Hub ids.

    Without a number after the last colon ("C:\\a.safetensors"), and where a file or folder has the whole text as its
    name, the strength is 1. Raises SettingsError for a strength out of range.
    """
    source, colon, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        return text, 1.0
    if not colon or os.path.exists(text):
        return text, 1.0
    if not 0 <= strength <= 2:
        raise SettingsError(f"{text!r} asks for strength {number}: pass a strength from 0 (nothing) to 2")
    return source, strength


@verb(app, "evaluate")
def evaluate(
    settings: Annotated[EvaluateSettings, Flat],
    erasers: tuple[str, ...] = (),
    model: str = "canvas",
    out: Path | None = None,
    calibrate: bool = False,
    sealed: bool = False,
) -> None:
    """Measure erasers with the second judge, on prompts and seeds that none was made with, beside a filter of prompts
    and doing nothing.

    Args:
        erasers: Eraser files, folders or Hub ids.
        model: The pipeline: canvas, or a folder with another canvas.
        out: Folder for pictures, results and the report; run again with it to go on. None: runs/evaluate, or
            runs/sealed-COMMIT.
        calibrate: Fit the erasers' gates to this pipeline's weights first (nothing is written).
        sealed: Make erasers of the twelve sealed concepts and measure those, once for a commit, when all is frozen;
            adds a line to docs/SEALED.md.
    """
    from neuraleraser.assessment import evaluate_erasers
    from neuraleraser.eraser import Eraser
    from neuraleraser.evaluation.report_files import write_report
    from neuraleraser.evaluation.terminal import terminal_tables
    from neuraleraser.families.opening import open_pipeline
    from neuraleraser.sealed import evaluate_sealed

    if sealed and (erasers or calibrate):
        raise SettingsError("--sealed makes its own erasers: pass neither --erasers nor --calibrate with it")
    if sealed:
        print(terminal_tables(evaluate_sealed(open_pipeline(model), settings, out)))
        return
    if not erasers:
        raise SettingsError("there are no erasers to measure: pass their files with --erasers")
    folder = out or Path("runs/evaluate")
    read = {f"--erasers {source}": source for source in erasers} | {"--model": model}
    check_outputs({}, read, folders={"--out": folder})
    loaded = [Eraser.from_pretrained(source) for source in erasers]
    pipe = open_pipeline(model)
    report = evaluate_erasers(pipe, calibrated(pipe, loaded) if calibrate else loaded, settings, folder)
    paths = write_report(report, folder)
    print("\n" + terminal_tables(report) + "\n")
    print("\n".join(map(str, paths)))
