"""The same formats against the packages themselves, both ways: `pip install 'neuraleraser[test-interop]'`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neuraleraser.sae import SAE
from neuraleraser.sae.formats import read, write

N, D, K = 24, 6, 4


def package(name: str) -> ModuleType:
    """The package, or a skip; what it warns of while it loads is its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, exc_type=ImportError)


def ours(threshold: float = 0.7) -> SAE:
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(N, D, generator=g), dim=1)
    b_enc, b_dec = 0.1 * torch.randn(N, generator=g), torch.randn(D, generator=g)
    return SAE(rows * 1.1, b_enc, rows, b_dec, threshold + torch.rand(N, generator=g), {"k": K})


def batch(rows: int = 2000) -> Tensor:
    return 2 * torch.randn(rows, D, generator=torch.Generator().manual_seed(1)) + 1


def scatter(module: nn.Module) -> Any:
    """The module with values in every parameter, rows of the decoder of any norm."""
    g = torch.Generator().manual_seed(2)
    for name, p in module.named_parameters():
        noise = 0.5 * torch.randn(p.shape, generator=g)
        p.data = (0.3 + noise.abs() if "threshold" in name else noise).to(p.dtype)
    return module


def equal(got: Tensor, want: Tensor) -> None:
    assert bool((want != 0).any())
    torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("kind", ["Standard", "JumpReLU", "Gated"])
def test_saelens_read(tmp_path: Path, kind: str, subtracts: bool):
    lib = package("sae_lens")
    config = getattr(lib, f"{kind}SAEConfig")(d_in=D, d_sae=N, apply_b_dec_to_input=subtracts)
    theirs, x = scatter(getattr(lib, f"{kind}SAE")(config)), batch()
    theirs.save_model(tmp_path)
    equal(read(tmp_path)(x), theirs(x))
    equal(read(tmp_path).encode(x), theirs.encode(x) * theirs.W_dec.norm(dim=1))


@pytest.mark.parametrize("rescaled", [True, False])
def test_saelens_batchtopk_checkpoint_read(tmp_path: Path, rescaled: bool):
    lib = package("sae_lens")
    config = lib.BatchTopKTrainingSAEConfig(d_in=D, d_sae=N, k=K, rescale_acts_by_decoder_norm=rescaled)
    theirs, x = scatter(lib.BatchTopKTrainingSAE(config)), batch()
    theirs.topk_threshold.fill_(0.8)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    final = lib.SAE.load_from_disk(tmp_path / "inference")
    for folder in ("training", "inference"):
        equal(read(tmp_path / folder)(x), final(x))


def test_saelens_written(tmp_path: Path):
    lib = package("sae_lens")
    before, x = ours(), batch()
    write(before, tmp_path, "saelens")
    after = lib.SAE.load_from_disk(tmp_path)
    assert after.cfg.architecture() == "jumprelu"
    equal(before.encode(x), after.encode(x))
    equal(before(x), after(x))


def test_sparsify_read(tmp_path: Path):
    lib = package("sparsify")
    theirs, x = scatter(lib.SparseCoder(D, lib.SparseCoderConfig(num_latents=N, k=K))), batch()
    theirs.save_to_disk(tmp_path)
    top = theirs.encode(x)
    z = torch.zeros(len(x), N).scatter(1, top.top_indices, top.top_acts.detach()) * theirs.W_dec.detach().norm(dim=1)
    got = read(tmp_path, calibrate=x)
    both = (z > 0) & (got.encode(x) > 0)
    assert got.header["calibration"]["missed"] < 0.5 and int(both.sum()) > len(x)
    equal(got.encode(x)[both], z[both])


def test_sparsify_written(tmp_path: Path):
    lib = package("sparsify")
    before, x = ours(), batch()
    write(before, tmp_path, "sparsify")
    after = lib.SparseCoder.load_from_disk(tmp_path)
    assert (after.cfg.k, after.num_latents) == (K, N)
    top = after.encode(x)
    z = torch.zeros(len(x), N).scatter(1, top.top_indices, top.top_acts.detach())
    both = (z > 0) & (before.encode(x) > 0)
    equal(before.encode(x)[both], z[both])
    equal(after.decode(top.top_acts, top.top_indices), before.decode(z))


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder"])
def test_dictionary_learning_read(tmp_path: Path, kind: str):
    lib = package("dictionary_learning.dictionary")
    theirs, x = scatter(getattr(lib, kind)(D, N)), batch()
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, "dict_size": N}}))
    equal(read(tmp_path)(x), theirs(x))


@pytest.mark.parametrize("kind", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_dictionary_learning_thresholds_read(tmp_path: Path, kind: str):
    home = {"BatchTopKSAE": "batch_top_k", "MatryoshkaBatchTopKSAE": "matryoshka_batch_top_k"}[kind]
    lib = package(f"dictionary_learning.trainers.{home}")
    groups = [[4, N - 4]] if kind.startswith("M") else []
    theirs, x = scatter(getattr(lib, kind)(D, N, K, *groups)), batch()
    theirs.threshold.fill_(0.6)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind, "k": K}}))
    equal(read(tmp_path)(x), theirs(x))


def test_dictionary_learning_written(tmp_path: Path):
    lib = package("dictionary_learning.dictionary")
    before, x = ours(), batch()
    write(before, tmp_path, "dictionary_learning")
    after = lib.JumpReluAutoEncoder.from_pretrained(tmp_path / "ae.pt")
    equal(before(x), after(x))
    equal(before.encode(x), after.encode(x))
