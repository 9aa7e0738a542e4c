"""The command line: sites of a model, and what files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import pipelines
from helpers.commands import refused
from helpers.erasers import GATE, make_eraser, with_picture
from helpers.sae_files import WRITTEN, batch, sae
from neuraleraser.canvas import pipeline as canvas
from neuraleraser.cli import main
from neuraleraser.sae import SAE, formats


def test_sites_lists_blocks_with_their_shapes(model: str, capsys: pytest.CaptureFixture[str]):
    assert main(["sites", model]) == 0
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == "site what positions width blocks after it known good".split()
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert rows["unet.down_blocks.0.attentions.0"].split() == ["block", "64", "16", "6"]
    cross = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    assert rows[cross].split() == ["cross-attention", "64", "16", "0"]
    assert rows["text_encoder.encoder.layers.1"].split() == ["text", "encoder", "8", "16", "7"]
    assert "objects: SAeUron (arXiv 2501.18052)" in rows["unet.up_blocks.1.attentions.1"]


def test_inspect(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\na dog\n")
    rows = torch.cat([torch.eye(32), -torch.eye(32)])
    SAE(rows, torch.zeros(64), rows, torch.zeros(32), torch.zeros(64), {"site": str(GATE)}).save("sae.safetensors")
    assert main(["inspect", "sae.safetensors"]) == 0
    assert "The file holds no measures, or none that can be read.\n\nPass --model" in capsys.readouterr().out
    argv = [
        "inspect",
        "sae.safetensors",
        "--model",
        model,
        "--prompts",
        "p.txt",
        "--num-images",
        "2",
        "--num-timesteps",
        "2",
    ]
    assert main([*argv, "--vectors-per-image", "20", "--num-inference-steps", "2", "--comparison-png", "s.png"]) == 0
    text = capsys.readouterr().out
    assert "Measured on 2 images, 40 vectors" in text and "variance explained  100.00%" in re.sub(" {3,}", "  ", text)
    bar = [line for line in text.splitlines() if "█" in line]
    assert bar and max(map(len, text.splitlines())) <= 120
    lines = text[text.index("timestep") :].splitlines()
    assert lines[0].split()[-1] == "recovered" and len(lines[2].split()) == 7
    with Image.open("s.png") as sheet:
        assert sheet.width > 2 * 16
    wrong = ["--site", "unet.up_blocks.1.attentions.0", "--num-inference-steps", "1"]
    assert "sae.safetensors: field W_enc takes activations 32 wide" in refused([*argv, *wrong], capsys)


def test_inspect_shows_what_the_shipped_file_says(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(canvas.WEIGHTS / "reference")]) == 0
    text = capsys.readouterr().out
    sae = SAE.load(canvas.WEIGHTS / "reference" / "sae.safetensors")
    figures = sae.header["measures"]
    assert f"{figures['explained_variance']:.2%}" in text and "Measured when it was made" in text
    bars = dict(re.findall(r"^ *(never|[\d.]+ to [\d.]+) +([\d,]+)", text, re.M))
    assert sum(int(count.replace(",", "")) for count in bars.values()) == sae.n_features


def test_inspect_shows_what_an_eraser_sees(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    eraser = with_picture(make_eraser(), pipelines.stable_diffusion(), window=3)
    eraser.save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "eraser.safetensors"
    for source in (file, tmp_path / "folder"):
        assert main(["inspect", str(source)]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"eraser {file}" in text and "concept Cats (object)" in text and "windows of 3 x 3 positions" in text
        assert "guided correction from 'a' to 'b', weight 0.5" in text and "two more forwards" in text
        assert f"correction low_rank, at {eraser.corrections[0].site}" in text
        assert "They are not made to see what comes in by a start image" in text  # as its header says
    for option in (["--model", "canvas"], ["--num-images", "3"], ["--num-inference-steps", "3"]):
        assert "is an eraser, of which only its file is read" in refused(["inspect", str(file), *option], capsys)


@pytest.mark.parametrize("to", WRITTEN)
def test_convert(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("own").mkdir()
    before = sae()
    before.save("own/sae.safetensors")
    assert main(["convert", "own/sae.safetensors", "theirs", "--to", to]) == 0
    assert capsys.readouterr().out == "theirs\n"
    after = formats.read("theirs")
    assert after.header == before.header and bool(((after.encode(batch()) > 0) == (before.encode(batch()) > 0)).all())
    kept = Path("own/sae.safetensors").read_bytes()
    assert "is the SAE's own folder" in refused(["convert", "own/sae.safetensors", "./own", "--to", to], capsys)
    assert Path("own/sae.safetensors").read_bytes() == kept and len(list(Path("own").iterdir())) == 1


def test_convert_says_what_it_can_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sae().save(tmp_path / "sae.safetensors")
    said = refused(["convert", str(tmp_path / "sae.safetensors"), str(tmp_path / "out"), "--to", "gemma-scope"], capsys)
    assert "can be written as saelens, sparsify, saeuron" in said and not (tmp_path / "out").exists()
