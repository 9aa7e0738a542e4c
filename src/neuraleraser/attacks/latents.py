"""Pictures as latents, as a pipeline has them at the end of sampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neuraleraser.sampling import Images, check_pictures

_BATCH = 20


@torch.no_grad()
def latents_of(pipe: Any, images: Images) -> Tensor:
    """Return the latents of pictures, float32 [N, c, h, w], on the autoencoder's device.

    Raises DataError unless the images are uint8 [N, H, W, 3].
    """
    check_pictures("images", images)
    vae = pipe.vae
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    parts = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode().float() for part in pixels.split(_BATCH)]
    return (torch.cat(parts) - (vae.config.get("shift_factor") or 0)) * vae.config["scaling_factor"]
