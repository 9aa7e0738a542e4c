"""Small, randomly initialised pipelines of the real classes, and one way to run them all.

Each builder returns a new pipeline (about 0.1 s), the same bits for the same seed. Latents are 8 x 8 (16 x 16
pixels). Stable Diffusion has a real tokenizer and text encoder; the others run from prompt embeddings, unless
they are given the parts that `tiny_text.py` makes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    ControlNetModel,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
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
        force_upcast=False,
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


def tokenizer(longest: int = WORDS) -> CLIPTokenizer:
    """One token a letter."""
    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    words += [letter + "</w>" for letter in "abcdefghijklmnopqrstuvwxyz"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=longest)


def clip_text(**settings: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        **{
            "vocab_size": 54,
            "hidden_size": WIDTH,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "max_position_embeddings": WORDS,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
            **settings,
        }
    )


def ddim(**settings: Any) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1, **settings)


def stable_diffusion(seed: int = 0, **settings: Any) -> StableDiffusionPipeline:
    """`settings` are the UNet's."""
    torch.manual_seed(seed)
    encoder = CLIPTextModel(clip_text()).eval()
    return _quiet(
        StableDiffusionPipeline(vae(), encoder, tokenizer(), unet(**settings), ddim(), None, None, None, False)  # type: ignore[arg-type]
    )


def stable_diffusion_2(seed: int = 0) -> StableDiffusionPipeline:
    """OpenCLIP's text encoder (exact GELU, an odd number of layers), heads of equal width, v-prediction."""
    torch.manual_seed(seed)
    encoder = CLIPTextModel(clip_text(hidden_act="gelu", num_hidden_layers=3, projection_dim=8)).eval()
    model = unet(attention_head_dim=(2, 4), use_linear_projection=True)
    scheduler = ddim(prediction_type="v_prediction")
    return _quiet(
        StableDiffusionPipeline(vae(), encoder, tokenizer(), model, scheduler, None, None, None, False)  # type: ignore[arg-type]
    )


def controlnet(seed: int = 0) -> StableDiffusionControlNetPipeline:
    pipe = stable_diffusion(seed)
    model = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8))
    for module in (model.controlnet_down_blocks, model.controlnet_mid_block):
        for weight in module.parameters():  # a new one adds nothing
            torch.nn.init.normal_(weight, std=0.3)
    parts: Any = {**pipe.components, "controlnet": model}
    return _quiet(StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False))


def stable_diffusion_xl(seed: int = 0, **parts: Any) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    model = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
    )
    all_parts: Any = {**_UNUSED, "vae": vae(), "unet": model, "scheduler": ddim(), **parts}
    return _quiet(StableDiffusionXLPipeline(**all_parts, add_watermarker=False))


def sdxl_turbo(seed: int = 0) -> StableDiffusionXLPipeline:
    """Made to be called with steps=1, guidance=0."""
    scheduler = EulerAncestralDiscreteScheduler(timestep_spacing="trailing", steps_offset=1)
    return stable_diffusion_xl(seed, scheduler=scheduler)


def stable_diffusion_3(seed: int = 0, channels: int = 4, newer: bool = False, **parts: Any) -> StableDiffusion3Pipeline:
    """`newer`: as SD 3.5 medium, normalised queries and keys, a second attention in the first block."""
    torch.manual_seed(seed)
    settings: Any = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if newer else {}
    model = SD3Transformer2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        **settings,
    )
    none = {**_UNUSED, "text_encoder_3": None, "tokenizer_3": None}
    all_parts: Any = {**none, "vae": vae(channels), "transformer": model, **parts}
    return _quiet(StableDiffusion3Pipeline(**all_parts, scheduler=FlowMatchEulerDiscreteScheduler()))


def flux(seed: int = 0, guidance: bool = True, **parts: Any) -> FluxPipeline:
    """Two double blocks, two single blocks, 16 wide, 4 x 4 positions. Without `guidance` as FLUX.1-schnell."""
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
        guidance_embeds=guidance,
    )
    all_parts: Any = {**_UNUSED, "vae": vae(), "transformer": model, **parts}
    return _quiet(FluxPipeline(**all_parts, scheduler=FlowMatchEulerDiscreteScheduler()))


def flux_kontext(seed: int = 0) -> FluxKontextPipeline:
    parts = flux(seed).components
    return _quiet(FluxKontextPipeline(**parts))


def pixart(seed: int = 0, kind: type = PixArtSigmaPipeline, **parts: Any) -> Any:
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
    all_parts: Any = {"text_encoder": None, "tokenizer": None, "vae": vae(), "transformer": model, **parts}
    return _quiet(kind(**all_parts, scheduler=DDIMScheduler(clip_sample=False)))


def sana(seed: int = 0, **parts: Any) -> SanaPipeline:
    """Two blocks, 16 wide. Its autoencoder shrinks by 8, so that 64 x 64 pixels are 8 x 8 positions."""
    torch.manual_seed(seed)
    model = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
    )
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    all_parts: Any = {"text_encoder": None, "tokenizer": None, "vae": autoencoder, "transformer": model, **parts}
    return _quiet(SanaPipeline(**all_parts, scheduler=scheduler))


def as_task(pipe: Any, task: str) -> Any:
    """The pipeline of the same parts for another task: "Img2Img" or "Inpaint"."""
    kind = getattr(diffusers, type(pipe).__name__.replace("Pipeline", f"{task}Pipeline"))
    taken = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    extra = {"requires_safety_checker": False, "add_watermarker": False}
    return _quiet(kind(**parts, **{name: value for name, value in extra.items() if name in taken}))


BUILDERS: dict[str, Callable[..., Any]] = {
    "stable_diffusion": stable_diffusion,
    "stable_diffusion_xl": stable_diffusion_xl,
    "stable_diffusion_3": stable_diffusion_3,
    "flux": flux,
    "pixart": pixart,
}
"""One pipeline for each way in which blocks and times are built: what most tests run over."""

EVERY: dict[str, Callable[[], Any]] = {
    **BUILDERS,
    "sd1_img2img": lambda: as_task(stable_diffusion(), "Img2Img"),
    "sd1_inpaint": lambda: as_task(stable_diffusion(), "Inpaint"),
    "sd1_inpaint_model": lambda: as_task(stable_diffusion(in_channels=9), "Inpaint"),  # made for it
    "sd1_controlnet": controlnet,
    "sd1_controlnet_img2img": lambda: as_task(controlnet(), "Img2Img"),
    "sd2": stable_diffusion_2,
    "sdxl_img2img": lambda: as_task(stable_diffusion_xl(), "Img2Img"),
    "sdxl_inpaint": lambda: as_task(stable_diffusion_xl(), "Inpaint"),
    "sdxl_turbo": sdxl_turbo,
    "sd35": lambda: stable_diffusion_3(newer=True),
    "sd3_img2img": lambda: as_task(stable_diffusion_3(), "Img2Img"),
    "sd3_inpaint": lambda: as_task(stable_diffusion_3(channels=16), "Inpaint"),
    "flux_schnell": lambda: flux(guidance=False),
    "flux_img2img": lambda: as_task(flux(), "Img2Img"),
    "flux_inpaint": lambda: as_task(flux(), "Inpaint"),
    "pixart_alpha": lambda: pixart(kind=PixArtAlphaPipeline),
    "sana": sana,
}
"""Every class and task that is supported."""


def embeds(pipe: Any, n: int = 1, guidance: float = 4.0) -> dict[str, Any]:
    """Call arguments that stand for n prompts: random, the same for all pipelines of a width."""
    generator = torch.Generator().manual_seed(7)
    dtype = next((pipe.unet if hasattr(pipe, "unet") else pipe.transformer).parameters()).dtype
    taken = inspect.signature(type(pipe).__call__).parameters
    made: dict[str, Any] = {}
    for side in ("", "negative_"):
        made[f"{side}prompt_embeds"] = torch.randn(n, WORDS, WIDTH, generator=generator).to(dtype)
        if "pooled_prompt_embeds" in taken:
            made[f"{side}pooled_prompt_embeds"] = torch.randn(n, WIDTH, generator=generator).to(dtype)
        if "prompt_attention_mask" in taken:
            made[f"{side}prompt_attention_mask"] = torch.ones(n, WORDS, dtype=torch.long)
    if "true_cfg_scale" in taken or guidance <= 1:
        made = {name: value for name, value in made.items() if not name.startswith("negative_")}
    if "prompt_attention_mask" in taken:  # of PixArt and Sana, whose default is ""
        made["negative_prompt"] = None if guidance > 1 else ""
    return made


def pictures(pipe: Any, n: int, height: int, width: int) -> dict[str, Any]:
    """Call arguments of the tasks that start from n images: the images, a mask of their left halves."""
    task = type(pipe).__name__
    generator = torch.Generator().manual_seed(8)
    made: dict[str, Any] = {}
    if "Img2Img" in task or "Inpaint" in task or "ControlNet" in task:
        made["image"] = torch.rand(n, 3, height, width, generator=generator)
    if "Kontext" in task:
        made |= {"image": torch.rand(n, 3, height, width, generator=generator), "_auto_resize": False}
        made["max_area"] = height * width
    if "Img2Img" in task or "Inpaint" in task:
        made["strength"] = 0.5
    if "Img2Img" in task and "ControlNet" in task:
        made["control_image"] = torch.rand(n, 3, height, width, generator=generator)
    if "Inpaint" in task:
        made["mask_image"] = (torch.arange(width) < width // 2).float().expand(n, 1, height, width)
    return made


def run(pipe: Any, seed: int, n: int = 1, steps: int = 2, guidance: float = 4.0, **settings: Any) -> Tensor:
    """n final latents, image i from seed + i. guidance 1: no negative pass. `settings` override the call's.

    With `grad=True` in settings the whole sampling is differentiable. Tasks that start from an image go `steps`
    steps too, of twice as many.
    """
    grad = settings.pop("grad", False)
    scale = 4 if isinstance(pipe, SanaPipeline) else 1
    height, width = (scale * settings.pop(side, 16) for side in ("height", "width"))
    task = pictures(pipe, n, height, width)
    call = {
        "generator": [torch.Generator().manual_seed(seed + i) for i in range(n)],
        "num_inference_steps": 2 * steps if "strength" in task else steps,
        "guidance_scale": guidance,
        "height": height,
        "width": width,
        "use_resolution_binning": False,
        "output_type": "latent",
        "return_dict": False,
        **task,
        **settings,
    }
    if "prompt" not in settings:
        call = {**embeds(pipe, n, guidance), **call}
    plain = type(pipe).__call__
    taken = inspect.signature(plain).parameters
    call = {name: value for name, value in call.items() if name in taken or name in settings}
    return (plain.__wrapped__ if grad else plain)(pipe, **call)[0]  # type: ignore[attr-defined]


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def left(pipe: Any) -> list[str]:
    """Everything that a loaded eraser could have left behind."""
    found = [
        name
        for name in vars(pipe)
        if name in ("progress_bar", "maybe_free_model_hooks", "prepare_latents") or "neural" in name
    ]
    for part in pipe.components.values():
        for path, module in part.named_modules() if isinstance(part, torch.nn.Module) else ():
            found += [path for name, held in vars(module).items() if "hooks" in name and held]
    return found
