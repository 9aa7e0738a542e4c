"""Other libraries' files from strangers: what is damaged or no SAE is one sentence."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.sae_files import WRITTEN, D, N, as_openai, as_saelens, put, sae, saelens, weights
from neuraleraser.errors import DataError, FileError, NeuralEraserError, SettingsError
from neuraleraser.sae.formats import read, write


def bad_saelens(folder: Path, name: str, value: Tensor | None, **config: Any) -> Path:
    tensors = as_saelens(weights(), "b_enc", "threshold")
    if value is None:
        del tensors[name]
    else:
        tensors[name] = value
    return saelens(folder, tensors, **({"architecture": "jumprelu"} | config))


@pytest.mark.parametrize(
    ("name", "value", "config", "message"),
    [
        ("b_enc", None, {}, r"sae_weights\.safetensors has no tensor 'b_enc' \(it has W_dec"),
        ("b_enc", torch.zeros(N + 1), {}, rf"'b_enc' of shape \({N + 1},\): expected \({N},\)"),
        ("W_dec", torch.zeros(N, 0), {}, "tensor 'W_dec' of shape"),
        ("W_enc", torch.zeros(N), {}, r"tensor 'W_enc' of shape \(24,\): expected \('any', 'any'\)"),
        ("threshold", torch.ones(N, dtype=torch.int64), {}, "tensor 'threshold' that is no whole dense float"),
        ("threshold", torch.full((N,), torch.nan), {}, "NaN or infinity in tensor 'threshold'"),
        ("b_dec", torch.zeros(D), {"d_in": 5}, r"cfg\.json has d_in = 5, but the tensors beside it have 6"),
        ("b_dec", torch.zeros(D), {"architecture": "temporal"}, r"cfg\.json has architecture = 'temporal'"),
        ("b_dec", torch.zeros(D), {"architecture": "topk"}, r"cfg\.json has k = None: expected a whole number"),
        ("b_dec", torch.zeros(D), {"architecture": "topk", "k": N + 1}, "k = 25: expected a whole number from 1 to 24"),
        ("b_dec", torch.zeros(D), {"apply_b_dec_to_input": 1}, "apply_b_dec_to_input = 1: expected true or false"),
        ("b_dec", torch.zeros(D), {"normalize_activations": ["\n" * 500]}, r"normalize_activations = \['"),
    ],
)
def test_one_sentence_names_the_file_and_the_field(tmp_path, name, value, config, message):
    with pytest.raises(FileError, match=message) as e:
        read(bad_saelens(tmp_path, name, value, **config))
    assert "\n" not in str(e.value) and str(tmp_path) in str(e.value) and len(str(e.value)) < 500


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({**as_openai(weights()), "activation": Evil()}, r"is refused \(UnpicklingError\)"),
        ([1, 2], "holds list, not a state dict"),
        ({**as_openai(weights()), "encoder.weight": "text"}, "no tensor 'encoder.weight'"),
        ({**as_openai(weights()), "encoder.weight": torch.zeros(1, 1).expand(10**6, 10**6)}, "no whole dense float"),
        ({**as_openai(weights()), "encoder.weight": weights()["W_enc"].to_sparse()}, "no whole dense float"),
        ({**as_openai(weights()), "activation": "TopK", "activation_state_dict": 3}, "activation = 'TopK'"),
        ({**as_openai(weights()), "activation": "TopK", "activation_state_dict": {"k": True}}, "k = True"),
    ],
)
def test_pickles_are_data(tmp_path, state, message):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(FileError, match=message) as e:
        read(tmp_path / "a.pt")
    assert "\n" not in str(e.value)


def archive(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, content in members.items():
            z.writestr(f"{name}.npy", content)
    return path


def test_archives_that_claim_more_than_they_hold_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 3), np.float32))
    header = (tmp_path / "x.npy").read_bytes().replace(b"(3, 3), }          ", b"(3, 30000000000), }")
    with pytest.raises(FileError, match="claims shape"):
        read(archive(tmp_path / "a.npz", W_enc=header))
    with pytest.raises(FileError, match="would unpack from"):
        read(archive(tmp_path / "b.npz", zipfile.ZIP_DEFLATED, W_enc=b"\0" * 2**26))
    np.savez(tmp_path / "c.npz", W_enc=np.array([{}], object))
    with pytest.raises(FileError, match="not a whole npz file of plain arrays"):
        read(tmp_path / "c.npz")


@pytest.mark.parametrize("format", WRITTEN)
def test_damaged_files_are_refused_and_never_crash(tmp_path, format):
    write(sae(), tmp_path, format)
    rng = np.random.default_rng(0)
    for path in sorted(p for p in tmp_path.iterdir() if p.name != "neuraleraser.json"):
        whole = path.read_bytes()
        for i in range(12):
            cut = whole[: int(rng.integers(len(whole)))]
            flipped = bytearray(whole)
            flipped[int(rng.integers(min(len(whole), 400)))] ^= 1 << int(rng.integers(8))
            path.write_bytes(cut if i % 2 else bytes(flipped))
            with pytest.raises(NeuralEraserError) if i % 2 else _either():
                read(tmp_path)
        path.unlink()
        with pytest.raises(FileError):
            read(tmp_path)
        path.write_bytes(whole)
    read(tmp_path)


class _either:
    """Whether it is read or refused: but nothing else may come out."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, NeuralEraserError)


def test_what_is_no_dictionary_is_refused(tmp_path):
    with pytest.raises(FileError, match="has none of the weights known by name"):
        read(tmp_path)
    with pytest.raises(FileError, match=r"gone\.safetensors does not exist"):
        read(tmp_path / "gone.safetensors")
    with pytest.raises(SettingsError, match="format is 'tf': expected one of saelens"):
        read(tmp_path, "tf")  # pyright: ignore[reportArgumentType]
    with pytest.raises(FileError, match=r"ae\.pt|config\.json"):
        read(tmp_path, "dictionary_learning")
    write(sae(), tmp_path, "saelens")
    write(sae(), tmp_path, "openai")
    with pytest.raises(FileError, match=re.escape("sae_weights.safetensors, autoencoder.pt of the weights")):
        read(tmp_path)


@pytest.mark.parametrize("calibrate", [torch.zeros(9, D + 1), torch.zeros(3, D), torch.zeros(9, D).fill_(torch.nan)])
def test_calibration_on_what_is_no_activations_is_refused(tmp_path, calibrate):
    tensors = {"encoder.weight": torch.eye(D), "encoder.bias": torch.zeros(D), "W_dec": torch.eye(D)}
    put(tmp_path, {"d_in": D, "k": 2}, "sae.safetensors", tensors | {"b_dec": torch.zeros(D)})
    with pytest.raises(DataError, match="calibrate"):
        read(tmp_path, calibrate=calibrate)


@pytest.mark.parametrize("flag", ["transcode", "skip_connection", "sample_topk"])
def test_sparsify_that_is_no_autoencoder_of_single_vectors_is_refused(tmp_path, flag):
    write(sae(), tmp_path, "sparsify")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {flag: True}))
    with pytest.raises(FileError, match=f"{flag} = True"):
        read(tmp_path)
