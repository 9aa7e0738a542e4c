"""Random features fire as often as the gate's own, are none of them, and add as much to the evidence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import pipelines
from helpers.erasers import EDIT, GATE, SHUT, make_gate, open_eraser, random, with_picture
from neuraleraser.eraser import Eraser, Provenance
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import Method
from neuraleraser.fitting.reference import Reference
from neuraleraser.methods import RandomFeatures
from neuraleraser.sae import SAE
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling

S = Sampling(num_inference_steps=2, guidance_scale=3.0, batch_size=2)
N, OWN = 40, [3, 17, 30]


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Feature i fires in a share of about (i + 1) / 41 of the rows; the strongest sixteenth is twice the mean."""
    rows = torch.nn.functional.normalize(random(N, 32, seed=1), dim=1)
    sae = SAE(rows, random(N, seed=2) / 4, rows, random(32, seed=3) / 4, torch.full((N,), 0.1))
    g = torch.Generator().manual_seed(4)
    fires = torch.rand(200, 2, N, generator=g) < (torch.arange(N) + 1) / 41
    mean = fires * torch.rand(200, 2, N, generator=g) * (1 + torch.arange(N) % 5)
    pooled = torch.stack([mean, 2 * mean], 2).half()
    return Reference(sae, GATE, pooled, torch.tensor([900.0, 0.0]), ["p"] * 200, [], Provenance())


def of(reference: Reference, share: float = 1.0) -> Eraser:
    f, sae = torch.tensor(OWN), reference.sae
    gate = replace(
        make_gate(GATE, 32),
        features=f,
        rows=sae.W_enc[f].half().float(),  # as files keep them
        bias=sae.b_enc[f] - sae.W_enc[f] @ sae.b_dec,
        threshold=sae.threshold[f].clone(),
        weight=torch.tensor([1.0, 2.0, -0.5]),
        share=share,
    )
    return replace(open_eraser(), gate=gate)


def test_features_are_matched(reference: Reference) -> None:
    counts = torch.zeros(N)
    for share, level in ((1.0, 0), (1 / 16, 1)):
        eraser = of(reference, share)
        for seed in range(30):
            gate = RandomFeatures(eraser, reference, seed, among=4).control.gate
            f = gate.features
            counts[f] += 1
            assert len({*f.tolist(), *OWN}) == 6
            pooled = reference.pooled[:, :, level].double().flatten(0, 1)
            rates, means = (pooled > 0).double().mean(0), pooled.mean(0)
            assert float((rates[f] - rates[OWN]).abs().max()) < 0.12
            torch.testing.assert_close(gate.weight * means[f], eraser.gate.weight * means[OWN], check_dtype=False)
            x = random(2, 5, 32, seed=seed)
            torch.testing.assert_close(gate.activations(x), reference.sae.encode(x)[..., f], atol=1e-5, rtol=1e-4)
            assert torch.equal(gate.low, eraser.gate.low) and torch.equal(gate.times, eraser.gate.times)
    assert int((counts > 0).sum()) >= 10  # of 3 times 4
    for seed in range(30):  # from all that are left each is drawn once
        drawn = RandomFeatures(of(reference), reference, seed, among=N).control.gate.features
        assert len({*drawn.tolist(), *OWN}) == 6


def test_it_is_a_method(reference: Reference) -> None:
    pipe = pipelines.stable_diffusion()
    eraser = of(reference)
    method: Method = RandomFeatures(eraser, reference)
    assert (method.name, method.concept, method.kind) == ("random-features", "Van_Gogh", "style")
    assert method.made_with is not None and method.made_with.seeds == ((0, 23),)
    keys = {RandomFeatures(eraser, reference, seed).key for seed in range(4)}
    assert len(keys) == 4 and RandomFeatures(eraser, reference, 1).key in keys
    base = generate(pipe, ["a", "b"], [5, 6], S)
    with method.watched(pipe) as watched:
        assert (generate(pipe, ["a", "b"], [5, 6], S) == base).all()
    with method.applied(pipe) as trace:
        found = generate(pipe, ["a", "b"], [5, 6], S)
    assert watched is not None and trace is not None and set(trace.fired) == set(watched.fired) != set()
    assert {i for i in range(2) if (found[i] != base[i]).any()} == set(trace.fired)
    assert (generate(pipe, ["a", "b"], [5, 6], S) == base).all() and pipelines.left(pipe) == []
    pictured = RandomFeatures(with_picture(eraser, pipe), reference).control
    assert pictured.image_gate is None and pictured.validation_error() is None


def test_what_cannot_be_is_refused(reference: Reference) -> None:
    eraser = of(reference)
    strange: list[Any] = [
        replace(eraser, gate=replace(eraser.gate, site=EDIT)),
        replace(eraser, gate=replace(eraser.gate, rows=eraser.gate.rows.roll(1, 0))),
        replace(eraser, gate=replace(eraser.gate, features=eraser.gate.features + N)),
        replace(eraser, gate=make_gate(GATE, 32, window=3, **SHUT)),
    ]
    for other in strange:
        with pytest.raises(SettingsError, match="pass the reference that it was made with"):
            RandomFeatures(other, reference)
    silent = replace(reference, pooled=reference.pooled * torch.isin(torch.arange(N), torch.tensor(OWN)))
    with pytest.raises(SettingsError, match="0 other features of the reference fire"):
        RandomFeatures(eraser, silent)
    with pytest.raises(SettingsError, match="among is 0"):
        RandomFeatures(eraser, reference, among=0)
    with pytest.raises(SettingsError, match="seed is -1"):
        RandomFeatures(eraser, reference, -1)
