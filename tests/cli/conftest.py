"""A folder as the command line finds it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from helpers.erasers import GATE, open_eraser
from neuraleraser.sae import SAE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: an eraser, an SAE, prompts, and things that are in the way."""
    monkeypatch.chdir(tmp_path)
    open_eraser().save("vg.safetensors")
    rows = torch.cat([torch.eye(32), -torch.eye(32)])
    sae = SAE(rows, torch.zeros(64), rows, torch.zeros(32), torch.zeros(64), {"site": str(GATE)})
    sae.save("sae.safetensors")
    Path("p.txt").write_text("a cat\na dog\n")
    Path("file").write_text("mine")
    Path("dir").mkdir()
    sae.save("dir/sae.safetensors")
    os.mkfifo("pipe")
    return tmp_path
