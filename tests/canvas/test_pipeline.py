"""The canvas's pipeline: its tokenizer, its exact classes, saving and loading."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer

from neuraleraser.canvas.pipeline import (
    END,
    MAX_TOKENS,
    SIZE,
    START,
    WEIGHTS,
    WIDTH,
    assemble,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    load_pipeline,
)
from neuraleraser.canvas.train import save_pipeline
from neuraleraser.canvas.words import EMPTY_PHRASES, OBJECT_PHRASES, OBJECTS, STYLE_PHRASES, STYLES, VOCABULARY, caption
from neuraleraser.errors import FileError

PHRASES = [p for group in (*OBJECT_PHRASES.values(), *STYLE_PHRASES.values(), EMPTY_PHRASES) for p in group]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer()


@pytest.fixture(scope="module")
def pipe(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return assemble(build_unet().eval(), build_vae().eval(), build_text_encoder(tokenizer).eval(), tokenizer)


@pytest.fixture(scope="module")
def saved(pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canvas") / "pipeline"
    folder.mkdir()
    (folder / "stale").touch()
    save_pipeline(pipe, folder)
    return folder


def tokens(tokenizer: CLIPTokenizer, text: str) -> list[str]:
    """The text's tokens without start and end."""
    made = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
    assert (made[0], made[-1]) == (START, END)
    return made[1:-1]


def test_every_word_of_every_phrase_is_one_token(tokenizer: CLIPTokenizer):
    for text in (*PHRASES, "a picture of", "and"):
        assert tokens(tokenizer, text) == [f"{word.lower()}</w>" for word in text.split()], text


def test_captions_fit_with_no_unknown_token(tokenizer: CLIPTokenizer):
    end = tokenizer.get_vocab()[END]  # CLIP's unknown token too
    rng = random.Random(4)
    texts = [caption((o,), s, rng) for o in OBJECTS for s in STYLES]
    # The longest there can be: two of the longest objects, the longest style, and the words around them.
    wordy = sorted((p for ps in OBJECT_PHRASES.values() for p in ps), key=lambda p: -len(p.split()))[:2]
    texts.append(
        f"a picture of {' and '.join(wordy)} {max(sum(STYLE_PHRASES.values(), ()), key=lambda p: len(p.split()))}"
    )
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert len(ids) <= MAX_TOKENS, text
        assert ids.count(end) == 1, text
        assert len(ids) - 2 == len(re.findall(r"\w+|,", text)), text


def test_unknown_words_are_split_not_lost(tokenizer: CLIPTokenizer):
    end = tokenizer.get_vocab()[END]
    for text in ("a squirrel in baroque style", "42 zebras!", "x-ray (q) #7"):
        ids = tokenizer(text)["input_ids"]
        assert ids.count(end) == 1
        assert "".join(tokens(tokenizer, text)).replace("</w>", "") == text.replace(" ", "").lower()
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "").lower()


def test_case_and_spaces_do_not_matter(tokenizer: CLIPTokenizer):
    assert tokens(tokenizer, "A Cat  in van GOGH style") == tokens(tokenizer, "a cat in Van Gogh style")


def test_long_prompts_are_cut_to_the_models_length(tokenizer: CLIPTokenizer):
    ids = tokenizer("a cat " * 40, truncation=True, padding="max_length")["input_ids"]
    assert len(ids) == MAX_TOKENS and ids[-1] == tokenizer.get_vocab()[END]


def test_the_tokenizer_is_the_same_each_time(tokenizer: CLIPTokenizer):
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_shipped_tokenizer_is_the_one_that_the_words_make(tokenizer: CLIPTokenizer):
    """A changed phrase moves the ids, and the shipped text encoder would read the wrong words."""
    shipped = CLIPTokenizer.from_pretrained(WEIGHTS / "pipeline" / "tokenizer", local_files_only=True)
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped(PHRASES)["input_ids"] == tokenizer(PHRASES)["input_ids"]


def test_the_parts_are_stable_diffusions_exact_classes_in_its_block_order(pipe: StableDiffusionPipeline):
    assert type(pipe) is StableDiffusionPipeline and pipe.safety_checker is None
    assert type(pipe.unet) is UNet2DConditionModel and type(pipe.vae) is AutoencoderKL
    assert type(pipe.text_encoder) is CLIPTextModel and type(pipe.tokenizer) is CLIPTokenizer
    assert type(pipe.scheduler) is DDIMScheduler
    assert [type(b).__name__ for b in pipe.unet.down_blocks] == [
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    ]
    assert type(pipe.unet.mid_block).__name__ == "UNetMidBlock2DCrossAttn"
    assert [type(b).__name__ for b in pipe.unet.up_blocks] == [
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    ]
    assert sum(isinstance(m, Transformer2DModel) for m in pipe.unet.modules()) == 7
    assert pipe.text_encoder.config.max_position_embeddings == pipe.tokenizer.model_max_length == MAX_TOKENS
    assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)


def test_all_weights_fit_in_the_package(pipe: StableDiffusionPipeline):
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert 2 * sum(p.numel() for part in parts for p in part.parameters()) < 38e6  # bytes as fp16


def test_the_scheduler_ends_clean_and_predicts_velocity():
    scheduler = build_scheduler()
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999 and len(scheduler.timesteps) == 25
    assert scheduler.config["prediction_type"] == "v_prediction" and scheduler.final_alpha_cumprod == 1


@torch.no_grad()
def test_it_samples(pipe: StableDiffusionPipeline):
    made = pipe(
        [VOCABULARY.prompt(["Cats"], "Van_Gogh")],
        num_inference_steps=2,
        guidance_scale=4.0,
        generator=[torch.Generator().manual_seed(1)],
        output_type="pt",
    ).images
    assert made.shape == (1, 3, SIZE, SIZE) and made.isfinite().all()


def test_saving_and_loading_keeps_ids_and_weights(pipe: StableDiffusionPipeline, saved: Path):
    again = load_pipeline(saved)
    texts = [VOCABULARY.prompt([o], s, i % 4) for i, (o, s) in enumerate((o, s) for o in OBJECTS for s in STYLES)]
    texts += ["a squirrel, 3 of them!", ""]
    assert again.tokenizer(texts)["input_ids"] == pipe.tokenizer(texts)["input_ids"]
    assert type(again.tokenizer) is CLIPTokenizer and again.tokenizer.model_max_length == MAX_TOKENS
    for name in ("unet", "vae", "text_encoder"):
        old, new = (getattr(p, name).state_dict() for p in (pipe, again))
        assert old.keys() == new.keys()
        for k in old:
            assert new[k].dtype == old[k].dtype
            assert torch.equal(old[k], new[k]), f"{name}.{k}: what is saved is what stays in memory"
    old, new = ({k: v for k, v in p.scheduler.config.items() if k[0] != "_"} for p in (pipe, again))
    assert old == new
    assert again.text_encoder.config.hidden_size == WIDTH


def test_saving_replaces_the_folder_and_writes_safetensors_only(saved: Path):
    assert not (saved / "stale").exists()
    assert [p.name for p in saved.parent.iterdir()] == ["pipeline"], "nothing is left beside it"
    files = {p.suffix for p in saved.rglob("*") if p.is_file()}
    assert files <= {".json", ".safetensors", ".txt"}


def test_loading_in_half_precision(saved: Path):
    assert load_pipeline(saved, torch.bfloat16).unet.dtype == torch.bfloat16


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileError, match=r"holds no pipeline .* train one") as caught:
            load_pipeline(folder)
        assert str(folder) in str(caught.value)
