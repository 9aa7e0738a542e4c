"""The command line: what `generate` says is what happened, and where erasers come from and go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.commands import refused, said, short_erase
from helpers.erasers import open_eraser
from neuraleraser.cli import main
from neuraleraser.eraser import Calibration, Eraser

pytestmark = pytest.mark.usefixtures("folder")


def test_what_generate_says_is_what_happened(model: str, capsys: pytest.CaptureFixture[str]):
    from dataclasses import replace

    e = open_eraser()
    shut = replace(e, gate=replace(e.gate, low=e.gate.low + 1e6, high=e.gate.high + 2e6))
    shut.save("shut.safetensors")
    (line,) = said(model, capsys, "--erasers", "vg.safetensors")
    assert line.startswith("Van_Gogh: acted at 2 of 2 steps (t = ")
    (line,) = said(model, capsys, "--erasers", "vg.safetensors:0")
    assert line.startswith("Van_Gogh: did not act (strength 0)")
    (line,) = said(model, capsys, "--erasers", "vg.safetensors:0", "--action", "detect")
    assert line.startswith("Van_Gogh: would not have acted (strength 0)")
    (line,) = said(model, capsys, "--erasers", "vg.safetensors:0", "--action", "refuse")
    assert line.startswith("Van_Gogh: did not refuse (strength 0)")
    (line,) = said(model, capsys, "--erasers", "shut.safetensors", "--action", "refuse")
    assert line == "Van_Gogh: did not fire, so nothing was refused"
    (line,) = said(model, capsys, "--erasers", "shut.safetensors")
    assert line == "Van_Gogh: did not fire"
    assert "Van_Gogh" in refused(
        [
            "generate",
            "a",
            "--model",
            model,
            "--num-inference-steps",
            "1",
            "--erasers",
            "vg.safetensors",
            "--action",
            "refuse",
        ],
        capsys,
    )


def test_images_are_written_as_png_alone(model: str, capsys: pytest.CaptureFixture[str]):
    assert "ends in .png" in refused(["generate", "a cat", "--model", model, "--out", "x.jpg"], capsys)
    assert not Path("x.jpg").exists()


def test_two_erasers_of_one_concept_are_told_apart(model: str, capsys: pytest.CaptureFixture[str]):
    from dataclasses import replace

    e = open_eraser()
    replace(e, gate=replace(e.gate, low=e.gate.low + 1e6, high=e.gate.high + 2e6)).save("shut.safetensors")
    lines = said(model, capsys, "--erasers", "vg.safetensors", "shut.safetensors", "vg.safetensors:0")
    assert lines[0].startswith("Van_Gogh (vg.safetensors) 1: acted at 2 of 2 steps")
    assert lines[1] == "Van_Gogh (shut.safetensors): did not fire"
    assert lines[2].startswith("Van_Gogh (vg.safetensors) 2: did not act (strength 0)")


def test_an_eraser_may_be_a_folder_or_on_the_hub(
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    import huggingface_hub

    open_eraser().save_pretrained("kept")
    asked: list[str] = []

    def download(repo: str, file: str, **_: Any) -> str:
        asked.append(repo)
        return str(Path("kept") / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert said(model, capsys, "--erasers", "kept")[0].startswith("Van_Gogh: acted")
    assert said(model, capsys, "--erasers", "owner/name:0.5")[0].startswith("Van_Gogh: acted")
    assert said(model, capsys, "--erasers", "owner/name:0")[0].startswith("Van_Gogh: did not act")
    Path("odd:0").mkdir()
    open_eraser("Cats").save_pretrained("odd:0")  # a folder of that name is not one with a strength
    assert said(model, capsys, "--erasers", "odd:0")[0].startswith("Cats: acted")
    assert asked == ["owner/name"] * 2
    argv = ["doctor", "--model", model, "--num-images", "1", "--num-inference-steps", "1", "--erasers"]
    for source in ("kept", "owner/name", "vg.safetensors"):
        capsys.readouterr()
        assert main([*argv, source]) in (0, 1) and "Van_Gogh" in capsys.readouterr().out
    monkeypatch.setattr("neuraleraser.fitting.calibrate", lambda pipe, eraser, *_, **__: _calibrated(eraser))
    for source, out in (("kept", "kept"), ("owner/name", "name"), ("vg.safetensors", "vg")):
        assert main(["calibrate", source, "--model", model, "--num-pairs", "2"]) == 0
        assert Eraser.load(f"{out}-calibrated.safetensors").name == "Van_Gogh"


def _calibrated(eraser: Eraser) -> Eraser:
    return replace(eraser, header=replace(eraser.header, calibrated=Calibration(2, (1.0, 1.0), 1.0)))


def test_the_name_in_an_eraser_opens_no_file(model: str, monkeypatch: pytest.MonkeyPatch):
    """A stranger's eraser may be named as a file of ours."""
    Path("secret.json").write_text('{"name": "x", "kind": "object", "pairs": [["our secret", "nothing"]]}')

    def opened(path: Path) -> None:
        raise AssertionError(f"{path} was opened")

    monkeypatch.setattr("neuraleraser.concepts.Concept.from_json", opened)
    open_eraser("secret.json").save("evil.safetensors")
    evil = ["--model", model, "--num-inference-steps", "1", "--erasers", "evil.safetensors"]
    main(["doctor", "--num-images", "1", *evil])
    main(["generate", "a", *evil, "--calibrate"])
    with pytest.raises(AssertionError, match="was opened"):  # what the user names is
        main(["erase", "secret.json", "--model", model])


def test_a_concept_s_name_stays_in_the_folder(tmp_path: Path):
    from neuraleraser.demo import _eraser_path

    for name in ("../../../x", "/etc/x", "a/b", "..", "a\\b"):
        assert _eraser_path(tmp_path, name).resolve().parent == tmp_path.resolve() / "erasers"


def test_a_concept_file_with_a_path_for_its_name(
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """Its eraser and its reference stay here."""
    deep = Path("a/b/c")
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    Path("evil.json").write_text(
        '{"name": "../../../x", "kind": "object", "pairs": [["a d", "a b"], ["a d c", "a c"]]}'
    )
    argv = short_erase("evil.json", model)
    main(argv)
    outside = {p.name for p in Path("..").iterdir()} | {p.name for p in Path("../../..").iterdir()}
    assert outside == {"c", "a", "vg.safetensors", "sae.safetensors", "p.txt", "file", "dir", "pipe"}
    assert [p for p in Path().glob("*.safetensors")] or "x-" in str(list(Path("runs/references").iterdir()))


@pytest.mark.filterwarnings("default::neuraleraser.errors.UnseenRouteWarning")
def test_a_picture_to_start_from(model: str, capsys: pytest.CaptureFixture[str]):
    run = ["generate", "", "--model", model, "--num-inference-steps", "2", "--image", "cat.png"]
    Image.new("RGB", (100, 60), "red").save("cat.png")
    assert main([*run, "--strength", "0.5", "--out", "half.png"]) == 0
    assert capsys.readouterr().out == "half.png: '', seed 0, from cat.png at strength 0.5\n"
    assert main([*run, "--out", "whole.png", "--erasers", "vg.safetensors", "--action", "erase_or_refuse"]) == 0
    printed = capsys.readouterr()
    acted, begun = printed.out.splitlines()
    assert acted.startswith("Van_Gogh: acted at 1 of 1 steps") and begun.endswith("at strength 0.8")
    assert "the gate of Van_Gogh does not see (start image)" in printed.err
    Image.new("RGB", (100, 60), "blue").save("cat.png")
    assert main([*run, "--strength", "0.5", "--out", "blue.png"]) == 0
    with Image.open("half.png") as half, Image.open("whole.png") as whole, Image.open("blue.png") as blue:
        assert half.size == whole.size and half.width > half.height
        assert len({half.tobytes(), whole.tobytes(), blue.tobytes()}) == 3


def test_pictures_that_cannot_be_started_from(model: str, capsys: pytest.CaptureFixture[str]):
    Image.new("RGB", (64, 64)).save("cat.png")
    run = ["generate", "a cat", "--model", model, "--out", "out.png"]
    assert "--strength says how much of a start image" in refused([*run, "--strength", "0.5"], capsys)
    assert "strength is 3" in refused([*run, "--image", "cat.png", "--strength", "3"], capsys)
    assert "none.png" in refused([*run, "--image", "none.png"], capsys)
    assert "p.txt cannot be read as a picture" in refused([*run, "--image", "p.txt"], capsys)
    assert "would replace what --image reads" in refused([*run[:-1], "cat.png", "--image", "cat.png"], capsys)
    assert not Path("out.png").exists()
