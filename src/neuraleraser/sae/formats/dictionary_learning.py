"""dictionary_learning: config.json, which names the class, and ae.pt, a pickled state dict.

| class | what fires |
|---|---|
| AutoEncoder, AutoEncoderNew | pre > 0; the second does not take its bias off x |
| GatedAutoEncoder | e^r u W + b_mag where that and u W + b_gate are positive: thresholds max(0, b_mag - e^r b_gate) |
| JumpReluAutoEncoder | pre > threshold [n]; b_dec is not taken off x |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | pre > one threshold; -1 where none was estimated: then as TopK here |
| AutoEncoderTopK | the k largest |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from neuraleraser.errors import FileError
from neuraleraser.io import atomic, untrusted
from neuraleraser.sae.conversion import Source

WEIGHTS, CONFIG = "ae.pt", "config.json"
_TOPK = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
_KNOWN = ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", *_TOPK)


def read(path: Path) -> Source:
    """The dictionary whose weights are at `path`, its configuration beside it."""
    where = path.with_name(CONFIG)
    config = untrusted.read_json(where).get("trainer")
    if not isinstance(config, dict):
        raise FileError(f"{where} has no object 'trainer': it is not of dictionary_learning")
    kind = config.get("dict_class")
    if kind not in _KNOWN:
        raise untrusted.unsupported(where, "dict_class", kind, f"an SAE can be made from {', '.join(_KNOWN)}")
    state = untrusted.read_state(path)
    if kind in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"):
        W = untrusted.get_tensor(state, "W_enc", (None, None), path).T
        n, d = W.shape
        W_dec = untrusted.get_tensor(state, "W_dec", (n, d), path)
    else:
        W = untrusted.get_tensor(state, "encoder.weight", (None, None), path)
        n, d = W.shape
        W_dec = untrusted.get_tensor(state, "decoder.weight", (d, n), path).T
    for name, is_ in (("dict_size", n), ("activation_dim", d)):
        untrusted.expect_equal(config, name, is_, where)

    def named(name: str, size: int) -> Tensor:
        return untrusted.get_tensor(state, name, (size,), path)

    if kind == "AutoEncoder":
        return Source(W, named("encoder.bias", n), W_dec, named("bias", d), W.new_zeros(n))
    if kind == "AutoEncoderNew":
        return Source(W, named("encoder.bias", n), W_dec, named("decoder.bias", d), W.new_zeros(n), subtracts=False)
    if kind == "GatedAutoEncoder":
        gain, bias = named("r_mag", n).exp(), named("mag_bias", n)
        threshold = bias - gain * named("gate_bias", n)
        return Source(W * gain[:, None], bias, W_dec, named("decoder_bias", d), threshold)
    bias = named("b_enc" if "W_enc" in state else "encoder.bias", n)
    if kind == "JumpReluAutoEncoder":
        return Source(W, bias, W_dec, named("b_dec", d), named("threshold", n), subtracts=False)
    return Source(W, bias, W_dec, named("b_dec", d), *_firing_rule(kind, config, state, n, path))


def _firing_rule(
    kind: str, config: dict[str, Any], state: dict[str, Any], n: int, path: Path
) -> tuple[Tensor | None, int]:
    """The threshold [n], where the class fires by one that was estimated, and k."""
    k = untrusted.get_int(config, "k", n, path.with_name(CONFIG))
    if kind == "AutoEncoderTopK":
        return None, k
    threshold = untrusted.get_tensor(state, "threshold", (), path)
    return (threshold.expand(n) if float(threshold) >= 0 else None), k


def write(t: dict[str, Tensor], folder: Path, k: int | None) -> Path:
    """Write as a JumpReluAutoEncoder; the path of its weights."""
    n, d = t["W_enc"].shape
    bias = t["b_enc"].double() - t["W_enc"].double() @ t["b_dec"].double()
    tensors = {**t, "W_enc": t["W_enc"].T.contiguous(), "b_enc": bias.float()}
    atomic.write_pickle(folder / WEIGHTS, tensors)
    trainer = {"dict_class": "JumpReluAutoEncoder", "activation_dim": d, "dict_size": n}
    atomic.write_json(folder / CONFIG, {"trainer": trainer})
    return folder / WEIGHTS
