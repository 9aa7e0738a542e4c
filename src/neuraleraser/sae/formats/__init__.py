"""Dictionaries of other libraries: read into an SAE, and written from one.

| format | files | written as |
|---|---|---|
| saelens | cfg.json, sae_weights.safetensors | JumpReLU |
| sparsify, saeuron | cfg.json, sae.safetensors | TopK |
| dictionary_learning | config.json, ae.pt | JumpReluAutoEncoder |
| openai | autoencoder.pt, or any .pt or .pth | ReLU, with thresholds its own activation |
| sdxl-unbox | config.json, state_dict.pth, mean.pt and std.pt if any | TopK |
| gemma-scope | params.npz, or any .npz | read only |

Decoder rows get norm 1 and every scale is folded in, so that x_hat stays equal; weights become float32.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from neuraleraser.errors import FileError, SettingsError
from neuraleraser.io import atomic, untrusted
from neuraleraser.sae.conversion import Source, to_sae
from neuraleraser.sae.formats import dictionary_learning, gemma_scope, openai, saelens, sparsify
from neuraleraser.sae.model import SAE

__all__ = ["Format", "read", "write"]

Format = Literal["saelens", "sparsify", "saeuron", "dictionary_learning", "openai", "sdxl-unbox", "gemma-scope"]

_WEIGHTS: dict[str, str] = {
    "saelens": saelens.WEIGHTS,
    "sparsify": sparsify.WEIGHTS,
    "saeuron": sparsify.WEIGHTS,
    "dictionary_learning": dictionary_learning.WEIGHTS,
    "openai": openai.WEIGHTS,
    "sdxl-unbox": openai.UNBOX_WEIGHTS,
    "gemma-scope": gemma_scope.WEIGHTS,
}
_NOTE = "neuraleraser.json"  # what other formats have no place for: our header, and thresholds where they have none
_NO_THRESHOLD = ("sparsify", "saeuron", "sdxl-unbox")


def read(path: str | os.PathLike[str], format: Format | None = None, calibrate: Tensor | None = None) -> SAE:
    """The SAE that another library's folder or weights file holds, on the CPU in float32; `format` is recognised
    from the names of the files where it is None.

    A dictionary whose features compete (TopK) or that scales every vector by itself (LayerNorm) cannot be one whose
    features stand alone: its thresholds are set on activations `calibrate` [M, d], recorded at its site, so that each
    feature fires as often as it did, and `header["calibration"]` says how far the two differ on a held-out quarter:
    `disagreement` (firings that only one of them has, over all), `missed`, `added`, `l0` and `explained_variance`
    of both. Other dictionaries are equal to what they were and need none. `header` also has `format` and `k`.

    Raises FileError, naming file and field, for anything missing, damaged, unknown or hostile; SettingsError where
    `calibrate` is needed and missing, DataError where it is not activations of the right width.
    """
    name, weights = _recognise(Path(path), format)
    source = _read(name, weights)
    header: dict[str, Any] = {"format": name} | ({} if source.k is None else {"k": source.k})
    if name == "sdxl-unbox":
        header |= openai.statistics(weights, len(source.b_enc))
    note = weights.with_name(_NOTE)
    if os.path.exists(note):
        ours = untrusted.read_json(note)
        if ours.get("weights") != _digest(weights):
            raise FileError(f"{note} belongs to other weights than {weights.name}: remove it to read those as they are")
        if not isinstance(ours.get("header"), dict) or not isinstance(ours.get("threshold", []), list):
            raise FileError(f"{note} has no object 'header' or a 'threshold' that is no list: remove it")
        header = ours["header"]
        if "threshold" in ours:
            source = replace(source, threshold=_parse_thresholds(ours["threshold"], source.b_enc, note))
    return to_sae(source, weights, calibrate, header)


def write(sae: SAE, folder: str | os.PathLike[str], format: str) -> None:
    """Write an SAE in another library's format, in float32, each file in one piece; `read` gives the same SAE back.

    TopK formats hold no thresholds: their own libraries will keep the k largest features, k being the header's `k` or
    the one it was trained with. The header, and those thresholds, go into a neuraleraser.json beside.

    Args:
        sae: The SAE.
        folder: The folder.
        format: Name of the format.

    Raises:
        SettingsError: The format is not written, k is not known, or the folder is not empty.
        FileError: The disk refuses.

    Examples:
        >>> from neuraleraser.sae import formats
        >>> formats.write(sae, "theirs", "saelens")
        >>> formats.read("theirs")
        SAE(n=256, d=128)
    """
    if format not in get_args(Format) or format == "gemma-scope":
        written = ", ".join(name for name in get_args(Format) if name != "gemma-scope")
        raise SettingsError(f"format is {format!r}: an SAE can be written as {written}")
    folder, t = Path(folder), {name: p.detach().float().cpu().contiguous() for name, p in sae.named_parameters()}
    k = _k_of(sae) if format in _NO_THRESHOLD else None
    if format == "saelens":
        weights = saelens.write(t, folder, k)
    elif format == "dictionary_learning":
        weights = dictionary_learning.write(t, folder, k)
    elif format == "openai":
        weights = openai.write(t, folder, k)
    elif format == "sdxl-unbox":
        weights = openai.write_unbox(t, folder, k, sae.header)
    else:
        weights = sparsify.write(t, folder, k, saeuron=format == "saeuron")
    note: dict[str, Any] = {"weights": _digest(weights), "header": sae.header}
    if format in _NO_THRESHOLD:
        note["threshold"] = t["threshold"].tolist()
    atomic.write_json(folder / _NOTE, note)


def _recognise(path: Path, format: Format | None) -> tuple[str, Path]:
    """The format, and the path of its weights."""
    if format is not None:
        if format not in get_args(Format):
            raise SettingsError(f"format is {format!r}: expected one of {', '.join(get_args(Format))}")
        return format, path / _WEIGHTS[format] if os.path.isdir(path) else path
    if os.path.isdir(path):  # unlike Path.is_dir, no error for a name that is too long
        found = [path / file for file in dict.fromkeys(_WEIGHTS.values()) if os.path.exists(path / file)]
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise FileError(
                f"{path} has {names} of the weights known by name: pass format= and the path of the weights"
            )
        path = found[0]
    for name, file in _WEIGHTS.items():
        if path.name == file:
            return ("saeuron" if name == "sparsify" and sparsify.is_saeuron(path) else name), path
    if path.suffix in (".npz", ".pt", ".pth"):
        return ("gemma-scope" if path.suffix == ".npz" else "openai"), path
    if not os.path.exists(path):
        raise FileError(f"{path} does not exist: check the path")
    raise FileError(f"{path} is not known by its name: pass format=, one of {', '.join(get_args(Format))}")


def _read(name: str, weights: Path) -> Source:
    """Read the weights in the format of this name."""
    if name == "saelens":
        return saelens.read(weights)
    if name in ("sparsify", "saeuron"):
        return sparsify.read(weights)
    if name == "dictionary_learning":
        return dictionary_learning.read(weights)
    if name == "openai":
        return openai.read(weights)
    if name == "sdxl-unbox":
        return openai.read_unbox(weights)
    return gemma_scope.read(weights)


def _k_of(sae: SAE) -> int:
    """Return how many features fire for a vector, as the header has it."""
    settings = sae.header.get("settings")
    k = sae.header.get("k", settings.get("k") if isinstance(settings, dict) else None)
    if type(k) is not int or not 1 <= k <= sae.n_features:
        raise SettingsError(f"the SAE's header has k = {k!r}: set sae.header['k'] to the features a vector may have")
    return k


def _parse_thresholds(values: list[Any], like: Tensor, path: Path) -> Tensor:
    """Thresholds [n] from JSON."""
    if len(values) != len(like) or not all(type(v) in (int, float) and 0 <= v < 1e38 for v in values):
        raise FileError(f"{path} has a 'threshold' that is not {len(like)} numbers of at least 0: remove it")
    return like.new_tensor(values)


def _digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
