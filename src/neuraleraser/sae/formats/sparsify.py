"""EleutherAI's sparsify, and SAeUron, which derives from it: cfg.json and sae.safetensors, TopK.

encoder.weight [n, d], encoder.bias, W_dec [n, d], b_dec: z = the k largest of ReLU((x - b_dec) W_enc^T + b_enc).
SAeUron trains with BatchTopK and runs TopK with the same k, which is what is read here; its `input_unit_norm`
standardises every vector by itself.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from neuraleraser.io import atomic, tensor_file, untrusted
from neuraleraser.sae.conversion import Source

WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"


def read(path: Path) -> Source:
    """Return the SAE whose weights are at `path`, its configuration beside it."""
    where = path.with_name(CONFIG)
    config, tensors = untrusted.read_json(where), tensor_file.load_foreign(path)
    for name in ("transcode", "skip_connection"):
        if untrusted.get_bool(config, name, False, where):
            raise untrusted.unsupported(where, name, True, "a transcoder is no autoencoder of one site")
    if untrusted.get_bool(config, "sample_topk", False, where):
        raise untrusted.unsupported(
            where, "sample_topk", True, "features that compete over a whole image cannot be read"
        )
    if config.get("activation", "topk") != "topk":
        raise untrusted.unsupported(where, "activation", config["activation"], "expected topk")
    W = untrusted.get_tensor(tensors, "encoder.weight", (None, None), path)
    n, d = W.shape
    untrusted.expect_equal(config, "d_in", d, where)
    if config.get("num_latents") != 0:  # 0: a multiple of d_in
        untrusted.expect_equal(config, "num_latents", n, where)
    return Source(
        W,
        untrusted.get_tensor(tensors, "encoder.bias", (n,), path),
        untrusted.get_tensor(tensors, "W_dec", (n, d), path),
        untrusted.get_tensor(tensors, "b_dec", (d,), path),
        k=untrusted.get_int(config, "k", n, where),
        scaling="layer_norm" if untrusted.get_bool(config, "input_unit_norm", False, where) else "none",
    )


def is_saeuron(path: Path) -> bool:
    """Tell whether the weights at `path` are SAeUron's, by the switches that it added."""
    return "batch_topk" in untrusted.read_json(path.with_name(CONFIG))


def write(t: dict[str, Tensor], folder: Path, k: int | None, saeuron: bool = False) -> Path:
    """Write as a TopK SAE; the path of its weights."""
    n, d = t["W_enc"].shape
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    tensor_file.save(folder / WEIGHTS, "sparsify", {name: t[ours] for name, ours in names.items()}, {})
    config = {"d_in": d, "num_latents": n, "k": k, "expansion_factor": max(1, n // d), "normalize_decoder": True}
    if saeuron:
        config |= {"multi_topk": False, "batch_topk": False, "sample_topk": False, "input_unit_norm": False}
    else:
        config |= {"activation": "topk", "multi_topk": False, "skip_connection": False, "transcode": False}
    atomic.write_json(folder / CONFIG, config)
    return folder / WEIGHTS
