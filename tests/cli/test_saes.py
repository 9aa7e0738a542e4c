"""The command line: from prompts to SAEs and their profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.commands import FEW, SAMPLING, refused
from helpers.erasers import GATE
from neuraleraser.activations import Shards
from neuraleraser.cli import main
from neuraleraser.errors import FileError
from neuraleraser.io import tensor_file
from neuraleraser.prompts import read_prompts
from neuraleraser.sae import SAE


def test_from_prompts_to_an_sae_and_its_profile(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\tCats, Fire\n\n a dog \n")
    assert read_prompts(prompts) == [("a cat", ("Cats", "Fire")), ("a dog", ())]
    kept, sae, out = tmp_path / "kept", tmp_path / "sae.safetensors", tmp_path / "profile.safetensors"
    drawn = ["--model", model, "--prompts", str(prompts)]
    collect = ["collect", GATE.path, *drawn, *SAMPLING, "--num-images", "3", "--vectors-per-image", "20"]
    assert main([*collect, "--out", str(kept)]) == 0
    assert "2 shards of 40 vectors at each of 1 sites" in capsys.readouterr().out
    shards = Shards.open(kept)
    assert shards.data["labels"] == ["Cats", "Fire"] and shards.load(0)[str(GATE)][0].shape == (40, 32)
    train = ["train", GATE.path, "--activations", str(kept), "--n-features", "64", *FEW, "--out", str(sae)]
    assert main(train) == 0
    header = SAE.load(sae).header
    assert header["site"] == str(GATE) and header["data"]["activations"] == shards.digest
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["kept", "prompts.txt", "sae.jsonl", "sae.safetensors"]
    assert "holds activations of" in refused(["train", "unet.mid_block", "--activations", str(kept), *FEW], capsys)
    assert "is larger than what a refill gives, 40" in refused([*train, "--train-batch-size", "4096"], capsys)
    argv = ["profile", "Van Gogh style", "--sae", str(sae), "--model", model, "--num-images", "2", "--top", "3"]
    assert main([*argv, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "SAeUron's share score" in text and len(text.splitlines()) == 1 + 5 + 2
    assert tensor_file.load(out, "profile")[1]["names"] == ["Van Gogh style", "no Van Gogh style"]


def test_several_saes_while_the_pipeline_draws(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Two sites, two widths, with labels; nothing but the SAEs and their logs is written."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\tCats\na dog\n")
    sites = [GATE.path, "unet.mid_block.attentions.0:update"]
    argv = [
        "train",
        *sites,
        "--model",
        model,
        "--prompts",
        "p.txt",
        "--n-features",
        "32",
        "--also-n-features",
        "64",
        *FEW,
    ]
    argv += [
        "--vectors-per-image",
        "16",
        "--buffer-chunks",
        "2",
        "--group-size",
        "4",
        "--binding-weight",
        "0.3",
        "--architecture",
        "matryoshka",
    ]
    assert main([*argv, "--out", "saes"]) == 0
    paths = sorted(p.name for p in Path("saes").iterdir())
    names = [f"{GATE.path}-{n}" for n in (32, 64)] + [f"unet.mid_block.attentions.0-update-image-{n}" for n in (32, 64)]
    assert paths == sorted(f"{name}.{end}" for name in names for end in ("jsonl", "safetensors"))
    sae = SAE.load(Path("saes") / f"{names[0]}.safetensors")
    assert sae.n_features == 32 and sae.header["labels"] == ["Cats"] and sae.header["settings"]["binding_weight"] == 0.3
    assert len((Path("saes") / f"{names[0]}.jsonl").read_text().splitlines()) == 6
    Path("p.txt").write_text("a cat\na dog\n")
    assert "no prompt says what it shows" in refused([*argv, "--out", "other"], capsys)
    assert not Path("other").exists()


def test_prompts_that_are_none(tmp_path: Path):
    path = tmp_path / "empty.txt"
    path.write_text("\n \n")
    with pytest.raises(FileError, match="holds no prompts"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="cannot be read"):
        read_prompts(path)
