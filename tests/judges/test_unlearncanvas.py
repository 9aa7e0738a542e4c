"""UnlearnCanvas's judge, through small random classifiers in files, and against a ViT that is written out."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from helpers.small_judges import SMALL, random_weights, small_classifier
from neuraleraser.errors import DataError, FileError
from neuraleraser.evaluation import metrics
from neuraleraser.evaluation.results import Results, Row
from neuraleraser.judges import (
    UNLEARNCANVAS_OBJECTS,
    UNLEARNCANVAS_STYLES,
    JudgeSpec,
    UnlearnCanvasJudge,
    unlearncanvas,
)
from neuraleraser.judges.unlearncanvas import VIT_LARGE, Shape, Vit, prepare_images, tensor_shapes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unlearncanvas, "VIT_LARGE", SMALL)


@pytest.fixture
def judge(small: None, tmp_path: Path) -> UnlearnCanvasJudge:
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-5, "betas": (0.9, 0.999)}]}
    style = small_classifier(tmp_path / "style50.pth", 51, epoch=4, optimizer_state_dict=optimizer)
    return UnlearnCanvasJudge.load(style, small_classifier(tmp_path / "style50_cls.pth", 20))


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 40, 24, 3)).astype(np.uint8)


def written_out(w: dict[str, Tensor], shape: Shape, pixels: Tensor) -> Tensor:
    """The logits [N, outputs] of pixels [N, 3, side, side], written out in float64, one head of one image at a time."""
    w, size = {name: x.double() for name, x in w.items()}, shape.width // shape.heads

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        off = x - x.mean(1, keepdim=True)
        return off / (off.square().mean(1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    logits = []
    for image in pixels.double():
        patches = [
            image[:, i : i + shape.patch, j : j + shape.patch].flatten()
            for i in range(0, shape.side, shape.patch)
            for j in range(0, shape.side, shape.patch)
        ]
        x = torch.cat([w["cls_token"][0], linear(torch.stack(patches), "patch_embed.proj")]) + w["pos_embed"][0]
        for block in (f"blocks.{i}" for i in range(shape.depth)):
            q, k, v = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").split(shape.width, 1)
            heads = [slice(i * size, (i + 1) * size) for i in range(shape.heads)]
            seen = [((q[:, h] @ k[:, h].T) / size**0.5).softmax(1) @ v[:, h] for h in heads]
            x = x + linear(torch.cat(seen, 1), f"{block}.attn.proj")
            hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            x = x + linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, f"{block}.mlp.fc2")
        logits.append(linear(norm(x, "norm"), "head")[0])
    return torch.stack(logits)


def logits(weights: dict[str, Tensor], shape: Shape, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return Vit(weights, shape, "cpu").model(pixels).logits


def test_it_computes_what_timms_names_say() -> None:
    weights, pixels = random_weights(SMALL, 20), torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    got = logits(weights, SMALL, pixels)
    torch.testing.assert_close(got, written_out(weights, SMALL, pixels).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(tensor_shapes(SMALL, 20)))
def test_every_tensor_of_the_file_is_in_its_place(name: str) -> None:
    """Changed in the file, each changes the logits as the formula says."""
    weights, pixels = random_weights(SMALL, 20), torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    changed = weights | {name: weights[name].flip(-1)}
    move = logits(changed, SMALL, pixels) - logits(weights, SMALL, pixels)
    want = written_out(changed, SMALL, pixels) - written_out(weights, SMALL, pixels)
    torch.testing.assert_close(move, want.float(), atol=1e-4, rtol=1e-4)
    assert float(want.abs().max()) > 1e-3


@pytest.mark.slow
def test_it_computes_what_timm_computes_from_the_same_names_at_full_size():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm = pytest.importorskip("timm", exc_type=ImportError)
    other = timm.create_model("vit_large_patch16_224.augreg_in21k", pretrained=False, num_classes=51).eval()
    state = other.state_dict()
    assert {name: tuple(x.shape) for name, x in state.items()} == tensor_shapes(VIT_LARGE, 51)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(logits(state, VIT_LARGE, pixels), other(pixels), atol=1e-4, rtol=1e-4)


def test_the_full_size_is_that_of_a_large_vit():
    sizes = tensor_shapes(VIT_LARGE, 51)
    assert len(sizes) == 296
    assert sum(int(np.prod(size)) for size in sizes.values()) == 303_301_632 + 51 * 1025


def test_labels_are_in_the_benchmarks_order():
    assert len(UNLEARNCANVAS_STYLES) == len(set(UNLEARNCANVAS_STYLES)) == 51
    assert UNLEARNCANVAS_STYLES == tuple(sorted(UNLEARNCANVAS_STYLES))
    places = {"Abstractionism": 0, "Rust": 37, "Seed_Images": 38, "Sketch": 39, "Winter": 50}
    assert {name: UNLEARNCANVAS_STYLES.index(name) for name in places} == places
    assert len(UNLEARNCANVAS_OBJECTS) == 20 and UNLEARNCANVAS_OBJECTS == tuple(sorted(UNLEARNCANVAS_OBJECTS))


def test_both_are_softmaxes_over_the_benchmarks_names(judge: UnlearnCanvasJudge, images: np.ndarray):
    seen = judge(images)
    assert seen.p_style.shape == (20, 51) and seen.p_object.shape == (20, 20) and seen.artefact is None
    assert {x.dtype for x in (seen.p_style, seen.p_object)} == {np.dtype(np.float32)}
    for p in (seen.p_style, seen.p_object):
        np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert (judge.styles, judge.objects) == (UNLEARNCANVAS_STYLES, UNLEARNCANVAS_OBJECTS)
    assert judge.artefact_threshold is None and judge.figures == {}
    own = Vit(random_weights(SMALL, 20, 20), SMALL, "cpu")  # each file went to its own head
    np.testing.assert_array_equal(own(images), seen.p_object)


def test_an_object_is_read_when_it_is_the_most_probable(judge: UnlearnCanvasJudge, images: np.ndarray):
    seen = judge(images)
    p = np.concatenate([seen.p_object, np.full((1, 20), 0.05, np.float32)])
    p[-1, 7] += np.float32(1e-6)  # hardly more than by chance, and still the answer
    asked = [UNLEARNCANVAS_OBJECTS[i % 20] for i in range(len(p))]
    asked[-1] = UNLEARNCANVAS_OBJECTS[7]
    rows = [
        Row(method="base", prompt="x", seed=i, cell_objects=(o,), p_style=seen.p_style[0], p_object=q)
        for i, (o, q) in enumerate(zip(asked, p, strict=True))
    ]
    table = Results.of(JudgeSpec.of(judge), rows)
    np.testing.assert_array_equal(metrics.classes_right(table, "object").sum(1), 1)
    np.testing.assert_array_equal(metrics.classes_right(table, "object").argmax(1), p.argmax(1))


def test_images_are_resized_as_pillow_does_and_scaled(images: np.ndarray):
    pixels = prepare_images(images[:2], 16)
    want = np.asarray(Image.fromarray(images[1]).resize((16, 16), Image.Resampling.BILINEAR)) / 127.5 - 1
    np.testing.assert_allclose(pixels[1].permute(1, 2, 0).numpy(), want, atol=1e-6)
    same = prepare_images(images[:1, :16, :16], 16)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose((same + 1) * 127.5, images[0, :16, :16], atol=1e-4)


def test_batches_and_neighbours_change_nothing(judge: UnlearnCanvasJudge, images: np.ndarray):
    together = judge(images)  # one full batch, one short
    alone = np.concatenate([judge(images[i : i + 3]).p_style for i in range(0, 20, 3)])
    np.testing.assert_allclose(together.p_style, alone, atol=1e-5)
    assert [p.shape for p in (judge(images[:0]).p_style, judge(images[:0]).p_object)] == [(0, 51), (0, 20)]
    mine = images[:2].copy()
    mine.setflags(write=False)
    judge(mine[:, ::-1])
    np.testing.assert_array_equal(mine, images[:2])
    with pytest.raises(DataError, match=r"\[N, H, W, 3\]"):
        judge(images[0])


def test_bare_state_dicts_and_safetensors_are_the_same(judge: UnlearnCanvasJudge, images: np.ndarray, tmp_path: Path):
    save_file(random_weights(SMALL, 51, 51), tmp_path / "style.safetensors")
    torch.save(random_weights(SMALL, 20, 20), tmp_path / "object.pt")
    other = UnlearnCanvasJudge.load(str(tmp_path / "style.safetensors"), str(tmp_path / "object.pt"))
    for a, b in ((other(images).p_style, judge(images).p_style), (other(images).p_object, judge(images).p_object)):
        np.testing.assert_array_equal(a, b)


def without(name: str) -> dict[str, Tensor]:
    return {key: x for key, x in random_weights(SMALL, 51).items() if key != name}


class Anything:
    """What no file of weights needs."""


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (without("blocks.1.norm2.bias"), r"lacks 'blocks.1.norm2.bias', and 1 of its 32 tensors"),
        (without("") | {"pre_logits.fc.weight": torch.zeros(2)}, r"has 'pre_logits.fc.weight'.*pass the benchmark's"),
        (random_weights(SMALL, 20), r"'head.bias' of shape \(20,\), not \(51,\): pass the benchmark's style50.pth"),
        (without("head.bias") | {"head.bias": [0.0]}, r"'head.bias' of shape \(\), not \(51,\)"),
        (without("norm.bias") | {"norm.bias": torch.zeros(3)}, r"'norm.bias' of shape \(3,\): expected \(24,\)"),
        (without("norm.bias") | {"norm.bias": torch.full((24,), torch.nan)}, "NaN or infinity in tensor 'norm.bias'"),
        (without("norm.bias") | {"norm.bias": Anything()}, "is refused"),
        ([torch.zeros(2)], "holds no state dict of a classifier: pass the benchmark's style50.pth"),
        ({"model_state_dict": 3}, "holds no state dict"),
    ],
)
def test_other_files_are_refused(small: None, tmp_path: Path, held: Any, said: str):
    torch.save(held, tmp_path / "wrong.pth")
    with pytest.raises(FileError, match=said) as caught:
        UnlearnCanvasJudge.load(tmp_path / "wrong.pth", small_classifier(tmp_path / "object.pth", 20))
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_or_no_archive_are_refused(small: None, tmp_path: Path):
    style = small_classifier(tmp_path / "style.pth", 51)
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    for name, said in (
        ("none.pth", "does not exist"),
        ("text.pth", "archive.*pass the benchmark's style50_cls.pth, which has 20 outputs"),
        ("text.safetensors", "safetensors"),
    ):
        with pytest.raises(FileError, match=said):
            UnlearnCanvasJudge.load(style, tmp_path / name)
