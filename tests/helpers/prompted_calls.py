"""Calls of the small Stable Diffusion by prompt, and an eraser that hears one of two prompts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor

from helpers.erasers import make_eraser, make_gate
from neuraleraser.eraser import Eraser
from neuraleraser.sites import Site, record

LOUD, QUIET = "a", "b c"


def prompts(pipe: Any, *texts: str, guidance: float = 4.0, negative: str = "", **settings: Any) -> Any:
    """Images of these prompts, image i from seed i."""
    call: dict[str, Any] = {
        "num_inference_steps": 2,
        "guidance_scale": guidance,
        "negative_prompt": [negative] * len(texts),
        "generator": [torch.Generator().manual_seed(i) for i in range(len(texts))],
        "output_type": "pt",
    }
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):
        call |= {"image": torch.full((len(texts), 3, 16, 16), 0.5), "strength": 1.0}
    return pipe(list(texts), **(call | settings)).images


READS = Site("unet.mid_block.attentions.0.transformer_blocks.0.attn2")
"""A cross-attention: of random weights it attends to all words alike, so that it says what the prompt is."""


def hears(pipe: Any, text: str = LOUD, other: str = QUIET, **kind: Any) -> Eraser:
    """An eraser whose gate opens for one of two prompts, whatever the picture."""
    found: list[Tensor] = []
    with record(pipe, [READS], lambda site, x, context: found.append(x.mean(1))):
        prompts(pipe, text, other, guidance=1.0)
    loud, quiet = torch.stack(found).mean(0)
    row = (loud - quiet) / (loud - quiet).square().sum()  # 1 apart
    gate = make_gate(READS, 32, f=1, low=10.5, high=10.6)
    gate = replace(
        gate, rows=row[None], bias=10.0 - (row @ quiet)[None], threshold=torch.zeros(1), weight=torch.ones(1)
    )
    return replace(make_eraser(**kind), gate=gate)


class OwnLoop(StableDiffusionPipeline):
    """A pipeline with a plain loop: neither a progress bar nor an end that anyone announces."""

    @torch.no_grad()
    def __call__(self, prompt: list[str], **_: Any) -> Any:  # type: ignore[override]
        return type("Output", (), {"images": loop(self, prompt)})


@torch.no_grad()
def loop(pipe: Any, texts: list[str], decode: bool = False) -> Tensor:
    text, _ = pipe.encode_prompt(texts, "cpu", 1, False)
    pipe.scheduler.set_timesteps(2)
    x = torch.randn(len(texts), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in pipe.scheduler.timesteps:
        x = pipe.scheduler.step(pipe.unet(x, t, encoder_hidden_states=text).sample, t, x).prev_sample
    return pipe.vae.decode(x).sample if decode else x


def twin(pipe: Any, kind: Any = StableDiffusionPipeline, **other: Any) -> Any:
    made = kind(**{**pipe.components, **other}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made
