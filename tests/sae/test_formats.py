"""Other libraries' files: naive encoders of each, written from their documentation, against what we read."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from helpers.sae_files import (
    WRITTEN,
    D,
    K,
    N,
    as_linear,
    as_openai,
    as_saelens,
    batch,
    check,
    put,
    rand,
    sae,
    saelens,
    top,
    weights,
)
from neuraleraser.errors import FileError, SettingsError
from neuraleraser.sae import SAE
from neuraleraser.sae.formats import read, write

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
    assert (got.n_features, got.d_in, got.header["k"], got.header["format"]) == (n, 1280, k, format)
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
