"""The metrics against stories counted by hand, against wrong definitions, and in their general properties."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tables import OBJECTS, STYLES, object_story, row, style_story, table

from neuraleraser.bench import metrics as m
from neuraleraser.bench.measure import Measure, ratio
from neuraleraser.bench.verdicts import BASE, Verdict, Verdicts, concat
from neuraleraser.errors import DataError


def van_gogh() -> m.Twins:
    return m.twins(style_story(), "eraser", "Van_Gogh")


def cats() -> m.Twins:
    return m.twins(object_story(), "eraser", "Cats")


# Counted by hand from the stories in tables.py: (metric, twins, good images, images to divide by, n).
BY_HAND: list[tuple[Callable[[m.Twins], Measure], Callable[[], m.Twins], int, int, int]] = [
    (m.ua, van_gogh, 4, 5, 5),  # the base shows it in 0 1 2 4 8, and it stays in 2
    (m.ira, van_gogh, 2, 3, 4),  # cells 5 6 7 8: the base is right in 5 6 7, after erasure 5 and 8 are
    (m.cra, van_gogh, 3, 4, 5),  # cells 5 to 9: the base's object is right but in 7, then 9 is damaged
    (m.kept, van_gogh, 2, 4, 5),  # own cells 0 to 4: base right but in 4, after erasure in 0 and 2
    (m.unchanged_share, van_gogh, 1, 4, 4),  # without it: 5 6 7 9, of which 5 has the same bits
    (m.ua, cats, 4, 5, 5),  # shown in 0 1 2 3 5, still there in 3
    (m.ira, cats, 1, 2, 2),  # cells 4 and 6: the bird of 4 is lost
    (m.cra, cats, 1, 2, 2),  # cells 4 and 6: the style of 6 is lost
    (m.kept, cats, 4, 5, 5),  # own cells 0 1 2 3 5: the style of 1 is lost
    (m.bystander, cats, 2, 3, 4),  # cells 0 to 3: base in 0 1 3, after erasure in 0 and 2
    (m.unchanged_share, cats, 1, 2, 2),  # without a cat: 4 and 6
]


@pytest.mark.parametrize(("metric", "twins", "good", "of", "n"), BY_HAND)
def test_metric_equals_the_count_by_hand(metric, twins, good, of, n):
    measure = metric(twins())
    assert (measure.value, measure.n) == (good / of, n)
    assert measure.low <= measure.value <= measure.high


def swapped(t: m.Twins) -> m.Twins:
    """The definition with base and erased images exchanged."""
    return m.Twins(t.method, t.concept, t.kind, t.after, t.base)


@pytest.mark.parametrize("metric", list(dict.fromkeys(case[0] for case in BY_HAND)))
def test_the_stories_tell_flipped_definitions_apart(metric):
    stories = [twins() for other, twins, *_ in BY_HAND if other is metric]
    values = [metric(t).value for t in stories]
    assert any(1 - value != value for value in values), "the share that goes taken for the share that stays"
    if metric is not m.unchanged_share:  # `identical` belongs to the erased image alone
        flipped = [metric(swapped(t)).value for t in stories]
        assert values != flipped, "base and erased exchanged"


def test_wrong_sets_of_images_would_give_other_values():
    t = van_gogh()
    own = m.own_cells(t.after, "Van_Gogh")
    shown = m.shows(t.after, "style", "Van_Gogh")
    assert m.ua(t).value != np.mean(~shown[own]), "ua over the prompts that ask, without looking at the base"
    for metric, kind in ((m.ira, "style"), (m.cra, "object")):
        other = m.accuracy(t.after.where(~own), kind).value
        assert metric(t).value != other, "accuracy not divided by the base's"
        everywhere = m.accuracy(t.after, kind).value / m.accuracy(t.base, kind).value
        assert metric(t).value != pytest.approx(everywhere), "own cells not excluded"
    assert m.kept(t).value != m.accuracy(t.after.where(own), "object").value, "kept not divided by the base's"
    assert m.unchanged_share(t).value not in (np.mean(t.after.identical), np.mean(t.after.identical[~own]))


def test_artefact_rate_is_the_share_beyond_the_threshold():
    t = van_gogh()
    assert m.artefact_rate(t.after, 10).value == 2 / 10
    assert m.artefact_rate(t.after, 11).value == 1 / 10, "a distance equal to the threshold is no artefact"
    assert m.artefact_rate(t.base, 10).value == 1 / 10
    every = m.erasure(t, 10)
    assert [every[name].value for name in ("artefact_rate_own", "artefact_rate_own_base")] == [2 / 5, 1 / 5]


def test_became_ranks_what_is_seen_where_the_concept_was():
    ranking = [(label, measure.value) for label, measure in m.became(van_gogh())]
    assert ranking == [("Mosaic", 0.4), ("Seed_Images", 0.2), ("Van_Gogh", 0.2), (m.NOTHING, 0.2)]
    # The dog that was asked for beside the cat is not what the cat became.
    ranking = [(label, measure.value) for label, measure in m.became(cats())]
    assert ranking == [("Birds", 0.4), (m.NOTHING, 0.4), ("Cats", 0.2)]


def test_base_quality_and_accuracy_by_class():
    base = m.base_quality(style_story(), 10)
    assert {name: (x.value, x.n) for name, x in base.items()} == {
        "style_accuracy": (7 / 9, 9),  # wrong in 3 and 8; 9 asks for none
        "object_accuracy": (8 / 10, 10),  # wrong in 4 and 7
        "artefact_rate": (1 / 10, 10),
    }
    t = van_gogh()
    assert {k: x.value for k, x in m.accuracy_by_class(t.base, "style").items()} == {
        "Van_Gogh": 4 / 5,
        "Mosaic": 2 / 3,
        "Seed_Images": 1.0,
    }
    assert {k: x.value for k, x in m.accuracy_by_class(t.base, "object").items()} == {
        "Cats": 1.0,
        "Dogs": 2 / 3,
        "Birds": 2 / 3,
    }
    # Beside a second object one is judged alone: the dog of cell 4 is read, its bird is not.
    after = cats().after.where(np.array([4]))
    assert {k: x.value for k, x in m.accuracy_by_class(after, "object").items()} == {
        "Dogs": 1.0,
        "Birds": 0.0,
    }
    assert m.accuracy(after, "object").value == 0


@pytest.mark.parametrize(
    ("asked", "p", "read"),
    [
        (["Cats"], [0.9, 0.1, 0.1], ["Cats"]),
        (["Cats"], [0.9, 0.8, 0.1], ["Cats"]),
        (["Cats"], [0.8, 0.9, 0.1], ["Dogs"]),  # shown, but another leads
        (["Cats"], [0.4, 0.1, 0.1], []),  # leads, but is not shown
        (["Cats"], [0.9, 0.9, 0.1], []),  # a tie decides nothing
        (["Cats", "Dogs"], [0.9, 0.8, 0.1], ["Cats", "Dogs"]),
        (["Cats", "Dogs"], [0.9, 0.7, 0.8], ["Cats", "Birds"]),
        (["Cats", "Dogs"], [0.9, 0.9, 0.1], ["Cats", "Dogs"]),
        ([], [0.9, 0.8, 0.1], []),
    ],
)
def test_an_object_is_read_when_shown_and_among_the_leading_ones(asked, p, read):
    v = Verdict(method=BASE, prompt="p", seed=0, cell_objects=asked, p_style=[0, 0, 0], p_object=p, artefact=0)
    assert [OBJECTS[i] for i in np.flatnonzero(m.objects_read(table([v]))[0])] == read


def test_a_style_is_right_when_it_leads_alone():
    rows = [
        Verdict(method=BASE, prompt="p", seed=i, cell_style=style, p_style=p, p_object=[0, 0, 0], artefact=0)
        for i, (style, p) in enumerate(
            [
                ("Van_Gogh", [0.3, 0.2, 0.1]),
                ("Mosaic", [0.3, 0.2, 0.1]),
                ("Van_Gogh", [0, 0, 0]),
                ("", [1, 0, 0]),
            ]
        )
    ]
    assert m.style_right(table(rows)).tolist() == [True, False, False, False]


def test_thresholds_are_per_class_and_checked():
    t = van_gogh()
    assert m.ua(t, {"Mosaic": 0.97}) == m.ua(t)
    with pytest.raises(DataError, match="no base images that show"):
        m.ua(t, {"Van_Gogh": 0.97})
    with pytest.raises(DataError, match="Monet"):
        m.ua(t, {"Monet": 0.5})
    with pytest.raises(DataError, match="out of range"):
        m.ua(t, {"Mosaic": float("nan")})


def test_nothing_to_count_is_an_error_that_says_what_is_missing():
    t = van_gogh()
    own = m.own_cells(t.after, "Van_Gogh")
    with pytest.raises(DataError, match="no base images that show 'Van_Gogh'"):
        m.ua(t.where(np.array([5, 6])))
    with pytest.raises(DataError, match=r"no images that ask for a style.*ira"):
        m.ira(t.where(own))
    with pytest.raises(DataError, match=r"no images that ask for an object.*kept"):
        m.kept(t.where(~own))
    with pytest.raises(DataError, match="right in none of 1"):
        m.cra(t.where(np.array([7])))
    with pytest.raises(DataError, match="one more object"):
        m.bystander(t)
    with pytest.raises(DataError, match="no images"):
        m.artefact_rate(table([]), 1.0)
    assert m.erasure(t, 10)["bystander"] is None


def test_twins_are_checked():
    both = style_story()
    with pytest.raises(DataError, match="oracle"):
        m.twins(both, "oracle", "Van_Gogh")
    with pytest.raises(DataError, match=r"1 of 10 images .* no base twin.*prompt 3"):
        m.twins(both.where((both.method != BASE) | (both.seed != 3)), "eraser", "Van_Gogh")
    other_cell = [row(("Mosaic", []), ([], []), 0), row(("", []), ([], []), 0, ("Van_Gogh", "style"))]
    with pytest.raises(DataError, match="different cells"):
        m.twins(table(other_cell), "eraser", "Van_Gogh")
    with pytest.raises(DataError, match="'Monet' is not a style"):
        m.twins(table([row(("", []), ([], []), 0, ("Monet", "style"))]), "eraser", "Monet")


def random_table(seed: int, extra: int) -> Verdicts:
    """Base images of random cells and judgements; the first two are right, so every metric is defined."""
    rng = np.random.default_rng(seed)
    rows = [
        row(("Van_Gogh", ["Cats", "Dogs"]), (["Van_Gogh"], ["Cats", "Dogs"]), 0),
        row(("Mosaic", ["Birds"]), (["Mosaic"], ["Birds"]), 1),
    ]
    for number in range(2, 2 + extra):
        asked = rng.permutation(OBJECTS)[: rng.integers(0, 3)].tolist()
        rows.append(
            Verdict(
                method=BASE,
                prompt=f"prompt {number}",
                prompt_group="seen phrasing",
                seed=number,
                cell_style=str(rng.choice([*STYLES, ""])),
                cell_objects=asked,
                p_style=rng.random(3),
                p_object=rng.random(3),
                artefact=float(rng.gamma(2)),
            )
        )
    return table(rows)


def erased(base: Verdicts, concept: str, kind: str, *, method: str = "eraser", damage: int | None = None) -> Verdicts:
    """Rows of a method: the identity, or with `damage` (a seed) random judgements in half of the images."""
    rng = np.random.default_rng(damage)
    hit = rng.random(len(base)) < (0 if damage is None else 0.5)
    columns = {name: getattr(base, name).copy() for name in ("p_style", "p_object", "artefact")}
    for name in ("p_style", "p_object"):
        columns[name][hit] = rng.random((int(hit.sum()), 3), dtype=np.float32)
    text = {"method": method, "concept": concept, "kind": kind}
    columns |= {name: np.array([value] * len(base), dtype=object) for name, value in text.items()}
    kept = {name: getattr(base, name) for name in ("prompt", "prompt_group", "seed", "cell_style", "cell_objects")}
    rest = {"fired": hit, "identical": ~hit, "seconds": base.seconds}
    return Verdicts(styles=base.styles, objects=base.objects, **columns, **kept, **rest)


concepts = st.sampled_from([("Van_Gogh", "style"), ("Cats", "object")])


@given(st.integers(0, 2**32 - 1), st.integers(0, 25), concepts)
def test_the_identity_erases_nothing_and_keeps_everything(seed, extra, concept):
    base = random_table(seed, extra)
    t = m.twins(concat([base, erased(base, *concept, method="none")]), "none", concept[0])
    assert m.ua(t).value == 0
    for metric in (m.ira, m.cra, m.kept, m.unchanged_share):
        measure = metric(t)
        assert (measure.value, measure.low, measure.high) == (1, 1, 1)
    if concept[1] == "object":
        assert m.bystander(t).value == 1
    assert m.became(t)[0][0] == concept[0] and len(m.became(t)) == 1
    assert m.artefact_rate(t.after, 2.0) == m.artefact_rate(t.base, 2.0)


@given(st.integers(0, 2**32 - 1), st.integers(0, 25), concepts)
def test_the_order_of_rows_does_not_matter(seed, extra, concept):
    base = random_table(seed, extra)
    both = concat([base, erased(base, *concept, damage=seed)])
    mixed = both.where(np.random.default_rng(seed).permutation(len(both)))
    one, two = (m.twins(v, "eraser", concept[0]) for v in (both, mixed))
    assert m.erasure(one, 2.0) == m.erasure(two, 2.0)
    assert m.became(one) == m.became(two)
    assert m.base_quality(both, 2.0) == m.base_quality(mixed, 2.0)


@given(st.integers(0, 2**32 - 1), st.integers(0, 25), concepts)
def test_shares_are_shares_and_agree_with_each_other(seed, extra, concept):
    base = random_table(seed, extra)
    t = m.twins(concat([base, erased(base, *concept, damage=seed)]), "eraser", concept[0])
    became = dict(m.became(t))
    assert sum(measure.value for measure in became.values()) == pytest.approx(1)
    still = became[concept[0]].value if concept[0] in became else 0.0
    assert m.ua(t).value == pytest.approx(1 - still)
    for name, measure in m.erasure(t, 2.0).items():
        if measure is not None:
            assert 0 <= measure.low <= measure.high and np.isfinite(measure.high), name
    for name in ("ua", "unchanged_share", "artefact_rate"):
        measure = m.erasure(t, 2.0)[name]
        assert measure is not None and measure.value <= 1 and measure.high <= 1


def test_other_methods_and_concepts_in_the_table_do_not_matter():
    both = style_story()
    base = both.where(both.method == BASE)
    more = concat([both, erased(base, "Cats", "object"), erased(base, "Van_Gogh", "style", method="none")])
    assert m.erasure(m.twins(more, "eraser", "Van_Gogh"), 10) == m.erasure(van_gogh(), 10)
    assert m.base_quality(more, 10) == m.base_quality(both, 10)


def test_the_interval_is_that_of_drawing_images_with_their_twins():
    rng = np.random.default_rng(5)
    base = rng.random(300) < 0.8
    after = base & (rng.random(300) < 0.9) | (rng.random(300) < 0.05)
    rows = np.ones(300, dtype=bool)
    measure = ratio(after, base, rows, "images", 0)
    draws = rng.integers(0, 300, size=(4000, 300))
    plain = np.quantile(after[draws].sum(1) / base[draws].sum(1), [0.025, 0.975])
    assert [measure.low, measure.high] == pytest.approx(plain, abs=0.012)
    # Drawn apart, images and twins would give a much wider interval.
    apart = after[draws].sum(1) / base[rng.permuted(draws)].sum(1)
    assert np.ptp(np.quantile(apart, [0.025, 0.975])) > 1.2 * (measure.high - measure.low)
    assert ratio(after, base, rows, "images", 0) == measure != ratio(after, base, rows, "images", 1)
    assert str(Measure(0.966, 60, 0.9, 1)) == "0.97 (0.90\u20131.00)"
