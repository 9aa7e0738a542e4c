"""Measuring erasers from end to end: draw, judge, compare with the base twin, report.

The base set is drawn once, with all erasers attached but only detecting. Up to the moment at which a gate opens
an erased image is its base twin, so an image in which none opened needs no second drawing: only the others are
drawn again, and compared bit for bit. Everything is on disk after each batch, so that a run which was stopped
goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from neuraleraser.bench import metrics
from neuraleraser.bench.cells import (
    GRID,
    HELD_OUT,
    HELD_OUT_GRID,
    IMAGE_TO_IMAGE,
    MAIN,
    Cell,
    base_cells,
    check_split,
    erasure_cells,
)
from neuraleraser.bench.measure import Measure
from neuraleraser.bench.panels import feature_panels, pairs_of, spread, versions
from neuraleraser.bench.published import saeuron, unlearncanvas
from neuraleraser.bench.report import ConceptSection, Number, Report
from neuraleraser.bench.store import Store
from neuraleraser.bench.verdicts import BASE, Key, Verdict, Verdicts, concat
from neuraleraser.canvas import words
from neuraleraser.eraser import Eraser, attach
from neuraleraser.errors import ConceptError, DataError, NeuralEraserError, SettingsError
from neuraleraser.models import image_to_image, speaks_canvas
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import EvaluateSettings, Sampling

METHOD = "eraser"


class Judge(Protocol):
    """What `evaluate` asks of a judge: see `neuraleraser.judges.CanvasJudge`."""

    @property
    def styles(self) -> Sequence[str]: ...
    @property
    def objects(self) -> Sequence[str]: ...
    @property
    def style_threshold(self) -> float: ...
    @property
    def object_thresholds(self) -> Any: ...  # one a name of `objects`
    @property
    def artefact_threshold(self) -> float | None: ...
    @property
    def figures(self) -> Mapping[str, Any]: ...  # accuracies on held-out renders, "style" and "object" among them

    def __call__(self, images: Images, /) -> Any:
        """uint8 [N, S, S, 3] -> p_style [N, styles], p_object [N, objects], artefact [N]."""
        ...


def evaluate(
    pipe: Any,
    erasers: Sequence[Eraser],
    settings: EvaluateSettings | None = None,
    folder: str | Path = "runs/evaluate",
    *,
    judge: Judge | None = None,
) -> Report:
    """Measure `erasers` one at a time on the canvas `pipe`, keeping images and verdicts in `folder`.

    Called again with the same settings it goes on where it was stopped. `folder`/erasers then holds the erasers with
    their figures in the header, where a model card finds them. The judge is the second one unless
    given. Raises SplitError where an eraser was made with what it would be tested with, ConceptError for a
    concept that the judge does not know, SettingsError for a folder of another run or a pipeline that is no
    canvas, DataError where the base shows too little to compare with.
    """
    s = settings or EvaluateSettings()
    judge = judge or _second_judge(pipe)
    _check(erasers, s, judge)
    styles, objects = s.styles or words.STYLES, s.objects or words.OBJECTS
    grid = base_cells(s.grid, styles=styles, objects=objects)
    cells = {e.name: [*grid, *erasure_cells(e.name, s, styles=styles, objects=objects)] for e in erasers}
    for e in erasers:
        check_split(e, cells[e.name])
    extra = [
        cell
        for k, phrasing in enumerate(range(4)[words.HELD_OUT])
        for cell in base_cells(s.held_out_grid, phrasing, styles=styles, objects=objects)
        # Half of the cells in each phrasing; each cell of a round once.
        if (styles.index(cell.style) + objects.index(cell.objects[0])) % 2 == k
    ]
    store = Store(Path(folder), judge.styles, judge.objects)
    erasers = store.claim(pipe, s, erasers)
    everything = list(dict.fromkeys(cell for part in (grid, *cells.values(), extra) for cell in part))
    _draw_base(pipe, erasers, everything, s.sampling, judge, store)
    for e in erasers:
        _draw_erased(pipe, e, cells[e.name], s.sampling, judge, store)
    base = store.table(BASE)
    tables = {e.name: _verdicts(e, cells[e.name], base, store) for e in erasers}
    whole = concat([base, *tables.values()])
    whole.save(store.folder / "verdicts.parquet")
    level, far = thresholds(judge), float(judge.artefact_threshold or 0)
    sections = [_section(pipe, e, concat([base, tables[e.name]]), cells[e.name], s, far, level, store) for e in erasers]
    for e, section in zip(erasers, sections, strict=True):
        measured(e, section).save(store.eraser_path(e))
    return Report(
        base=_base(base, far, level),
        judge={f"{kind}_accuracy": float(judge.figures[kind]) for kind in ("style", "object")},
        concepts=sections,
        settings={**asdict(s), "images of the base": len(base), "images in all": len(whole)},
        versions=versions(pipe),
    )


def _second_judge(pipe: Any) -> Judge:
    from neuraleraser.judges import CanvasJudge

    if not speaks_canvas(pipe):
        raise SettingsError(
            f"this {type(pipe).__name__} is not a canvas, whose judge is the only one here: "
            "pass model 'canvas', or a judge of your own"
        )
    return CanvasJudge.load("second")


def measured(eraser: Eraser, section: ConceptSection) -> Eraser:
    """The eraser with its figures in the header, as model cards state them."""
    figures = {
        name: {"value": round(m.value, 4), "low": round(m.low, 4), "high": round(m.high, 4), "n": m.n}
        for name, m in section.metrics.items()
        if isinstance(m, Measure)
    }
    return replace(eraser, header={**eraser.header, "measured": figures})


def thresholds(judge: Judge) -> dict[str, float]:
    """Class name to the probability above which the judge sees it."""
    objects = zip(judge.objects, judge.object_thresholds, strict=True)
    return {s: float(judge.style_threshold) for s in judge.styles} | {name: float(level) for name, level in objects}


def _check(erasers: Sequence[Eraser], s: EvaluateSettings, judge: Judge) -> None:
    if judge.artefact_threshold is None:
        raise SettingsError("this judge measures no artefacts: pass the second canvas judge, or none")
    names = [e.name for e in erasers]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise SettingsError(f"two of the erasers erase {twice[0]!r}: measure them one after the other, in two folders")
    for e in erasers:
        known = {"style": judge.styles, "object": judge.objects}.get(str(e.header.get("kind")), ())
        if e.name not in known:
            raise ConceptError(
                f"the eraser of {e.name!r} (kind {e.header.get('kind')!r}) cannot be measured: "
                f"the judge knows the styles {list(judge.styles)} and the objects {list(judge.objects)}"
            )
        if not isinstance(_make_seconds(e), int | float):
            raise DataError(f"the eraser of {e.name!r} does not say how many seconds it took to make: make it again")
    if not s.sampling.pad:
        raise SettingsError(
            "without padding an image's bits depend on its company, so there are no twins: leave pad on"
        )
    if s.grid < 1 or s.timings < 1 or s.timed_images < 1:
        raise SettingsError(
            f"grid is {s.grid}, timings {s.timings}, timed_images {s.timed_images}: each must be at least 1"
        )


def _make_seconds(eraser: Eraser) -> Any:
    return eraser.header.get("make_seconds", eraser.header.get("seconds"))


# --- drawing


def _draw_base(
    pipe: Any, erasers: Sequence[Eraser], cells: Sequence[Cell], s: Sampling, judge: Judge, store: Store
) -> None:
    done = store.done(BASE)
    todo = [c for c in cells if c.key not in done]

    def on(part: Sequence[Cell], images: Images, fired: Sequence[dict[str, list[float]]], seconds: float) -> None:
        store.put_images(BASE, part, images)
        store.note_fired(part, erasers, fired)
        store.add(BASE, _rows(judge, part, images, method=BASE, seconds=seconds))

    _draw(pipe, erasers, todo, s, on, "base", len(cells), action="detect")


def _draw_erased(pipe: Any, eraser: Eraser, cells: Sequence[Cell], s: Sampling, judge: Judge, store: Store) -> None:
    need = [c for c in cells if store.may_have_fired(c, eraser)]
    done = store.done(eraser.name)
    todo = [c for c in need if c.key not in done]

    def on(part: Sequence[Cell], images: Images, fired: Sequence[dict[str, list[float]]], seconds: float) -> None:
        store.put_images(eraser.name, part, images)
        same = [np.array_equal(x, store.image(BASE, c)) for c, x in zip(part, images, strict=True)]
        rows = _rows(judge, part, images, method=METHOD, seconds=seconds)
        store.add(
            eraser.name,
            [
                replace(row, concept=eraser.name, kind=str(eraser.header["kind"]), fired=bool(f), identical=i)
                for row, f, i in zip(rows, fired, same, strict=True)
            ],
        )

    _draw(pipe, [eraser], todo, s, on, f"without {eraser.name}", len(need))


def _draw(
    pipe: Any,
    erasers: Sequence[Eraser],
    cells: Sequence[Cell],
    s: Sampling,
    on: Callable[[Sequence[Cell], Images, Sequence[dict[str, list[float]]], float], None],
    label: str,
    total: int,
    *,
    action: str = "erase",
) -> None:
    """Draw `cells` and tell `on` each finished batch: its cells, images, what fired in each, seconds an image."""
    plain = [c for c in cells if c.group != IMAGE_TO_IMAGE]
    started = [c for c in cells if c.group == IMAGE_TO_IMAGE]
    with tqdm(total=total, initial=total - len(cells), desc=label, unit="img") as bar:

        def run(using: Any, part: Sequence[Cell], init: Images | None) -> None:
            clock = [time.monotonic()]
            with attach(using, erasers, action=action) as trace:

                def each(index: range, images: Images) -> None:
                    seconds = (time.monotonic() - clock[0]) / len(index)
                    on([part[i] for i in index], images, [trace.fired.get(i, {}) for i in index], seconds)
                    bar.update(len(index))
                    clock[0] = time.monotonic()

                prompts, seeds = [c.prompt for c in part], [c.seed for c in part]
                generate(using, prompts, seeds, s, init=init, each=each)

        if plain:
            run(pipe, plain, None)
        if started:
            run(image_to_image(pipe), started, _renders(started, _size(pipe)))


def _rows(judge: Judge, cells: Sequence[Cell], images: Images, **more: Any) -> list[Verdict]:
    seen = judge(images)
    p_style, p_object, artefact = (np.asarray(v) for v in (seen.p_style, seen.p_object, seen.artefact))
    return [
        Verdict(
            prompt=c.prompt,
            prompt_group=c.group,
            seed=c.seed,
            cell_style=c.style,
            cell_objects=c.objects,
            p_style=p_style[i],
            p_object=p_object[i],
            artefact=float(artefact[i]),
            **more,
        )
        for i, c in enumerate(cells)
    ]


def _renders(cells: Sequence[Cell], size: int) -> Images:
    """A render of each cell's own content [N, size, size, 3], from its seed."""
    try:
        from neuraleraser.canvas.render import Content, render
    except ImportError as error:
        raise NeuralEraserError(
            f"rendering needs {error.name}, which is not installed: pip install 'neuraleraser[canvas]'"
        ) from error
    return np.stack([render(Content(c.objects, c.style), c.seed, size) for c in cells])


def _size(pipe: Any) -> int:
    return int(pipe.unet.config["sample_size"]) * int(pipe.vae_scale_factor)


# --- from verdicts to the report


def _verdicts(eraser: Eraser, cells: Iterable[Cell], base: Verdicts, store: Store) -> Verdicts:
    """One row a cell: what was drawn again, and for the others their base twin's row."""
    drawn = store.table(eraser.name)
    keys = {c.key for c in cells}
    there = {key[2:] for key in drawn.keys()}
    rows = np.array([i for i, key in enumerate(base.keys()) if key[2:] in keys - there], dtype=int)
    n = len(rows)
    copied = replace(
        base.where(rows),
        method=np.full(n, METHOD, dtype=object),
        concept=np.full(n, eraser.name, dtype=object),
        kind=np.full(n, str(eraser.header["kind"]), dtype=object),
        fired=np.zeros(n, dtype=bool),
        identical=np.ones(n, dtype=bool),
    )
    return concat([drawn.where(np.array([key[2:] in keys for key in drawn.keys()], dtype=bool)), copied])


def _group(table: Verdicts, *groups: str) -> Verdicts:
    return table.where(np.isin(table.prompt_group, groups))


def _base(base: Verdicts, far: float, level: dict[str, float]) -> dict[str, Number]:
    grid = _group(base, GRID)
    figures: dict[str, Number] = dict(metrics.base_quality(grid, far, level))
    held_out = _group(base, HELD_OUT_GRID)
    for kind in ("style", "object"):
        if len(held_out):
            figures[f"{kind}_accuracy_held_out"] = metrics.accuracy(held_out, kind, level)
        for name, figure in metrics.accuracy_by_class(grid, kind, level).items():
            figures[f"{kind}_accuracy_{name}"] = figure
    return figures


def _section(
    pipe: Any,
    eraser: Eraser,
    table: Verdicts,
    cells: Sequence[Cell],
    s: EvaluateSettings,
    far: float,
    level: dict[str, float],
    store: Store,
) -> ConceptSection:
    main = metrics.twins(_group(table, *MAIN), METHOD, eraser.name)
    figures: dict[str, Number] = dict(metrics.erasure(main, far, level))
    for group, suffix in ((HELD_OUT, "held_out"), (IMAGE_TO_IMAGE, "image_to_image")):
        part = _group(table, group)
        if len(part):
            t = metrics.twins(part, METHOD, eraser.name)
            figures |= {f"{m.__name__}_{suffix}": _or_none(m, t, level) for m in (metrics.ua, metrics.kept)}
    for label, official in (("unlearncanvas", unlearncanvas), ("saeuron", saeuron)):
        try:
            figures |= {f"{label}_{name}": value for name, value in official(main).items()}
        except DataError:  # too few cells for their definitions; ours do not depend on it
            continue
    own = [c for c in cells if c.group in MAIN and eraser.name in (c.style, *c.objects)]
    others = [c for c in cells if c.group == GRID and eraser.name not in (c.style, *c.objects)]
    acting, idle = overhead(pipe, eraser, own, others, s)
    figures |= {
        "make_seconds": float(_make_seconds(eraser)),
        "bytes": float(store.eraser_path(eraser).stat().st_size),
        "overhead": acting,
        "overhead_idle": idle,
    }
    shown = dict(zip(main.base.keys(), metrics.shows(main.base, main.kind, eraser.name, level), strict=True))
    seen = [c for c in own if shown[Key(BASE, "", *c.key)]]
    return ConceptSection(
        name=eraser.name,
        kind=main.kind,
        metrics=figures,
        pairs=pairs_of(store, eraser.name, seen, 6),
        others=pairs_of(store, eraser.name, others, 8),
        features=feature_panels(pipe, eraser, seen or own, s.sampling),
        became=metrics.became(main, level),
        method=METHOD,
    )


def _or_none(metric: Callable[..., Any], t: metrics.Twins, level: dict[str, float]) -> Number:
    try:
        return metric(t, level)
    except DataError:  # the base shows the concept in none of these few images
        return None


def overhead(
    pipe: Any, eraser: Eraser, own: Sequence[Cell], others: Sequence[Cell], s: EvaluateSettings
) -> tuple[float, float]:
    """Sampling time with the eraser attached over plain sampling: (where it acts, where it does not).

    Medians over `s.timings` rounds; in each the three are timed right after one another on equal batches, in
    alternating order, so that other load on the machine falls on all of them.
    """
    n = s.timed_images
    sampling = replace(s.sampling, batch=n, pad=True)
    mine, theirs = spread(own, n), spread(others or own, n)

    def seconds(cells: Sequence[Cell], attached: bool) -> float:
        with attach(pipe, [eraser] if attached else []):
            started = time.perf_counter()
            generate(pipe, [c.prompt for c in cells], [c.seed for c in cells], sampling)
            return time.perf_counter() - started

    seconds(mine, True)  # warm
    ratios = []
    for k in range(s.timings):
        jobs: list[tuple[Sequence[Cell], bool]] = [(mine, False), (mine, True), (theirs, True)]
        order = range(3) if k % 2 == 0 else range(2, -1, -1)
        took = {i: seconds(*jobs[i]) for i in order}
        ratios.append((took[1] / took[0], took[2] / took[0]))
    acting, idle = np.median(np.array(ratios), 0)
    return float(acting), float(idle)
