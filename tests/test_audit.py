"""An audit is an evaluation of everything, with a report and a certificate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from helpers.canvas_cells import WITH_TINY
from helpers.commands import refused
from helpers.erasers import open_eraser
from helpers.measured import S
from helpers.stamp_judge import StampJudge, reader, stamping
from neuraleraser import families
from neuraleraser.auditing import FULL, QUICK, audit
from neuraleraser.eraser import Eraser, Provenance
from neuraleraser.errors import FileError
from neuraleraser.evaluation import draw as drawing
from neuraleraser.evaluation.certificate import compare_folder, read_certificate
from neuraleraser.methods import EraserMethod
from neuraleraser.settings import EvaluateSettings


@pytest.fixture(autouse=True, scope="module")
def family() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", WITH_TINY)
        patch.setattr(drawing, "generate", stamping)
        yield


def eraser() -> Any:
    e = open_eraser("Van_Gogh")
    return replace(e, header=replace(e.header, reference=Provenance(((0, 999),))))


def test_report_and_certificate_agree(tmp_path: Path):
    report = audit(reader(), eraser(), tmp_path / "audit", S, judge=StampJudge())
    assert [e.method for e in report.erasures] == ["neuraleraser", "string-filter-all", "string-filter-seen", "none"]
    files = {"report.html", "report.json", "figures.csv", "tables.tex", "contact.png", "certificate.json", "run.json"}
    assert files <= {path.name for path in (tmp_path / "audit").iterdir()}
    content = read_certificate(tmp_path / "audit/certificate.json")
    assert compare_folder(content, tmp_path / "audit") == []
    (kept,) = (tmp_path / "audit/erasers").iterdir()
    own = EraserMethod(Eraser.load(kept))
    assert content["run"]["methods"]["neuraleraser"] == {"Van_Gogh": own.key}, "of what a file holds"


def test_a_key_that_is_none_is_found_before_the_work(tmp_path: Path):
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(FileError, match="is no private key"):
        audit(reader(), eraser(), tmp_path / "audit", S, key=tmp_path / "key.pem", judge=StampJudge())
    assert not (tmp_path / "audit").exists()


def test_every_kind_of_image_is_in_both_budgets():
    rounds = [f.name for f in fields(EvaluateSettings) if f.name.endswith(("_rounds", "_prompts", "_steps"))]
    for settings in (FULL, QUICK):
        missing = {name for name in rounds if not getattr(settings, name)}
        assert missing <= {"held_out_grid_rounds"}, "that is of the base model alone"


def test_the_verb_checks_what_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    missing = str(tmp_path / "none.safetensors")
    assert "there is no eraser" in refused(["audit", missing, "--out", str(tmp_path / "out")], capsys)
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(["audit", missing, "--out", str(tmp_path / "file")], capsys)
