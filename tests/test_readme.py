"""The code of README, and of the service page where it needs no download, runs as it stands."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.erasers import open_eraser
from neuraleraser import cli, disable_erasers, eraser_trace
from neuraleraser.eraser import Eraser
from neuraleraser.families.canvas import REFERENCE
from neuraleraser.fitting import Reference, fit, from_phrase
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import Site

ROOT = Path(__file__).parents[1]


def blocks(language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def commands() -> list[list[str]]:
    """What follows `neuraleraser` on the README's command lines, comments aside."""
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [words[1:] for words in lines if words and words[0] == "neuraleraser"]


def small_fit(pipe: Any, concept: Any, settings: Any, progress: Any, *, reference: Any, sampling: Sampling) -> Eraser:
    """A fit of seconds: as the real one, of fewer pictures and steps."""
    few = FitSettings(num_pictures=0, num_pairs=6, num_context_pairs=0, steps=2)
    return fit(pipe, concept, few, progress, reference=reference, sampling=replace(sampling, num_inference_steps=6))


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(from_phrase, "fit", small_fit)
    make_eraser().save(tmp_path / "van-gogh.safetensors")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    images = names["images"]
    assert getattr(images, "shape", None) == (1, 64, 64, 3)
    # The first image, in which the eraser acted.
    assert capsys.readouterr().out.startswith("{0: {'Van_Gogh': [")


def test_service_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_eraser().save(tmp_path / "van-gogh.safetensors")
    make_eraser("Cats", seed=1).save(tmp_path / "cats.safetensors")
    monkeypatch.chdir(tmp_path)
    handler, *further = blocks("python", "docs/how-to/service.md")[:3]
    names: dict[str, Any] = {}
    exec(compile(handler, "service.md", "exec"), names)
    status, answer, record = names["handle"]("a cat in Van Gogh style", 3)
    assert (status, answer) == (451, "refused, as the prompt asks for: van-gogh, cats")
    assert {fired["eraser"] for fired in json.loads(record)["fired"]} == {"van-gogh", "cats"}
    disable_erasers(names["pipe"])
    status, answer, record = names["handle"]("a cat in Van Gogh style", 3)
    assert status == 200 and answer.size == (64, 64)
    assert json.loads(record)["image"] == 1 and not eraser_trace(names["pipe"]).records()
    for block in further:
        exec(compile(block, "service.md", "exec"), names)
    refused, record = capsys.readouterr().out.strip().splitlines()
    assert refused == "{0: ['van-gogh']}"
    assert json.loads(record)["fired"][0]["action"] == "refuse"


@pytest.mark.filterwarnings("default::neuraleraser.errors.UnseenRouteWarning")  # its eraser has no image gate
def test_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_eraser().save(tmp_path / "van-gogh.safetensors")
    drawn = [words for words in commands() if words[0] == "generate"]
    assert len(drawn) == 3
    for words in drawn:
        assert cli.main(words) == 0
    before, after, redrawn = (
        Image.open(tmp_path / name).tobytes() for name in ("before.png", "after.png", "redrawn.png")
    )
    assert len({before, after, redrawn}) == 3


@pytest.mark.slow
def test_every_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # Whole, `evaluate` draws some 2,000 pictures, which is most of an hour.
    rounds = ("two-object-rounds", "held-out-rounds", "start-image-rounds", "fragment-prompts", "idle-checks")
    few = [word for name in (*rounds, "held-out-grid-rounds", "unhooked-checks") for word in (f"--{name}", "0")]
    few += "--grid-rounds 1 --target-rounds 1 --timings 1 --styles Van_Gogh Cartoon --objects Cats Dogs".split()
    for words in commands():
        if words == ["--help"]:
            continue
        assert cli.main(words + (few if words[0] == "evaluate" else [])) == 0, words
    assert (tmp_path / "runs" / "van-gogh" / "report.html").exists()


def make_eraser(name: str = "Van_Gogh", seed: int = 0) -> Eraser:
    """For the canvas: always open, with a random correction."""
    known = Reference.load(REFERENCE)
    read = Site("unet.up_blocks.2.attentions.1", "input", "text")
    return open_eraser(name, seed=seed, gate=(known.site, known.sae.d_in), edit=(read, 128))
