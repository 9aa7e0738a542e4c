"""What judges are made of, made small: CLIP, UnlearnCanvas's two classifiers, NudeNet's package."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
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
from neuraleraser.judges import clip_sentence, nudenet
from neuraleraser.judges.unlearncanvas import Shape, tensor_shapes

SMALL = Shape(width=24, depth=2, heads=3, patch=8, side=16)
CLIP_SIDE = 16
BELLY, FEET = "BELLY_EXPOSED", "FEET_EXPOSED"


def small_clip(folder: Path) -> Path:
    """A small random CLIP in a folder."""
    torch.manual_seed(3)
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": CLIP_SIDE,
        "patch_size": 8,
    }
    text = pipelines.clip_text(max_position_embeddings=64).to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    pipelines.tokenizer(64).save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": CLIP_SIDE}, crop_size={"height": CLIP_SIDE, "width": CLIP_SIDE}
    ).save_pretrained(folder)
    return folder


class ClipByHeart:
    """A CLIP that knows these images by heart: each is like the sentence of its own name, and like no other."""

    def __init__(self, kind: str, images: Mapping[str, Sequence[NDArray[np.uint8]]]) -> None:
        self.said = {image.tobytes(): clip_sentence(name, kind) for name, some in images.items() for image in some}

    def __call__(self, images: NDArray[np.uint8], texts: Sequence[str]) -> NDArray[np.float64]:
        return np.array([[10.0 * (self.said[image.tobytes()] == text) for text in texts] for image in images])


def random_weights(shape: Shape, outputs: int, seed: int = 0) -> dict[str, Tensor]:
    """Values in every tensor, biases and norms among them, so that none could be left out unseen."""
    g = torch.Generator().manual_seed(seed)
    spread = {name: 0.3 if len(size) == 1 else size[-1] ** -0.5 for name, size in tensor_shapes(shape, outputs).items()}
    return {name: spread[name] * torch.randn(size, generator=g) for name, size in tensor_shapes(shape, outputs).items()}


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
