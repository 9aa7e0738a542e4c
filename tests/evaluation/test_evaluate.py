"""Measuring from end to end on a tiny pipeline, with a judge that reads stamped pixels."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.canvas_cells import canvas_protocol
from helpers.erasers import open_eraser
from helpers.measured import S, everything, of
from helpers.stamp_judge import STYLES, StampJudge, stamp, stamping
from neuraleraser.assessment import evaluate_erasers
from neuraleraser.canvas import words
from neuraleraser.canvas.canvas_judge import CanvasJudge
from neuraleraser.eraser import Eraser, Provenance, attach, model_card
from neuraleraser.errors import ConceptError, DataError, SettingsError, SplitError
from neuraleraser.evaluation import draw as drawing
from neuraleraser.evaluation import timing
from neuraleraser.evaluation.evaluate import default_judge, evaluate
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.metrics import pair_with_base
from neuraleraser.evaluation.protocol import FRAGMENTS, IMAGE_TO_IMAGE, MAIN_GROUPS, Cell, EvaluationProtocol
from neuraleraser.evaluation.report_files import write_report
from neuraleraser.evaluation.results import BASE
from neuraleraser.evaluation.run_folder import RunFolder
from neuraleraser.families.canvas import render
from neuraleraser.families.defaults import default_sampling, evaluation_sampling
from neuraleraser.families.opening import image_to_image, open_pipeline
from neuraleraser.judges import JudgeSpec
from neuraleraser.methods import DoNothing, EraserMethod, StringFilter
from neuraleraser.sampling import generate
from neuraleraser.settings import EvaluateSettings, Sampling


@pytest.fixture(autouse=True)
def stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "generate", stamping)


def test_from_erasers_to_a_report(pipe: Any, erasers: list[Eraser], tmp_path: Path):
    report = evaluate_erasers(pipe, erasers, S, tmp_path, judge=StampJudge())
    data = report.to_dict()
    filters = ["string-filter-all", "string-filter-seen"]
    assert [(c["name"], c["method"]) for c in data["concepts"]] == [
        (name, method) for name in ("Van_Gogh", "Cats") for method in ("neuraleraser", *filters, "none")
    ]
    assert data["base"]["style_accuracy"] == data["base"]["object_accuracy"] == 1
    assert data["base"]["object_accuracy_Cats"] == 1 and data["base"]["style_accuracy_held_out"] == 1
    assert data["base"]["unhooked_identical"] == 1 and data["base"]["ns"]["unhooked_identical"] == 5
    assert [f for f in data["findings"] if f["level"] == "error"] == []
    style, full, seen, none = data["concepts"][:4]
    assert (
        style["make_seconds"] == 12.5
        and style["make_peak_bytes"] == 2**30
        and 0 < style["bytes"] < 200_000
        and style["overhead_idle"] > 0
    )
    assert style["bystander"] is None and data["concepts"][4]["bystander"] is not None
    # The judge takes every changed image for an artefact, and the threshold is its own.
    assert 0 < style["artefact_rate_target"] == style["ua"] < 1 and style["artefact_rate_target_base"] == 0
    assert none["ua"] == 0 == none["artefact_rate_target"] and none["unchanged_share"] == 1
    assert full["ua"] == seen["ua"] == 1 and full["ua_held_out"] == 1 and seen["ua_held_out"] == 0
    assert full["unchanged_compared"] == 1 and full["ns"]["idle_identical"] >= 2
    kept = Eraser.load(tmp_path / "erasers" / "Van_Gogh.safetensors")
    assert kept.header.measured["ua"]["value"] == pytest.approx(style["ua"], abs=1e-4)
    assert "| ua |" in str(model_card(kept.header))
    (gate,) = report.erasures[0].gates
    assert gate.title == "Prompt gate" and gate.features and gate.features[0].heatmaps and report.erasures[0].pairs
    assert "They are not made to see what comes in by a start image" in report.erasures[0].routes
    assert not report.erasures[1].pairs and not report.erasures[1].gates
    ours, everywhere, _, nothing = (entry.beside for entry in report.erasures[:4])
    places = [[(p.prompt, p.seed) for p in some] for some in (ours, everywhere, nothing)]
    assert places[0] == places[1] == places[2] and len(places[0]) == 4 and "Gogh" not in places[0][-1][0]
    assert all(p.identical for p in nothing) and not any(p.identical for p in everywhere[:3])
    assert all(np.array_equal(a.before, b.before) for a, b in zip(ours, everywhere, strict=True))
    results = everything(tmp_path)
    cells = canvas_protocol(["Van_Gogh", "Cats"], S).cells
    for e in erasers:
        rows = of(results, "neuraleraser", e.name)
        assert len(rows) == len(cells[e.name])
        acted = rows.lists_name("fired", rows.identities())
        assert 0 < acted.sum() < len(rows)  # else this test would show nothing
        assert not (~rows.identical & ~acted).any() and rows.compared[acted].all()
        drawn = len(list((tmp_path / "images" / "neuraleraser" / e.name).rglob("*.png")))
        assert drawn == rows.compared.sum() >= min(acted.sum() + S.idle_checks, len(rows))
    # What the report says was erased is what was changed: the judge sees the style no more in edited images.
    main = of(results, "neuraleraser", "Van_Gogh")
    main = main.where((main.cell_style == "Van_Gogh") & np.isin(main.group, MAIN_GROUPS))
    assert style["ua"] == pytest.approx((~main.identical).mean())
    assert style["n"] == len(main)
    for path in write_report(report, tmp_path):
        assert path.stat().st_size > 0


def test_images_that_were_not_drawn_again_would_have_had_the_same_bits(
    pipe: Any, erasers: list[Eraser], tmp_path: Path
):
    """The shortcut is exact: drawing every image with the eraser attached gives what the folder says."""
    judge = StampJudge()
    evaluate(pipe, [EraserMethod(e) for e in erasers], S, tmp_path, judge=judge)
    run, protocol = RunFolder(tmp_path, JudgeSpec.of(judge)), canvas_protocol([e.name for e in erasers], S)
    for e in erasers:
        cells = protocol.cells[e.name]
        with attach(pipe, e):
            images = generate(pipe, [c.prompt for c in cells], [c.seed for c in cells], S.sampling)
        for cell, image in zip(cells, images, strict=True):
            assert np.array_equal(stamp(cell.prompt, cell.seed, image), run.image("neuraleraser", e.name, cell))


def test_every_thing_a_judge_says_is_read_by_its_own_thresholds(pipe: Any, erasers: list[Eraser], tmp_path: Path):
    """Nothing the judge says reaches 0.5. At its threshold of 0.3 classes show; at one of 0.45 none does."""
    judge, strict = StampJudge(), StampJudge()
    strict.thresholds = dict.fromkeys(judge.thresholds, 0.45)
    report = evaluate(pipe, [EraserMethod(erasers[0])], S, tmp_path / "a", judge=judge)
    assert report.erasures[0].figures["ua"] is not None and report.base["style_accuracy"].value == 1  # type: ignore[union-attr]
    blind = evaluate(pipe, [EraserMethod(erasers[0])], S, tmp_path / "b", judge=strict)
    assert blind.erasures[0].figures["ua"] is None and blind.base["style_accuracy"].value == 0  # type: ignore[union-attr]


def test_a_judge_without_artefacts_gives_a_report_without_them(pipe: Any, erasers: list[Eraser], tmp_path: Path):
    class Blind(StampJudge):
        artefact_threshold = None

        def __call__(self, images: Any, /) -> Any:
            return replace(super().__call__(images), artefact=None)

    report = evaluate(pipe, [EraserMethod(erasers[0])], S, tmp_path, judge=Blind())
    figures = report.erasures[0].figures
    assert figures["artefact_rate"] is None and figures["artefact_rate_target"] is None and figures["ua"] is not None
    page = write_report(report, tmp_path)[0].read_text()
    assert "artefact_rate" not in page and "ua_held_out" in page


def test_the_default_judge_is_the_second_of_the_canvas(pipe: Any):
    judge = default_judge(open_pipeline("canvas"))
    second = CanvasJudge.load("second")
    assert judge.artefact_threshold == second.artefact_threshold is not None and judge.figures == second.figures
    with pytest.raises(SettingsError, match="no judge is known"):
        default_judge(pipe)


@dataclass(frozen=True)
class Painter:
    """A method of a kind of its own: weights that are changed while it is applied. It cannot watch."""

    concept: str = "Van_Gogh"
    kind: str = "style"
    name: str = "painter"
    key: str = "1"
    made_with: None = None
    only_if: str = ""
    """Watch, and claim to act where the prompt has this text: a lie, as it acts everywhere."""

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[None]:
        weight = pipe.unet.conv_out.weight
        before = weight.data.clone()
        weight.data.mul_(1.5)
        try:
            yield None
        finally:
            weight.data.copy_(before)

    def watched(self, pipe: Any) -> Any:
        if not self.only_if:
            return nullcontext()
        return StringFilter(self.concept, self.kind, {self.only_if: ""}).watched(pipe)


def test_a_method_that_cannot_tell_where_it_acts_is_drawn_in_full(pipe: Any, tmp_path: Path):
    report = evaluate(pipe, [Painter()], S, tmp_path, judge=StampJudge())
    rows = of(everything(tmp_path), "painter", "Van_Gogh")
    assert rows.compared.all() and not rows.identical.any()
    assert len(rows) == len(canvas_protocol(["Van_Gogh"], S).cells["Van_Gogh"])
    figures = report.erasures[0].figures
    assert figures["unchanged_share"].value == 0 and figures["idle_identical"] is None  # type: ignore[union-attr]
    assert report.findings == []


def test_a_method_that_acts_where_it_says_that_it_does_not_is_found_out(pipe: Any, tmp_path: Path):
    report = evaluate(pipe, [Painter(only_if="Van Gogh")], S, tmp_path, judge=StampJudge())
    (finding,) = report.findings
    assert finding.level == "error" and "in which it said that it does not act" in finding.text
    figures = report.erasures[0].figures
    assert figures["idle_identical"].value == 0 and figures["idle_identical"].n >= S.idle_checks  # type: ignore[union-attr]
    assert figures["unchanged_compared"].value == 0 < figures["unchanged_share"].value  # type: ignore[union-attr]
    assert 'class="error"' in write_report(report, tmp_path)[0].read_text()


def test_a_watcher_that_changes_the_base_is_found_out(pipe: Any, tmp_path: Path):
    class Meddler(Painter):
        @contextmanager
        def watched(self, pipe: Any) -> Any:
            with self.applied(pipe), DoNothing("Van_Gogh", "style").watched(pipe) as trace:
                yield trace

    report = evaluate(pipe, [Meddler()], S, tmp_path, judge=StampJudge())
    assert "5 of 5 base images differ from those drawn with nothing attached" in report.findings[-1].text
    assert report.base["unhooked_identical"].value == 0  # type: ignore[union-attr]


def test_image_to_image_starts_from_the_render(pipe: Any, tmp_path: Path):
    s = replace(S, start_image_rounds=1, fragment_prompts=0, held_out_grid_rounds=0)
    report = evaluate(pipe, [Painter()], s, tmp_path, judge=StampJudge())
    assert report.erasures[0].figures["ua_image_to_image"].value == 1  # type: ignore[union-attr]
    cells = [c for c in canvas_protocol(["Van_Gogh"], s).cells["Van_Gogh"] if c.group == IMAGE_TO_IMAGE]
    assert len(cells) == 3 and {c.route for c in cells} == {"start image"}
    prompts, seeds = [c.prompt for c in cells], [c.seed for c in cells]
    start = np.stack([render(c.objects, c.style, c.seed, 16) for c in cells])
    assert len(np.unique(start.reshape(3, -1), axis=0)) == 3 and start.std() > 10
    images = generate(image_to_image(pipe), prompts, seeds, s.sampling, image=start)
    run = RunFolder(tmp_path, JudgeSpec.of(StampJudge()))
    for cell, image in zip(cells, images, strict=True):
        assert np.array_equal(run.image(BASE, "", cell), stamp(cell.prompt, cell.seed, image))


@pytest.mark.parametrize(
    ("made", "error", "word"),
    [(None, SettingsError, "no renderer"), ([0], DataError, "start images of the protocol are of type list")],
)
def test_start_images_that_cannot_be_made_are_an_error_before_anything_is_generated(
    pipe: Any, tmp_path: Path, made: Any, error: type[Exception], word: str
):
    def failing(cells: Any, size: int) -> Any:
        if made is None:
            raise SettingsError("no renderer")
        return made

    cells = [
        Cell("a cat in Van Gogh style", 10_000 + i, "Van_Gogh", ("Cats",), group)
        for i, group in enumerate(("grid", IMAGE_TO_IMAGE))
    ]
    judge, protocol = StampJudge(), EvaluationProtocol({"Van_Gogh": cells}, start_images=failing)
    with pytest.raises(error, match=word):
        evaluate(pipe, [DoNothing("Van_Gogh", "style")], S, tmp_path, judge=judge, protocol=protocol)
    assert judge.calls == 0


def test_cells_of_one_s_own(pipe: Any, tmp_path: Path):
    """Any prompts, any judge of one domain: nothing of the canvas is asked for."""

    class Styles(StampJudge):
        objects = ()

        def __init__(self) -> None:
            super().__init__()
            self.thresholds = dict.fromkeys(STYLES, 0.3)

        def __call__(self, images: Any, /) -> Any:
            return replace(super().__call__(images), p_object=np.zeros((len(images), 0), np.float32))

    own = [Cell(f"ship {i} in Van Gogh style", i, "Van_Gogh", ("Ships",), "grid") for i in range(5)]
    others = [Cell(f"ship {i} in mosaic style", 10 + i, "Mosaic", ("Ships",), "grid") for i in range(5)]
    protocol = EvaluationProtocol({"Van_Gogh": [*own, *others]})
    filter = StringFilter("Van_Gogh", "style", {"in Van Gogh style": ""})
    report = evaluate(pipe, [filter], S, tmp_path, judge=Styles(), protocol=protocol)
    figures = report.erasures[0].figures
    assert figures["ua"].value == figures["ira"].value == 1 and figures["ua"].n == 5  # type: ignore[union-attr]
    assert figures["cra"] is None and figures["kept_still"] is None
    write_report(report, tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"concept": "Unicorns"}, ConceptError, "cannot be measured"),
        ({"kind": "object"}, ConceptError, "cannot be measured"),
        ({"seeds": (9_000, 11_000)}, SplitError, "seeds 9000 to 11000"),
        ({"reference": Provenance(((0, 1), (9_000, 11_000)))}, SplitError, "seeds 9000 to 11000"),
        ({"concept": "Bricks"}, SplitError, "Bricks: sealed"),
    ],
)
def test_what_cannot_be_measured_fairly_is_refused_before_anything_is_drawn(
    pipe: Any, tmp_path: Path, change: dict, error: type[Exception], message: str
):
    e = open_eraser()
    judge = StampJudge()
    with pytest.raises(error, match=message):
        evaluate_erasers(pipe, [replace(e, header=replace(e.header, **change))], S, tmp_path, judge=judge)
    assert judge.calls == 0 and not list(tmp_path.iterdir())


def test_wrong_arguments(pipe: Any, tmp_path: Path):
    twins = [EraserMethod(open_eraser()), EraserMethod(open_eraser(seed=2))]
    with pytest.raises(SettingsError, match="two of the methods are 'neuraleraser' of 'Van_Gogh'"):
        evaluate(pipe, twins, S, tmp_path, judge=StampJudge())
    with pytest.raises(SettingsError, match=r"Eraser was passed as a method.*: EraserMethod\(eraser\) makes"):
        evaluate(pipe, [open_eraser()], S, tmp_path, judge=StampJudge())  # type: ignore[list-item]
    with pytest.raises(SettingsError, match="no methods"):
        evaluate(pipe, [], S, tmp_path, judge=StampJudge())
    with pytest.raises(SplitError, match="Crayon: sealed"):
        evaluate(pipe, twins[:1], replace(S, styles=("Crayon",)), tmp_path, judge=StampJudge())
    with pytest.raises(SettingsError, match="grid_rounds is 0"):
        replace(S, grid_rounds=0)
    with pytest.raises(SettingsError, match="leave it on"):
        replace(S, sampling=Sampling(pad_last_batch=False))


def test_without_sampling_it_is_the_pipeline_s_usual(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert evaluation_sampling(pipe, EvaluateSettings()) == default_sampling(pipe)
    monkeypatch.setattr("neuraleraser.families.defaults.default_sampling", lambda pipe: S.sampling)
    few = replace(S, sampling=None, two_object_rounds=0, held_out_rounds=0, fragment_prompts=0, idle_checks=0)
    evaluate(pipe, [DoNothing("Van_Gogh", "style")], few, tmp_path, judge=StampJudge())
    settings = json.loads((tmp_path / "run.json").read_text())["settings"]
    assert settings["sampling"]["num_inference_steps"] == 2


def test_overhead_alternates_and_takes_the_median(pipe: Any, erasers: list[Eraser], monkeypatch: pytest.MonkeyPatch):
    """Timed with a clock that gives plain sampling 1 s, the acting eraser 3 s, the idle one 2 s."""
    now, order = [0.0], []

    def fake(pipe_: Any, prompts: list[str], seeds: Any, s: Any) -> None:
        own = "Gogh" in prompts[0]
        hooked = any(m._forward_hooks for m in pipe.unet.modules())
        order.append((own, hooked))
        now[0] += 1 if not hooked else 3 if own else 2

    ticks: Iterator[float] = iter(lambda: now[0], None)  # type: ignore[arg-type]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(timing, "generate", fake)
    cells = canvas_protocol(["Van_Gogh"], S).cells["Van_Gogh"]
    costs = timing.overhead(pipe, EraserMethod(erasers[0]), cells, replace(S, timings=2))
    assert costs == {"overhead": 3.0, "overhead_idle": 2.0}
    assert order[1:] == [(True, False), (True, True), (False, True), (False, True), (True, True), (True, False)]


def test_fragments_are_where_a_filter_fails(pipe: Any, methods: list[Method], tmp_path: Path):
    """A judge to whom everything looks like Van Gogh: the filters change no fragment, the eraser some."""

    class Fan(StampJudge):
        def __call__(self, images: Any, /) -> Any:
            seen = super().__call__(images)
            same = seen.artefact[:, None] < 10
            return replace(seen, p_style=np.where(same, [[0.2, 0.9, 0.2]], 0.2).astype(np.float32))

    s = replace(S, fragment_prompts=12)
    report = evaluate(pipe, methods[:4], s, tmp_path, judge=Fan())
    ours, *others = (entry.figures["ua_fragments"] for entry in report.erasures)
    assert ours.value > 0 and all(figure.value == 0 and figure.n == 12 for figure in others)  # type: ignore[union-attr]
    assert report.erasures[0].figures["shown_fragments"].value == 1  # type: ignore[union-attr]
    t = pair_with_base(everything(tmp_path), "neuraleraser", "Van_Gogh")
    assert set(t.after.table["route"].to_pylist()) == {"named", "paraphrased", FRAGMENTS}
    assert not any(words.VOCABULARY.is_named_in(p.split(", ")[1]) for p in t.after.prompt[t.after.group == FRAGMENTS])
