"""The command line: quick help without torch, one sentence for what goes wrong, and the verbs on a tiny pipeline."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from erasers import GATE, open_eraser
from neuraleraser.activations import Shards
from neuraleraser.canvas import pipeline as canvas
from neuraleraser.cli import main
from neuraleraser.cli.erasing import parse_eraser
from neuraleraser.cli.prompts import read_prompts
from neuraleraser.errors import FileError, SettingsError
from neuraleraser.io import artifact
from neuraleraser.sae import SAE

VERBS = ("demo", "erase", "generate", "evaluate", "sites", "collect", "train", "inspect")
VERBS += ("profile", "doctor", "calibrate", "dictionary")
CANVAS_VERBS = ("train", "render", "sheet", "judge", "dictionary")


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canvas with random weights in place of the shipped one."""
    words = canvas.build_tokenizer()
    pipe = canvas.assemble(canvas.build_unet(), canvas.build_vae(), canvas.build_text_encoder(words), words)
    monkeypatch.setattr("neuraleraser.models.load_pipeline", lambda *args, **kwargs: pipe)


def test_help_is_quick_and_loads_nothing_heavy():
    code = (
        "import sys, time\nfrom neuraleraser.cli import main\n"
        "try: main(['erase', '--help'])\nexcept SystemExit as e: assert e.code == 0\n"
        "print(sorted({'torch', 'numpy', 'diffusers', 'PIL', 'pyarrow'} & sys.modules.keys()), time.process_time())"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, last = done.stdout.splitlines()
    loaded, seconds = last.rsplit(" ", 1)
    assert loaded == "[]"
    assert float(seconds) < 0.6, f"{seconds} s of processor time, {time.monotonic() - started:.1f} s in all"


@pytest.mark.parametrize("argv", [[v] for v in VERBS] + [["canvas", v] for v in CANVAS_VERBS])
def test_every_option_of_every_verb_says_what_it_is(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main([*argv, "--help"])
    assert caught.value.code == 0
    text = re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out)
    options = re.split(r"\n\s+(?=--\w)", text)[1:]
    assert options or argv == ["sites"]
    for option in options:
        # What remains once the flags, the type and the default are taken away is the sentence about it.
        rest = re.sub(r"--[\w.-]+,?|\(default:.*?\)|\(required\)|[A-Z{}\[\]|.,]+|None", " ", option, flags=re.S)
        assert len(rest.split()) >= 2, option


@pytest.mark.parametrize("argv", [[], ["erays"], ["generate"], ["generate", "a", "--seed", "x"], ["demo", "--nope"]])
def test_wrong_options_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run what is wrong: exit code 2, one line on stderr, returned."""
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("neuraleraser: "), error
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "  "], "the prompt is empty"),
        (["generate", "a cat", "--steps", "0"], "steps is 0"),
        (["generate", "a cat", "--seed", "-1"], "seed is -1: pass a whole number from 0"),
        (["generate", "a cat", "--model", "/nowhere/x"], "there is no pipeline '/nowhere/x'"),
        (["generate", "a cat", "--eraser", "missing.safetensors"], "there is no eraser 'missing.safetensors'"),
        (["generate", "a cat", "--eraser", "x.safetensors:3"], "asks for strength 3: pass a strength from 0"),
        (["generate", "a cat", "--eraser", "x.safetensors:nan"], "asks for strength nan"),
        (["evaluate", "--erasers"], "no erasers to measure"),
        (["evaluate", "--erasers", "a.safetensors"], "there is no eraser 'a.safetensors'"),
        (["collect", "--sites"], "0 sites"),
        (["collect", "--sites", "unet:what"], "'unet:what' is no site"),
        (["collect", "--sites", "unet", "--prompts", "no.txt"], "'no.txt' cannot be read"),
        (["collect", "--sites", "unet", "--images", "0"], "1 sites, 0 images"),
        (["train"], "0 sites, 1 widths"),
        (["train", "unet", "--features"], "1 sites, 0 widths"),
        (["train", "unet", "--features", "8", "--active", "9"], "k is 9 but there are only n = 8 features"),
        (["train", "unet", "--per-map", "3"], "batch is 4096: pass a multiple of per_map = 3"),
        (["train", "unet", "mid", "--out", "one.safetensors"], "2 SAEs do not fit into one file one.safetensors"),
        (["train", "unet", "--activations", "nowhere"], "nowhere/index.safetensors does not exist"),
        (["train", "unet", "--prompts", "no.txt"], "'no.txt' cannot be read"),
        (["inspect", "no.safetensors"], "no.safetensors does not exist"),
        (["inspect", "--images", "0"], "images is 0"),
        (["profile", "--sae", "no.safetensors"], "no concept was named"),
        (["profile", "cat", "--sae", "no.safetensors"], "no.safetensors does not exist"),
        (["canvas", "sheet", "--objects", "Unicorns"], "pass objects of Architectures"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(argv, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["erase", ""], "the concept is an empty phrase"),
        (["erase", "a unicorn"], "no concept 'a unicorn'"),
        (["erase", "Van Gog style"], "Did you mean Van_Gogh"),
        (["erase", "missing.json"], "missing.json is no readable JSON"),
        (["erase", "cat", "--dictionary", "nowhere"], "sae.safetensors does not exist"),
        (["collect", "--sites", "unet.mid_block.attention.0"], "the nearest are"),
    ],
)
def test_what_the_canvas_cannot_do_is_one_sentence(
    argv: list[str],
    message: str,
    untrained: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert message in refused(argv, capsys)
    assert not list(tmp_path.iterdir())


def test_a_model_without_a_dictionary_gets_its_own(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    argv = [
        "erase",
        "a d",
        "--model",
        model,
        "--neighbours",
        "a b",
        "--images",
        "10",
        "--pairs",
        "2",
        "--beside",
        "1",
        "--steps",
        "2",
        "--rank",
        "1",
        "--batch",
        "2",
    ]
    argv += ["--sampling-steps", "2", "--pairs", "4", "--images-at-once", "2"]
    assert main(argv) == 0
    first = capsys.readouterr()
    assert f"Making a dictionary for {model} at unet." in first.out
    assert "15 of its own images, of a d and a b." in first.out
    from neuraleraser import Eraser

    made = Eraser.load(Path("a-d.safetensors"))
    assert made.header["sampling"]["steps"] == 2 and made.header["sampling"]["batch"] == 2
    (folder,) = Path("runs/dictionaries").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["background.safetensors", "sae.safetensors"]
    assert main(argv) == 0  # the second time it is there
    assert "Making a dictionary" not in capsys.readouterr().out
    assert "images is 3: pass a whole number from 5" in refused([*argv[:4], "--images", "3"], capsys)


def test_a_published_dictionary_out_of_reach_is_said_and_replaced(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import huggingface_hub

    from neuraleraser.fit import published as table
    from neuraleraser.models import default_gate_site, open_pipeline

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    theirs = replace(table.PUBLISHED[0], models=(model,), site=default_gate_site(open_pipeline(model), "object"))
    monkeypatch.setattr(table, "PUBLISHED", (theirs,))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    argv = [
        "erase",
        "a d",
        "--model",
        model,
        "--neighbours",
        "a b",
        "--images",
        "10",
        "--pairs",
        "2",
        "--beside",
        "1",
        "--steps",
        "2",
        "--rank",
        "1",
        "--batch",
        "2",
    ]
    assert main([*argv, "--sampling-steps", "2", "--pairs", "4", "--images-at-once", "2"]) == 0
    out = capsys.readouterr().out
    assert "is published: bcywinski/SAeUron_coco" in out
    assert "could not be fetched from the Hub: no network." in out and "Making a dictionary" in out


def test_an_eraser_of_another_width_is_refused(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    e = open_eraser()
    gate = replace(e.gate, rows=e.gate.rows.repeat(1, 2))
    replace(e, gate=gate).save(tmp_path / "wide.safetensors")
    argv = ["generate", "a", "--model", model, "--eraser", str(tmp_path / "wide.safetensors"), "--steps", "1"]
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
        assert main(["generate", "a cat", "--model", model, "--steps", "2", "--out", str(out), *more]) == 0
        with Image.open(out) as image:
            return np.asarray(image), capsys.readouterr().out

    plain, text = draw()
    assert plain.shape == (16, 16, 3) and "image.png: 'a cat', seed 0" in text
    other, _ = draw("--seed", "1")
    assert not np.array_equal(plain, other)
    both = [str(tmp_path / "vg.safetensors"), str(tmp_path / "cat.safetensors")]
    seen, text = draw("--eraser", *both, "--action", "detect")
    assert np.array_equal(seen, plain)
    assert "Van_Gogh: would have acted at 2 of 2 steps" in text and "Cats: would have acted" in text
    erased, text = draw("--eraser", *both)
    assert not np.array_equal(erased, plain) and "Van_Gogh: acted at 2 of 2 steps (t = " in text
    off, _ = draw("--eraser", *(f"{path}:0" for path in both))
    assert np.array_equal(off, plain)


def test_sites_lists_blocks_with_their_shapes(model: str, capsys: pytest.CaptureFixture[str]):
    assert main(["sites", model]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == "site what positions width blocks after it known good".split()
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert rows["unet.down_blocks.0.attentions.0"].split() == ["block", "64", "16", "6"]
    cross = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    assert rows[cross].split() == ["cross-attention", "64", "16", "0"]
    assert rows["text_encoder.encoder.layers.1"].split() == ["text", "encoder", "8", "16", "7"]
    assert "objects: SAeUron (arXiv 2501.18052)" in rows["unet.up_blocks.1.attentions.1"]


SAMPLING = ["--sampling-steps", "2", "--images-at-once", "2"]
FEW = ["--active", "4", "--steps", "6", "--batch", "16", *SAMPLING]


def test_from_prompts_to_an_sae_and_its_profile(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\tCats, Fire\n\n a dog \n")
    assert read_prompts(prompts) == [("a cat", ("Cats", "Fire")), ("a dog", ())]
    kept, sae, out = tmp_path / "kept", tmp_path / "sae.safetensors", tmp_path / "profile.safetensors"
    drawn = ["--model", model, "--prompts", str(prompts)]
    collect = ["collect", "--sites", GATE.path, *drawn, *SAMPLING, "--images", "3", "--per-image", "20"]
    assert main([*collect, "--out", str(kept)]) == 0
    assert "2 shards of 40 vectors at each of 1 sites" in capsys.readouterr().out
    shards = Shards.open(kept)
    assert shards.data["labels"] == ["Cats", "Fire"] and shards.load(0)[str(GATE)][0].shape == (40, 32)
    train = ["train", GATE.path, "--activations", str(kept), "--features", "64", *FEW, "--out", str(sae)]
    assert main(train) == 0
    header = SAE.load(sae).header
    assert header["site"] == str(GATE) and header["data"]["activations"] == shards.digest
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["kept", "prompts.txt", "sae.jsonl", "sae.safetensors"]
    assert "holds activations of" in refused(["train", "unet.mid_block", "--activations", str(kept), *FEW], capsys)
    assert "is larger than what a refill gives, 40" in refused([*train, "--batch", "4096"], capsys)
    argv = ["profile", "Van Gogh style", "--sae", str(sae), "--model", model, "--images", "2", "--top", "3"]
    assert main([*argv, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "SAeUron's share score" in text and len(text.splitlines()) == 1 + 4 + 2
    assert artifact.load(out, "profile")[1]["names"] == ["Van Gogh style", "no Van Gogh style"]


def test_several_saes_while_the_pipeline_draws(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Two sites, two widths, with labels; nothing but the SAEs and their logs is written."""
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\tCats\na dog\n")
    sites = [GATE.path, "unet.mid_block.attentions.0:update"]
    argv = ["train", *sites, "--model", model, "--prompts", "p.txt", "--features", "32", "64", *FEW]
    argv += ["--per-image", "16", "--window", "2", "--per-map", "4", "--bind", "0.3", "--architecture", "matryoshka"]
    assert main([*argv, "--out", "saes"]) == 0
    paths = sorted(p.name for p in Path("saes").iterdir())
    names = [f"{GATE.path}-{n}" for n in (32, 64)] + [f"unet.mid_block.attentions.0-update-image-{n}" for n in (32, 64)]
    assert paths == sorted(f"{name}.{end}" for name in names for end in ("jsonl", "safetensors"))
    sae = SAE.load(Path("saes") / f"{names[0]}.safetensors")
    assert sae.n == 32 and sae.header["labels"] == ["Cats"] and sae.header["settings"]["bind"] == 0.3
    assert len((Path("saes") / f"{names[0]}.jsonl").read_text().splitlines()) == 6
    Path("p.txt").write_text("a cat\na dog\n")
    assert "says of no prompt what it shows" in refused([*argv, "--out", "other"], capsys)
    assert not Path("other").exists()


def test_inspect(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("a cat\na dog\n")
    rows = torch.cat([torch.eye(32), -torch.eye(32)])
    SAE(rows, torch.zeros(64), rows, torch.zeros(32), torch.zeros(64), {"site": str(GATE)}).save("sae.safetensors")
    assert main(["inspect", "sae.safetensors"]) == 0
    assert "The file holds no measures, or none that can be read.\n\nPass --model" in capsys.readouterr().out
    argv = ["inspect", "sae.safetensors", "--model", model, "--prompts", "p.txt", "--images", "2", "--times", "2"]
    assert main([*argv, "--per-image", "20", "--sampling-steps", "2", "--sheet", "s.png"]) == 0
    text = capsys.readouterr().out
    assert "Measured on 2 images, 40 vectors" in text and "variance explained  100.00%" in re.sub(" {3,}", "  ", text)
    bar = [line for line in text.splitlines() if "█" in line]
    assert bar and max(map(len, text.splitlines())) <= 120
    kept = text[text.index("timestep") :].splitlines()
    assert kept[0].split()[-1] == "kept" and len(kept[1].split()) == 7
    with Image.open("s.png") as sheet:
        assert sheet.width > 2 * 16
    wrong = ["--site", "unet.up_blocks.1.attentions.0", "--sampling-steps", "1"]
    assert "sae.safetensors: field W_enc takes activations 32 wide" in refused([*argv, *wrong], capsys)


def test_inspect_shows_what_the_shipped_file_says(capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(canvas.WEIGHTS / "dictionary")]) == 0
    text = capsys.readouterr().out
    sae = SAE.load(canvas.WEIGHTS / "dictionary" / "sae.safetensors")
    figures = sae.header["measures"]
    assert f"{figures['explained_variance']:.2%}" in text and "Measured when it was made" in text
    bars = dict(re.findall(r"^ *(never|[\d.]+ to [\d.]+) +([\d,]+)", text, re.M))
    assert sum(int(count.replace(",", "")) for count in bars.values()) == sae.n


def test_prompts_that_are_none(tmp_path: Path):
    path = tmp_path / "empty.txt"
    path.write_text("\n \n")
    with pytest.raises(FileError, match="holds no prompts"):
        read_prompts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FileError, match="cannot be read"):
        read_prompts(path)


def test_the_contact_sheet_of_the_canvas(tmp_path: Path):
    assert main(["canvas", "sheet", "--objects", "Cats", "--size", "32", "--out", str(tmp_path / "s.png")]) == 0
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.height > 25 * 32


@pytest.mark.parametrize(
    ("argv", "home", "message"),
    [
        (["demo"], "neuraleraser.demo.demo", "--resume"),
        (["sites"], "neuraleraser.models.open_pipeline", "Nothing half-written is left"),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    argv: list[str], home: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(home, stop)
    assert main(argv) == 130
    assert message in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_traceback():
    command = [sys.executable, "-m", "neuraleraser.cli", "demo", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_a_bug_is_not_hidden_as_a_wrong_option(monkeypatch: pytest.MonkeyPatch):
    def bug(*args: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("neuraleraser.models.open_pipeline", bug)
    with pytest.raises(ValueError, match="a bug"):
        main(["sites"])
