"""All methods on the same images: six styles and six objects of the canvas, fixed beforehand.

    python benchmarks/canvas_official.py draw --kind style --erasers runs/erasers [--methods sld uce]
    python benchmarks/canvas_official.py draw --kind object --erasers runs/erasers
    python benchmarks/canvas_official.py join

Erasers are files of `neuraleraser erase`, named after their concepts. Other methods are set as
`benchmarks/canvas_rivals.py` found best on development concepts, SAeUron as docs/how-to/saeuron.md says. Cells are
those of `evaluate`, of eight styles and eight objects: each with each, and of the concept once more, in held-out
phrasings, in fragments, beside another object, and from a picture of it (at strength 0.3, 0.5 or 0.7 by turns, and half
of it drawn anew) or its inverted latents, with an empty prompt. Test seeds, second judge. All methods share the base's
images. Ours and the controls are drawn on all six concepts and all cells; other methods, which change every image, on
fewer concepts, on every second cell of the grid that does not ask for the concept, and without inpainting and inverted
latents.

"patch-replacement" has SAeUron's features, and "saemnesia" starts from SAeUron's SAE in runs/saeuron;
"difference-of-means" stands behind the prompt gate of our eraser, which sees no picture. The first and the last were
not tuned. "none" does nothing; "oracle" is the base model, asked for the same without the
concept; the string filters know every phrasing, or those that methods are made with. "make_seconds" is of one core that
others used as well.

`draw` keeps everything in a folder, and goes on where it was stopped; the two kinds may run side by side. `join` writes
report.json's content, with an entry in "concepts" for every method and concept, to
benchmarks/results/canvas-official.json;
`benchmarks/report_official.py` prints its tables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import canvas_routes
import tyro
from canvas_rivals import RESULTS, RIVALS, chosen

from neuraleraser.canvas.words import VOCABULARY as V
from neuraleraser.concepts import canvas_concept
from neuraleraser.eraser import Eraser
from neuraleraser.evaluation.evaluate import default_protocol, evaluate
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.protocol import GRID, HALF, IMAGE_TO_IMAGE, INVERTED, NEUTRAL, Cell, EvaluationProtocol
from neuraleraser.evaluation.report import Report
from neuraleraser.families import family_of
from neuraleraser.families.defaults import default_sampling
from neuraleraser.families.opening import open_pipeline
from neuraleraser.io.atomic import write_bytes
from neuraleraser.methods import (
    DifferenceOfMeans,
    DoNothing,
    EraserMethod,
    Oracle,
    PatchReplacement,
    string_filters,
)
from neuraleraser.settings import EvaluateSettings

STYLES = ("Van_Gogh", "Superstring", "On_Fire", "Neon_Lines", "Sponge_Dabbed", "Watercolor")
OBJECTS = ("Cats", "Flowers", "Horses", "Jellyfish", "Rabbits", "Waterfalls")
BESIDE = ("Seed_Images", "Mosaic", "Dogs", "Towers")
"""Kept beside them: a plain picture, a style, a look-alike of cats and rabbits, and of none."""
SETTINGS = EvaluateSettings(
    grid_rounds=1,
    target_rounds=1,
    two_object_rounds=1,
    held_out_rounds=1,
    start_image_rounds=1,
    fragment_prompts=10,
    held_out_grid_rounds=0,
    unhooked_checks=20,
    idle_checks=4,
    styles=(*STYLES, *BESIDE[:2]),
    objects=(*OBJECTS, *BESIDE[2:]),
)
FOLDER = Path("runs/official")
OUT = Path("benchmarks/results/canvas-official.json")
SAEURON = ("saeuron", "saeuron-published", "patch-replacement")
"""Made with one SAE of the image stream."""


@dataclass(frozen=True)
class Draw:
    """Draw and measure."""

    erasers: Path
    """Folder of erasers, named after their concepts."""
    kind: Literal["style", "object"]
    methods: tuple[str, ...] = (*SAEURON, "difference-of-means", *RIVALS)
    """Other methods; ours and the controls come first and always."""
    concepts: tuple[str, ...] = ()
    """Other methods are measured on these; none named: the first three."""
    folder: Path = FOLDER
    saeuron: Path = Path("runs/saeuron")
    """Folder in which SAeUron's SAE and its erasers are made and kept."""


@dataclass(frozen=True)
class Join:
    """Write the results file."""

    folder: Path = FOLDER
    out: Path = OUT


def protocol_of(pipe: Any, concepts: Sequence[str], *, half: bool = False) -> EvaluationProtocol:
    """Return the cells; of those that start from a picture, the ones whose prompt says nothing. `half`: of the grid,
    those of the concept and every second other one; and no inpainting or inverted latents, whose few images cost a
    batch of twenty each."""
    whole = default_protocol(family_of(pipe), concepts, SETTINGS)

    def taken(c: Cell, name: str) -> bool:
        other = c.group == GRID and not c.asks_for(name)
        at = SETTINGS.styles.index(c.style) + SETTINGS.objects.index(c.objects[0]) if other else 0
        return c.group not in (IMAGE_TO_IMAGE, NEUTRAL) and not (half and (at % 2 or c.group in (HALF, INVERTED)))

    return replace(whole, cells={name: [c for c in cells if taken(c, name)] for name, cells in whole.cells.items()})


def ours_and_controls(s: Draw, protocol: EvaluationProtocol, concepts: Sequence[str]) -> Iterator[Method]:
    """Yield the methods that can tell where they would act, which the base's images are drawn with."""
    for name in concepts:
        yield EraserMethod(Eraser.load(s.erasers / f"{name}.safetensors"))
        yield from string_filters(V, name)
        yield Oracle.of(V, name, protocol.cells[name])
        yield DoNothing(name, s.kind)


def made(s: Draw, pipe: Any, label: str, name: str) -> tuple[Method, float, Any]:
    """Make a method of others; return it with the seconds that takes, and its settings."""
    clock = time.monotonic()
    if label in SAEURON:
        routes = canvas_routes.Settings(s.erasers, saeuron=s.saeuron)
        found = {m.name: m for m in canvas_routes.saeuron(routes, pipe, name).values()}
        found["patch-replacement"] = PatchReplacement(Eraser.load(s.saeuron / f"{name}.safetensors"))
        return found[label], time.monotonic() - clock, "docs/how-to/saeuron.md"
    if label == "difference-of-means":
        eraser, pairs = Eraser.load(s.erasers / f"{name}.safetensors"), canvas_concept(name).pairs[:24]
        control = DifferenceOfMeans.measure(pipe, eraser, pairs, range(len(pairs)), default_sampling(pipe))
        return control, time.monotonic() - clock, {}
    numbers = chosen(label, json.loads(RESULTS.read_text()))
    method = RIVALS[label].make(pipe, name, numbers)
    return method, time.monotonic() - clock, numbers


def draw(s: Draw) -> None:
    """Measure ours and the controls, then each other method on each concept."""
    pipe, folder = open_pipeline("canvas"), s.folder / s.kind
    pipe.set_progress_bar_config(disable=True)
    every = STYLES if s.kind == "style" else OBJECTS
    protocol, part = protocol_of(pipe, every), protocol_of(pipe, every, half=True)

    def measured(methods: Sequence[Method], path: Path, details: Callable[[Report], Report] = lambda r: r) -> None:
        cells = protocol if len(methods) > 1 else part
        report = details(evaluate(pipe, methods, SETTINGS, folder, protocol=cells))
        write_bytes(path, json.dumps(report.to_dict(), indent=1).encode())

    first = folder / "entries/controls.json"
    if not first.exists():
        measured(list(ours_and_controls(s, protocol, every)), first)
    for label in s.methods:
        for name in s.concepts or every[:3]:
            path = folder / f"entries/{label}-{name}.json"
            if path.exists():
                continue
            method, seconds, numbers = made(s, pipe, label, name)
            costs = {"make_seconds": round(seconds, 1)}
            measured([method], path, lambda r, m=method, c=costs: r.with_details(m.name, m.concept, c))
            print(label, name, numbers, costs, flush=True)


def join(s: Join) -> None:
    """Write one file of all entries."""
    whole: dict[str, Any] = {}
    for kind in ("style", "object"):
        paths = sorted((s.folder / kind / "entries").glob("*.json"), key=lambda p: (p.stem != "controls", p.stem))
        for path in paths:
            report = json.loads(path.read_text())
            base = {f"{key}_{kind}s_run": value for key, value in report["base"].items()}
            whole.setdefault("command", "python benchmarks/canvas_official.py draw; … join")
            for key in ("judge", "settings", "versions"):
                whole.setdefault(key, report[key])
            whole["base"] = base | whole.get("base", {})  # the controls' run, which comes first, has the whole grid
            whole.setdefault("findings", []).extend(f for f in report["findings"] if f not in whole["findings"])
            whole.setdefault("concepts", []).extend(report["concepts"])
    rows = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    whole["numbers"] = {label: chosen(label, rows) for label in {row["method"] for row in rows}}
    lines = [f'"{key}": {json.dumps(value)}' for key, value in whole.items() if key != "concepts"]
    entries = ",\n".join(json.dumps(entry) for entry in whole["concepts"])  # one a line
    write_bytes(s.out, ("{" + ",\n".join([*lines, f'"concepts": [\n{entries}\n]']) + "}\n").encode())


if __name__ == "__main__":
    command = tyro.cli(
        Annotated[Draw, tyro.conf.subcommand("draw")] | Annotated[Join, tyro.conf.subcommand("join")]  # type: ignore[arg-type]
    )
    draw(command) if isinstance(command, Draw) else join(command)
