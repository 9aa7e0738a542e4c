"""Small, randomly initialised pipelines of the real classes, and one way to run them all.

Each builder returns a new pipeline (about 0.1 s), the same bits for the same seed. Latents are 8 x 8 (16 x 16
pixels). Stable Diffusion has a real tokenizer and text encoder; the others run from prompt embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WIDTH = 16  # of prompt embeddings
WORDS = 8  # of a prompt embedding
_UNUSED = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


def vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        shift_factor=0.0,
        sample_size=16,
    )


def unet(**settings: Any) -> UNet2DConditionModel:
    """SD's block order, small: four Transformer2DModels, 8 x 8 and 4 x 4 positions, 16 and 32 wide."""
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "block_out_channels": (16, 32),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
            **settings,
        }
    )


def stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    words += [letter + "</w>" for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=WORDS)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            intermediate_size=32,
            num_attention_heads=2,
            num_hidden_layers=2,
            max_position_embeddings=WORDS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    ).eval()
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return _quiet(
        StableDiffusionPipeline(vae(), encoder, tokenizer, unet(), scheduler, None, None, None, False)  # type: ignore[arg-type]
    )


def stable_diffusion_xl(seed: int = 0) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    model = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    parts: Any = {**_UNUSED, "vae": vae(), "unet": model, "scheduler": scheduler}
    return _quiet(StableDiffusionXLPipeline(**parts, add_watermarker=False))


def stable_diffusion_3(seed: int = 0) -> StableDiffusion3Pipeline:
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
    )
    parts: Any = {**_UNUSED, "text_encoder_3": None, "tokenizer_3": None, "vae": vae(), "transformer": model}
    return _quiet(StableDiffusion3Pipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler()))


def flux(seed: int = 0) -> FluxPipeline:
    """Two double blocks, two single blocks, 16 wide, 4 x 4 positions."""
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
        guidance_embeds=True,
    )
    parts: Any = {**_UNUSED, "vae": vae(), "transformer": model}
    return _quiet(FluxPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler()))


def pixart(seed: int = 0) -> PixArtSigmaPipeline:
    torch.manual_seed(seed)
    model = PixArtTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=16,
        caption_channels=WIDTH,
    )
    parts: Any = {"text_encoder": None, "tokenizer": None, "vae": vae(), "transformer": model}
    return _quiet(PixArtSigmaPipeline(**parts, scheduler=DDIMScheduler(clip_sample=False)))


BUILDERS: dict[str, Callable[..., Any]] = {
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_xl": stable_diffusion_xl,
    "stable_diffusion_3": stable_diffusion_3,
    "flux": flux,
    "pixart": pixart,
}


def embeds(pipe: Any, n: int = 1, guidance: float = 4.0) -> dict[str, Any]:
    """Call arguments that stand for n prompts: random, the same for all pipelines of a width."""
    generator = torch.Generator().manual_seed(7)
    dtype = next((pipe.unet if hasattr(pipe, "unet") else pipe.transformer).parameters()).dtype
    made: dict[str, Any] = {}
    for side in ("", "negative_"):
        made[f"{side}prompt_embeds"] = torch.randn(n, WORDS, WIDTH, generator=generator).to(dtype)
        if isinstance(pipe, StableDiffusionXLPipeline | StableDiffusion3Pipeline | FluxPipeline):
            made[f"{side}pooled_prompt_embeds"] = torch.randn(n, WIDTH, generator=generator).to(dtype)
        if isinstance(pipe, PixArtSigmaPipeline):
            made[f"{side}prompt_attention_mask"] = torch.ones(n, WORDS, dtype=torch.long)
    if isinstance(pipe, FluxPipeline) or guidance <= 1:
        made = {name: value for name, value in made.items() if not name.startswith("negative_")}
    if isinstance(pipe, PixArtSigmaPipeline):
        made["negative_prompt"] = None if guidance > 1 else ""
    return made


def run(pipe: Any, seed: int, n: int = 1, steps: int = 2, guidance: float = 4.0, **settings: Any) -> Tensor:
    """n final latents, image i from seed + i. guidance 1: no negative pass. `settings` override the call's.

    With `grad=True` in settings the whole sampling is differentiable.
    """
    grad = settings.pop("grad", False)
    call = {
        "generator": [torch.Generator().manual_seed(seed + i) for i in range(n)],
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "height": 16,
        "width": 16,
        "output_type": "latent",
        "return_dict": False,
        **settings,
    }
    if "prompt" not in settings:
        call = {**embeds(pipe, n, guidance), **call}
    if isinstance(pipe, PixArtSigmaPipeline):
        call["use_resolution_binning"] = False
    plain = type(pipe).__call__
    return (plain.__wrapped__ if grad else plain)(pipe, **call)[0]  # type: ignore[attr-defined]


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe
