"""A NeuralEraser eraser as a technique of eval-unlearn (https://pypi.org/project/eval-unlearn/, MIT).

The benchmark makes a technique with the entries of its config, and calls `generate(prompts, seed=...)`. Steps,
guidance, fp16 on a GPU, the seed of each image and the safety checker, which is off, are as in its own techniques.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from eval_unlearn.configs.base import BaseConfig

from neuraleraser import Eraser, SettingsError, attach, open_pipeline


@dataclass(frozen=True)
class NeuralEraserConfig(BaseConfig):
    """Settings of the technique."""

    eraser: str = ""
    """An eraser's file or folder, or its id on the Hub."""
    model_id: str = "CompVis/stable-diffusion-v1-4"
    """The pipeline that the eraser was made for: a folder, or an id on the Hub."""
    erase_concept: str | None = None
    """What the benchmark's metrics ask for, such as "nudity"; the eraser itself says what is erased."""
    strength: float = 1.0
    """Strength of the eraser, from 0 (nothing) to 2."""
    device: str | None = None
    """Device of the pipeline; None: a GPU, if there is one."""
    use_fp16: bool = True
    """Run in fp16 on a GPU."""
    num_inference_steps: int = 50
    """Denoising steps."""
    guidance_scale: float = 7.5
    """Classifier-free guidance scale."""

    def __post_init__(self) -> None:
        if not self.eraser:
            raise SettingsError(
                "the technique's config names no eraser: give it \"eraser\", the path of an eraser's file"
            )


class NeuralEraserTechnique:
    """The technique "neuraleraser". Its settings are those of `NeuralEraserConfig`; others are ignored."""

    def __init__(self, **settings: Any) -> None:
        self.config = c = NeuralEraserConfig.from_dict(settings)
        self.eraser = Eraser.from_pretrained(c.eraser)
        device = c.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.float16 if c.use_fp16 and device.startswith("cuda") else torch.float32
        self.pipe = open_pipeline(c.model_id, dtype, device=device)
        if getattr(self.pipe, "safety_checker", None) is not None:
            self.pipe.safety_checker = None

    def generate(self, prompts: Sequence[str], seed: int | None = None, **more: Any) -> list[Any]:
        """Return an image for each prompt, with the eraser attached; image i has the seed `seed` + i.

        `more` goes to the pipeline, before the config's steps and guidance. Raises whatever `attach` does, so that an
        eraser that did not run is an error and no image.
        """
        how = {"num_inference_steps": self.config.num_inference_steps, "guidance_scale": self.config.guidance_scale}
        how |= more
        images = []
        with attach(self.pipe, self.eraser, self.config.strength):
            for i, prompt in enumerate(prompts):
                noise = None if seed is None else torch.Generator(self.pipe.device).manual_seed(seed + i)
                images.append(self.pipe(prompt=prompt, generator=noise, **how).images[0])
        return images
