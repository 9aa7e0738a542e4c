"""Files of ours on the Hub, wherever a verb takes one: owner/name, or owner/name@revision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import neuraleraser
from helpers.commands import refused, said
from helpers.erasers import GATE, open_eraser
from helpers.fake_hub import FakeHub, content, make_reference
from neuraleraser.cli import main
from neuraleraser.eraser import Calibration, Eraser
from neuraleraser.errors import ConceptError
from neuraleraser.sae import SAE

pytestmark = pytest.mark.usefixtures("folder")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """Three repositories; what is on their main branches today is none of ours."""
    made = FakeHub(tmp_path / "hub", monkeypatch)
    held: dict[str, Any] = {"an-eraser": open_eraser(), "an-sae": SAE.load("sae.safetensors")}
    for name, of in (held | {"a-reference": make_reference()}).items():
        files = content(of)
        made.put(f"owner/{name}", files, "v1")
        made.put(f"owner/{name}", dict.fromkeys(files, b"nothing that can be read"))
    return made


def test_erasers(hub: FakeHub, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    assert said(model, capsys, "--erasers", "owner/an-eraser@v1:0.5")[0].startswith("Van_Gogh: acted")
    assert said(model, capsys, "--erasers", "owner/an-eraser@v1:0")[0].startswith("Van_Gogh: did not act")
    argv = ["generate", "a cat", "--model", model, "--erasers"]
    assert "safetensors" in refused([*argv, "owner/an-eraser"], capsys)  # today's is none
    assert "has no revision 'v2'" in refused([*argv, "owner/an-eraser@v2:0.5"], capsys)
    seen = Calibration(2, (1.0, 1.0), 1.0)
    monkeypatch.setattr(
        "neuraleraser.fitting.calibrate",
        lambda pipe, e, *_, **__: replace(e, header=replace(e.header, calibrated=seen)),
    )
    assert main(["calibrate", "owner/an-eraser@v1", "--model", model, "--num-pairs", "2"]) == 0
    assert Eraser.load("an-eraser-calibrated.safetensors").name == "Van_Gogh"


def test_saes(hub: FakeHub, model: str, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", "owner/an-sae@v1"]) == 0
    assert f"{GATE}" in capsys.readouterr().out
    argv = ["profile", "a d", "a b", "--model", model, "--num-images", "1", "--sae"]
    for source in ("owner/an-sae@v1", "dir", "dir/sae.safetensors"):
        assert main([*argv, source, "--out", "p.safetensors"]) == 0
        assert "gap to the worst neighbour" in capsys.readouterr().out
    assert main(["convert", "owner/an-sae@v1", "theirs"]) == 0 and Path("theirs/cfg.json").is_file()
    assert "is the SAE's own folder" in refused(["convert", "dir", "dir"], capsys)
    assert "the Hub has no repository 'owner/no-sae'" in refused([*argv, "owner/no-sae"], capsys)


def test_references(hub: FakeHub, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    given: list[Any] = []

    def fit(*_: Any, reference: Any, **__: Any) -> None:
        given.append(reference)
        raise ConceptError("so far, and no further")

    monkeypatch.setattr("neuraleraser.fitting.from_phrase.fit", fit)
    source = "owner/a-reference@v1"
    argv = ["erase", "a d", "--model", model, "--neighbours", "a b", "--reference"]
    assert main([*argv, source]) == 2
    pipe = neuraleraser.open_pipeline(model)
    with pytest.raises(ConceptError):
        neuraleraser.erase(pipe, "a d", neighbours=["a b"], reference=source)
    assert [known.site for known in given] == [make_reference().site] * 2
    assert "holds no reference" in refused([*argv, "dir"], capsys)
