"""The official figures, counted by hand from the stories in result_tables.py."""

from __future__ import annotations

from helpers.result_tables import object_story, style_story
from neuraleraser.evaluation import metrics as m
from neuraleraser.evaluation.official_metrics import saeuron, unlearncanvas


def values(figures):
    return {name: (figure.value, figure.n) if figure else None for name, figure in figures.items()}


def test_unlearncanvas_counts_styled_images_without_looking_at_the_base():
    # Cell 4 shows nothing strongly; its first class counts as chosen, which is the target.
    t = m.pair_with_base(style_story(), "eraser", "Van_Gogh")
    assert values(unlearncanvas(t)) == {
        "UA": (2 / 5, 5),  # target cells 0 to 4: classified as the target in 2, 3 and 4
        "IRA": (2 / 3, 3),  # cells 5 6 8: 6 is wrong
        "CRA": (5 / 8, 8),  # cells 0 to 6 and 8: the object is wrong in 1 3 4
    }


def test_saeuron_takes_the_cra_of_a_style_from_unstyled_images():
    t = m.pair_with_base(style_story(), "eraser", "Van_Gogh")
    ours, theirs = unlearncanvas(t), saeuron(t)
    assert (theirs["UA"], theirs["IRA"]) == (ours["UA"], ours["IRA"])
    assert values(theirs)["CRA"] == (0, 2)  # cells 7 and 9
    assert saeuron(t.where(t.after.seed < 7))["CRA"] is None


def test_both_count_single_objects_only():
    t = m.pair_with_base(object_story(), "eraser", "Cats")
    assert unlearncanvas(t)["UA"] is None  # the only prompts of one object are plain
    assert saeuron(t)["CRA"] is None
