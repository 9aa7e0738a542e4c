"""Small text encoders of the real classes, for pipelines of `pipelines.py` that otherwise run from embeddings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from helpers import pipelines

PROMPT: dict[str, Any] = {"prompt": "a b"}
SHORT: dict[str, Any] = {**PROMPT, "max_sequence_length": pipelines.WORDS}


def _letters() -> PreTrainedTokenizerFast:
    """One token a word of a letter."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *"abcdefgh"])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=pipelines.WORDS
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=16, d_model=pipelines.WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def _gemma() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=16,
            hidden_size=pipelines.WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def _sdxl() -> Any:
    half = {"hidden_size": 8, "num_hidden_layers": 3}
    return pipelines.stable_diffusion_xl(
        text_encoder=CLIPTextModel(pipelines.clip_text(**half)),
        text_encoder_2=CLIPTextModelWithProjection(pipelines.clip_text(**half, projection_dim=pipelines.WIDTH)),
        tokenizer=pipelines.tokenizer(),
        tokenizer_2=pipelines.tokenizer(),
    )


def _sd3() -> Any:
    config = pipelines.clip_text(hidden_size=8, num_hidden_layers=3, projection_dim=8)
    return pipelines.stable_diffusion_3(
        text_encoder=CLIPTextModelWithProjection(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        text_encoder_3=_t5(),
        tokenizer=pipelines.tokenizer(),
        tokenizer_2=pipelines.tokenizer(),
        tokenizer_3=_letters(),
    )


def _flux() -> Any:
    return pipelines.flux(
        text_encoder=CLIPTextModel(pipelines.clip_text()),
        text_encoder_2=_t5(),
        tokenizer=pipelines.tokenizer(),
        tokenizer_2=_letters(),
    )


READING: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "stable_diffusion": (pipelines.stable_diffusion, PROMPT),
    "sd2": (pipelines.stable_diffusion_2, PROMPT),
    "stable_diffusion_xl": (_sdxl, PROMPT),
    "stable_diffusion_3": (_sd3, SHORT),
    "flux": (_flux, SHORT),
    "pixart": (lambda: pipelines.pixart(text_encoder=_t5(), tokenizer=_letters()), SHORT),
    "sana": (
        lambda: pipelines.sana(text_encoder=_gemma(), tokenizer=_letters()),
        {**SHORT, "complex_human_instruction": None},
    ),
}
"""Builders with text encoders, and how they are called with a prompt. Their autoencoders' decoders never run."""


def build(name: str) -> Any:
    """A pipeline of READING with its text encoders, the same bits each time."""
    torch.manual_seed(1)
    return READING[name][0]()
