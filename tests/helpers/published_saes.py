"""SAEs in the shape that SAeUron and sdxl-unbox publish."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor


def rows(n: int, x: Tensor) -> Tensor:
    """Directions of an SAE [n, d] that has something to say of activations x."""
    own = x[torch.arange(n) % len(x)] - x.mean(0)
    noise = torch.randn(n, x.shape[1], generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(own + 0.3 * own.norm(dim=1, keepdim=True) * noise / x.shape[1] ** 0.5, dim=1)


def saeuron(folder: Path, x: Tensor, k: int = 4) -> Path:
    n, w = 64, rows(64, x)
    folder.mkdir(parents=True)
    tensors = {"encoder.weight": w, "encoder.bias": torch.zeros(n), "W_dec": w.clone(), "b_dec": x.mean(0)}
    save_file(tensors, folder / "sae.safetensors")
    config = {"d_in": x.shape[1], "expansion_factor": 4, "num_latents": n, "k": k, "batch_topk": True}
    config |= {"sample_topk": False, "input_unit_norm": False, "multi_topk": False}
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


def unbox(folder: Path, x: Tensor, k: int = 4) -> Path:
    n, w = 64, rows(64, x)
    folder.mkdir(parents=True)
    state = {"encoder.weight": w, "latent_bias": torch.zeros(n), "decoder.weight": w.T.contiguous()}
    state |= {"pre_bias": x.mean(0), "stats_last_nonzero": torch.zeros(n, dtype=torch.long)}
    torch.save({"state_dict": state}, folder / "state_dict.pth")
    for name in ("mean.pt", "std.pt"):
        torch.save(torch.rand(n), folder / name)
    config = {"n_dirs_local": n, "d_model": x.shape[1], "k": k, "auxk": 16, "dead_steps_threshold": 2441}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
