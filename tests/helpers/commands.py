"""Command lines that are refused or say what they did, and options for short runs."""

from __future__ import annotations

import pytest

from neuraleraser.cli import main


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run what is wrong: exit code 2, one line on stderr, returned."""
    capsys.readouterr()
    assert main(argv) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("neuraleraser: "), error
    return lines[0]


SAMPLING = ["--num-inference-steps", "2", "--batch-size", "2"]
FEW = ["--k", "4", "--steps", "6", "--train-batch-size", "16", *SAMPLING]


def said(model: str, capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """Run `generate` on a prompt: the lines that it prints before the last."""
    capsys.readouterr()
    assert main(["generate", "a cat", "--model", model, "--num-inference-steps", "2", "--out", "o.png", *argv]) == 0
    return capsys.readouterr().out.splitlines()[:-1]


def short_erase(concept: str, model: str) -> list[str]:
    """Options of an `erase` of seconds, beside one neighbour."""
    fit = ["--num-pairs", "4", "--num-context-pairs", "1", "--steps", "2", "--rank", "1"]
    images = ["--num-images", "10", "--num-pictures", "8"]
    return ["erase", concept, "--model", model, "--neighbours", "a b", *images, *fit, *SAMPLING]
