"""What is drawn, and that nothing is tested with what it was made with (law 12)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from erasers import open_eraser
from neuraleraser.bench.cells import (
    GRID,
    HELD_OUT,
    HELD_OUT_GRID,
    IMAGE_TO_IMAGE,
    OWN,
    TWO_OBJECTS,
    base_cells,
    check_split,
    erasure_cells,
)
from neuraleraser.canvas import words
from neuraleraser.concepts import canvas_concept
from neuraleraser.errors import ConceptError, SplitError
from neuraleraser.settings import SELECTION_SEEDS, TEST_SEEDS, EvaluateSettings

FULL = EvaluateSettings()


def everything() -> list:
    cells = base_cells(FULL.grid) + base_cells(1, 2)
    for name in (*words.STYLES, *words.OBJECTS):
        if name != words.PLAIN:
            cells += erasure_cells(name, FULL)
    return list(dict.fromkeys(cells))


def test_the_grid_is_every_style_with_every_object():
    cells = base_cells(2)
    assert len(cells) == 2 * len(words.STYLES) * len(words.OBJECTS)
    assert {c.group for c in cells} == {GRID}
    assert set(Counter((c.style, c.objects) for c in cells).values()) == {2}


def test_no_two_cells_share_a_seed_but_those_of_one_picture():
    """Different cells of one group never share noise; across groups they do not either."""
    by_seed: dict[int, set] = {}
    for c in everything():
        by_seed.setdefault(c.seed, set()).add((c.style, frozenset(c.objects), c.group))
    assert all(len(cells) == 1 for cells in by_seed.values())


def test_a_picture_s_place_on_disk_is_its_own():
    places = Counter((c.style, "+".join(c.objects), c.seed) for c in everything())
    assert max(places.values()) == 1


def test_more_rounds_add_cells_and_change_none():
    assert base_cells(1) == base_cells(3)[: len(base_cells(1))]


def test_selection_and_test_seeds_are_disjoint():
    assert not set(SELECTION_SEEDS) & set(TEST_SEEDS)
    assert all(c.seed in TEST_SEEDS for c in everything())
    assert all(c.seed in SELECTION_SEEDS for c in base_cells(1, seeds=SELECTION_SEEDS))


@pytest.mark.parametrize("name", ["Van_Gogh", "Cats"])
def test_no_prompt_that_tests_an_eraser_makes_one(name: str):
    made = {p.shows for p in canvas_concept(name).pairs}
    assert not made & {c.prompt for c in (*base_cells(1), *erasure_cells(name, FULL))}


def test_a_style_s_own_cells():
    cells = erasure_cells("Van_Gogh", replace(FULL, own=2, held_out=1, image_to_image=1))
    groups = Counter(c.group for c in cells)
    n = len(words.OBJECTS)
    assert groups == {OWN: 2 * n, HELD_OUT: n, IMAGE_TO_IMAGE: n}
    assert all(c.style == "Van_Gogh" for c in cells)


def test_an_object_s_own_cells_have_it_beside_every_other_in_both_orders():
    cells = [c for c in erasure_cells("Cats", replace(FULL, two_objects=1)) if c.group == TWO_OBJECTS]
    assert len(cells) == len(words.OBJECTS) - 1
    assert all("Cats" in c.objects and len(set(c.objects)) == 2 for c in cells)
    assert {c.objects.index("Cats") for c in cells} == {0, 1}
    assert len({c.style for c in cells}) > 10


def test_held_out_cells_use_held_out_phrasings_of_the_concept_only():
    seen, held = words.phrases_of("Cats")[:2], words.phrases_of("Cats")[2:]
    for c in erasure_cells("Cats", FULL):
        if c.group == HELD_OUT:
            assert any(p in c.prompt for p in held) and not any(p in c.prompt for p in seen)


def test_an_unknown_concept_has_no_cells():
    with pytest.raises(ConceptError, match="'Unicorns'"):
        erasure_cells("Unicorns", FULL)


def test_a_fair_eraser_passes():
    check_split(open_eraser(), everything())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"seeds": [0, 10_000]}, "made with the seeds 0 to 10000"),
        ({"split": {"seeds": [TEST_SEEDS.start, TEST_SEEDS.start]}}, "made with the seeds 10000"),
        (
            {"prompts": ["a cat as a Van Gogh painting"]},
            "'a cat as a Van Gogh painting', which would test it",
        ),
        ({"prompts": ["a lighthouse like The Starry Night"]}, "lighthouse like The Starry Night', which is held out"),
        ({"phrasings": [0, 3]}, "the phrasing 3, which is held out"),
        ({"seeds": None}, "does not say which seeds"),
        ({"seeds": ["a", "b"]}, "does not say which seeds"),
        ({"split": "none"}, "does not say which seeds"),
    ],
)
def test_an_overlap_is_refused(header: dict, message: str):
    eraser = open_eraser()
    eraser = replace(eraser, header={**eraser.header, **header})
    with pytest.raises(SplitError, match=message):
        check_split(eraser, [*base_cells(1), *erasure_cells("Van_Gogh", FULL)])


def test_held_out_grid_is_a_group_of_its_own():
    assert {c.group for c in base_cells(1, 3)} == {HELD_OUT_GRID}
