"""What judges are opened from, made small: a CLIP, UnlearnCanvas's two classifiers, NudeNet's package."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from helpers import pipelines
from neuraleraser.judges import NONE, nudenet, sentence
from neuraleraser.judges.unlearncanvas import Shape, layout

SMALL = Shape(width=24, depth=2, heads=3, patch=8, side=16)
BELLY, FEET = "BELLY_EXPOSED", "FEET_EXPOSED"


def small_clip(folder: Path, side: int = 16) -> str:
    """A random CLIP that sees `side` x `side` pixels and reads letters, as a checkpoint in `folder`."""
    torch.manual_seed(3)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": side,
        "patch_size": 8,
    }
    text = pipelines.clip_text(max_position_embeddings=64).to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    pipelines.tokenizer(64).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(
        folder
    )
    return str(folder)


def trained_clip(folder: Path, images: Mapping[str, NDArray[np.uint8]]) -> str:
    """A small CLIP that knows objects by heart: these images of each name. Those of no name are like none but the last.

    Seconds of training.
    """
    small_clip(folder, side=32)
    model: Any = CLIPModel.from_pretrained(folder)
    names = [name for name in images if name != NONE]
    texts = pipelines.tokenizer(64)([sentence(name, "object") for name in names], padding=True, return_tensors="pt")
    every = [image for some in images.values() for image in some]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(
        images=every, input_data_format="channels_last", return_tensors="pt"
    )["pixel_values"]
    shown = torch.tensor([names.index(name) if name in names else -1 for name, some in images.items() for _ in some])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        logits = model(**texts, pixel_values=pixels).logits_per_image
        loss = torch.nn.functional.cross_entropy(logits, shown % len(names))
        if loss.item() < 0.02:
            break
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.02
    model.save_pretrained(folder)
    return str(folder)


def random_weights(shape: Shape, outputs: int, seed: int = 0) -> dict[str, Tensor]:
    """Values in every tensor, biases and norms among them, so that none could be left out unseen."""
    g = torch.Generator().manual_seed(seed)
    spread = {name: 0.3 if len(size) == 1 else size[-1] ** -0.5 for name, size in layout(shape, outputs).items()}
    return {name: spread[name] * torch.randn(size, generator=g) for name, size in layout(shape, outputs).items()}


def small_classifier(path: Path, outputs: int, **beside: Any) -> Path:
    """A classifier of the `SMALL` shape in a file as the benchmark writes them."""
    torch.save({"model_state_dict": random_weights(SMALL, outputs, outputs), **beside}, path)
    return path


class Detector:
    """Finds a belly, as sure as the first pixel is red; feet, as sure as it is blue; and always a face."""

    def detect(self, image: np.ndarray) -> list[dict[str, Any]]:
        assert image.flags.c_contiguous and image.dtype == np.uint8
        blue, _, red = (image[0, 0] / 255).tolist()  # it is given BGR
        found = [(BELLY, red), (BELLY, red / 2), (FEET, blue), ("FACE_MALE", 0.99), ("NEW_CLASS", 0.99)]
        return [{"class": name, "score": score, "box": [0, 0, 1, 1]} for name, score in found if score > 0.25]


def install_detector(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put a package `nudenet` with `Detector` in place, its weights in `folder`."""
    (folder / "320n.onnx").write_bytes(b"weights")
    package = SimpleNamespace(NudeDetector=Detector, __file__=str(folder / "__init__.py"))
    monkeypatch.setitem(sys.modules, "nudenet", package)  # type: ignore[arg-type]
    monkeypatch.setattr(nudenet, "version", lambda name: "0")
