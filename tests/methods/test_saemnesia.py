"""SAEmnesia's assignment, losses, training and edit are those of loops by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import random
from neuraleraser.errors import SettingsError, SiteError
from neuraleraser.evaluation.method import Method
from neuraleraser.methods import SAEmnesia, SAEmnesiaSettings
from neuraleraser.methods.saemnesia import (
    _bind,
    assign_features,
    assignment_loss,
    concept_scores,
    decorrelation_loss,
)
from neuraleraser.sae import SAE
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import EditContext, Site, record

SITE = Site("unet.up_blocks.0.attentions.1")  # 32 wide, 4 x 4 positions
S = Sampling(num_inference_steps=3, guidance_scale=3.0, batch_size=2)
FEW = SAEmnesiaSettings(steps=3, maps=4)
PROMPTS, SHOWN = ["x a", "y b", "x b", "y a"], [{"X", "A"}, {"Y", "B"}, {"X", "B"}, {"Y", "A"}]
GROUPS = [["X", "Y"], ["A", "B"]]
NAMES = ["X", "Y", "A", "B"]
SEEDS = [11, 12, 13, 14]
N = 20


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def sae() -> SAE:
    w = torch.nn.functional.normalize(random(N, 32, seed=1), dim=1)
    parts = (w.clone(), random(N, seed=2) / 4, w, random(32, seed=3) / 4, torch.full((N,), 0.01))
    return SAE(*parts, {"site": str(SITE), "settings": {"k": 4}, "model": "a model"})


@pytest.fixture(scope="module")
def labelled(pipe: Any, sae: SAE) -> SAE:
    return SAEmnesia.train_sae(pipe, sae, PROMPTS, SHOWN, GROUPS, SEEDS, S, FEW)


def maps(pipe: Any, context: Any = None) -> tuple[Tensor, list[float]]:
    """Activations of the conditional half [images, steps, P, d], one image at a time, and the timesteps."""
    found: list[list[Tensor]] = []
    times: list[float] = []

    def on(site: Site, x: Tensor, context: EditContext[None]) -> None:
        found[-1].append(x[1].double())  # the first half is the unconditional one
        times.append(float(context.timestep[0]))

    with record(pipe, [SITE], on):
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
            found.append([])
            generate(pipe, [prompt], [seed], replace(S, batch_size=1))
    return torch.stack([torch.stack(steps) for steps in found]), times[: S.num_inference_steps]


def test_losses_are_the_formulas() -> None:
    v, y = random(5, 3, seed=4), torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]]).float()
    wanted = 0.0
    for b in range(5):
        shown = [c for c in range(3) if y[b, c]]
        wanted -= sum(math.log(1 / (1 + math.exp(-v[b, c]))) for c in shown) / max(1, len(shown)) / 5
    assert float(assignment_loss(v, y)) == pytest.approx(wanted, rel=1e-5)
    pairs = [float(torch.corrcoef(torch.stack([v[:, 0], v[:, j]]))[0, 1]) for j in (1, 2)]
    assert float(decorrelation_loss(v, 1)) == pytest.approx(sum(pairs) / 2, rel=1e-4)
    assert float(decorrelation_loss(torch.ones(5, 3), 1)) == 0


def test_scores_are_shares_of_all_activation() -> None:
    pooled, y = random(4, 2, 6, seed=5).abs(), torch.tensor([[1, 0], [0, 1], [1, 1], [0, 0]]).float()
    found = concept_scores(pooled, y)
    for c, i in product(range(2), range(6)):
        wanted = 0.0
        for t in range(2):
            on, off = (
                torch.stack([pooled[n, t] for n in range(4) if bool(y[n, c]) is with_c]).mean(0)
                for with_c in (True, False)
            )
            wanted += float(on[i] / on.sum() - off[i] / off.sum()) / 2
        assert float(found[c, i]) == pytest.approx(wanted, abs=1e-6)


def test_each_concept_takes_its_best_free_feature_objects_first() -> None:
    scores = torch.tensor([[0.1, 0.2, 0.0, 0.0], [0.0, 0.9, 0.3, 0.0], [0.0, 1.5, 0.0, 0.2]])
    # Of two objects the second has the better score and takes feature 1; the style comes last, better as its score is.
    assert assign_features(scores, 2) == [0, 1, 3]
    assert assign_features(scores, 0) == [0, 2, 1]  # all styles: the last has the best score of all
    assert assign_features(scores, 3) == [0, 2, 1]


def test_features_of_concepts_come_first_with_their_means(pipe: Any, sae: SAE, labelled: SAE) -> None:
    """The features that score best, at rates so low that training leaves them as they were."""
    still = replace(FEW, learning_rate=1e-9)
    found = SAEmnesia.train_sae(pipe, sae, PROMPTS, SHOWN, GROUPS, SEEDS, S, still)
    x, times = maps(pipe)
    y = torch.tensor([[float(name in shown) for name in NAMES] for shown in SHOWN])
    z = sae.double().encode(x).mean(2).float()
    sae.float()
    first = assign_features(concept_scores(z, y), 2)
    torch.testing.assert_close(found.W_enc[:4], sae.W_enc[first], atol=1e-5, rtol=1e-4)
    assert {*map(tuple, found.W_dec.mul(1e3).round().tolist())} == {*map(tuple, sae.W_dec.mul(1e3).round().tolist())}
    assert found.header["labels"] == NAMES and found.header["concepts"] == 4
    means = labelled.header["means"]
    assert means["times"] == pytest.approx(sorted(times))
    pooled = labelled.double().encode(x).mean(2).flip(1)  # [images, T ascending, n]
    labelled.float()
    for c, shown in enumerate(y.T):
        by_concept = [pooled[column > 0][:, :, c].mean(0) for column in y.T]
        torch.testing.assert_close(torch.tensor(means["own"][c]).double(), by_concept[c], atol=2e-3, rtol=1e-2)
        torch.testing.assert_close(
            torch.tensor(means["all"][c]).double(), torch.stack(by_concept).mean(0), atol=2e-3, rtol=1e-2
        )
        assert shown.sum() == 2


def test_training_is_adam_on_the_sum_by_hand(sae: SAE) -> None:
    """One step: of a first step of Adam only the signs of the gradients are left, and the size of the rate."""
    x, y = random(6, 2, 5, 32, seed=7).half(), torch.tensor([[1, 0, 1], [0, 1, 1], [1, 0, 0]] * 2).float()
    s = SAEmnesiaSettings(steps=1, maps=12, learning_rate=1e-3, binding=5.0, decorrelation=0.5, sparsity=0.01)
    found = _bind(sae, x, y, 2, s, None)
    vectors = x.float().flatten(0, 2)
    scale = math.sqrt(32 / float(vectors.square().sum(1).mean()))
    vectors = scale * vectors
    parts = [p.detach().clone().requires_grad_() for p in (sae.W_enc, scale * sae.b_enc, sae.W_dec, scale * sae.b_dec)]
    w_enc, b_enc, w_dec, b_dec = parts
    pre = (vectors - b_dec) @ w_enc.T + b_enc
    cut = pre.flatten().sort(descending=True).values[4 * len(vectors) - 1]
    z = torch.where(pre >= cut, pre, 0.0)
    variance = (vectors - vectors.mean(0)).square().sum(1).mean()
    v = pre[:, :3].unflatten(0, (12, 5)).amax(1)
    labels = y.repeat_interleave(2, 0)
    loss = (vectors - z @ w_dec - b_dec).square().sum(1).mean() / variance
    loss = loss + 5.0 * (assignment_loss(v, labels) + 0.5 * decorrelation_loss(v, 2)) + 0.01 * pre.relu().mean()
    loss.backward()
    for new, old, part in zip(
        (found.W_enc, scale * found.b_enc, scale * found.b_dec),
        (sae.W_enc, scale * sae.b_enc, scale * sae.b_dec),
        (w_enc, b_enc, b_dec),
        strict=True,
    ):
        assert part.grad is not None
        clear = part.grad.abs() > 1e-5
        assert clear.float().mean() > 0.5
        torch.testing.assert_close((new - old)[clear], -1e-3 * part.grad.sign()[clear], atol=2e-5, rtol=2e-2)
    assert found.threshold.unique().numel() == 1 and float(found.threshold[0]) > 0
    torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(N))


def test_labels_raise_their_features(sae: SAE) -> None:
    """A feature that its label asks for fires more in the end on the maps that have the label."""
    y = torch.tensor([[1, 0], [0, 1]] * 4).float()
    x = random(8, 2, 5, 32, seed=8) + 2 * torch.einsum("ic,cd->id", y, random(2, 32, seed=9))[:, None, None]
    plain, bound = (
        _bind(sae, x.half(), y, 1, SAEmnesiaSettings(steps=60, maps=8, learning_rate=3e-3, binding=b), None)
        for b in (0.0, 3.0)
    )

    def own(one: SAE) -> float:
        return float((one.encode(x)[..., :2].mean((1, 2)) * y).sum() / y.sum())

    assert own(bound) > own(plain) + 0.1


def test_the_edit_is_saeurons_on_one_feature(pipe: Any, labelled: SAE) -> None:
    method = SAEmnesia.fit(pipe, "B", "style", labelled, multiplier=-3.0)
    seen: list[tuple[Tensor, float]] = []
    with record(pipe, [SITE], lambda site, x, context: seen.append((x.clone(), float(context.timestep[0])))):
        pipelines.run(pipe, 0, steps=3)
    means, (correction,) = labelled.header["means"], method.eraser.corrections
    acted = 0
    for x, t in seen:
        found = correction.delta(x, torch.full((len(x),), t))
        at = min(range(3), key=lambda i: abs(means["times"][i] - t))
        z = labelled.encode(x)[..., 3]
        scaled = -3.0 * means["own"][3][at] * z
        wanted = torch.where(z > means["all"][3][at], scaled - z, 0.0)[..., None] * labelled.W_dec[3]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
        acted += int((wanted != 0).any())
    assert acted


def test_it_erases_inside_its_context_alone(pipe: Any, labelled: SAE) -> None:
    method: Method = SAEmnesia.fit(pipe, "B", "style", labelled, multiplier=-30.0)
    base = generate(pipe, ["x b", "b"], [5, 6], S)
    with method.applied(pipe) as trace:
        found = generate(pipe, ["x b", "b"], [5, 6], S)
    assert trace is not None and trace.fired and (found != base).any()
    assert (generate(pipe, ["x b", "b"], [5, 6], S) == base).all() and pipelines.left(pipe) == []
    assert (method.name, method.concept, method.kind) == ("saemnesia", "B", "style")
    assert method.made_with is not None and method.made_with.seeds == ((11, 14), (11, 14))
    assert "x a" in method.made_with.prompts and "B" in method.made_with.labels
    other = SAEmnesia.fit(pipe, "B", "style", labelled, multiplier=-1.0)
    assert len({method.key, other.key, SAEmnesia.fit(pipe, "A", "style", labelled).key}) == 3


def test_what_cannot_be_is_refused(pipe: Any, sae: SAE, labelled: SAE) -> None:
    def made(sae: SAE = sae, prompts: Any = PROMPTS, shown: Any = SHOWN, groups: Any = GROUPS, seeds: Any = SEEDS):
        return SAEmnesia.train_sae(pipe, sae, prompts, shown, groups, seeds, S, FEW)

    def with_header(header: dict[str, Any], first: int = N) -> SAE:
        w_enc, b_enc, w_dec, threshold = (x[:first] for x in (sae.W_enc, sae.b_enc, sae.W_dec, sae.threshold))
        return SAE(w_enc, b_enc, w_dec, sae.b_dec, threshold, header)

    with pytest.raises(SettingsError, match="4 prompts, names for 4 and 3 seeds"):
        made(seeds=SEEDS[:3])
    with pytest.raises(SettingsError, match="no name twice"):
        made(groups=[["X"], ["X"]])
    with pytest.raises(SettingsError, match="no prompt, or every prompt, shows Z"):
        made(groups=[["X", "Z"], ["A"]])
    with pytest.raises(SettingsError, match="4 concepts, and the SAE has 3 features"):
        made(sae=with_header(dict(sae.header), 3))
    with pytest.raises(SettingsError, match="does not name its site"):
        made(sae=with_header({"settings": {"k": 4}}))
    with pytest.raises(SettingsError, match="does not say how many features fire"):
        made(sae=with_header({"site": str(SITE)}))
    with pytest.raises(SiteError, match="32"):
        made(sae=with_header({"site": "unet.up_blocks.1.attentions.0", "settings": {"k": 4}}))
    with pytest.raises(SettingsError, match="no feature of 'Z', but of X, Y, A, B"):
        SAEmnesia.fit(pipe, "Z", "style", labelled)
    with pytest.raises(SettingsError, match="no feature of 'X', but of no concept"):
        SAEmnesia.fit(pipe, "X", "object", sae)
    with pytest.raises(SettingsError, match="multiplier"):
        SAEmnesia.fit(pipe, "B", "style", labelled, multiplier=math.nan)
    for bad in ({"steps": 0}, {"maps": 1}, {"learning_rate": 0.0}, {"binding": -1.0}, {"seed": -1}):
        with pytest.raises(SettingsError, match=next(iter(bad))):
            SAEmnesiaSettings(**bad)  # type: ignore[arg-type]
