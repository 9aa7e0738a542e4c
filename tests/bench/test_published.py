"""The published figures, counted by hand from the stories in tables.py."""

from __future__ import annotations

import pytest
from tables import object_story, style_story

from neuraleraser.bench import metrics as m
from neuraleraser.bench.published import saeuron, unlearncanvas
from neuraleraser.errors import DataError


def values(figures):
    return {name: (measure.value, measure.n) for name, measure in figures.items()}


def test_unlearncanvas_counts_styled_images_without_looking_at_the_base():
    # Cell 4 shows nothing strongly; its first class counts as chosen, which is the target.
    t = m.twins(style_story(), "eraser", "Van_Gogh")
    assert values(unlearncanvas(t)) == {
        "UA": (2 / 5, 5),  # own cells 0 to 4: classified as the target in 2, 3 and 4
        "IRA": (2 / 3, 3),  # cells 5 6 8: 6 is wrong
        "CRA": (5 / 8, 8),  # cells 0 to 6 and 8: the object is wrong in 1 3 4
    }


def test_saeuron_takes_the_cra_of_a_style_from_unstyled_images():
    t = m.twins(style_story(), "eraser", "Van_Gogh")
    ours, theirs = unlearncanvas(t), saeuron(t)
    assert (theirs["UA"], theirs["IRA"]) == (ours["UA"], ours["IRA"])
    assert values(theirs)["CRA"] == (0, 2)  # cells 7 and 9
    with pytest.raises(DataError, match="SAeUron CRA"):
        saeuron(t.where(t.after.seed < 7))


def test_both_count_single_objects_only():
    t = m.twins(object_story(), "eraser", "Cats")
    with pytest.raises(DataError, match="UnlearnCanvas UA"):
        unlearncanvas(t)  # the only prompts of one object are plain
    with pytest.raises(DataError, match="SAeUron CRA"):
        saeuron(t)
