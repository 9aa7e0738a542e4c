"""The CLIP judge, through a small random CLIP in a folder: what it says, and when it refuses to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from helpers import pipelines
from helpers.small_judges import CLIP_SIDE, small_clip
from neuraleraser.concepts import Concept
from neuraleraser.errors import ConceptError, DataError, FileError
from neuraleraser.fitting.clip_judge import calibrate_clip_judge
from neuraleraser.judges import NO_CONCEPT, Clip, ClipJudge, ImageTextModel, JudgeSpec, clip_sentence
from neuraleraser.judges.clip import _best_threshold

SIZE = (CLIP_SIDE, CLIP_SIDE)
RED, GREEN, BLUE, GREY = (220, 20, 20), (20, 220, 20), (20, 20, 220), (120, 120, 120)
PAIR = ("red style", "blue style")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    return str(small_clip(folder))


def coloured(colour: Sequence[int], n: int = 16, seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Images of one colour with a little noise."""
    noise = np.random.default_rng(seed).integers(-12, 13, (n, *size, 3))
    return (np.array(colour) + noise).clip(0, 255).astype(np.uint8)


def calibrated(clip: str, kind: str, **more: np.ndarray) -> tuple[ClipJudge, np.ndarray, np.ndarray]:
    """A judge and images of its concept and of its neighbour. Weights are random, so that only one of the two
    colours lies on the concept's side: the other way round CLIP is wrong, and refuses."""
    judges, refused = [], []
    for own, other in ((RED, BLUE), (BLUE, RED)):
        images = {PAIR[0]: coloured(own), PAIR[1]: coloured(other, seed=1), **more}
        try:
            judges.append((ClipJudge.calibrate(PAIR[0], kind, images, clip), own, other))
        except ConceptError as error:
            refused.append(str(error))
    assert len(judges) == len(refused) == 1
    assert "cannot tell 'red style' from 'blue style'" in refused[0] and "balanced accuracy" in refused[0]
    judge, own, other = judges[0]
    return judge, coloured(own, seed=5), coloured(other, seed=6)


def test_a_style_is_told_from_its_neighbour(clip: str) -> None:
    judge, own, other = calibrated(clip, "style")
    assert judge.styles == PAIR and judge.objects == () and judge.artefact_threshold is None
    assert JudgeSpec.of(judge).thresholds == dict.fromkeys(PAIR, 0.5)
    seen, unseen = judge(own), judge(other)
    assert seen.p_style.shape == (16, 2) and seen.p_object.shape == (16, 0) and seen.artefact is None
    assert seen.p_style.dtype == np.float32
    np.testing.assert_allclose(seen.p_style.sum(1), 1, atol=1e-6)
    assert (seen.p_style[:, 0] > 0.5).all() and (unseen.p_style[:, 0] < 0.5).all()
    assert judge.figures == {"recall": 1.0, "false_alarms": {PAIR[1]: 0.0}, "balanced_accuracy": 1.0}


def test_each_object_has_a_threshold_of_its_own(clip: str) -> None:
    judge, own, other = calibrated(clip, "object")
    assert judge.objects == PAIR and judge.styles == ()
    for images, here in ((own, 0), (other, 1)):
        seen = judge(images)
        assert seen.p_object.shape == (16, 2) and seen.p_style.shape == (16, 0)
        over = seen.p_object > [judge.thresholds[name] for name in judge.objects]
        assert over[:, here].all() and not over[:, 1 - here].any()


def test_the_probability_is_that_of_the_margin(clip: str) -> None:
    style, own, _ = calibrated(clip, "style")
    margin = style._margins(style._logits(own))[:, 0] - style.margin_thresholds[0]
    np.testing.assert_allclose(style(own).p_style[:, 0], 1 / (1 + np.exp(-margin)), atol=1e-5)


def test_images_of_neither_are_told_from_the_concept_too(clip: str) -> None:
    with pytest.raises(ConceptError, match="cannot tell 'red style' from 'images without it'"):
        # what shows nothing looks just as the concept does
        own = calibrated(clip, "style")[1]
        other = calibrated(clip, "style")[2]
        images = {PAIR[0]: own, PAIR[1]: other, NO_CONCEPT: own.copy()}
        ClipJudge.calibrate(PAIR[0], "style", images, clip)


def test_what_looks_the_same_is_refused(clip: str) -> None:
    images = {name: coloured(GREY, seed=i) for i, name in enumerate(PAIR)}
    with pytest.raises(ConceptError, match=r"cannot tell.*use a larger CLIP, or other neighbours"):
        ClipJudge.calibrate(PAIR[0], "style", images, clip)


def test_one_bad_neighbour_is_enough(clip: str) -> None:
    _, own, other = calibrated(clip, "style")
    images = {PAIR[0]: own, PAIR[1]: other, "green style": own[::-1].copy()}
    with pytest.raises(ConceptError, match="from 'green style'"):
        ClipJudge.calibrate(PAIR[0], "style", images, clip)


def test_sizes_batches_and_neighbours_change_nothing(clip: str) -> None:
    judge, own, other = calibrated(clip, "style")
    many = np.concatenate([own, other, own])  # more than a batch
    alone = np.concatenate([judge(many[i : i + 5]).p_style for i in range(0, len(many), 5)])
    np.testing.assert_allclose(judge(many).p_style, alone, atol=1e-5)
    assert judge(coloured(GREEN, n=2, size=(40, 24))).p_style.shape == (2, 2)
    assert judge(many[:0]).p_style.shape == (0, 2)
    kept = own.copy()
    own.setflags(write=False)
    judge(own)
    np.testing.assert_array_equal(own, kept)


@pytest.mark.parametrize(
    "wrong", [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((2, 0, 8, 3), np.uint8), None]
)
def test_other_things_than_images_are_refused(clip: str, wrong: Any) -> None:
    with pytest.raises(DataError, match=r"\[N, H, W, 3\]"):
        calibrated(clip, "style")[0](wrong)


def test_what_is_missing_is_said(clip: str, tmp_path: Path) -> None:
    red = coloured(RED)
    for images in ({PAIR[0]: red}, {PAIR[1]: red}, {PAIR[0]: red, NO_CONCEPT: red}):
        with pytest.raises(ConceptError, match="one neighbour at least"):
            ClipJudge.calibrate(PAIR[0], "style", images, clip)
    with pytest.raises(DataError, match="7 images of 'blue style': pass at least 8"):
        ClipJudge.calibrate(PAIR[0], "style", {PAIR[0]: red, PAIR[1]: red[:7]}, clip)
    for name in (str(tmp_path), "nobody/nothing", ""):
        with pytest.raises(FileError, match="could not be opened") as caught:
            ClipJudge.calibrate(PAIR[0], "style", {PAIR[0]: red, PAIR[1]: red}, name)
        assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(clip: str, tmp_path: Path) -> None:
    for path in Path(clip).iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    torch.save(CLIPModel.from_pretrained(clip).state_dict(), tmp_path / "pytorch_model.bin")
    red = coloured(RED)
    with pytest.raises(FileError, match="safetensors"):
        ClipJudge.calibrate(PAIR[0], "style", {PAIR[0]: red, PAIR[1]: red}, str(tmp_path))


def test_it_is_calibrated_on_what_the_pipeline_draws(clip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, own, other = calibrated(clip, "style")
    asked: list[tuple[list[str], list[int]]] = []

    def draw(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], sampling: Any) -> np.ndarray:
        asked.append((list(prompts), list(seeds)))
        return (own if "red" in prompts[0] else other)[: len(prompts)]

    monkeypatch.setattr("neuraleraser.fitting.clip_judge.generate", draw)
    pipe = pipelines.stable_diffusion()
    judge = calibrate_clip_judge(
        pipe, Concept.from_phrase(PAIR[0]), [Concept.from_phrase(PAIR[1])], clip, num_images=12, seed=5
    )
    assert judge.styles == PAIR and set(judge.figures["false_alarms"]) == {PAIR[1], NO_CONCEPT}
    assert [prompts[0] for prompts, _ in asked] == ["a cat in red style", "a cat in blue style", "a cat"]
    assert all(seeds == list(range(5, 17)) for _, seeds in asked)


def test_a_checkpoint_that_is_not_there_is_an_error_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="could not be opened"):
        calibrate_clip_judge(
            pipelines.stable_diffusion(), Concept.from_phrase(PAIR[0]), [Concept.from_phrase(PAIR[1])], str(tmp_path)
        )


def test_sentences() -> None:
    assert (
        clip_sentence("Van_Gogh", "style")
        == clip_sentence("Van Gogh style", "style")
        == "a picture in the style of Van Gogh"
    )
    assert clip_sentence("a cat", "object") == "a picture of a cat"


def test_the_threshold_lies_in_the_widest_gap() -> None:
    assert _best_threshold(np.array([3.0, 5.0]), [np.array([0.0, 1.0]), np.array([-4.0])]) == 2.0
    assert _best_threshold(np.array([2.0, 2.0]), [np.array([2.0])]) == 2.0
    # one neighbour far, one near: the near one decides
    assert 1.0 < _best_threshold(np.array([1.5, 3.0]), [np.zeros(100), np.array([1.0])]) < 1.5


def test_similarities_are_clips_own(clip: str):
    """Images and sentences apart, in batches, give what the whole model gives."""
    images, texts = np.concatenate([coloured(RED, 40), coloured(BLUE, 3)]), [f"a picture of {k}" for k in range(35)]
    opened = Clip(clip)
    words = opened.tokenizer(texts, padding=True, return_tensors="pt")
    pixels = opened.processor(images=list(images), input_data_format="channels_last", return_tensors="pt")
    with torch.no_grad():
        own = opened.model(**words, pixel_values=pixels["pixel_values"])
    np.testing.assert_allclose(opened(images, texts), own.logits_per_image.numpy(), atol=1e-4)
    np.testing.assert_allclose(opened.features(images), own.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(opened.text_features(texts), own.text_embeds.numpy(), atol=1e-5)
    assert isinstance(opened, ImageTextModel) and opened(images[:0], texts).shape == (0, 35)


def test_a_long_prompt_is_cut_off(clip: str):
    opened = Clip(clip)
    long = " ".join(["cat"] * 300)
    assert np.array_equal(opened.text_features([long]), opened.text_features([long + " dog"]))


def test_half_precision_gives_vectors_of_length_1(clip: str):
    opened = Clip(clip)
    opened.model = opened.model.to(torch.bfloat16)
    found = opened.text_features(["a cat", "a dog"])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_what_is_no_whole_clip_is_refused(clip: str, tmp_path: Path):
    """transformers makes up what is not there, and says so in a log alone."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(clip, tmp_path / name))

    lacking = copied("lacking")
    weights = load_file(lacking / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "vision_model.encoder.layers.1" not in name}
    save_file(kept, lacking / "model.safetensors")
    with pytest.raises(FileError, match=r"no whole CLIP \(without vision_model\.encoder"):
        Clip(str(lacking))
    other = copied("other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "siglip"}))
    with pytest.raises(FileError, match=r"no whole CLIP|could not be opened"):
        Clip(str(other))
    damaged = copied("damaged")
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, damaged / "model.safetensors")
    with pytest.raises((FileError, DataError), match=r"damaged|does not run"):
        Clip(str(damaged))


def test_a_digest_is_of_the_weights(clip: str, tmp_path: Path):
    folder = Path(shutil.copytree(clip, tmp_path / "clip"))
    assert Clip(clip).digest == Clip(str(folder)).digest
    weights = load_file(folder / "model.safetensors")
    weights["logit_scale"] = weights["logit_scale"] + 1
    save_file(weights, folder / "model.safetensors")
    assert Clip(clip).digest != Clip(str(folder)).digest
