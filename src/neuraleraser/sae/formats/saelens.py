"""SAELens 6: cfg.json and sae_weights.safetensors, W_enc [d, n], W_dec [n, d] of any norm.

A checkpoint of a training run may lie beside the statistics it standardised activations with, not yet folded in:
activation_scaler.json (u = s x) or activation_whitening.safetensors (u = (x - mean) M). Formulas from its
documentation and code: a Gated SAE, z = e^r u W_enc + b_mag where that and u W_enc + b_gate are positive, is one of
thresholds max(0, b_mag - e^r b_gate).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from neuraleraser.errors import FileError
from neuraleraser.io import atomic, tensor_file, untrusted
from neuraleraser.sae.conversion import Source

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
_SCALER, _WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
_BATCH = ("batchtopk", "matryoshka_batchtopk")  # saved while they train
_KNOWN = ("standard", "jumprelu", "topk", "gated", *_BATCH)


def read(path: Path) -> Source:
    """Return the SAE whose weights are at `path`, its configuration beside it."""
    where = path.with_name(CONFIG)
    config, tensors = untrusted.read_json(where), tensor_file.load_foreign(path)
    architecture = config.get("architecture", "standard")
    legacy = config.get("activation_fn_kwargs")
    if config.get("activation_fn_str", "relu") == "topk" and isinstance(legacy, dict):  # SAELens 5
        architecture, config = "topk", {**config, "k": legacy.get("k")}
    if architecture not in _KNOWN:
        raise untrusted.unsupported(where, "architecture", architecture, f"an SAE can be made from {', '.join(_KNOWN)}")
    if config.get("finetuning_scaling_factor") not in (None, False):
        raise untrusted.unsupported(where, "finetuning_scaling_factor", True, "fold it into the decoder first")
    W = untrusted.get_tensor(tensors, "W_enc", (None, None), path).T
    n, d = W.shape
    for name, is_ in (("d_sae", n), ("d_in", d)):
        untrusted.expect_equal(config, name, is_, where)
    W_dec, b_dec = (
        untrusted.get_tensor(tensors, "W_dec", (n, d), path),
        untrusted.get_tensor(tensors, "b_dec", (d,), path),
    )
    subtracts = untrusted.get_bool(config, "apply_b_dec_to_input", True, where)
    by_norm = untrusted.get_bool(config, "rescale_acts_by_decoder_norm", False, where)
    if architecture == "gated":
        gain = untrusted.get_tensor(tensors, "r_mag", (n,), path).exp()
        bias = untrusted.get_tensor(tensors, "b_mag", (n,), path)
        gate = untrusted.get_tensor(tensors, "b_gate", (n,), path)
        source = Source(W * gain[:, None], bias, W_dec, b_dec, bias - gain * gate, subtracts=subtracts)
    else:
        bias = untrusted.get_tensor(tensors, "b_enc", (n,), path)
        source = Source(W, bias, W_dec, b_dec, bias.new_zeros(n), subtracts=subtracts, by_norm=by_norm)
    if architecture == "jumprelu":
        source = replace(source, threshold=_threshold(tensors, n, path), by_norm=False)
    elif architecture in _BATCH and float(untrusted.get_tensor(tensors, "topk_threshold", (), path)) > 0:
        one = untrusted.get_tensor(tensors, "topk_threshold", (), path)
        source = replace(source, threshold=one.expand(n))
    elif architecture == "topk" or architecture in _BATCH:
        source = replace(source, threshold=None, k=untrusted.get_int(config, "k", n, where))
    return _fold_normalisation(source, config.get("normalize_activations"), path)


def _threshold(tensors: dict[str, Tensor], n: int, path: Path) -> Tensor:
    """Thresholds [n], which older checkpoints of SAELens held as logarithms."""
    if "log_threshold" in tensors and "threshold" not in tensors:
        return untrusted.get_tensor(tensors, "log_threshold", (n,), path).exp()
    return untrusted.get_tensor(tensors, "threshold", (n,), path)


def _fold_normalisation(source: Source, how: object, path: Path) -> Source:
    """The source on raw activations, where its statistics are fixed; else with its `scaling` named."""
    if how in (None, False, "none"):
        return source
    if how == "layer_norm":
        return replace(source, scaling="layer_norm")
    if how == "constant_norm_rescale":
        return replace(source, scaling="norm")
    d = source.W_enc.shape[1]
    if how in (True, "expected_average_only_in"):
        where = path.with_name(_SCALER)
        if not os.path.exists(where):
            raise FileError(f"{path.with_name(CONFIG)} says its activations were scaled and {where} lacks: fetch it")
        s = untrusted.read_json(where).get("scaling_factor")
        if not isinstance(s, (int, float)) or isinstance(s, bool) or not 1e-30 < s < 1e30:
            raise untrusted.unsupported(where, "scaling_factor", s, "expected a positive number")
        matrix, inverse, mean = torch.eye(d).double() * s, torch.eye(d).double() / s, torch.zeros(d).double()
    elif how == "covariance_whitening":
        where = path.with_name(_WHITENING)
        tensors = tensor_file.load_foreign(where)
        matrix, inverse = (untrusted.get_tensor(tensors, name, (d, d), where) for name in ("matrix", "inverse_matrix"))
        mean = untrusted.get_tensor(tensors, "mean", (d,), where)
    else:
        known = "none, expected_average_only_in, covariance_whitening, layer_norm, constant_norm_rescale"
        raise untrusted.unsupported(path.with_name(CONFIG), "normalize_activations", how, f"expected one of {known}")
    if source.by_norm:  # the ranking is by the norms before this
        norm = source.W_dec.norm(dim=1)
        norm = torch.where(norm == 0, 1.0, norm)
        source = replace(
            source,
            W_enc=source.W_enc * norm[:, None],
            b_enc=source.b_enc * norm,
            W_dec=source.W_dec / norm[:, None],
            by_norm=False,
        )
    W = source.W_enc @ matrix.T
    return replace(
        source,
        W_enc=W,
        b_enc=source.b_enc if source.subtracts else source.b_enc - W @ mean,
        W_dec=source.W_dec @ inverse,
        b_dec=source.b_dec @ inverse + mean,
    )


def write(t: dict[str, Tensor], folder: Path, k: int | None) -> Path:
    """Write as a JumpReLU SAE; the path of its weights."""
    n, d = t["W_enc"].shape
    tensors = {**t, "W_enc": t["W_enc"].T}
    tensor_file.save(folder / WEIGHTS, "saelens", tensors, {})
    config = {
        "architecture": "jumprelu",
        "d_in": d,
        "d_sae": n,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.28.0", "sae_lens_training_version": None},
    }
    atomic.write_json(folder / CONFIG, config)
    return folder / WEIGHTS
