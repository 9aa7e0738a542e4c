"""SAEs of known weights as other libraries write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from neuraleraser.sae import SAE

N, D, K = 24, 6, 4
WRITTEN = ["saelens", "sparsify", "saeuron", "dictionary_learning", "openai", "sdxl-unbox"]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape)))


def weights(unit: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """[n, d] encoder and decoder rows, biases, thresholds; decoder rows of many norms unless `unit`."""
    rows = torch.nn.functional.normalize(rand(N, D, seed=seed), dim=1)
    return {
        "W_enc": rows + 0.2 * rand(N, D, seed=seed + 1),
        "b_enc": 0.2 * rand(N, seed=seed),
        "W_dec": rows if unit else rows * torch.linspace(0.3, 3, N)[:, None],
        "b_dec": 2 * rand(D, seed=seed),
        "threshold": 0.2 + rand(N, seed=seed + 2).abs(),
    }


def sae(seed: int = 0, header: dict[str, Any] | None = None) -> SAE:
    return SAE(**weights(unit=True, seed=seed), header={"k": K} if header is None else header)


def batch(rows: int = 400, seed: int = 3) -> Tensor:
    return 2 * rand(rows, D, seed=seed) + 1


def top(pre: Tensor, k: int = K) -> Tensor:
    """The k largest of a row where positive, else 0, one row at a time."""
    z = torch.zeros_like(pre)
    for i, row in enumerate(pre):
        for j in sorted(range(len(row)), key=lambda j: -float(row[j]))[:k]:
            z[i, j] = max(float(row[j]), 0.0)
    return z


def put(folder: Path, config: dict[str, Any] | None, name: str, value: Any) -> Path:
    """A stranger's folder: a configuration and a file of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / ("cfg.json" if name.endswith(".safetensors") else "config.json")).write_text(json.dumps(config))
    if name.endswith(".safetensors"):
        save_file({key: x.clone().contiguous() for key, x in value.items()}, folder / name)
    else:
        torch.save(value, folder / name)
    return folder


def saelens(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    base = {"d_in": D, "d_sae": N, "dtype": "float32", "device": "cpu", "metadata": {"sae_lens_version": "6.54.12"}}
    return put(folder, base | config, "sae_weights.safetensors", tensors)


def as_saelens(w: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: w[name].T if name == "W_enc" else w[name] for name in ("W_enc", "W_dec", "b_dec", *names)}


def as_linear(w: dict[str, Tensor]) -> dict[str, Tensor]:
    """dictionary_learning's names for two nn.Linear."""
    return {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T.contiguous()}


def as_openai(w: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "encoder.weight": w["W_enc"],
        "latent_bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
        "pre_bias": w["b_dec"],
        "stats_last_nonzero": torch.zeros(len(w["b_enc"]), dtype=torch.long),
    }


def check(got: SAE, z: Tensor, x_hat: Tensor, x: Tensor, norm: Tensor | float = 1.0) -> None:
    """That `got` gives, in units of rows of norm 1, the activations z and the reconstruction x_hat."""
    assert 0.02 < float((z > 0).float().mean()) < 0.9  # the case says something
    torch.testing.assert_close(got.W_dec.norm(dim=1), torch.ones(got.n_features))
    torch.testing.assert_close(got.encode(x), z * norm, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got(x), x_hat, atol=1e-5, rtol=1e-5)


def image_sae(path: Path) -> None:
    """Write an untrained SAE of the canvas's image stream, 64 wide."""
    rows = torch.nn.functional.normalize(rand(32, 64), dim=1)
    header = {"site": "unet.up_blocks.2.attentions.0:output:image", "settings": {"k": K}}
    SAE(rows, torch.zeros(32), rows, torch.zeros(64), torch.zeros(32), header).save(path)
