"""A judge that cannot read the base model's images is refused before any method is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.measured import S
from helpers.result_tables import OBJECTS, STYLES, row, table
from helpers.stamp_judge import StampJudge, stamping
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation import draw as drawing
from neuraleraser.evaluation.base_check import check_readable
from neuraleraser.evaluation.evaluate import evaluate
from neuraleraser.evaluation.results import Results
from neuraleraser.judges import Judgement
from neuraleraser.methods import DoNothing
from neuraleraser.sampling import Images


def base(wrong: int, n: int = 30) -> Results:
    """Images of which the judge is wrong in the style of the first few, and right in every object."""
    rows = []
    for i in range(n):
        style, name = STYLES[i % 3], OBJECTS[i % 3]
        seen = STYLES[(i + 1) % 3] if i < wrong else style
        rows.append(row((style, [name]), ([seen], [name]), i))
    return table(rows)


def test_a_judge_that_is_mostly_wrong_is_refused_with_its_accuracy() -> None:
    with pytest.raises(SettingsError, match=r"is right in 0\.10 \(.*n = 30\) of .* known style.*not trained for this"):
        check_readable(base(27), ["style"])
    check_readable(base(27), ["object"])
    check_readable(base(12), ["style", "object"])


def test_few_images_decide_nothing() -> None:
    check_readable(base(19, 19), ["style"])
    with pytest.raises(SettingsError):
        check_readable(base(20, 20), ["style"])


class Shuffled(StampJudge):
    """Has its styles in another order."""

    def __call__(self, images: Images, /) -> Judgement:
        seen = super().__call__(images)
        return replace(seen, p_style=np.roll(np.asarray(seen.p_style), 1, axis=1))


def test_a_shuffled_judge_is_refused_before_a_method_is_drawn(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "generate", stamping)
    settings = replace(S, grid_rounds=3, start_image_rounds=0)
    method = DoNothing("Van_Gogh", "style")
    with pytest.raises(SettingsError, match=r"is right in 0\.00 .* its classes are in another order"):
        evaluate(pipe, [method], settings, tmp_path / "wrong", judge=Shuffled())
    assert not (tmp_path / "wrong/images/none").exists()
    evaluate(pipe, [method], settings, tmp_path / "right", judge=StampJudge())
