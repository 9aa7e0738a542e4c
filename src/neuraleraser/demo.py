"""The demo: two concepts taken out of the canvas, one at a time, from phrases; measured, and shown."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from neuraleraser.assessment import evaluate_erasers
from neuraleraser.concepts import Concept, concept_of
from neuraleraser.eraser import Eraser, attach
from neuraleraser.errors import ConceptError, ConceptRemainsWarning, FileError
from neuraleraser.evaluation.evaluate import default_protocol
from neuraleraser.evaluation.figures import grid_sheet, png
from neuraleraser.evaluation.report import Report, size_text
from neuraleraser.evaluation.report_files import write_report
from neuraleraser.evaluation.terminal import terminal_tables
from neuraleraser.families import family_of
from neuraleraser.families.defaults import default_sampling
from neuraleraser.families.opening import image_to_image, native_side, open_pipeline
from neuraleraser.fitting import fit
from neuraleraser.fitting.reference import Reference, shipped_reference
from neuraleraser.io.atomic import write_bytes
from neuraleraser.io.locks import locked
from neuraleraser.io.names import file_name
from neuraleraser.io.outputs import check_outputs, save_or_keep
from neuraleraser.precision import fast_dtype
from neuraleraser.sampling import generate
from neuraleraser.settings import TEST_SEEDS, DemoSettings, EvaluateSettings

_STARTS = "start-images.png"
_FILES = {
    "report.html": "pictures, features and figures",
    "report.json": "the figures",
    "figures.csv": "the figures, a row each",
    "tables.tex": "the tables in LaTeX",
    "contact.png": "before and after",
}


def demo(settings: DemoSettings | None = None, say: Callable[[str], None] = print) -> Report:
    """Make an eraser for each phrase, measure them all, write the report; returns it.

    Files go to `settings.folder`: erasers/, with a sheet of images beside each as soon as it is made (`first_look`);
    run/ (pictures and results); those of `write_report`; and start-images.png: a picture of each concept, as the model
    redraws it and as it does with the eraser.
    Raises ConceptError for a phrase that names nothing on the canvas or the same as another, SettingsError for what
    cannot be measured, FileError for a folder that cannot be written or in which another demo is at work, before
    anything is generated.
    """
    s = settings or DemoSettings()
    check_outputs(
        {name: s.folder / name for name in (*_FILES, _STARTS)},
        folders={name: s.folder / name for name in ("erasers", "run")},
    )
    started = time.monotonic()
    pipe = open_pipeline(s.model, fast_dtype())
    concepts = [(phrase, concept_of(pipe, phrase)) for phrase in s.phrases]
    _check_concepts(pipe, concepts, s)
    known = Reference.from_pretrained(s.reference) if s.reference else shipped_reference(pipe)
    with locked(s.folder / ".lock", wait=False) as alone:
        if not alone:
            raise FileError(f"another demo is at work in {s.folder}: wait for it, or pass another --folder")
        report = _demo(pipe, concepts, known, s, say)
    say(f"Done in {(time.monotonic() - started) / 60:.1f} minutes.")
    return report


def _demo(
    pipe: Any,
    concepts: Sequence[tuple[str, Concept]],
    known: Reference,
    s: DemoSettings,
    say: Callable[[str], None],
) -> Report:
    """Make, measure and show, in a folder that nobody else uses."""
    run = s.folder / "run"
    if not s.resume and (run / "run.json").is_file():  # its own record says that the folder is ours
        shutil.rmtree(run)
    some = "one concept" if len(concepts) == 1 else f"{len(concepts)} concepts, one at a time"
    say(f"Erasing {some}. Step 1 of 2: making the erasers.")
    erasers = []
    for phrase, concept in concepts:
        path = _eraser_path(s.folder, concept.name)
        if s.resume and path.exists():
            say(f"{phrase!r}: {path} is there already")
        else:
            with progress_bar(phrase) as progress:
                save_or_keep(path, fit(pipe, concept, s.fit, progress, reference=known).save)
        erasers.append(Eraser.load(path))
        say(f"{phrase!r} -> {path}, {size_text(path.stat().st_size)}, made in {erasers[-1].header.seconds or 0:.0f} s")
        if said := separability_warning(erasers[-1]):
            say(said)
        write_bytes(path.with_suffix(".png"), png(first_look(pipe, erasers[-1])))
        say(f"{path.with_suffix('.png')}  images without it and with it: open it now")
    if any(e.image_gate for e in erasers) and family_of(pipe).render is not None:
        write_bytes(s.folder / _STARTS, png(start_images(pipe, erasers)))
        say(f"{s.folder / _STARTS}  pictures of them that come in, redrawn with and without erasers: objects may stay")
    say("Step 2 of 2: measuring them on prompts and seeds that none was made with.")
    report = evaluate_erasers(pipe, erasers, _with_concepts(s.evaluate, concepts), run)
    for e in erasers:  # now with their figures
        shutil.copyfile(run / "erasers" / f"{file_name(e.name)}.safetensors", _eraser_path(s.folder, e.name))
    paths = write_report(report, s.folder)
    say("\n" + terminal_tables(report) + "\n")
    for path in paths:
        say(f"{path}  {_FILES[path.name]}")
    return report


def _check_concepts(pipe: Any, concepts: Sequence[tuple[str, Concept]], s: DemoSettings) -> None:
    """Raise ConceptError or SettingsError for concepts that cannot be shown and measured."""
    vocabulary, seen = family_of(pipe).vocabulary, dict[str, str]()
    for phrase, concept in concepts:
        if vocabulary is None or concept.name not in vocabulary:
            raise ConceptError(
                f"{phrase!r} is none of the canvas's own concepts, which the demo shows: pass a phrase such as 'cat', "
                "or use `neuraleraser erase` and `evaluate`"
            )
        if concept.name in seen:
            raise ConceptError(f"{phrase!r} names {concept.name}, as {seen[concept.name]!r} does: pass one of them")
        seen[concept.name] = phrase
    names = [concept.name for _, concept in concepts]
    default_protocol(family_of(pipe), names, _with_concepts(s.evaluate, concepts))


def _with_concepts(settings: EvaluateSettings, concepts: Sequence[tuple[str, Concept]]) -> EvaluateSettings:
    """Return the settings with the concepts among their styles and objects, where these are named."""
    added = {
        kind: tuple(dict.fromkeys((*named, *(c.name for _, c in concepts if c.kind == kind[:-1]))))
        for kind, named in (("styles", settings.styles), ("objects", settings.objects))
        if named
    }
    return replace(settings, **added)


def first_look(pipe: Any, eraser: Eraser) -> NDArray[np.uint8]:
    """Return a sheet uint8 [H, W, 3]: images of three prompts that name the concept and one that does not, as the base
    generates them and as it does with the eraser, of the same seeds.

    For a family whose vocabulary is known; in phrasings of the test.
    """
    v = family_of(pipe).vocabulary
    assert v is not None
    others = [n for n in (v.open_objects if eraser.name in v.styles else v.open_styles) if n != eraser.name]
    rest = [n for n in (v.open_styles if eraser.name in v.styles else v.open_objects) if n != eraser.name]
    cells = [(eraser.name, others[i]) for i in (0, len(others) // 3, 2 * len(others) // 3)] + [(rest[-1], others[0])]
    prompts = [v.fresh_prompt((b,), a) if a in v.styles else v.fresh_prompt((a,), b) for a, b in cells]
    seeds = range(TEST_SEEDS.start, TEST_SEEDS.start + len(prompts))
    sampling = replace(default_sampling(pipe), batch_size=len(prompts))
    base = generate(pipe, prompts, seeds, sampling)
    with attach(pipe, eraser):
        found = generate(pipe, prompts, seeds, sampling)
    rows = [(p, [x.repeat(2, 0).repeat(2, 1) for x in pair]) for p, *pair in zip(prompts, base, found, strict=True)]
    return grid_sheet(rows, ("without", "with the eraser"))


def start_images(pipe: Any, erasers: Sequence[Eraser]) -> NDArray[np.uint8]:
    """Return a sheet uint8 [H, W, 3] of one picture of each concept: as it is, as the base redraws it by image-to-image
    at half strength with an empty prompt, and as it does with the concept's eraser.

    For a family whose world is known: the pictures are rendered, with seeds of the test.
    """
    family = family_of(pipe)
    v, render = family.vocabulary, family.render
    assert v is not None and render is not None
    names = [e.name for e in erasers]
    objects, styles = ([n for n in known if n not in names] or known for known in (v.open_objects, v.open_styles))
    size = native_side(pipe)
    seeds = range(TEST_SEEDS.start, TEST_SEEDS.start + len(erasers))
    shown = [
        ([n], styles[i % len(styles)]) if n in v.objects else ([objects[i % len(objects)]], n)
        for i, n in enumerate(names)
    ]
    given = np.stack([render(o, style, seed, size) for (o, style), seed in zip(shown, seeds, strict=True)])
    using = image_to_image(pipe)
    sampling = replace(default_sampling(pipe), strength=0.5, batch_size=len(erasers))
    base = generate(using, [""] * len(erasers), seeds, sampling, image=given)
    rows = []
    for i, eraser in enumerate(erasers):
        with warnings.catch_warnings(), attach(using, eraser):
            warnings.simplefilter("ignore", ConceptRemainsWarning)  # the sheet shows what remains
            found = generate(using, [""], [seeds[i]], replace(sampling, batch_size=1), image=given[i : i + 1])
        rows.append((eraser.name, [x.repeat(2, 0).repeat(2, 1) for x in (given[i], base[i], found[0])]))
    return grid_sheet(rows, ("picture", "redrawn", "with the eraser"))


def _eraser_path(folder: Path, name: str) -> Path:
    return folder / "erasers" / f"{file_name(name)}.safetensors"


def separability_warning(eraser: Eraser) -> str:
    """Return what to say of an eraser whose features could not tell the concept apart; "" if they could."""
    share = eraser.header.open_share
    if share is None or share >= 0.5:
        return ""
    return (
        f"Careful: the features set {eraser.name} apart from the rest at only {share:.0%} of the timesteps; at the "
        "others the gate stays shut, so the concept will often stay in."
    )


class progress_bar:
    """Context manager: a bar with the time left, fed by calls `progress(what, share)` as `fit` makes them."""

    def __init__(self, label: str) -> None:
        self._bar = tqdm(total=1.0, bar_format="{desc}: {percentage:3.0f} %|{bar}| {elapsed}, {remaining} left")
        self._label = label

    def __enter__(self) -> Callable[[str, float], None]:
        return self._tell

    def _tell(self, what: str, share: float) -> None:
        self._bar.set_description_str(f"{self._label}: {what}", refresh=False)
        self._bar.update(max(0.0, min(share, 1.0) - self._bar.n))

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
