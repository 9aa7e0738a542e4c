"""The canvas's own Stable Diffusion pipeline: its parts, and opening the shipped one.

The parts are diffusers' and transformers' exact classes, in Stable Diffusion 1's block order: down (CrossAttn,
CrossAttn, Down), mid, up (Up, CrossAttn, CrossAttn). Pictures are 64 px, latents 16 x 16 x 8.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from neuraleraser.canvas.words import OBJECTS, STYLES, caption
from neuraleraser.errors import FileError

WEIGHTS = Path(__file__).parent / "weights"
SIZE = 64
MAX_TOKENS = 24
WIDTH = 128
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges make every word of the canvas's captions one token.

    It knows printable ASCII; anything else becomes the unknown token, which is CLIP's end of text.
    """
    rng = random.Random(0)
    corpus = [caption([o], s, rng) for o in OBJECTS for s in STYLES for _ in range(20)]
    corpus += [caption([], s, rng) for s in STYLES for _ in range(20)]
    corpus += [caption([a, b], s, rng) for a, b, s in zip(OBJECTS, OBJECTS[1:], STYLES, strict=False)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    # As CLIPTokenizer splits at run time: words, single digits, runs of anything else.
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    bpe.pre_tokenizer = pre_tokenizers.Split(words, "removed", invert=True)  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = [chr(c) for c in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=[], initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    model = json.loads(bpe.to_str())["model"]
    # Every printable character, inside a word and at its end: a word that no caption holds is split, not lost.
    letters = [*alphabet, *(c + "</w>" for c in alphabet)]
    learnt = [t for t in model["vocab"] if t not in set(letters)]
    vocab = {t: i for i, t in enumerate([*letters, *learnt, START, END])}
    merges: Any = [tuple(m) for m in model["merges"]]  # as the library takes them, not as it declares them
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained CLIP text encoder of width 128, three layers."""
    ids = tokenizer.get_vocab()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=WIDTH,
        bos_token_id=ids[START],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
    )
    return CLIPTextModel(config)


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder, 64 px to 16 x 16 latents of 8 channels."""
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=8,
        block_out_channels=(32, 64, 96),  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """An untrained denoiser of 12.6 M parameters with seven text-conditioned blocks."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128, 256),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # number of heads: diffusers keeps SD 1's misnomer
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """SD 1's noise schedule, velocity prediction (Salimans and Ho 2022), steps counted from the noisy end."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=True,
    )


def assemble(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    """Put the parts together; no safety checker, since there is nothing unsafe to draw."""
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_pipeline(folder: Path = WEIGHTS / "pipeline", dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    """Open the shipped canvas pipeline, or another in `folder`, as `dtype`.

    Raises FileError if `folder` holds no pipeline.
    """
    if not (folder / "model_index.json").exists():
        raise FileError(f"{folder} holds no pipeline (no model_index.json): train one with `neuraleraser canvas train`")
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=dtype, safety_checker=None, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
