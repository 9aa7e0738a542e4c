"""Labelled training gives every labelled concept a feature that detects it, and with Matryoshka carries it; without
labels it is spread over its cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from helpers.planted import planted
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.sae import SAE, StepLog, TrainSettings, labelled_batches, measure_sae, train, train_step, training
from neuraleraser.sae.sparse_ops import Weights
from neuraleraser.sae.supervised import concept_directions, contrast_loss, fisher_features

CONCEPTS, CASES, D = 3, 4, 32
PLAIN = TrainSettings(n_features=96, k=2, steps=400, dead_after=8000, bf16=False)


def centres() -> Tensor:
    """The directions [3, 32] of the concepts."""
    return normalize(torch.randn(CONCEPTS, D, generator=torch.Generator().manual_seed(77)), dim=1)


@cache
def concepts() -> tuple[Tensor, Tensor]:
    """(x [N, 1, 32], labels [N, 3]): three concepts of four cases each, over 24 background directions.

    A case is a direction of its own, at cosine 0.74 to its concept: a dictionary without labels learns the cases.
    """
    _, x = planted(24, D, 8000, active=1.5, seed=5)
    g = torch.Generator().manual_seed(78)
    centre = centres()[:, None]
    own = normalize(torch.randn(CONCEPTS, CASES, D, generator=g), dim=2)
    cases = normalize(centre + 0.9 * own, dim=2)
    labels = torch.rand(len(x), CONCEPTS, generator=g) < 0.15
    case = torch.randint(CASES, (len(x), CONCEPTS), generator=g)
    size = labels * (1.5 + 0.5 * torch.rand(len(x), CONCEPTS, generator=g))
    shown = torch.stack([cases[c, case[:, c]] for c in range(CONCEPTS)], dim=1)
    return (x + (size[:, :, None] * shown).sum(1))[:, None], labels


@cache
def trained(
    bind: float = 0.0, contrast: float = 0.0, positions: int = 1, architecture: str = "batchtopk"
) -> tuple[SAE, list[StepLog]]:
    """With `positions`, as many vectors make a map, and a map shows what any of them does."""
    x, labels = concepts()
    logs: list[StepLog] = []
    x, labels = x[:7000].view(-1, positions, D), labels[:7000].view(-1, positions, CONCEPTS).any(1)
    weights = {"binding_weight": bind, "contrast_weight": contrast}
    settings = dataclasses.replace(PLAIN, architecture=architecture, log_every=400, **weights)
    return train(labelled_batches(x, labels, 256 // positions), settings, on_step=logs.append), logs


def carriers(sae: SAE) -> list[int]:
    """For each concept, the fewest features whose mean activations account for 90 % (by squared norm) of the
    difference in mean reconstruction between held-out vectors with and without it, largest first."""
    x, labels = concepts()[0][7000:, 0], concepts()[1][7000:]
    z, counts = sae.encode(x), []
    for c in range(CONCEPTS):
        parts = (z[labels[:, c]].mean(0) - z[~labels[:, c]].mean(0))[:, None] * sae.W_dec
        parts = parts[parts.norm(dim=1).argsort(descending=True)]
        left = (parts.sum(0) - parts.cumsum(0)).square().sum(1) / parts.sum(0).square().sum()
        counts.append(int((left > 0.1).nonzero().max()) + 2 if bool((left > 0.1).any()) else 1)
    return counts


def tells(sae: SAE) -> Tensor:
    """[CONCEPTS, n]: balanced accuracy on held-out vectors of "the feature fires" as a detector of the concept."""
    x, labels = concepts()[0][7000:, 0], concepts()[1][7000:]
    on = (sae.encode(x) > 0).float()
    return torch.stack([(on[y].mean(0) + 1 - on[~y].mean(0)) / 2 for y in labels.T])


@pytest.mark.parametrize(
    ("architecture", "positions"), [("batchtopk", 1), ("batchtopk", 4), ("jumprelu", 1), ("matryoshka", 1)]
)
def test_a_bound_concept_needs_one_feature_to_be_detected_and_one_to_three_to_be_carried(architecture, positions):
    plain, (bound, logs) = trained()[0], trained(0.3, 0.0, positions, architecture)
    own = tells(bound)[:, :CONCEPTS].diag()
    print(f"{architecture}: {carriers(bound)} carry, own {own.tolist()}, {logs[-1]}")
    print(f"plain: {carriers(plain)}, best {tells(plain).amax(1).tolist()}")
    assert float(own.min()) > 0.95, "feature c is concept c"
    assert float(tells(plain)[:, :CONCEPTS].diag().max()) < 0.6
    assert float(tells(plain).amax(1).median()) < 0.75, "without labels most concepts have no feature"
    if architecture == "matryoshka":  # elsewhere the cases keep features beside the bound one
        assert max(carriers(bound)) <= 3
        assert sum(carriers(bound)) <= sum(carriers(plain)) / 2
    assert bound.header["concepts"] == CONCEPTS and "concepts" not in plain.header
    assert logs[-1].bind < 0.35


def test_bound_features_start_towards_their_concepts():
    x = torch.tensor([[3.0, 1.0], [5.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    labels = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 0]])
    otherwise = torch.tensor([[0.0, 1.0], [0.6, 0.8], [0.8, 0.6], [0.0, 1.0]])
    want = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6], [-1.0, 0.0]])
    torch.testing.assert_close(concept_directions(x, labels, otherwise), want)
    once = trained_for_one_step()
    assert float((once.W_dec[:CONCEPTS] @ centres().T).diag().min()) > 0.8


def trained_for_one_step() -> SAE:
    x, labels = concepts()
    return train(labelled_batches(x, labels, 4000), dataclasses.replace(PLAIN, steps=1, binding_weight=0.3))


def test_a_discriminant_is_nothing_without_its_label_and_the_gap_with_it():
    x, labels = concepts()[0][:, 0].double(), concepts()[1]
    w = Weights(x[:4], x[:4, 0], x[:4], x.mean(0))
    rows, bias, out = fisher_features(x, labels, w)
    pre = (x - w.b_dec) @ rows.T + bias
    for c in range(CONCEPTS):
        gap = x[labels[:, c]].mean(0) - x[~labels[:, c]].mean(0)
        assert float(pre[~labels[:, c], c].mean()) == pytest.approx(0, abs=1e-9)
        assert float(pre[labels[:, c], c].mean()) == pytest.approx(float(gap.norm()))
        torch.testing.assert_close(out[c], gap / gap.norm())


def test_a_label_that_never_changes_leaves_its_row():
    x, labels = concepts()[0][:100, 0], torch.ones(100, 2)
    labels[:, 0] = 0
    w = Weights(x[:4], x[:4, 0], x[:4], x[0])
    for got, want in zip(fisher_features(x, labels, w), w, strict=False):
        assert torch.equal(got, want[:2])


def test_a_discriminant_takes_away_what_else_varies_along_the_gap():
    """The concept moves coordinate 0, which something else moves more; that alone also moves coordinate 1."""
    g = torch.Generator().manual_seed(3)
    labels = (torch.rand(4000, 1, generator=g) < 0.3).float()
    other = 4 * torch.randn(4000, generator=g)
    x = 0.1 * torch.randn(4000, 6, generator=g)
    x[:, 0] += 2 * labels[:, 0] + other
    x[:, 1] += other
    w = Weights(torch.zeros(1, 6), torch.zeros(1), torch.zeros(1, 6), torch.zeros(6))
    rows, bias, out = fisher_features(x, labels, w, shrink=1e-5)

    def separation(values: Tensor) -> float:
        return float(((values > values.mean()) == (labels[:, 0] > 0)).float().mean())

    assert separation((x @ rows.T + bias)[:, 0]) > 0.99 and separation((x @ out.T)[:, 0]) < 0.75


def test_a_discriminant_is_held_while_the_rest_learns():
    x, labels = concepts()
    stream = labelled_batches(x[:7000], labels[:7000], 256)
    few, many = (train(stream, dataclasses.replace(PLAIN, steps=n, fisher_features=True)) for n in (140, 400))
    assert torch.equal(few.W_enc[:CONCEPTS], many.W_enc[:CONCEPTS])
    assert not torch.equal(few.W_enc[CONCEPTS:], many.W_enc[CONCEPTS:])
    own = tells(many)[:, :CONCEPTS].diag()
    print(own.tolist(), measure_sae(many, x[7000:, 0])["explained_variance"])
    assert float(own.min()) > 0.95 and many.header["concepts"] == CONCEPTS
    assert measure_sae(many, x[7000:, 0])["explained_variance"] > 0.85


def test_features_that_belong_to_labels_are_not_lifted():
    """They answer to their labels, also where none of the last batches showed them."""
    x, labels = concepts()
    stream, chosen = labelled_batches(x, labels, 256), dataclasses.replace(PLAIN, fisher_features=True)
    state = training._untrained_state(stream, chosen)
    with torch.no_grad():
        state.weights.b_enc[:CONCEPTS] -= 100  # they do not fire
    state.idle += 10**6
    before = state.weights.b_enc.detach().clone()
    batch, shown = next(stream(0))
    train_step.train_step(state, batch * state.scale, shown, chosen)
    lifted = (state.weights.b_enc - before).detach() > 0
    assert not lifted[:CONCEPTS].any() and lifted[CONCEPTS:].any()


def test_contrast_separates_concepts():
    x, labels = concepts()[0][7000:, 0], concepts()[1][7000:]

    def apart(sae: SAE) -> float:
        pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        return float(contrast_loss(pre[:400], labels[:400]))

    plain, (contrasted, logs) = trained()[0], trained(0.0, 0.01)
    print(apart(plain), apart(contrasted), logs[-1])
    assert apart(contrasted) < apart(plain) - 0.5
    assert logs[-1].contrast > 0 and logs[-1].bind == 0
    assert logs[-1].fvu < 0.1


def test_labels_without_a_weight_change_nothing():
    x, labels = concepts()
    settings = dataclasses.replace(PLAIN, steps=5)
    a = train(labelled_batches(x, labels, 64), settings)
    b = train(lambda step: (x for x, _ in labelled_batches(x, labels, 64)(step)), settings)
    c = train(lambda step: ([x, y] for x, y in labelled_batches(x, labels, 64)(step)), settings)  # as a DataLoader
    assert torch.equal(a.W_enc, c.W_enc)
    assert torch.equal(a.W_enc, b.W_enc)


def test_killed_and_resumed_it_ends_in_the_same_bits(tmp_path):
    x, labels = concepts()
    weights = {"binding_weight": 0.1, "contrast_weight": 0.1}
    settings = dataclasses.replace(PLAIN, steps=12, checkpoint_every=4, init_vectors=512, **weights)
    stream, path = labelled_batches(x.view(-1, 2, D), labels[::2], 64, seed=3), tmp_path / "run.safetensors"
    want = train(stream, settings)

    def short(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from (item for _, item in zip(range(step, 9), stream(step), strict=False))

    with pytest.raises(DataError, match="ended after 9"):
        train(short, settings, checkpoint=path)
    got = train(stream, settings, checkpoint=path)
    assert all(torch.equal(p, q) for p, q in zip(got.parameters(), want.parameters(), strict=True))
    assert got.header == want.header


def test_maps_stay_together():
    bank = torch.arange(24.0).view(6, 2, 2)
    labels = torch.arange(6)[:, None]
    stream = labelled_batches(bank, labels, 2, seed=1)
    seen = [item for _, item in zip(range(5), stream(0), strict=False)]
    assert all(torch.equal(x.view(2, 2, 2), bank[y[:, 0]]) for x, y in seen)
    assert sorted(int(v) for _, y in seen[:3] for v in y) == list(range(6))
    later = next(stream(4))
    assert torch.equal(later[0], seen[4][0]) and torch.equal(later[1], seen[4][1])
    with pytest.raises(DataError, match=r"bank has shape \(6, 4\), its labels \(6, 1\)"):
        labelled_batches(bank.flatten(1), labels, 2)
    with pytest.raises(DataError, match=r"its labels \(5, 1\)"):
        labelled_batches(bank, labels[:5], 2)


def test_where_no_map_has_a_partner_there_is_nothing_to_contrast():
    pre = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for labels in (torch.eye(3), torch.zeros(3, 2)):
        assert contrast_loss(pre, labels) == 0
    assert contrast_loss(pre[:1], torch.ones(1, 2)) == 0


def test_labels_that_do_not_fit_are_refused():
    x, y = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(64, 2)
    nan = y.clone()
    nan[3, 1] = float("nan")
    settings = dataclasses.replace(PLAIN, n_features=16, steps=4, init_vectors=64, binding_weight=0.1)
    for items, message in [
        ((x,), "batch 0 has no labels: labelled training takes"),
        (((x, y), x), "batch 1 has no labels"),
        (((x, y, y),), "batch 0 is 3 values"),
        (((x, y[:5]),), r"batch 0 has labels \(5, 2\) for 64 vectors: pass \[M, C\], M a divisor of 64"),
        (((x, y[:, 0]),), r"batch 0 has labels \(64,\)"),
        (((x, y[:, :0]),), r"batch 0 has labels \(64, 0\)"),
        (((x, torch.zeros(64, 17)),), "labels for 17 concepts, more than the n = 16 features"),
        (((x, y), (x, y[:, :1])), "batch 1 has labels for 1 concepts: batches before had 2"),
        (((x, y + 2),), "batch 0 has 128 labels that are neither 0 nor 1"),
        (((x, y), (x, nan)), "batch 1 has 1 labels that are neither"),
        (((x * float("inf"), y),), "batch 0 holds 512 NaN or infinite"),
    ]:
        with pytest.raises(DataError, match=message):
            train(lambda step, items=items: iter(items[step:]), settings)
    for wrong in ({"binding_weight": -1.0}, {"contrast_weight": float("nan")}, {"binding_weight": float("inf")}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            dataclasses.replace(PLAIN, **wrong)
