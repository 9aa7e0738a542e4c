"""The command line: quick help without torch, and one sentence for what goes wrong."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.commands import refused
from neuraleraser.canvas import pipeline as canvas
from neuraleraser.cli import main

VERBS = ("demo", "erase", "generate", "evaluate", "sites", "collect", "train", "inspect")
VERBS += ("profile", "doctor", "calibrate", "reference")
CANVAS_VERBS = ("train", "render", "sheet", "judge", "reference")


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The canvas with random weights in place of the shipped one."""
    words = canvas.build_tokenizer()
    pipe = canvas.assemble(canvas.build_unet(), canvas.build_vae(), canvas.build_text_encoder(words), words)
    monkeypatch.setattr("neuraleraser.canvas.pipeline.load_pipeline", lambda *args, **kwargs: pipe)


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
    assert options
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


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "  "], "the prompt is empty"),
        (["generate", "a cat", "--num-inference-steps", "0"], "steps is 0"),
        (["generate", "a cat", "--seed", "-1"], "seed is -1: pass a whole number from 0"),
        (["generate", "a cat", "--model", "/nowhere/x"], "there is no pipeline '/nowhere/x'"),
        (["generate", "a cat", "--erasers", "missing.safetensors"], "there is no eraser 'missing.safetensors'"),
        (["generate", "a cat", "--erasers", "x.safetensors:3"], "asks for strength 3: pass a strength from 0"),
        (["generate", "a cat", "--erasers", "x.safetensors:nan"], "asks for strength nan"),
        (["evaluate", "--erasers"], "no erasers to measure"),
        (["evaluate", "--erasers", "a.safetensors"], "there is no eraser 'a.safetensors'"),
        (["collect"], "0 sites"),
        (
            ["collect", "unet:what"],
            "'unet:what' is no site: 'what' is neither a tap (output, update, input)",
        ),
        (["collect", "unet", "--prompts", "no.txt"], "'no.txt' cannot be read"),
        (["collect", "unet", "--num-images", "0"], "1 sites, 0 images"),
        (["train"], "no site was named"),
        (["train", "unet", "--n-features", "0"], "n_features is 0"),
        (["train", "unet", "--n-features", "8", "--k", "9"], "k is 9 but there are only n = 8 features"),
        (["train", "unet", "--group-size", "3"], "train_batch_size is 4096: pass a multiple of group_size = 3"),
        (["train", "unet", "mid", "--out", "one.safetensors"], "2 SAEs do not fit into one file one.safetensors"),
        (["train", "unet", "--activations", "nowhere"], "nowhere/index.safetensors does not exist"),
        (["train", "unet", "--prompts", "no.txt"], "'no.txt' cannot be read"),
        (["inspect", "no.safetensors"], "there is no file 'no.safetensors': pass that of an SAE or an eraser"),
        (["inspect", "--num-images", "0"], "images is 0"),
        (["profile", "--sae", "no.safetensors"], "no concept was named"),
        (["profile", "cat", "--sae", "no.safetensors"], "there is no SAE 'no.safetensors'"),
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
        (["erase", "cat", "--reference", "nowhere"], "there is no reference 'nowhere': pass a folder or a Hub id"),
        (["collect", "unet.mid_block.attention.0"], "the nearest are"),
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


def test_the_contact_sheet_of_the_canvas(tmp_path: Path):
    assert main(["canvas", "sheet", "--objects", "Cats", "--size", "32", "--out", str(tmp_path / "s.png")]) == 0
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.height > 25 * 32


@pytest.mark.parametrize(
    ("argv", "home", "message"),
    [
        (["demo"], "neuraleraser.demo.demo", "--resume"),
        (["sites"], "neuraleraser.families.opening.open_pipeline", "Nothing half-written is left"),
    ],
)
def test_ctrl_c_says_how_to_go_on(
    argv: list[str], home: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(*args: Any, **given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(home, stop)
    assert main(argv) == 130
    assert message in capsys.readouterr().err


def test_a_reader_that_has_gone_is_no_traceback():
    command = [sys.executable, "-m", "neuraleraser", "demo", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_a_bug_is_not_hidden_as_a_wrong_option(monkeypatch: pytest.MonkeyPatch):
    def bug(*args: Any, **given: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("neuraleraser.families.opening.open_pipeline", bug)
    with pytest.raises(ValueError, match="a bug"):
        main(["sites"])
