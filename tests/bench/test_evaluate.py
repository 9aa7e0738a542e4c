"""Measuring from end to end on a tiny pipeline, with a judge that reads stamped pixels."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from erasers import half_open, open_eraser
from neuraleraser.bench import evaluate as module
from neuraleraser.bench.cells import HELD_OUT, IMAGE_TO_IMAGE, base_cells, erasure_cells
from neuraleraser.bench.evaluate import evaluate, overhead
from neuraleraser.bench.panels import overlay, spread, write_report
from neuraleraser.bench.store import Store
from neuraleraser.bench.verdicts import Verdicts
from neuraleraser.canvas import words
from neuraleraser.eraser import Eraser, attach, model_card
from neuraleraser.errors import ConceptError, DataError, SettingsError, SplitError
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import EvaluateSettings, Sampling
from tiny import stable_diffusion

STYLES = ("Seed_Images", "Van_Gogh", "Mosaic")
OBJECTS = ("Cats", "Dogs", "Birds")
S = EvaluateSettings(
    grid=1,
    own=1,
    two_objects=1,
    held_out=1,
    image_to_image=0,
    held_out_grid=1,
    timings=1,
    timed_images=2,
    sampling=Sampling(steps=2, batch=4),
    styles=STYLES,
    objects=OBJECTS,
)


class StampJudge:
    """Sees what the first two pixels say; where the rest is not what it first saw for a prompt and seed, nothing of
    the concepts (so that an edit counts as an erasure)."""

    styles, objects = STYLES, OBJECTS
    style_threshold, object_thresholds, artefact_threshold = 0.5, (0.5,) * 3, 10.0
    figures = {"style": 0.99, "object": 0.98}  # noqa: RUF012

    def __init__(self) -> None:
        self.first: dict[bytes, bytes] = {}
        self.calls = 0
        self.stop_at = -1

    def __call__(self, images: Images) -> Any:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        p_style, p_object = np.full((len(images), 3), 0.01), np.full((len(images), 3), 0.01)
        for i, image in enumerate(images):
            flat = image.reshape(-1)
            same = self.first.setdefault(flat[:16].tobytes(), flat[16:].tobytes()) == flat[16:].tobytes()
            p_style[i, flat[0] if same else 0] = 0.9
            p_object[i, np.flatnonzero(flat[1:4])] = 0.9
        return SimpleNamespace(p_style=p_style, p_object=p_object, artefact=np.ones(len(images)))


def stamp(prompt: str, seed: int, image: np.ndarray) -> np.ndarray:
    def said(name: str) -> bool:
        return any(phrase in prompt for phrase in words.phrases_of(name))

    marks = [next((i for i, s in enumerate(STYLES) if i and said(s)), 0), *(int(said(o)) for o in OBJECTS)]
    marks += [ord(c) % 256 for c in prompt[:4].ljust(4)] + list(seed.to_bytes(8, "little"))
    out = image.copy()
    out.reshape(-1)[:16] = marks
    return out


@pytest.fixture(autouse=True)
def stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    def stamping(pipe: Any, prompts: Any, seeds: Any, s: Any, *, each: Any = None, **more: Any) -> Images:
        def tell(index: range, images: Images) -> None:
            each(index, np.stack([stamp(prompts[i], seeds[i], x) for i, x in zip(index, images, strict=True)]))

        return generate(pipe, prompts, seeds, s, each=tell if each else None, **more)

    monkeypatch.setattr(module, "generate", stamping)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return stable_diffusion()


@pytest.fixture(scope="module")
def erasers(pipe: Any) -> list[Eraser]:
    cells = base_cells(1, styles=STYLES, objects=OBJECTS)
    prompts, seeds = [c.prompt for c in cells], [c.seed for c in cells]
    made = [open_eraser("Van_Gogh"), open_eraser("Cats", "object", seed=1)]
    return [half_open(e, pipe, prompts, seeds, S.sampling) for e in made]


def cells_of(name: str, s: EvaluateSettings = S) -> list:
    grid = base_cells(s.grid, styles=STYLES, objects=OBJECTS)
    return [*grid, *erasure_cells(name, s, styles=STYLES, objects=OBJECTS)]


def test_from_erasers_to_a_report(pipe: Any, erasers: list[Eraser], tmp_path: Path):
    s = replace(S, image_to_image=1)
    report = evaluate(pipe, erasers, s, tmp_path, judge=StampJudge())
    data = report.to_dict()
    assert [c["name"] for c in data["concepts"]] == ["Van_Gogh", "Cats"]
    assert data["base"]["style_accuracy"] == data["base"]["object_accuracy"] == 1
    assert data["base"]["object_accuracy_Cats"] == 1 and data["base"]["style_accuracy_held_out"] == 1
    assert data["judge"] == {"style_accuracy": 0.99, "object_accuracy": 0.98, "ci": {}, "ns": {}}
    style, obj = data["concepts"]
    assert style["make_seconds"] == 12.5 and 0 < style["bytes"] < 200_000
    assert style["overhead"] > 0 and style["overhead_idle"] > 0
    assert style["bystander"] is None and obj["bystander"] == 1
    assert "ua_held_out" in style and "ua_image_to_image" in style
    kept = Eraser.load(tmp_path / "erasers" / "Van_Gogh.safetensors")
    assert kept.header["measured"]["ua"]["value"] == pytest.approx(style["ua"], abs=1e-4)
    assert "| ua |" in model_card(kept.header)
    assert report.concepts[0].features and report.concepts[0].features[0].heatmaps
    table = Verdicts.load(tmp_path / "verdicts.parquet")
    for e in erasers:
        rows = table.where(table.concept == e.name)
        assert len(rows) == len(cells_of(e.name, s))
        assert 0 < rows.fired.sum() < len(rows)  # else this test would show nothing
        assert not (~rows.identical & ~rows.fired).any()
        drawn = len(list((tmp_path / "images" / e.name).rglob("*.png")))
        assert drawn == rows.fired.sum()
    # What the report says was erased is what was changed: the judge sees the style no more in edited images.
    main = table.where((table.concept == "Van_Gogh") & (table.cell_style == "Van_Gogh"))
    main = main.where(~np.isin(main.prompt_group, [HELD_OUT, IMAGE_TO_IMAGE]))
    assert style["ua"] == pytest.approx((~main.identical).mean())
    for path in write_report(report, tmp_path):
        assert path.stat().st_size > 0
    assert json.loads((tmp_path / "report.json").read_text())["concepts"][0]["n"] == len(main)


def test_images_that_were_not_drawn_again_would_have_had_the_same_bits(
    pipe: Any, erasers: list[Eraser], tmp_path: Path
):
    """The shortcut is exact: drawing every image with the eraser attached gives what the store says."""
    judge = StampJudge()
    evaluate(pipe, erasers, S, tmp_path, judge=judge)
    store = Store(tmp_path, STYLES, OBJECTS)
    for e in erasers:
        saved = Eraser.load(store.eraser_path(e))
        cells = cells_of(e.name)
        with attach(pipe, saved):
            images = generate(pipe, [c.prompt for c in cells], [c.seed for c in cells], S.sampling)
        again = 0
        for cell, image in zip(cells, images, strict=True):
            here = store.drawn_again(e.name, cell)
            again += here
            assert np.array_equal(stamp(cell.prompt, cell.seed, image), store.image(e.name if here else "base", cell))
        assert 0 < again < len(cells)


def same(a: Verdicts, b: Verdicts) -> bool:
    assert sorted(a.keys()) == sorted(b.keys())
    order = [b.keys().index(key) for key in a.keys()]
    b = b.where(np.array(order))
    return all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("p_style", "p_object", "fired", "identical")
    )


@pytest.mark.parametrize("stop_at", [2, 9])
def test_a_run_that_was_stopped_goes_on(pipe: Any, erasers: list[Eraser], tmp_path: Path, stop_at: int):
    whole, judge = StampJudge(), StampJudge()
    evaluate(pipe, erasers, S, tmp_path / "whole", judge=whole)
    judge.stop_at = stop_at
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, erasers, S, tmp_path / "stopped", judge=judge)
    assert not list((tmp_path / "stopped").rglob("*.part"))
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "stopped" / "images").rglob("*.png")}
    base_rows = len(Verdicts.load(tmp_path / "stopped" / "verdicts" / "base.parquet"))
    assert base_rows == min(4 * (stop_at - 1), base_rows) > 0
    evaluate(pipe, erasers, S, tmp_path / "stopped", judge=judge)
    tables = [Verdicts.load(tmp_path / name / "verdicts.parquet") for name in ("whole", "stopped")]
    assert same(*tables)
    assert judge.calls <= whole.calls + 2  # only the interrupted batch was drawn twice, and one batch is split
    kept = sum(p.stat().st_mtime_ns == t for p, t in first.items())
    assert kept >= len(first) - S.sampling.batch


def test_a_torn_line_only_costs_a_drawing(pipe: Any, erasers: list[Eraser], tmp_path: Path):
    judge = StampJudge()
    evaluate(pipe, erasers, S, tmp_path, judge=judge)
    before = Verdicts.load(tmp_path / "verdicts.parquet")
    log = tmp_path / "fired.jsonl"
    log.write_text(log.read_text()[:-30])
    evaluate(pipe, erasers, S, tmp_path, judge=judge)
    assert same(before, Verdicts.load(tmp_path / "verdicts.parquet"))


def test_an_eraser_that_changed_is_measured_anew(pipe: Any, erasers: list[Eraser], tmp_path: Path):
    judge = StampJudge()
    evaluate(pipe, erasers, S, tmp_path, judge=judge)
    shut = replace(erasers[0].gate, low=torch.full((2,), 1e9), high=torch.full((2,), 2e9))
    report = evaluate(pipe, [replace(erasers[0], gate=shut)], S, tmp_path, judge=judge)
    ua = report.concepts[0].metrics["ua"]
    assert ua is not None and not isinstance(ua, float) and ua.value == 0
    rows = Verdicts.load(tmp_path / "verdicts.parquet")
    assert rows.where(rows.concept == "Van_Gogh").identical.all()


def test_a_folder_of_other_settings_is_refused(pipe: Any, erasers: list[Eraser], tmp_path: Path):
    judge = StampJudge()
    judge.stop_at = 1
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, erasers, S, tmp_path, judge=judge)
    with pytest.raises(SettingsError, match="other settings"):
        evaluate(pipe, erasers, replace(S, own=2), tmp_path, judge=judge)
    with pytest.raises(SettingsError, match="other model"):
        evaluate(stable_diffusion(seed=1), erasers, S, tmp_path, judge=judge)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda e: {"concept": "Unicorns"}, ConceptError, "cannot be measured"),
        (lambda e: {"kind": "object"}, ConceptError, "cannot be measured"),
        (lambda e: {"seconds": None}, DataError, "how many seconds"),
        (lambda e: {"seeds": [9_000, 11_000]}, SplitError, "seeds 9000 to 11000"),
    ],
)
def test_what_cannot_be_measured_fairly_is_refused_before_anything_is_drawn(
    pipe: Any, tmp_path: Path, change: Callable[[Eraser], dict], error: type[Exception], message: str
):
    e = open_eraser()
    judge = StampJudge()
    with pytest.raises(error, match=message):
        evaluate(pipe, [replace(e, header={**e.header, **change(e)})], S, tmp_path, judge=judge)
    assert judge.calls == 0 and not list(tmp_path.iterdir())


def test_wrong_settings(pipe: Any, tmp_path: Path):
    judge = StampJudge()
    with pytest.raises(SettingsError, match="two of the erasers erase 'Van_Gogh'"):
        evaluate(pipe, [open_eraser(), open_eraser(seed=2)], S, tmp_path, judge=judge)
    with pytest.raises(SettingsError, match="grid is 0"):
        evaluate(pipe, [open_eraser()], replace(S, grid=0), tmp_path, judge=judge)
    with pytest.raises(SettingsError, match="leave pad on"):
        evaluate(pipe, [open_eraser()], replace(S, sampling=Sampling(pad=False)), tmp_path, judge=judge)
    with pytest.raises(SettingsError, match="not a canvas"):
        evaluate(pipe, [open_eraser()], S, tmp_path)


def test_overhead_alternates_and_takes_the_median(pipe: Any, erasers: list[Eraser], monkeypatch: pytest.MonkeyPatch):
    """Timed with a clock that gives plain sampling 1 s, the acting eraser 3 s, the idle one 2 s."""
    now, order = [0.0], []

    def fake(pipe_: Any, prompts: list[str], seeds: Any, s: Any) -> None:
        own = "Gogh" in prompts[0]
        hooked = any(m._forward_hooks for m in pipe.unet.modules())
        order.append((own, hooked))
        now[0] += 1 if not hooked else 3 if own else 2

    ticks: Iterator[float] = iter(lambda: now[0], None)  # type: ignore[arg-type]
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(module, "generate", fake)
    grid = base_cells(1, styles=STYLES, objects=OBJECTS)
    own = [c for c in grid if c.style == "Van_Gogh"]
    others = [c for c in grid if c.style != "Van_Gogh"]
    assert overhead(pipe, erasers[0], own, others, replace(S, timings=2)) == (3.0, 2.0)
    assert order[1:] == [(True, False), (True, True), (False, True), (False, True), (True, True), (True, False)]


def test_spread_is_even():
    assert spread("abcdefgh", 4) == list("adeh")
    assert spread("ab", 4) == list("aabb")
    assert spread("", 4) == []
    table = [(row, column) for row in range(25) for column in range(20)]
    assert len({column for _, column in spread(table, 8)}) > 3


def test_a_heatmap_shows_where():
    heat = np.zeros((2, 2))
    heat[0, 1] = 1
    image = overlay(np.full((8, 8, 3), 200, np.uint8), heat)
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8
    assert (image[:8, 8:] == image[0, 8]).all() and (image[:8, :8] == image[0, 0]).all()
    assert image[0, 8, 0] > image[0, 8, 2] + 50  # warm where it fires
    assert len(set(image[0, 0].tolist())) == 1  # grey where not
