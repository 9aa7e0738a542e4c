"""The command line: erasers made and used on a tiny pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.commands import SAMPLING, refused, short_erase
from helpers.erasers import open_eraser
from neuraleraser.cli import main
from neuraleraser.cli.generate import parse_eraser
from neuraleraser.errors import SettingsError


def test_a_model_without_a_reference_gets_its_own(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    argv = short_erase("a d", model)
    assert main(argv) == 0
    first = capsys.readouterr()
    assert f"Making a reference for {Path(model).name} at unet." in first.out
    assert "15 of its own images, of a d and a b." in first.out
    from neuraleraser import Eraser

    made = Eraser.load(Path("a-d.safetensors"))
    drawn = made.header.sampling
    assert drawn is not None and (drawn.num_inference_steps, drawn.batch_size) == (2, 2)
    (folder,) = Path("runs/references").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["background.safetensors", "sae.safetensors"]
    assert main([*argv, "--out", "two words.safetensors"]) == 0  # the second time it is there
    out = capsys.readouterr().out
    assert "Making a reference" not in out and out.rstrip().endswith("--erasers 'two words.safetensors'")
    assert "images is 3: pass a whole number from 5" in refused([*argv[:4], "--num-images", "3"], capsys)


def test_a_published_reference_out_of_reach_is_said_and_replaced(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub

    from neuraleraser.families.opening import open_pipeline
    from neuraleraser.families.stable_diffusion import STABLE_DIFFUSION
    from neuraleraser.fitting import published_references as table
    from neuraleraser.sites import default_gate_site

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    site = default_gate_site(open_pipeline(model), "object")
    theirs = replace(STABLE_DIFFUSION.published[0], models=(Path(model).name,), site=site)
    monkeypatch.setattr(table, "FAMILIES", (replace(STABLE_DIFFUSION, published=(theirs,)),))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    argv = short_erase("a d", model)
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "is published: bcywinski/SAeUron_coco" in out
    assert "could not be fetched from the Hub: no network." in out and "Making a reference" in out


def test_an_eraser_as_saeuron_makes_it(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from neuraleraser import Eraser
    from neuraleraser.fitting import unlabelled_sae

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(unlabelled_sae, "TRAINING_STEPS", 5)
    monkeypatch.setattr(unlabelled_sae, "VECTORS_PER_IMAGE", 64)
    argv = ["erase", "a d", "--model", model, "--neighbours", "a b", "--method", "saeuron", *SAMPLING]
    few = ["--saeuron.num-images", "2", "--saeuron.sae-images", "4", "--saeuron.multiplier", "-3"]
    assert main([*argv, *few]) == 0
    assert "Training an SAE of unet." in capsys.readouterr().out
    made = Eraser.load(Path("a-d.safetensors"))
    assert (made.header.method, made.header.settings.multiplier) == ("saeuron", -3)
    (sae,) = Path("runs/saes").iterdir()
    assert main([*argv, *few, "--sae", str(sae), "--out", "again.safetensors"]) == 0
    assert Eraser.load(Path("again.safetensors")).content_hash == made.content_hash
    out = ["generate", "a d", "--model", model, "--num-inference-steps", "2", "--out", "image.png"]
    assert main([*out, "--erasers", "a-d.safetensors"]) == 0
    assert "a d: acted at" in capsys.readouterr().out
    for wrong in (["--reference", "x"], ["--rank", "3"], ["--num-images", "7"]):
        assert "saeuron reads no reference" in refused([*argv, *wrong], capsys)
    for wrong in (["--sae", str(sae)], ["--saeuron.multiplier", "-3"]):
        assert "are for saeuron alone" in refused([*short_erase("a d", model), *wrong], capsys)


def test_an_eraser_of_another_width_is_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    e = open_eraser()
    gate = replace(e.gate, rows=e.gate.rows.repeat(1, 2))
    replace(e, gate=gate).save(tmp_path / "wide.safetensors")
    argv = [
        "generate",
        "a",
        "--model",
        model,
        "--erasers",
        str(tmp_path / "wide.safetensors"),
        "--num-inference-steps",
        "1",
    ]
    assert "expects 64: use it with the pipeline it was made for" in refused(argv, capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.5", ("a.safetensors", 0.5)),
        ("a.safetensors:0", ("a.safetensors", 0.0)),
        ("dir:x/a.safetensors", ("dir:x/a.safetensors", 1.0)),
        ("2", ("2", 1.0)),
        ("owner/name", ("owner/name", 1.0)),
        ("owner/name:0.5", ("owner/name", 0.5)),
        ("owner/name@v1", ("owner/name@v1", 1.0)),
        ("owner/name@v1:0.5", ("owner/name@v1", 0.5)),
        ("folder/:2", ("folder/", 2.0)),
        (r"C:\erasers\a.safetensors", (r"C:\erasers\a.safetensors", 1.0)),
        (r"C:\erasers\a.safetensors:0.5", (r"C:\erasers\a.safetensors", 0.5)),
        ("a:b:c", ("a:b:c", 1.0)),
        ("a.safetensors:", ("a.safetensors:", 1.0)),
    ],
)
def test_an_eraser_with_its_strength(text: str, expected: tuple[str, float]):
    assert parse_eraser(text) == expected


@pytest.mark.parametrize("text", ["a:-1", "a:2.01", "a:inf", "a:1e9"])
def test_a_strength_out_of_range(text: str):
    with pytest.raises(SettingsError, match="pass a strength from 0"):
        parse_eraser(text)


def test_generate_with_and_without_erasers(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    open_eraser().save(tmp_path / "vg.safetensors")
    open_eraser("Cats", "object", seed=1).save(tmp_path / "cat.safetensors")

    def draw(*more: str) -> tuple[np.ndarray, str]:
        out = tmp_path / "image.png"
        assert (
            main(["generate", "a cat", "--model", model, "--num-inference-steps", "2", "--out", str(out), *more]) == 0
        )
        with Image.open(out) as image:
            return np.asarray(image), capsys.readouterr().out

    plain, text = draw()
    assert plain.shape == (16, 16, 3) and "image.png: 'a cat', seed 0" in text
    other, _ = draw("--seed", "1")
    assert not np.array_equal(plain, other)
    both = [str(tmp_path / "vg.safetensors"), str(tmp_path / "cat.safetensors")]
    seen, text = draw("--erasers", *both, "--action", "detect")
    assert np.array_equal(seen, plain)
    assert "Van_Gogh: would have acted at 2 of 2 steps" in text and "Cats: would have acted" in text
    erased, text = draw("--erasers", *both)
    assert not np.array_equal(erased, plain) and "Van_Gogh: acted at 2 of 2 steps (t = " in text
    off, _ = draw("--erasers", *(f"{path}:0" for path in both))
    assert np.array_equal(off, plain)
