"""Images that start from a picture: what is drawn, what is counted, and where it is shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

from helpers.canvas_cells import canvas_protocol
from helpers.erasers import open_eraser, with_picture
from helpers.measured import S, everything, of, same
from helpers.result_tables import row, style_story, table
from helpers.stamp_judge import ByteJudge, StampJudge, reader
from neuraleraser.attacks import inverted_latents, random_denoiser
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.evaluate import evaluate
from neuraleraser.evaluation.html import page
from neuraleraser.evaluation.measure import measure
from neuraleraser.evaluation.metrics import pair_with_base
from neuraleraser.evaluation.protocol import (
    CEILING,
    EMPTY,
    HALF,
    HALF_CEILING,
    IMAGE_TO_IMAGE,
    INVERTED,
    INVERTED_CONTROL,
    NEUTRAL,
    Cell,
    EvaluationProtocol,
)
from neuraleraser.evaluation.report import ErasureReport, Report
from neuraleraser.evaluation.results import BASE, Results, Row, concat
from neuraleraser.evaluation.route_metrics import route_figures
from neuraleraser.evaluation.run_folder import RunFolder
from neuraleraser.evaluation.terminal import terminal_tables
from neuraleraser.families.canvas import render
from neuraleraser.families.opening import image_to_image, inpainting
from neuraleraser.judges import JudgeSpec
from neuraleraser.methods import DoNothing, EraserMethod, StringFilter
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import made_for

FEW = replace(
    S, target_rounds=0, held_out_rounds=0, fragment_prompts=0, held_out_grid_rounds=0, unhooked_checks=0, idle_checks=0,
    start_image_rounds=3, sampling=Sampling(num_inference_steps=4, batch_size=2),
)  # fmt: skip
FILTER = StringFilter("Van_Gogh", "style", {"as a Van Gogh painting": ""})


def drawn_by_hand(pipe: Any, cell: Cell) -> np.ndarray:
    start = cell.start
    assert start is not None and start.strength is not None
    picture = render(start.objects, start.style, start.seed, 16)[None]
    s = replace(FEW.sampling or Sampling(), strength=start.strength)
    if cell.group in (INVERTED, INVERTED_CONTROL):
        using = random_denoiser(pipe) if cell.group == INVERTED_CONTROL else pipe
        return generate(using, [""], [cell.seed], s, latents=inverted_latents(using, picture, s))[0]
    if cell.group not in (HALF, HALF_CEILING):
        return generate(image_to_image(pipe), [cell.prompt], [cell.seed], s, image=picture)[0]
    left = np.zeros((1, 16, 16), dtype=bool)
    left[:, :, :8] = True
    mask = left if start.half == "left" else ~left
    return generate(inpainting(pipe), [cell.prompt], [cell.seed], s, image=picture, mask_image=mask)[0]


def other_half(cell: Cell) -> str:
    assert cell.start is not None
    return "right" if cell.start.half == "left" else "left"


def test_cells_are_drawn_from_their_pictures_at_their_strengths(pipe: Any, tmp_path: Path):
    protocol = canvas_protocol(["Van_Gogh"], FEW)
    halves = [c for c in (*protocol.cells["Van_Gogh"], *protocol.base_only) if c.group in (HALF, HALF_CEILING)]
    others = [replace(c, seed=c.seed + 1, start_image=replace(c.start, half=other_half(c))) for c in halves]
    protocol = replace(protocol, base_only=[*protocol.base_only, *others])
    methods = [FILTER, DoNothing("Van_Gogh", "style")]
    evaluate(pipe, methods, FEW, tmp_path, judge=ByteJudge(), protocol=protocol)
    run = RunFolder(tmp_path, JudgeSpec.of(StampJudge()))
    cells = {(c.group, c.start.strength, c.start.half): c for c in protocol.all_cells() if c.start}
    assert len(cells) == 4 * 3 + 2 * 2 + 2
    for cell in cells.values():
        assert np.array_equal(run.image(BASE, "", cell), drawn_by_hand(pipe, cell)), cell
    base = of(everything(tmp_path), BASE)
    for cell, names, strength in zip(base.keys(), base.start, base.strength, strict=True):
        assert (strength > 0) == bool(names) == any(word in cell.group for word in ("image", "inpainting", "latents"))
    assert set(base.strength) == {0, 0.3, 0.5, 0.7, 1}


def test_an_evaluation_of_start_images_goes_on_where_it_stopped(pipe: Any, tmp_path: Path):
    """Stopped among the cells with start images, it draws the others alone and ends in the same results."""
    methods = [FILTER]
    whole = evaluate(pipe, methods, FEW, tmp_path / "a", judge=(counting := ByteJudge()))
    judge = ByteJudge(stop_at=counting.calls * 2 // 3)
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, methods, FEW, tmp_path / "b", judge=judge)
    again = evaluate(pipe, methods, FEW, tmp_path / "b", judge=(rest := ByteJudge()))
    assert same(everything(tmp_path / "a"), everything(tmp_path / "b"))
    assert again.to_dict()["concepts"] == whole.to_dict()["concepts"] and 0 < rest.calls < counting.calls / 2


def test_without_cells_that_start_from_pictures_there_are_no_routes(pipe: Any, tmp_path: Path):
    report = evaluate(pipe, [FILTER], replace(FEW, start_image_rounds=0), tmp_path, judge=ByteJudge())
    assert report.erasures[0].route_figures == [] and report.to_dict()["concepts"][0]["route_figures"] == []
    for text in (page(report), terminal_tables(report)):
        assert "Routes" not in text and "ceiling" not in text


def test_a_strength_that_leaves_no_step_is_an_error_before_anything_is_drawn(pipe: Any, tmp_path: Path):
    judge = ByteJudge()
    with pytest.raises(SettingsError, match=r"strength 0\.3 of 2 steps is less than one step"):
        evaluate(pipe, [FILTER], replace(FEW, sampling=S.sampling), tmp_path, judge=judge)
    assert judge.calls == 0


def test_cells_of_one_s_own_start_as_the_sampling_says(pipe: Any, tmp_path: Path):
    cells = [
        Cell("a cat", 10_000 + i, "Van_Gogh", ("Cats",), group) for i, group in enumerate((IMAGE_TO_IMAGE, "grid"))
    ]
    asked = []

    def start_images(starts: Sequence[Any], size: int) -> Images:
        asked.extend(starts)
        return np.zeros((len(starts), size, size, 3), np.uint8)

    protocol = EvaluationProtocol({"Van_Gogh": cells}, start_images=start_images)
    report = evaluate(pipe, [FILTER], FEW, tmp_path, judge=ByteJudge(), protocol=protocol)
    (route,) = report.erasures[0].route_figures
    assert (route.group, route.strength, route.figures["ceiling"]) == (IMAGE_TO_IMAGE, 0.8, None)
    assert {(s.shows, s.seed, s.strength) for s in asked} == {(("Van_Gogh", "Cats"), 10_000, None)}


def test_latents_that_cannot_be_inverted_are_an_error_before_anything_is_drawn(tmp_path: Path):
    euler = reader()
    euler.scheduler = EulerDiscreteScheduler(steps_offset=1)
    judge = ByteJudge()
    with pytest.raises(SettingsError, match="DDIM alone can be run backwards"):
        evaluate(euler, [FILTER], FEW, tmp_path, judge=judge)
    assert judge.calls == 0


def test_no_method_watches_a_random_denoiser(pipe: Any, tmp_path: Path):
    """Its images are the base's: an eraser, which was made for other weights, is not attached to it."""
    e = open_eraser()
    e = replace(e, header=replace(e.header, made_for=made_for(pipe, e.sites)))
    evaluate(pipe, [EraserMethod(e)], FEW, tmp_path, judge=ByteJudge())
    base = of(everything(tmp_path), BASE)
    control = base.group == INVERTED_CONTROL
    assert control.sum() == 3 and not any(base.table["watched"].to_pylist()[i] for i in np.flatnonzero(control))
    assert all(base.table["watched"].to_pylist()[i] for i in np.flatnonzero(base.group == INVERTED))


def test_an_image_gate_acts_where_a_filter_of_words_has_nothing_to_find(pipe: Any, tmp_path: Path):
    """An eraser whose prompt gate is shut and whose image gate opens for everything, beside the filter."""
    e = open_eraser()
    shut = replace(e, gate=replace(e.gate, low=e.gate.low + 1e6, high=e.gate.high + 2e6))
    report = evaluate(pipe, [EraserMethod(with_picture(shut, pipe)), FILTER], FEW, tmp_path, judge=ByteJudge())
    ours, filtered = ({(r.group, r.strength): r.figures["acted"] for r in e.route_figures} for e in report.erasures)
    assert len(ours) == 3 * 3 + 2 and all(f is not None and f.value == 1 for f in ours.values())
    assert all(f is not None and f.value == (group == IMAGE_TO_IMAGE) for (group, _), f in filtered.items())
    changed = of(everything(tmp_path), "neuraleraser", "Van_Gogh")
    assert not changed.identical[changed.strength > 0].any()
    for entry, other in zip(*(e.route_figures for e in report.erasures), strict=True):
        assert entry.figures["ceiling"] == other.figures["ceiling"] is not None
        assert other.group == IMAGE_TO_IMAGE or other.figures["shown_after"] == other.figures["shown_base"]


# --- figures by hand

ERASED, SHOWN, GONE = ("Van_Gogh", "style"), (["Van_Gogh"], ["Cats"]), (["Mosaic"], ["Cats"])
PLAIN_CAT, VAN_GOGH_CAT = ("Seed_Images", ["Cats"]), ("Van_Gogh", "Cats")


def pair(number: int, group: str, strength: float, before: Any, after: Any, *, acts: bool) -> list[Row]:
    more: dict[str, Any] = {"group": group, "strength": strength, "start": VAN_GOGH_CAT}
    name = "eraser/Van_Gogh/k"
    base = replace(row(PLAIN_CAT, before, number), watched=[name], fired=[name] if acts else [], **more)
    return [base, replace(row(PLAIN_CAT, after, number, ERASED, identical=not acts), **more)]


def ceiling(number: int, strength: float, seen: Any, start: Sequence[str] = VAN_GOGH_CAT, cell: Any = PLAIN_CAT) -> Row:
    return replace(row(cell, seen, number), group=CEILING, strength=strength, start=start)


def routes() -> Results:
    rows = [
        *pair(100, NEUTRAL, 0.3, SHOWN, SHOWN, acts=True),
        *pair(101, NEUTRAL, 0.3, SHOWN, GONE, acts=True),
        *pair(102, NEUTRAL, 0.3, GONE, GONE, acts=False),
        *pair(103, NEUTRAL, 0.3, SHOWN, SHOWN, acts=False),
        *pair(104, NEUTRAL, 0.7, SHOWN, GONE, acts=True),
        *pair(105, EMPTY, 0.3, SHOWN, SHOWN, acts=True),
        *pair(106, INVERTED, 1.0, SHOWN, GONE, acts=True),
        *pair(107, INVERTED, 1.0, SHOWN, SHOWN, acts=False),
        replace(ceiling(206, 1.0, SHOWN), group=INVERTED_CONTROL),
        ceiling(200, 0.3, SHOWN),
        ceiling(201, 0.3, GONE),
        ceiling(202, 0.3, GONE),
        ceiling(203, 0.7, GONE),
        ceiling(204, 0.3, SHOWN, ("Mosaic", "Cats")),  # of another concept's picture
        ceiling(205, 0.3, SHOWN, VAN_GOGH_CAT, ("Van_Gogh", [])),  # of the cat: asks for the style
    ]
    return concat([style_story(), table(rows)])


def test_figures_of_routes_equal_the_count_by_hand():
    results = routes()
    found = route_figures(results, pair_with_base(results, "eraser", "Van_Gogh"))
    values = {
        (r.group, r.strength): {name: f and (round(f.value, 3), f.n) for name, f in r.figures.items()} for r in found
    }
    assert values == {
        (NEUTRAL, 0.3): {"shown_base": (0.75, 4), "shown_after": (0.5, 4), "acted": (0.5, 4), "ceiling": (0.333, 3)},
        (NEUTRAL, 0.7): {"shown_base": (1, 1), "shown_after": (0, 1), "acted": (1, 1), "ceiling": (0, 1)},
        (EMPTY, 0.3): {"shown_base": (1, 1), "shown_after": (1, 1), "acted": (1, 1), "ceiling": (0.333, 3)},
        (INVERTED, 1): {"shown_base": (1, 2), "shown_after": (0.5, 2), "acted": (0.5, 2), "ceiling": (1, 1)},
    }
    assert all(f.low <= f.value <= f.high for r in found for f in r.figures.values() if f)


def test_a_method_that_does_not_say_where_it_acts_has_no_share_of_it():
    rows = [replace(r, watched=[], fired=[]) for r in pair(100, NEUTRAL, 0.3, SHOWN, GONE, acts=True)]
    (found,) = route_figures(table(rows), pair_with_base(table(rows), "eraser", "Van_Gogh"))
    assert found.figures["acted"] is None and found.figures["shown_after"] is not None
    assert found.figures["ceiling"] is None


def test_no_other_figure_counts_images_of_routes():
    with_routes, without = (measure(results) for results in (routes(), style_story()))
    assert dict(with_routes.base) == dict(without.base)
    kept, own = (m.erasures[0].figures for m in (with_routes, without))
    assert {name: kept[name] for name in own if name != "idle_identical"} == {
        name: figure for name, figure in own.items() if name != "idle_identical"
    }
    assert with_routes.erasures[0].became == without.erasures[0].became


def test_routes_are_in_every_form_of_the_report(tmp_path: Path):
    e = measure(routes()).erasures[0]
    entries = [
        ErasureReport(m, "Van_Gogh", "style", e.figures, route_figures=e.route_figures) for m in ("eraser", "filter")
    ]
    report = Report(base={}, judge={}, erasures=entries)
    report.save_json(tmp_path / "report.json")
    listed = json.loads((tmp_path / "report.json").read_text())["concepts"][1]["route_figures"]
    assert [(r["group"], r["strength"], r["shown_base"], r["ns"]["ceiling"]) for r in listed] == [
        (NEUTRAL, 0.3, 0.75, 3), (NEUTRAL, 0.7, 1, 1), (EMPTY, 0.3, 1, 3), (INVERTED, 1, 1, 1),
    ]  # fmt: skip
    assert all(low <= r[name] <= high for r in listed for name, (low, high) in r["ci"].items())
    text = terminal_tables(report).partition("Routes")[2]
    lines = [line.split() for line in text.splitlines() if line.strip().startswith("image-to-image, neutral 0.3")]
    assert len(lines) == 2 and [w for w in lines[0] if "." in w and "-" not in w] == [
        "0.3",
        "0.75",
        "0.33",
        "0.50",
        "0.50",
    ]
    assert lines[0].count("n=4") == 3 and lines[0].count("n=3") == 1
    assert max(map(len, terminal_tables(report).splitlines())) <= 120
    html = page(report).partition("<h3>Routes</h3>")[2]
    assert html.count("filter: image-to-image, neutral") == 2 and html.count("<code>ceiling</code>") == 1
    assert html.partition("</table>")[0].count('class="ci"') == 2 * 4 * 4
