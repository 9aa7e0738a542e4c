"""The metrics against stories counted by hand, against wrong definitions, and in their general properties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.result_tables import JUDGE, OBJECTS, STYLES, object_story, row, style_story, table
from neuraleraser.errors import DataError
from neuraleraser.evaluation import metrics as m
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.results import BASE, Results, Row, concat
from neuraleraser.judges import JudgeSpec


def van_gogh() -> m.PairedResults:
    return m.pair_with_base(style_story(), "eraser", "Van_Gogh")


def cats() -> m.PairedResults:
    return m.pair_with_base(object_story(), "eraser", "Cats")


# Counted by hand from the stories in result_tables.py: (metric, pairs, good images, images to divide by, n).
BY_HAND: list[tuple[Callable[[m.PairedResults], Estimate], Callable[[], m.PairedResults], int, int, int]] = [
    (m.ua, van_gogh, 4, 5, 5),  # the base shows it in 0 1 2 4 8, and it stays in 2
    (m.shown_share, van_gogh, 5, 10, 10),
    (m.ira, van_gogh, 2, 3, 4),  # cells 5 6 7 8: the base is right in 5 6 7, after erasure 5 and 8 are
    (m.cra, van_gogh, 3, 4, 5),  # cells 5 to 9: the base's object is right but in 7, then 9 is damaged
    (m.kept, van_gogh, 2, 4, 5),  # target cells 0 to 4: base right but in 4, after erasure in 0 and 2
    (m.kept_still, van_gogh, 2, 4, 4),
    (m.unchanged_share, van_gogh, 1, 4, 4),  # without it: 5 6 7 9, of which 5 has the same bits
    (m.unchanged_compared, van_gogh, 0, 3, 3),  # 5 was not compared
    (m.ua, cats, 4, 5, 5),  # shown in 0 1 2 3 5, still there in 3
    (m.ira, cats, 1, 2, 2),  # cells 4 and 6: the bird of 4 is lost
    (m.cra, cats, 1, 2, 2),  # cells 4 and 6: the style of 6 is lost
    (m.kept, cats, 4, 5, 5),  # target cells 0 1 2 3 5: the style of 1 is lost
    (m.kept_still, cats, 4, 5, 5),
    (m.bystander, cats, 2, 3, 4),  # cells 0 to 3: base in 0 1 3, after erasure in 2 and 3
    (m.bystander_still, cats, 1, 3, 3),  # of 0 1 3 only 3: the bird of 2 offsets nothing
    (m.unchanged_share, cats, 1, 2, 2),  # without a cat: 4 and 6
]


@pytest.mark.parametrize(("metric", "pairs", "good", "of", "n"), BY_HAND)
def test_metric_equals_the_count_by_hand(metric, pairs, good, of, n):
    estimate = metric(pairs())
    assert (estimate.value, estimate.n) == (good / of, n)
    assert estimate.low <= estimate.value <= estimate.high


def swapped(t: m.PairedResults) -> m.PairedResults:
    """The definition with base and erased images exchanged."""
    return m.PairedResults(t.method, t.concept, t.kind, t.after, t.base)


@pytest.mark.parametrize("metric", list(dict.fromkeys(case[0] for case in BY_HAND)))
def test_the_stories_tell_flipped_definitions_apart(metric):
    stories = [pairs() for other, pairs, *_ in BY_HAND if other is metric]
    values = [metric(t).value for t in stories]
    if metric is not m.shown_share:
        assert any(1 - value != value for value in values), "the share that goes taken for the share that stays"
    if metric not in (m.unchanged_share, m.unchanged_compared):  # `identical` belongs to the erased image alone
        flipped = [metric(swapped(t)).value for t in stories]
        assert values != flipped, "base and erased exchanged"


def test_wrong_sets_of_images_would_give_other_values():
    t = van_gogh()
    target = m.is_target(t.after, "Van_Gogh")
    shown = m.shows_concept(t.after, "style", "Van_Gogh")
    assert m.ua(t).value != np.mean(~shown[target]), "ua over the prompts that ask, without looking at the base"
    for metric, kind in ((m.ira, "style"), (m.cra, "object")):
        other = m.accuracy(t.after.where(~target), kind).value
        assert metric(t).value != other, "accuracy not divided by the base's"
        everywhere = m.accuracy(t.after, kind).value / m.accuracy(t.base, kind).value
        assert metric(t).value != pytest.approx(everywhere), "target cells not excluded"
    assert m.kept(t).value != m.accuracy(t.after.where(target), "object").value, "kept not divided by the base's"
    assert m.unchanged_share(t).value not in (np.mean(t.after.identical), np.mean(t.after.identical[~target]))


def test_artefact_rate_is_the_share_beyond_the_judge_s_threshold():
    def with_limit(t: m.PairedResults, limit: float) -> m.PairedResults:
        after, base = (replace(r, judge=replace(JUDGE, artefact_threshold=limit)) for r in (t.after, t.base))
        return replace(t, after=after, base=base)

    t = van_gogh()
    assert m.artefact_rate(with_limit(t, 10).after).value == 2 / 10
    assert m.artefact_rate(with_limit(t, 11).after).value == 1 / 10, "a distance equal to the threshold is none"
    assert m.artefact_rate(with_limit(t, 10).base).value == 1 / 10
    every = m.erasure_metrics(t)
    assert [every[name].value for name in ("artefact_rate_target", "artefact_rate_target_base")] == [2 / 5, 1 / 5]


def test_became_ranks_what_is_seen_where_the_concept_was():
    ranking = [(label, estimate.value) for label, estimate in m.became(van_gogh())]
    assert ranking == [("Mosaic", 0.4), ("Seed_Images", 0.2), ("Van_Gogh", 0.2), (m.NO_CLASS, 0.2)]
    # The dog that was asked for beside the cat is not what the cat became.
    ranking = [(label, estimate.value) for label, estimate in m.became(cats())]
    assert ranking == [("Birds", 0.4), (m.NO_CLASS, 0.4), ("Cats", 0.2)]


def test_accuracy_and_accuracy_by_class():
    t = van_gogh()
    assert (m.accuracy(t.base, "style").value, m.accuracy(t.base, "style").n) == (7 / 9, 9)  # 3, 8 wrong; 9 asks none
    assert (m.accuracy(t.base, "object").value, m.accuracy(t.base, "object").n) == (8 / 10, 10)  # wrong in 4 and 7
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
    # Beside a second object one is judged alone: the dog of cell 4 is right, its bird is not.
    after = cats().after.where(np.array([4]))
    assert {k: x.value for k, x in m.accuracy_by_class(after, "object").items()} == {"Dogs": 1.0, "Birds": 0.0}
    assert m.accuracy(after, "object").value == 0


def one(asked: tuple[str, list[str]], p_style: list[float], p_object: list[float], judge: JudgeSpec = JUDGE) -> Results:
    """A table of one base image."""
    style, objects = asked
    made = Row(
        method=BASE, prompt="p", seed=0, cell_style=style, cell_objects=objects, p_style=p_style, p_object=p_object,
        artefact=0.0,
    )  # fmt: skip
    return table([made], judge)


@pytest.mark.parametrize(
    ("asked", "p", "right"),
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
def test_an_object_is_right_when_shown_and_among_the_leading_ones(asked, p, right):
    found = m.classes_right(one(("", asked), [0, 0, 0], p), "object")[0]
    assert [OBJECTS[i] for i in np.flatnonzero(found)] == right


@pytest.mark.parametrize(
    ("style", "p", "right"),
    [
        ("Van_Gogh", [0.6, 0.3, 0.1], True),
        ("Mosaic", [0.6, 0.3, 0.1], False),
        ("Van_Gogh", [0.4, 0.3, 0.3], False),  # leads, but is not shown: it counts as gone, so not as right
        ("Van_Gogh", [0.6, 0.6, 0.1], False),
        ("", [1, 0, 0], False),
    ],
)
def test_a_style_is_right_by_the_same_rule(style, p, right):
    assert m.all_classes_right(one((style, []), p, [0, 0, 0]), "style").tolist() == [right]


@given(
    st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3),
    st.floats(0, 0.99),
    st.sampled_from(["style", "object"]),
)
def test_what_is_right_is_shown_and_what_is_gone_is_not_right(p, threshold, kind):
    judge = JudgeSpec(STYLES, OBJECTS, dict.fromkeys((*STYLES, *OBJECTS), threshold), 10.0)
    asked = ("Van_Gogh", ["Cats"])
    results = one(asked, p, p, judge)
    concept = asked[0] if kind == "style" else asked[1][0]
    assert not (m.all_classes_right(results, kind) & ~m.shows_concept(results, kind, concept)).any()


def test_a_bystander_is_not_easier_to_keep_once_the_concept_is_gone():
    """A dog in second place behind a bird is wrong beside a cat that shows, and beside one that is gone."""
    for cat in (0.95, 0.04):
        t = m.PairedResults("m", "Cats", "object", *[one(("", ["Cats", "Dogs"]), [0, 0, 0], [cat, 0.7, 0.8])] * 2)
        with pytest.raises(DataError):
            m.bystander(t)  # the base is not right
    t = m.PairedResults("m", "Cats", "object", *[one(("", ["Cats", "Dogs"]), [0, 0, 0], [0.04, 0.8, 0.7])] * 2)
    assert m.bystander(t).value == 1


def test_thresholds_are_the_judge_s_by_class():
    raised = replace(JUDGE, thresholds={**JUDGE.thresholds, "Van_Gogh": 0.97})
    t = van_gogh()
    higher = replace(t, base=replace(t.base, judge=raised), after=replace(t.after, judge=raised))
    with pytest.raises(DataError, match="no base images that show"):
        m.ua(higher)
    other = replace(JUDGE, thresholds={**JUDGE.thresholds, "Mosaic": 0.97})
    assert m.ua(replace(t, base=replace(t.base, judge=other), after=replace(t.after, judge=other))) == m.ua(t)


def test_nothing_to_count_is_an_error_that_says_what_is_missing():
    t = van_gogh()
    target = m.is_target(t.after, "Van_Gogh")
    with pytest.raises(DataError, match="no base images that show 'Van_Gogh'"):
        m.ua(t.where(np.array([5, 6])))
    with pytest.raises(DataError, match=r"no images that ask for a style.*ira"):
        m.ira(t.where(target))
    with pytest.raises(DataError, match=r"no images that ask for an object.*kept"):
        m.kept(t.where(~target))
    with pytest.raises(DataError, match="right in none of 1"):
        m.cra(t.where(np.array([7])))
    with pytest.raises(DataError, match="one more object"):
        m.bystander(t)
    with pytest.raises(DataError, match="no images"):
        m.artefact_rate(table([]))
    assert m.erasure_metrics(t)["bystander"] is None


def test_a_judge_without_artefacts_or_with_one_domain_gives_what_it_can():
    blind = JudgeSpec(STYLES, (), dict.fromkeys(STYLES, 0.5), None)
    rows = []
    for results in (style_story(),):
        for i, key in enumerate(results.keys()):
            source = results.table.slice(i, 1).to_pylist()[0]
            rows.append(Row(**{**source, "p_object": [], "artefact": None}))
            assert key.prompt == source["prompt"]
    t = m.pair_with_base(Results.of(blind, rows), "eraser", "Van_Gogh")
    every, whole = m.erasure_metrics(t), m.erasure_metrics(van_gogh())
    assert [name for name, figure in every.items() if figure is None] == [
        "cra", "kept", "kept_still", "bystander", "bystander_still", "artefact_rate_target",
        "artefact_rate_target_base", "artefact_rate", "idle_identical",
    ]  # fmt: skip
    assert every["ua"] == whole["ua"] and every["ira"] == whole["ira"]


def test_pairs_are_checked():
    both = style_story()
    with pytest.raises(DataError, match="oracle"):
        m.pair_with_base(both, "oracle", "Van_Gogh")
    with pytest.raises(DataError, match=r"1 of 10 images .* no base twin.*prompt 3"):
        m.pair_with_base(both.where((both.method != BASE) | (both.seed != 3)), "eraser", "Van_Gogh")
    other_cell = [row(("Mosaic", []), ([], []), 0), row(("", []), ([], []), 0, ("Van_Gogh", "style"))]
    with pytest.raises(DataError, match="different cells"):
        m.pair_with_base(table(other_cell), "eraser", "Van_Gogh")
    with pytest.raises(DataError, match="'Monet' is not a style"):
        m.pair_with_base(table([row(("", []), ([], []), 0, ("Monet", "style"))]), "eraser", "Monet")


def random_table(seed: int, extra: int) -> Results:
    """Base images of random cells and judgements; the first two are right, so every metric is defined."""
    rng = np.random.default_rng(seed)
    rows = [
        row(("Van_Gogh", ["Cats", "Dogs"]), (["Van_Gogh"], ["Cats", "Dogs"]), 0),
        row(("Mosaic", ["Birds"]), (["Mosaic"], ["Birds"]), 1),
    ]
    for number in range(2, 2 + extra):
        asked = rng.permutation(OBJECTS)[: rng.integers(0, 3)].tolist()
        cell = (str(rng.choice([*STYLES, ""])), asked)
        blank = row(cell, ([], []), number, artefact=float(rng.gamma(2)))
        rows.append(replace(blank, p_style=rng.random(3), p_object=rng.random(3)))
    return table(rows)


def erased(base: Results, concept: str, kind: str, *, method: str = "eraser", damage: int | None = None) -> Results:
    """Rows of a method: the identity, or with `damage` (a seed) random judgements in half of the images."""
    rng = np.random.default_rng(damage)
    rows = []
    for source in base.table.to_pylist():
        hit = damage is not None and rng.random() < 0.5
        source |= {"method": method, "concept": concept, "kind": kind, "method_key": "k", "identical": not hit}
        source |= {"compared": hit, "watched": [f"{method}/{concept}/k"]}
        if hit:
            source |= {"p_style": rng.random(3), "p_object": rng.random(3), "fired": source["watched"]}
        rows.append(Row(**source))
    return table(rows)


concepts = st.sampled_from([("Van_Gogh", "style"), ("Cats", "object")])


@given(st.integers(0, 2**32 - 1), st.integers(0, 25), concepts)
def test_the_identity_erases_nothing_and_keeps_everything(seed, extra, concept):
    base = random_table(seed, extra)
    t = m.pair_with_base(concat([base, erased(base, *concept, method="none")]), "none", concept[0])
    assert m.ua(t).value == 0 == m.ua(t).low
    for metric in (m.ira, m.cra, m.kept, m.kept_still, m.unchanged_share):
        estimate = metric(t)
        assert estimate.value == 1 and estimate.low < 1, "unanimity of n images is no certainty"
    if concept[1] == "object":
        assert m.bystander(t).value == m.bystander_still(t).value == 1
    assert m.became(t)[0][0] == concept[0] and len(m.became(t)) == 1
    assert m.artefact_rate(t.after) == m.artefact_rate(t.base)


@given(st.integers(0, 2**32 - 1), st.integers(0, 25), concepts)
def test_the_order_of_rows_does_not_matter(seed, extra, concept):
    base = random_table(seed, extra)
    both = concat([base, erased(base, *concept, damage=seed)])
    mixed = both.where(np.random.default_rng(seed).permutation(len(both)))
    one, two = (m.pair_with_base(v, "eraser", concept[0]) for v in (both, mixed))
    assert m.erasure_metrics(one) == m.erasure_metrics(two)
    assert m.became(one) == m.became(two)


@given(st.integers(0, 2**32 - 1), st.integers(0, 25), concepts)
def test_shares_are_shares_and_agree_with_each_other(seed, extra, concept):
    base = random_table(seed, extra)
    t = m.pair_with_base(concat([base, erased(base, *concept, damage=seed)]), "eraser", concept[0])
    became = dict(m.became(t))
    assert sum(estimate.value for estimate in became.values()) == pytest.approx(1)
    still = became[concept[0]].value if concept[0] in became else 0.0
    assert m.ua(t).value == pytest.approx(1 - still)
    every = m.erasure_metrics(t)
    for name, estimate in every.items():
        if estimate is not None:
            assert 0 <= estimate.low <= estimate.value <= estimate.high and np.isfinite(estimate.high), name
            assert estimate.low < estimate.high, name
            if name not in ("ira", "cra", "kept", "bystander"):
                assert estimate.high <= 1, name
    for name in ("kept", "bystander"):
        gain, still = every[name], every[f"{name}_still"]
        assert gain is None or still is None or still.value <= gain.value + 1e-9, "gains only add"


def test_other_methods_and_concepts_in_the_table_do_not_matter():
    both = style_story()
    base = both.where(both.method == BASE)
    more = concat([both, erased(base, "Cats", "object"), erased(base, "Van_Gogh", "style", method="none")])
    assert m.erasure_metrics(m.pair_with_base(more, "eraser", "Van_Gogh")) == m.erasure_metrics(van_gogh())
