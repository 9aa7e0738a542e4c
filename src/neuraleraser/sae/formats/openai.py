"""OpenAI's sparse_autoencoder, one pickled state dict, and sdxl-unbox, which derives from it: a folder with
config.json, state_dict.pth and, where it has them, mean.pt and std.pt.

encoder.weight [n, d], latent_bias, decoder.weight [d, n], pre_bias. OpenAI's `activation` is ReLU or TopK, and TopK
means that every vector is standardised by itself. sdxl-unbox is TopK without that; mean.pt holds the mean
activation of every feature, which it steers with.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import FileError
from neuraleraser.io import atomic, untrusted
from neuraleraser.sae.conversion import Source

WEIGHTS, UNBOX_WEIGHTS, UNBOX_CONFIG = "autoencoder.pt", "state_dict.pth", "config.json"
STATISTICS = {"feature_mean": "mean.pt", "feature_std": "std.pt"}  # by their names in the header


def read(path: Path) -> Source:
    """Return OpenAI's SAE at `path`."""
    state = untrusted.read_state(path)
    source = _source(state, path)
    n = len(source.b_enc)
    activation, its = state.get("activation"), state.get("activation_state_dict", {})
    if activation is None and "latents_activation_frequency" in state:
        activation = "ReLU"  # as OpenAI's own loader takes it
    if not isinstance(its, dict) or activation not in ("ReLU", "TopK", "JumpReLU"):
        raise untrusted.unsupported(
            path,
            "activation",
            activation,
            "expected ReLU or TopK; for a training checkpoint, write its k into a config.json as sdxl-unbox does",
        )
    if activation == "ReLU":
        return replace(source, threshold=source.b_enc.new_zeros(n))
    if activation == "JumpReLU":  # ours
        return replace(source, threshold=untrusted.get_tensor(its, "threshold", (n,), path))
    if its.get("postact_fn", "ReLU") != "ReLU":
        raise untrusted.unsupported(path, "postact_fn", its["postact_fn"], "features of an SAE are never negative")
    return replace(source, k=untrusted.get_int(its, "k", n, path), scaling="layer_norm")


def write(t: dict[str, Tensor], folder: Path, k: int | None) -> Path:
    """Write as a ReLU autoencoder where no threshold is above 0; else with an activation that OpenAI's loader
    refuses, rather than one that it would run without the thresholds. The path of its weights."""
    state: dict[str, Any] = _state(t)
    n = len(t["b_enc"])
    state |= {"latents_activation_frequency": torch.ones(n), "latents_mean_square": torch.zeros(n)}
    plain = not bool(t["threshold"].any())
    state["activation"] = "ReLU" if plain else "JumpReLU"
    state["activation_state_dict"] = {} if plain else {"threshold": t["threshold"]}
    atomic.write_pickle(folder / WEIGHTS, state)
    return folder / WEIGHTS


def read_unbox(path: Path) -> Source:
    """Return the SAE of sdxl-unbox whose weights are at `path`, its configuration beside it."""
    where = path.with_name(UNBOX_CONFIG)
    config, state = untrusted.read_json(where), untrusted.read_state(path)
    inner = state.get("state_dict", state)
    if not isinstance(inner, dict):
        raise FileError(f"{path} has a state_dict that is {type(inner).__name__}: expected a dict of tensors")
    source = _source(inner, path)
    n, d = source.W_enc.shape
    for name, is_ in (("n_dirs_local", n), ("d_model", d)):
        untrusted.expect_equal(config, name, is_, where)
    return replace(source, k=untrusted.get_int(config, "k", n, where))


def statistics(path: Path, n: int) -> dict[str, list[float]]:
    """The mean and standard deviation of every feature, where they lie beside the weights at `path`."""
    found = {}
    for name, file in STATISTICS.items():
        where = path.with_name(file)
        if os.path.exists(where):
            found[name] = untrusted.get_tensor({file: untrusted.read_pickle(where)}, file, (n,), where).tolist()
    return found


def write_unbox(t: dict[str, Tensor], folder: Path, k: int | None, header: dict[str, Any]) -> Path:
    """Write as a TopK autoencoder, with the statistics that `header` has; the path of its weights."""
    n, d = t["W_enc"].shape
    atomic.write_pickle(folder / UNBOX_WEIGHTS, {"state_dict": _state(t)})
    for name, file in STATISTICS.items():
        values = header.get(name)
        if isinstance(values, list) and len(values) == n:
            atomic.write_pickle(folder / file, torch.tensor(values, dtype=torch.float32))
    config = {"n_dirs_local": n, "d_model": d, "k": k, "auxk": None, "dead_steps_threshold": 0}
    atomic.write_json(folder / UNBOX_CONFIG, config)
    return folder / UNBOX_WEIGHTS


def _source(state: dict[str, Any], path: Path) -> Source:
    """Return the source of a checked state dict."""
    W = untrusted.get_tensor(state, "encoder.weight", (None, None), path)
    n, d = W.shape
    return Source(
        W,
        untrusted.get_tensor(state, "latent_bias", (n,), path),
        untrusted.get_tensor(state, "decoder.weight", (d, n), path).T,
        untrusted.get_tensor(state, "pre_bias", (d,), path),
    )


def _state(t: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of our tensors."""
    return {
        "pre_bias": t["b_dec"],
        "latent_bias": t["b_enc"],
        "stats_last_nonzero": torch.zeros(len(t["b_enc"]), dtype=torch.long),
        "encoder.weight": t["W_enc"],
        "decoder.weight": t["W_dec"].T.contiguous(),
    }
