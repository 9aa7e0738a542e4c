"""Small text encoders of the real classes, for the pipelines of `tiny.py` that otherwise run from embeddings."""

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

import tiny

PROMPT: dict[str, Any] = {"prompt": "a b"}
SHORT: dict[str, Any] = {**PROMPT, "max_sequence_length": tiny.WORDS}


def _letters() -> PreTrainedTokenizerFast:
    """One token a word of a letter."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *"abcdefgh"])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=tiny.WORDS
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=16, d_model=tiny.WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def _gemma() -> Gemma2Model:
    return Gemma2Model(
        Gemma2Config(
            vocab_size=16,
            hidden_size=tiny.WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )


def _sdxl() -> Any:
    half = {"hidden_size": 8, "num_hidden_layers": 3}
    return tiny.stable_diffusion_xl(
        text_encoder=CLIPTextModel(tiny.clip_text(**half)),
        text_encoder_2=CLIPTextModelWithProjection(tiny.clip_text(**half, projection_dim=tiny.WIDTH)),
        tokenizer=tiny.tokenizer(),
        tokenizer_2=tiny.tokenizer(),
    )


def _sd3() -> Any:
    config = tiny.clip_text(hidden_size=8, num_hidden_layers=3, projection_dim=8)
    return tiny.stable_diffusion_3(
        text_encoder=CLIPTextModelWithProjection(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        text_encoder_3=_t5(),
        tokenizer=tiny.tokenizer(),
        tokenizer_2=tiny.tokenizer(),
        tokenizer_3=_letters(),
    )


def _flux() -> Any:
    return tiny.flux(
        text_encoder=CLIPTextModel(tiny.clip_text()),
        text_encoder_2=_t5(),
        tokenizer=tiny.tokenizer(),
        tokenizer_2=_letters(),
    )


READING: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "stable_diffusion": (tiny.stable_diffusion, PROMPT),
    "sd2": (tiny.stable_diffusion_2, PROMPT),
    "stable_diffusion_xl": (_sdxl, PROMPT),
    "stable_diffusion_3": (_sd3, SHORT),
    "flux": (_flux, SHORT),
    "pixart": (lambda: tiny.pixart(text_encoder=_t5(), tokenizer=_letters()), SHORT),
    "sana": (
        lambda: tiny.sana(text_encoder=_gemma(), tokenizer=_letters()),
        {**SHORT, "complex_human_instruction": None},
    ),
}
"""Builders with text encoders, and how they are called with a prompt. Their autoencoders' decoders never run."""


def build(name: str) -> Any:
    """A pipeline of READING with its text encoders, the same bits each time."""
    torch.manual_seed(1)
    return READING[name][0]()
