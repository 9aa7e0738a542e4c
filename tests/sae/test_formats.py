"""Other libraries' files: naive encoders of each, written from their documentation, against what we read."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neuraleraser.errors import DataError, FileError, NeuralEraserError, SettingsError
from neuraleraser.sae import SAE
from neuraleraser.sae.formats import read, write

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
    torch.testing.assert_close(got.W_dec.norm(dim=1), torch.ones(got.n))
    torch.testing.assert_close(got.encode(x), z * norm, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got(x), x_hat, atol=1e-5, rtol=1e-5)


# --- SAELens


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_saelens_thresholds(tmp_path, architecture, subtracts):
    w, x = weights(), batch()
    u = x - w["b_dec"] * subtracts
    if architecture == "gated":
        extra = {"r_mag": 0.3 * rand(N, seed=8), "b_gate": 0.5 * rand(N, seed=9), "b_mag": w["b_enc"]}
        tensors = as_saelens(w) | extra
        gate, pre = u @ w["W_enc"].T + extra["b_gate"], u @ (w["W_enc"].T * extra["r_mag"].exp()) + w["b_enc"]
        z = (gate > 0) * pre.relu()
    else:
        jump = architecture == "jumprelu"
        tensors = as_saelens(w, "b_enc", *(["threshold"] if jump else []))
        pre = u @ w["W_enc"].T + w["b_enc"]
        z = pre.relu() * (pre > (w["threshold"] if jump else 0))
    got = read(saelens(tmp_path, tensors, architecture=architecture, apply_b_dec_to_input=subtracts))
    check(got, z, z @ w["W_dec"] + w["b_dec"], x, w["W_dec"].norm(dim=1))
    assert got.header == {"format": "saelens"}


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("how", ["none", "expected_average_only_in", "covariance_whitening"])
def test_saelens_checkpoint_of_batchtopk_with_what_is_not_folded_yet(tmp_path, how, rescaled):
    w, x = weights(), batch()
    norm = w["W_dec"].norm(dim=1)
    mean, matrix = 0.3 * rand(D, seed=4), torch.eye(D) + 0.1 * rand(D, D, seed=5)
    inverse = torch.linalg.inv(matrix).contiguous()
    folder = saelens(
        tmp_path,
        as_saelens(w, "b_enc") | {"topk_threshold": torch.tensor(1.1, dtype=torch.float64)},
        architecture="batchtopk",
        rescale_acts_by_decoder_norm=rescaled,
        normalize_activations=how,
        k=K,
    )
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": 0.7}))
    statistics = {"mean": mean, "matrix": matrix, "inverse_matrix": inverse}
    save_file(statistics, folder / "activation_whitening.safetensors")
    u = {"none": x, "expected_average_only_in": 0.7 * x, "covariance_whitening": (x - mean) @ matrix}[how]
    pre = (u - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    z = pre * norm if rescaled else pre
    z = z * (z > 1.1)
    y = (z / norm if rescaled else z) @ w["W_dec"] + w["b_dec"]
    back = {"none": y, "expected_average_only_in": y / 0.7, "covariance_whitening": y @ inverse + mean}[how]
    got = read(folder)
    assert bool(((got.encode(x) > 0) == (z > 0)).all())
    torch.testing.assert_close(got(x), back, atol=2e-5, rtol=1e-5)


def test_saelens_older_names(tmp_path):
    w, x = weights(), batch()
    tensors = as_saelens(w, "b_enc") | {"log_threshold": w["threshold"].log()}
    new = read(saelens(tmp_path / "new", as_saelens(w, "b_enc", "threshold"), architecture="jumprelu"))
    old = read(saelens(tmp_path / "old", tensors, architecture="jumprelu", normalize_activations=False))
    torch.testing.assert_close(old(x), new(x), atol=1e-5, rtol=1e-5)
    saelens(tmp_path / "5", as_saelens(w, "b_enc"), activation_fn_str="topk", activation_fn_kwargs={"k": K})
    assert read(tmp_path / "5", calibrate=x).header["k"] == K


def test_saelens_statistics_that_are_missing_are_asked_for(tmp_path):
    saelens(tmp_path, as_saelens(weights(), "b_enc"), normalize_activations="expected_average_only_in")
    with pytest.raises(FileError, match=r"activation_scaler\.json lacks"):
        read(tmp_path)


# --- TopK formats: what is left once the thresholds are calibrated


def planted(rows: int = 4000, margin: bool = True) -> tuple[dict[str, Tensor], Tensor]:
    """A dictionary of orthogonal rows, each of one norm, and vectors in which exactly 2 of 6 fire, well apart."""
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(D, D, generator=g)).Q
    w = {"W_enc": q, "b_enc": torch.zeros(D), "W_dec": q, "b_dec": torch.randn(D, generator=g)}
    z = torch.zeros(rows, D).scatter(1, torch.rand(rows, D, generator=g).topk(2).indices, 1.0)
    z = z * (1 + torch.rand(rows, D, generator=g)) + (0.3 * torch.rand(rows, D, generator=g) if margin else 0.0)
    return w, z @ q + w["b_dec"]


@pytest.mark.parametrize("format", ["sparsify", "saeuron", "dictionary_learning", "sdxl-unbox", "saelens"])
def test_topk_where_features_are_well_apart_becomes_equal(tmp_path, format):
    w, x = planted()
    tensors = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    if format == "sparsify":
        put(tmp_path, {"d_in": D, "num_latents": 0, "k": 2, "activation": "topk"}, "sae.safetensors", tensors)
    elif format == "saeuron":
        put(tmp_path, {"d_in": D, "k": 2, "batch_topk": True}, "sae.safetensors", tensors)
    elif format == "dictionary_learning":
        state = as_linear(w) | {"b_dec": w["b_dec"], "k": torch.tensor(2), "threshold": torch.tensor(-1.0)}
        put(tmp_path, {"trainer": {"dict_class": "BatchTopKSAE", "k": 2}}, "ae.pt", state)
    elif format == "sdxl-unbox":
        config = {"n_dirs_local": D, "d_model": D, "k": 2, "auxk": 1, "dead_steps_threshold": 9}
        put(tmp_path, config, "state_dict.pth", {"state_dict": as_openai(w)})
        torch.save(torch.arange(D).float(), tmp_path / "mean.pt")
    else:
        saelens(tmp_path, as_saelens(w, "b_enc"), architecture="topk", k=2, d_sae=D)
    with pytest.raises(SettingsError, match=rf"keeps the 2 largest .* pass calibrate=activations \[M, {D}\]"):
        read(tmp_path)
    got = read(tmp_path, calibrate=x)
    fresh = planted(200)[1][:50]
    z = top((fresh - w["b_dec"]) @ w["W_enc"].T + w["b_enc"], 2)
    check(got, z, z @ w["W_dec"] + w["b_dec"], fresh)
    assert (got.header["format"], got.header["k"]) == (format, 2)
    measured = got.header["calibration"]
    assert (measured["vectors"], measured["held_out"], measured["disagreement"]) == (3000, 1000, 0.0)
    assert measured["explained_variance"] == pytest.approx(measured["explained_variance_source"])
    assert got.header.get("feature_mean") == (list(range(D)) if format == "sdxl-unbox" else None)
    json.dumps(got.header, allow_nan=False)


def test_topk_where_features_compete_is_measured_honestly(tmp_path):
    w, x = weights(), batch(4000)
    tensors = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    got = read(put(tmp_path, {"d_in": D, "k": K}, "sae.safetensors", tensors), calibrate=x)
    held = x[3::4]
    z, norm = top((held - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]), w["W_dec"].norm(dim=1)
    theirs, ours = z > 0, got.encode(held) > 0
    both = theirs & ours
    torch.testing.assert_close(got.encode(held)[both], (z * norm)[both], atol=1e-5, rtol=1e-5)
    measured = got.header["calibration"]
    assert measured["disagreement"] == pytest.approx(1 - float(both.sum() / (theirs | ours).sum()), abs=1e-6)
    assert measured["missed"] == pytest.approx(1 - float(both.sum() / theirs.sum()), abs=1e-6)
    assert measured["l0"] == pytest.approx(measured["l0_source"], rel=0.05)  # each as often as before
    variance = (held - held.mean(0)).square().sum()
    ev = 1 - (held - z @ w["W_dec"] - w["b_dec"]).square().sum() / variance
    assert measured["explained_variance_source"] == pytest.approx(float(ev), abs=1e-5)
    ev = 1 - (held - got(held)).square().sum() / variance
    assert measured["explained_variance"] == pytest.approx(float(ev), abs=1e-5)


@pytest.mark.parametrize("format", ["openai", "saelens", "saeuron"])
def test_layer_norm_becomes_a_fixed_scale(tmp_path, format):
    """Exact where all vectors have the mean and deviation of the calibration set; elsewhere it is measured."""
    g = torch.Generator().manual_seed(1)
    u = torch.randn(4000, D, generator=g)
    u = (u - u.mean(1, keepdim=True)) / u.std(1, keepdim=True)
    x, w = 3 * u + 5, weights(seed=5)
    w["b_dec"] = 0.1 * w["b_dec"]
    pre = (u - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    if format == "openai":
        put(tmp_path, None, "autoencoder.pt",
            as_openai(w) | {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}})  # fmt: skip
        z = top(pre[:200])
    elif format == "saeuron":
        tensors = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
        config = {"d_in": D, "k": K, "batch_topk": False, "input_unit_norm": True}
        put(tmp_path, config, "sae.safetensors", tensors)
        z = top(pre[:200])
    else:
        saelens(tmp_path, as_saelens(w, "b_enc"), architecture="standard", normalize_activations="layer_norm")
        z = pre[:200].relu()
        with pytest.raises(SettingsError, match="scales every vector by itself"):
            read(tmp_path)
    got = read(tmp_path, calibrate=x)
    ours, norm = got.encode(x[:200]), w["W_dec"].norm(dim=1)
    both = (z > 0) & (ours > 0)
    assert int(both.sum()) > 0.7 * int((z > 0).sum())
    torch.testing.assert_close(ours[both], (3 * z * norm)[both], atol=1e-4, rtol=1e-4)
    y = 3 * (ours / 3 / norm @ w["W_dec"] + w["b_dec"]) + 5
    torch.testing.assert_close(got(x[:200]), y, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("format", "n", "k"), [("saeuron", 20480, 32), ("sdxl-unbox", 5120, 10)])
def test_files_of_the_published_shapes(tmp_path, format, n, k):
    """SAeUron's and sdxl-unbox's dictionaries: 1280 wide, as many features, their own tensor names."""
    rows = torch.nn.functional.normalize(rand(n, 1280), dim=1)
    w = {"W_enc": rows, "b_enc": torch.zeros(n), "W_dec": rows, "b_dec": rand(1280)}
    if format == "saeuron":
        tensors = {"encoder.weight": rows, "encoder.bias": w["b_enc"], "W_dec": rows, "b_dec": w["b_dec"]}
        config = {"d_in": 1280, "expansion_factor": 16, "num_latents": 0, "k": k, "batch_topk": True,
                  "sample_topk": False, "input_unit_norm": False, "multi_topk": False}  # fmt: skip
        put(tmp_path, config, "sae.safetensors", tensors)
    else:
        config = {"n_dirs_local": n, "d_model": 1280, "k": k, "auxk": 256, "dead_steps_threshold": 2441}
        put(tmp_path, config, "state_dict.pth", {"state_dict": as_openai(w)})
        torch.save(torch.rand(n), tmp_path / "mean.pt")
        torch.save(torch.rand(n), tmp_path / "std.pt")
    x = 5 * rows[torch.arange(512 * k) % n].view(512, k, 1280).sum(1) + w["b_dec"]
    got = read(tmp_path, calibrate=x)
    assert (got.n, got.d, got.header["k"], got.header["format"]) == (n, 1280, k, format)
    assert got.header["calibration"]["missed"] < 1
    z = (x[:4] - w["b_dec"]) @ rows.T
    fires = got.encode(x[:4]) > 0
    torch.testing.assert_close(got.encode(x[:4])[fires], z[fires], atol=1e-5, rtol=1e-5)


# --- dictionary_learning, OpenAI, Gemma Scope


def trainer(name: str) -> dict[str, Any]:
    return {"trainer": {"dict_class": name, "dict_size": N, "activation_dim": D, "k": K}, "buffer": {}}


@pytest.mark.parametrize(
    "name",
    ["AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "BatchTopKSAE",
     "MatryoshkaBatchTopKSAE"],
)  # fmt: skip
def test_dictionary_learning(tmp_path, name):
    w, x = weights(), batch()
    b_dec, pre = w["b_dec"], (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    if name == "AutoEncoder":
        state, z = as_linear(w) | {"bias": b_dec}, pre.relu()
    elif name == "AutoEncoderNew":
        state, z = as_linear(w) | {"decoder.bias": b_dec}, (x @ w["W_enc"].T + w["b_enc"]).relu()
    elif name == "GatedAutoEncoder":
        extra = {"r_mag": 0.3 * rand(N, seed=8), "gate_bias": 0.5 * rand(N, seed=9), "mag_bias": w["b_enc"]}
        state = {k: v for k, v in as_linear(w).items() if k != "encoder.bias"} | extra | {"decoder_bias": b_dec}
        linear = (x - b_dec) @ w["W_enc"].T
        z = (linear + extra["gate_bias"] > 0) * (extra["r_mag"].exp() * linear + extra["mag_bias"]).relu()
    elif name == "JumpReluAutoEncoder":
        state, pre = {**w, "W_enc": w["W_enc"].T.contiguous()}, x @ w["W_enc"].T + w["b_enc"]
        z = (pre * (pre > w["threshold"])).relu()
    elif name == "BatchTopKSAE":
        state = as_linear(w) | {"b_dec": b_dec, "k": torch.tensor(K), "threshold": torch.tensor(0.9)}
        z = pre.relu() * (pre > 0.9)
    else:
        state = {**w, "W_enc": w["W_enc"].T.contiguous(), "threshold": torch.tensor(0.9), "k": torch.tensor(K),
                 "group_sizes": torch.tensor([4, N - 4])}  # fmt: skip
        z = pre.relu() * (pre > 0.9)
    got = read(put(tmp_path, trainer(name), "ae.pt", state))
    check(got, z, z @ w["W_dec"] + b_dec, x, w["W_dec"].norm(dim=1))


def test_openai_relu(tmp_path):
    w, x = weights(), batch()
    state = as_openai(w) | {"activation": "ReLU", "activation_state_dict": {}}
    torch.save(state, tmp_path / "12.pt")  # as published: one file, any name
    z = ((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu()
    check(read(tmp_path / "12.pt"), z, z @ w["W_dec"] + w["b_dec"], x, w["W_dec"].norm(dim=1))
    torch.save(as_openai(w), tmp_path / "13.pt")
    with pytest.raises(FileError, match=r"13\.pt has activation = None: .* write its k"):
        read(tmp_path / "13.pt")


def test_gemma_scope(tmp_path):
    w, x = weights(), batch()
    np.savez(tmp_path / "params.npz", **{k: (v.T if k == "W_enc" else v).numpy() for k, v in w.items()})
    pre = x @ w["W_enc"].T + w["b_enc"]
    z = pre * (pre > w["threshold"])
    for path in (tmp_path, tmp_path / "params.npz"):
        check(read(path), z, z @ w["W_dec"] + w["b_dec"], x, w["W_dec"].norm(dim=1))
    with pytest.raises(SettingsError, match="can be written as saelens"):
        write(sae(), tmp_path, "gemma-scope")


def test_a_row_of_zeros_shows_nothing_and_never_fires(tmp_path):
    w, x = weights(), batch()
    w["W_dec"][5] = 0
    got = read(saelens(tmp_path, as_saelens(w, "b_enc", "threshold"), architecture="jumprelu"))
    assert not bool((got.encode(x)[:, 5] > 0).any())
    pre = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    torch.testing.assert_close(got(x), pre * (pre > w["threshold"]) @ w["W_dec"] + w["b_dec"], atol=1e-5, rtol=1e-5)


# --- round trips


@pytest.mark.parametrize("format", WRITTEN)
def test_written_and_read_it_is_the_same(tmp_path, format):
    header = {"settings": {"k": 3}, "site": "unet.mid_block:output:image", "feature_mean": [0.5] * N}
    for seed in (0, 1):  # the second over the first
        before = sae(seed, header)
        write(before, tmp_path, format)
        after, x = read(tmp_path), batch()
        for name, p in before.named_parameters():
            if format == "dictionary_learning":  # which takes b_dec off elsewhere
                torch.testing.assert_close(after.get_parameter(name), p, atol=1e-6, rtol=1e-6)
            else:
                assert torch.equal(after.get_parameter(name), p), name
        torch.testing.assert_close(after(x), before(x), atol=1e-5, rtol=1e-5)
        assert after.header == header
    assert not [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]


@pytest.mark.parametrize("format", ["sparsify", "saeuron", "sdxl-unbox"])
def test_topk_needs_k_to_be_written_and_its_note_belongs_to_its_weights(tmp_path, format):
    with pytest.raises(SettingsError, match=r"k = None: set sae\.header\['k'\]"):
        write(sae(header={}), tmp_path, format)
    write(sae(), tmp_path, format)
    note = (tmp_path / "neuraleraser.json").read_text()
    write(sae(1), tmp_path, format)
    (tmp_path / "neuraleraser.json").write_text(note)
    with pytest.raises(FileError, match="belongs to other weights"):
        read(tmp_path)
    (tmp_path / "neuraleraser.json").unlink()
    with pytest.raises(SettingsError, match="keeps the 4 largest"):
        read(tmp_path)


def test_openai_without_thresholds_is_written_as_its_own_relu(tmp_path):
    plain = SAE(**{**weights(unit=True), "threshold": torch.zeros(N)})
    write(plain, tmp_path, "openai")
    state = torch.load(tmp_path / "autoencoder.pt", weights_only=True)
    assert (state["activation"], state["activation_state_dict"]) == ("ReLU", {})


# --- files from strangers


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
