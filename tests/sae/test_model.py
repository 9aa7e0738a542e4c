"""The SAE as a thing to use: what it computes, that features stand alone, files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuraleraser.errors import DataError, FileError, SettingsError
from neuraleraser.io import tensor_file
from neuraleraser.sae import SAE, measure_sae, pool_batches


def random_sae(n: int = 24, d: int = 6, seed: int = 0) -> SAE:
    g = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    biases = 0.1 * torch.randn(n, generator=g), torch.randn(d, generator=g)
    return SAE(rows * 1.1, biases[0], rows, biases[1], 0.5 * torch.rand(n, generator=g))


def test_the_formula():
    sae = SAE(
        W_enc=torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        b_enc=torch.tensor([0.0, 0.5, 0.0]),
        W_dec=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]),
        b_dec=torch.tensor([1.0, 0.0]),
        threshold=torch.tensor([0.0, 1.5, 2.0]),
    )
    x = torch.tensor([[2.0, 1.0]])  # pre = (2, 1.5, 2): a feature at its threshold does not fire
    assert torch.equal(sae.encode(x), torch.tensor([[2.0, 0.0, 0.0]]))
    assert torch.equal(sae(x), torch.tensor([[3.0, 0.0]]))
    assert (sae.n_features, sae.d_in) == (3, 2)


@given(seed=st.integers(0, 100), keep=st.lists(st.integers(0, 23), min_size=1, max_size=5, unique=True))
def test_features_stand_alone(seed, keep):
    """Law 4: a feature is what it would be in an SAE of few features, and for a vector alone."""
    sae = random_sae(seed=seed)
    x = 2 * torch.randn(9, 6, generator=torch.Generator().manual_seed(seed + 1))
    few = SAE(sae.W_enc[keep], sae.b_enc[keep], sae.W_dec[keep], sae.b_dec, sae.threshold[keep])
    torch.testing.assert_close(few.encode(x), sae.encode(x)[:, keep])
    torch.testing.assert_close(sae.encode(x[3]), sae.encode(x)[3])


def test_gradients_reach_the_activations_and_not_the_weights():
    sae, x = random_sae(), torch.randn(4, 3, 6).requires_grad_()
    sae(x).square().sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())
    assert all(p.grad is None for p in sae.parameters())


def test_saved_and_loaded_it_is_the_same(tmp_path):
    sae, x = random_sae(), torch.randn(20, 6)
    sae.header = {"settings": {"k": 3}, "measures": measure_sae(sae, x)}
    sae.save(tmp_path / "a.safetensors", {"site": "unet.mid_block:output:image", "time_scale": 1000})
    back = SAE.load(tmp_path / "a.safetensors")
    assert all(torch.equal(p, q) for p, q in zip(sae.parameters(), back.parameters(), strict=True))
    assert torch.equal(back(x), sae(x))
    assert back.header == {**sae.header, "site": "unet.mid_block:output:image", "time_scale": 1000}
    half = sae.bfloat16()
    half.save(tmp_path / "b.safetensors")
    assert SAE.load(tmp_path / "b.safetensors").W_dec.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"W_enc": torch.ones(24, 5)}, "do not fit"),
        ({"W_enc": torch.ones(24)}, r"shape \(24,\)"),
        ({"b_dec": torch.ones(24)}, "do not fit"),
        ({"W_dec": 2 * torch.ones(24, 6)}, "norm"),
        ({"W_dec": torch.zeros(24, 6)}, "norm"),
        ({"threshold": -torch.ones(24)}, "threshold"),
        ({"threshold": torch.ones(24, dtype=torch.int64)}, "dtypes"),
    ],
)
def test_what_is_no_sae_is_refused(change, message, tmp_path):
    tensors = {**dict(random_sae().named_parameters()), **change}
    with pytest.raises(DataError, match=message):
        SAE(**tensors)
    tensor_file.save(tmp_path / "x", "sae", tensors, {})
    with pytest.raises(FileError, match=message):
        SAE.load(tmp_path / "x")


def test_files_of_other_tensors_or_kinds_are_refused(tmp_path):
    tensors = {"b_dec": torch.zeros(3), "other": torch.zeros(3)}
    tensor_file.save(tmp_path / "x", "sae", tensors, {})
    with pytest.raises(FileError, match=r"an SAE has \['W_dec'"):
        SAE.load(tmp_path / "x")
    tensor_file.save(tmp_path / "x", "eraser", tensors, {})
    with pytest.raises(FileError, match="eraser"):
        SAE.load(tmp_path / "x")


def test_another_width_is_refused():
    with pytest.raises(DataError, match=r"shape \(4, 5\): this SAE takes \[\.\.\., 6\]"):
        random_sae().encode(torch.zeros(4, 5))


def test_measures():
    eye = torch.eye(4)
    sae = SAE(eye, torch.zeros(4), eye, torch.zeros(4), torch.zeros(4))
    x = torch.zeros(100, 4)
    x[:, 0], x[:10, 1], x[:1, 2] = 1 + torch.arange(100) / 100, 1.0, 1.0
    m = measure_sae(sae, x)
    assert m["explained_variance"] == pytest.approx(1.0)
    assert m["l0"] == pytest.approx(1.11)
    assert m["dead_share"] == 0.25
    by_edge = dict(zip(m["rates"]["log10_edges"], m["rates"]["features"], strict=False))
    assert by_edge[-2.0] == 1 and by_edge[-1.0] == 1 and by_edge[-0.5] == 1
    assert sum(m["rates"]["features"]) == 3
    mean = SAE(eye, torch.full((4,), -9.0), eye, x.mean(0), torch.zeros(4))
    assert measure_sae(mean, x)["explained_variance"] == pytest.approx(0.0, abs=1e-6)


def test_measures_do_not_depend_on_how_they_are_made(monkeypatch):
    sae, x = random_sae(), torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    whole = measure_sae(sae, x)
    monkeypatch.setattr("neuraleraser.sae.quality._CHUNK", 24 * 7)
    parts = measure_sae(sae, x)
    assert parts.pop("explained_variance") == pytest.approx(whole.pop("explained_variance"))
    assert parts == whole


def test_bad_activations_are_not_measured():
    sae = random_sae()
    for x, message in [
        (torch.zeros(0, 6), r"shape \(0, 6\)"),
        (torch.zeros(3, 5), r"shape \(3, 5\)"),
        (torch.full((3, 6), float("nan")), "18 of 18"),
    ]:
        with pytest.raises(DataError, match=message):
            measure_sae(sae, x)


@given(n=st.integers(1, 40), share=st.floats(0.01, 1), seed=st.integers(0, 5), start=st.integers(0, 60))
def test_pool_batches_can_start_anywhere(n, share, seed, start):
    bank = torch.arange(n).float()[:, None]
    batch = max(1, int(share * n))
    stream = pool_batches(bank, batch, seed)
    it = stream(0)
    first = [next(it) for _ in range(start + 3)]
    it = stream(start)
    assert all(torch.equal(next(it), want) for want in first[start:])
    epoch = torch.cat(first[: n // batch])
    assert len(set(epoch.flatten().tolist())) == len(epoch)  # no vector twice


def test_pool_epochs_and_seeds_differ():
    bank = torch.arange(100).float()[:, None]
    it = pool_batches(bank, 100, 0)(0)
    a, b, c = next(it), next(it), next(pool_batches(bank, 100, 1)(0))
    assert not torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(b, c)


def test_pools_that_hold_nothing_are_refused():
    for bank in (torch.zeros(0, 3), torch.zeros(3)):
        with pytest.raises(DataError, match="bank has shape"):
            pool_batches(bank, 1)
    for batch in (0, 5):
        with pytest.raises(SettingsError, match=f"batch is {batch}: pass 1 to 4"):
            pool_batches(torch.zeros(4, 3), batch)
