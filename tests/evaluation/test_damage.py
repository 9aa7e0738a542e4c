"""Which concept paid for which erasure: the shares against a count written out, look-alikes, grids and plots."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.result_tables import OBJECTS, STYLES, object_story, row, style_story, table
from neuraleraser.errors import DataError
from neuraleraser.evaluation import damage_metrics as d
from neuraleraser.evaluation.damage_grid import damage_grids
from neuraleraser.evaluation.html import page
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.measure import measure
from neuraleraser.evaluation.metrics import PairedResults, pair_with_base
from neuraleraser.evaluation.report import ErasureReport, Report
from neuraleraser.evaluation.table_files import figures_csv
from neuraleraser.evaluation.tradeoff import tradeoffs
from neuraleraser.judges import JudgeSpec


def shares(t: PairedResults) -> dict[str, tuple[float, int]]:
    return {c.name: (c.still_right.value, c.still_right.n) for c in d.damage(t)}


def test_the_damage_equals_the_count_by_hand():
    style = pair_with_base(style_story(), "eraser", "Van_Gogh")
    # Cells without the style: 5 6 7 8 9. Their styles are right in 5 6 7, and stay in 5.
    assert shares(style) == {
        "Mosaic": (0.5, 2),
        "Seed_Images": (0.0, 1),
        "Cats": (0.5, 2),
        "Dogs": (1, 1),
        "Birds": (1, 1),
    }
    cats = pair_with_base(object_story(), "eraser", "Cats")
    # Cells without a cat: 4 (Van_Gogh, dog and bird) and 6 (plain, dog), which has become a mosaic.
    assert shares(cats) == {"Van_Gogh": (1, 1), "Seed_Images": (0.0, 1), "Dogs": (1, 2), "Birds": (0.0, 1)}
    assert {c.name: c.kind for c in d.damage(cats)}["Dogs"] == "object"
    assert d.damage(cats)[-1].loss == 1


def random_pairs(seed: int, count: int) -> PairedResults:
    """Base images of one style and object each, and what an erasure of Van_Gogh made of them."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        cell = (str(rng.choice(STYLES)), [str(rng.choice(OBJECTS))])
        for erased in (("", ""), ("Van_Gogh", "style")):
            rows.append(replace(row(cell, ([], []), i, erased), p_style=rng.random(3), p_object=rng.random(3)))
    return pair_with_base(table(rows), "eraser", "Van_Gogh")


def naive(t: PairedResults, names: tuple[str, ...], kind: str) -> tuple[int, int]:
    """Images of these classes that are right in the base, and those of them that still are."""
    right, still = 0, 0
    classes, p = (STYLES, "p_style") if kind == "style" else (OBJECTS, "p_object")
    for i in range(len(t)):
        asked = t.base.cell_style[i] if kind == "style" else t.base.cell_objects[i][0]
        if asked not in names or t.base.cell_style[i] == "Van_Gogh":
            continue
        k = classes.index(asked)

        def is_right(values: np.ndarray, k: int = k) -> bool:
            return bool(values[k] > 0.5 and all(values[k] > values[j] for j in range(3) if j != k))

        if is_right(getattr(t.base, p)[i]):
            right += 1
            still += is_right(getattr(t.after, p)[i])
    return right, still


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_the_damage_equals_a_plain_loop(seed: int, count: int):
    t = random_pairs(seed, count)
    found = {c.name: c.still_right for c in d.damage(t)}
    for kind, classes in (("style", STYLES), ("object", OBJECTS)):
        for name in classes:
            right, still = naive(t, (name,), kind)
            if name == "Van_Gogh" or not right:
                assert name not in found
            else:
                assert (found[name].value, found[name].n) == (still / right, right)


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_look_alikes_and_the_rest_equal_a_plain_loop(seed: int, count: int):
    t = random_pairs(seed, count)
    own = [i for i in range(count) if t.base.cell_style[i] == "Van_Gogh"]
    if not own:
        with pytest.raises(DataError, match="0 base images ask for 'Van_Gogh'"):
            d.lookalikes(t)
        assert d.lookalike_damage(t) is None
        return
    seen = {name: naive(t, (name,), "style")[0] for name in ("Mosaic", "Seed_Images")}
    if not all(seen.values()):
        with pytest.raises(DataError, match=rf"{sum(map(bool, seen.values()))} other classes of its domain"):
            d.lookalikes(t)
        assert d.lookalike_damage(t) is None
        return
    means = {name: sum(float(t.base.p_style[i][k]) for i in own) / len(own) for k, name in enumerate(STYLES)}
    near, rest = sorted(("Mosaic", "Seed_Images"), key=lambda name: -means[name])
    ((name, p),) = d.lookalikes(t)
    assert name == near and p == pytest.approx(means[near])
    for metric, some in ((d.lookalike_loss, near), (d.rest_loss, rest)):
        right, still = naive(t, (some,), "style")
        assert (metric(t).value, metric(t).n) == (pytest.approx(1 - still / right), right)
    found = d.lookalike_damage(t)
    assert found is not None and found.gap is not None
    assert found.gap.value == pytest.approx(d.lookalike_loss(t).value - d.rest_loss(t).value)
    assert found.gap.low < found.gap.value < found.gap.high or abs(found.gap.value) == 1


def test_look_alikes_of_an_object_are_read_where_nothing_stands_beside_it():
    t = pair_with_base(object_story(), "eraser", "Cats")
    ((name, p),) = d.lookalikes(t)  # of cell 5 alone, in which nothing else is seen
    assert name == "Dogs" and p == pytest.approx(0.04), "beside the cat a dog was asked for, and seen"


def test_a_judge_of_two_classes_knows_no_look_alikes():
    judge = JudgeSpec(STYLES[:2], OBJECTS, dict.fromkeys((*STYLES[:2], *OBJECTS), 0.5), 10.0)
    rows = [
        replace(row(("Van_Gogh", ["Cats"]), ([], []), 0, e), p_style=[0.9, 0.1])
        for e in (("", ""), ("Van_Gogh", "style"))
    ]
    with pytest.raises(DataError, match="0 other classes"):
        d.lookalikes(pair_with_base(table(rows, judge), "eraser", "Van_Gogh"))


def test_a_difference_has_an_interval_that_holds_what_it_should():
    a, b = Estimate(0.5, 40, 0.35, 0.65), Estimate(0.1, 40, 0.04, 0.2)
    gap = d.difference_of(a, b)
    assert (gap.value, gap.n) == (0.4, 80)
    assert gap.low == pytest.approx(0.4 - np.hypot(0.15, 0.1)) and gap.high == pytest.approx(0.4 + np.hypot(0.15, 0.06))
    none = d.difference_of(Estimate(0, 20, 0, 0.17), Estimate(0, 50, 0, 0.07))
    assert (none.value, none.low, none.high) == (0, -0.07, 0.17), "that nothing is lost in 20 images is no certainty"
    rng = np.random.default_rng(0)
    drawn = rng.binomial(60, 0.4, 2000) / 60 - rng.binomial(60, 0.2, 2000) / 60
    ends = [(0.4 - 0.12, 0.4 + 0.13), (0.2 - 0.09, 0.2 + 0.11)]
    gap = d.difference_of(Estimate(0.4, 60, *ends[0]), Estimate(0.2, 60, *ends[1]))
    assert [gap.low, gap.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.02)


# --- the report


def full(**change: float) -> list[ErasureReport]:
    """Two concepts erased by "ours", which hurts Dogs and Mosaic, and by "none", which hurts nothing."""
    share = {n: Estimate(1 - lost, 20, max(0.0, 0.9 - lost), min(1.0, 1.02 - lost)) for n, lost in change.items()}
    sound = Estimate(1.0, 20, 0.83, 1.0)
    entries = []
    for concept, others in (("Van_Gogh", ("Mosaic", "Seed_Images")), ("Mosaic", ("Van_Gogh", "Seed_Images"))):
        for method, x, y in (("ours", 0.9, 0.4), ("none", 0.0, 0.05)):
            classes = [(n, "style") for n in others] + [(n, "object") for n in OBJECTS]
            damage = [d.ClassDamage(n, k, share[n] if method == "ours" and n in share else sound) for n, k in classes]
            near = d.LookAlikes((("Seed_Images", 0.2),), Estimate(0.1, 40, -0.05, 0.25))
            figures = {"ua": x, "artefact_rate_target": y, "unchanged_share": 1 - y}
            entries.append(ErasureReport(method, concept, "style", figures, damage=damage, lookalikes=near))
    return entries


def test_a_grid_shows_who_paid_and_counts_the_others():
    ours, none = damage_grids(full(Mosaic=0.25, Dogs=0.5))
    assert (ours.method, ours.erased) == ("ours", ("Van_Gogh", "Mosaic"))
    lines = {name: [None if c is None else c.loss for c in cells] for _, some in ours.rows for name, cells in some}
    assert lines == {"Mosaic": [0.25, None], "Dogs": [0.5, 0.5]} and [kind for kind, _ in ours.rows] == [
        "style",
        "object",
    ]
    assert ours.whole == (("style", 2), ("object", 2))
    assert none.rows == () and none.whole == (("style", 3), ("object", 3))
    assert damage_grids([replace(e, damage=()) for e in full()]) == []


def test_the_page_colours_each_loss_by_its_size():
    text = page(Report({}, {}, full(Mosaic=0.25, Dogs=0.01)))
    assert '<td style="--loss:0.250" class="sure"' in text and '<td style="--loss:0.010" title="' in text
    assert "Nothing is lost of 3 styles and 3 objects, which is all of them." in text
    assert "Seed Images 0.2." in text and text.count("Nothing is lost of 2 styles and 2 objects.") == 1


def test_a_plot_has_a_point_a_method_at_its_mean():
    entries = full()
    entries[2] = replace(entries[2], figures={"ua": 0.7, "artefact_rate_target": 0.2, "unchanged_share": None})
    artefacts, unchanged = tradeoffs(entries)
    ours, none = artefacts.points
    assert (ours.method, ours.erased, ours.other) == ("ours", pytest.approx(0.8), pytest.approx(0.3))
    assert ours.concepts == ((0.9, 0.4), (0.7, 0.2)) and (none.erased, none.other) == (0, 0.05)
    assert unchanged.more_is_better and unchanged.points[0].concepts == ((0.9, 0.6),), "where both figures are there"
    text = page(Report({}, {}, entries))
    assert '<circle cx="160.0" cy="140.0" r="4.5"/>' in text and text.count('class="plot"') == 2
    assert tradeoffs(entries[:1]) == [] and 'class="plot"' not in page(Report({}, {}, entries[:1]))


def test_points_that_coincide_share_a_label():
    entries = [
        ErasureReport(m, "Cats", "object", {"ua": x, "unchanged_share": 0.9})
        for m, x in zip("abc", (0.9, 0.2, 0.91), strict=True)
    ]
    (plot,) = tradeoffs(entries)
    assert plot.labels == [(0.9, 0.9, "1, 3"), (0.2, 0.9, "2")]


def test_the_damage_is_in_report_json_and_in_the_csv(tmp_path):
    (e,) = measure(style_story()).erasures
    whole = Report(
        {}, {}, [ErasureReport(e.method, e.concept, e.kind, e.figures, damage=e.damage, lookalikes=e.lookalikes)]
    )
    whole.save_json(tmp_path / "report.json")
    (concept,) = json.loads((tmp_path / "report.json").read_text())["concepts"]
    mosaic = concept["damage"][0]
    assert (mosaic["name"], mosaic["kind"], mosaic["still_right"], mosaic["ns"]) == (
        "Mosaic",
        "style",
        0.5,
        {"still_right": 2},
    )
    assert mosaic["ci"]["still_right"] == [e.damage[0].still_right.low, e.damage[0].still_right.high]
    assert concept["lookalikes"]["names"][0]["name"] == "Mosaic" and concept["lookalike_loss"] == 0.5
    assert concept["lookalikes"]["gap"] == concept["lookalike_loss"] - concept["rest_loss"] == -0.5
    rows = {line[5]: line[6:] for line in csv.reader(io.StringIO(figures_csv(whole)))}
    assert rows["still_right_Mosaic"][0] == "0.5" and rows["still_right_Mosaic"][3] == "2"
    assert rows["lookalike_gap"][0] == "-0.5" and rows["rest_loss"][0] == "1.0"
    bare = Report({}, {}, [ErasureReport("none", "Cats", "object", {})]).to_dict()["concepts"][0]
    assert bare["damage"] == [] and bare["lookalikes"] is None
