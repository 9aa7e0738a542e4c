"""The difference of means is that of hooks by hand, is subtracted where the eraser's gate opens, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import EDIT, GATE, SHUT, half_open, make_correction, make_eraser, open_eraser, with_picture
from neuraleraser.concepts import Pair
from neuraleraser.eraser import attach
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import Method
from neuraleraser.methods import DifferenceOfMeans, EraserMethod
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import EditContext, Site, record

S = Sampling(num_inference_steps=3, guidance_scale=3.0, batch_size=2)
ONE = replace(S, batch_size=1)
PAIRS = [Pair("x a", "a"), Pair("x b", "b"), Pair("x c", "c")]
SEEDS = [11, 12, 13]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(scope="module")
def method(pipe: Any) -> DifferenceOfMeans:
    return DifferenceOfMeans.measure(pipe, open_eraser(), PAIRS, SEEDS, S)


def test_means_are_those_of_hooks_by_hand(pipe: Any, method: DifferenceOfMeans) -> None:
    module = pipe.unet.get_submodule(EDIT.path.removeprefix("unet."))
    sums: dict[int, Tensor] = {}
    for sign in (1, -1):
        for pair, seed in zip(PAIRS, SEEDS, strict=True):
            seen: list[Tensor] = []
            hook = module.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[0][1]))  # conditional half
            generate(pipe, [pair.positive if sign > 0 else pair.negative], [seed], ONE)
            hook.remove()
            for step, x in enumerate(seen):
                mean = x.flatten(1).double().mean(1)
                sums[step] = sums.get(step, torch.zeros(16, dtype=torch.float64)) + sign * mean / len(PAIRS)
    wanted = torch.stack([sums[step] for step in (2, 1, 0)])  # timesteps ascend
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(method.differences[EDIT].double(), wanted, atol=2e-5, rtol=1e-3)
    assert (method.times.diff() > 0).all()


def test_it_is_subtracted_from_every_position_where_the_gate_opens(pipe: Any, method: DifferenceOfMeans) -> None:
    before: list[Tensor] = []
    after: list[tuple[float, Tensor]] = []

    def note(site: Site, x: Tensor, context: EditContext[None]) -> None:
        before.append(x.clone())

    def note_after(site: Site, x: Tensor, context: EditContext[None]) -> None:
        after.append((float(context.timestep[0]), x.clone()))

    strong = replace(method, strength=3.0)
    with record(pipe, [EDIT], note), strong.applied(pipe) as trace, record(pipe, [EDIT], note_after):
        generate(pipe, ["a"], [5], ONE)
    assert list(trace.fired) == [0] and len(before) == 3
    for x, (t, out) in zip(before, after, strict=True):
        step = int((method.times - t).abs().argmin())
        wanted = x[1] - 3.0 * method.differences[EDIT][step]
        assert torch.equal(out[0], x[0])  # the negative prompt's half
        torch.testing.assert_close(out[1], wanted, atol=1e-5, rtol=1e-5)


def test_the_gate_is_the_erasers_own(pipe: Any) -> None:
    prompts, seeds = ["a", "b", "x", "y"], [1, 2, 3, 4]
    eraser = half_open(open_eraser(), pipe, prompts, seeds, S)
    method = DifferenceOfMeans.measure(pipe, eraser, PAIRS, SEEDS, S, strength=5.0)
    base = generate(pipe, prompts, seeds, S)
    with EraserMethod(eraser).watched(pipe) as wanted:
        generate(pipe, prompts, seeds, S)
    with method.watched(pipe) as watched:
        assert (generate(pipe, prompts, seeds, S) == base).all()
    with method.applied(pipe) as trace:
        found = generate(pipe, prompts, seeds, S)
    assert 0 < len(wanted.fired) < 4 and wanted.fired.keys() == watched.fired.keys() == trace.fired.keys()
    changed = {i for i in range(4) if (found[i] != base[i]).any()}
    assert changed == set(wanted.fired)  # all others have the base's bits
    assert (generate(pipe, prompts, seeds, S) == base).all() and pipelines.left(pipe) == []


def test_all_sites_of_an_eraser_are_edited_and_its_image_part_is_left_out(pipe: Any) -> None:
    first, second = Site("unet.mid_block.attentions.0", "input", "text"), EDIT
    also = (Site("unet.up_blocks.0.attentions.1", "input", "text"),)
    text = make_correction(first, 16, also=also)
    eraser = with_picture(replace(open_eraser(), corrections=(text, make_correction(second, 16))), pipe)
    header = replace(eraser.header, routes=("named", "start image"), least_strength=0.8)
    method = DifferenceOfMeans.measure(pipe, replace(eraser, header=header), PAIRS, SEEDS, S)
    control = method.control
    assert [(c.site, c.also) for c in control.corrections] == [(first, also), (second, ())]
    assert control.image_gate is None and control.guided is None and control.routes == ("named",)
    assert control.validation_error() is None and control.header.least_strength is None
    base = generate(pipe, ["a"], [5], ONE)
    with method.applied(pipe):
        assert (generate(pipe, ["a"], [5], ONE) != base).any()


def test_it_is_a_method(pipe: Any, method: DifferenceOfMeans) -> None:
    known: Method = method
    assert (known.name, known.concept, known.kind) == ("difference-of-means", "Van_Gogh", "style")
    made = known.made_with
    assert made is not None and made.seeds == ((0, 23), (11, 13)) and "x a" in made.prompts
    assert made.prompts[0] == "made with this"
    others = (
        replace(method, strength=1.0000001),
        replace(method, times=method.times + 1),
        replace(method, eraser=open_eraser(seed=1)),
        replace(method, differences={EDIT: 2 * method.differences[EDIT]}),
    )
    assert len({method.key, *(other.key for other in others)}) == 5
    base = generate(pipe, ["a"], [5], ONE)
    with replace(method, strength=0.0).applied(pipe):
        assert (generate(pipe, ["a"], [5], ONE) == base).all()
    with pytest.raises(ZeroDivisionError), method.applied(pipe):
        _ = 1 / 0
    assert (generate(pipe, ["a"], [5], ONE) == base).all() and pipelines.left(pipe) == []


def test_what_cannot_be_is_refused(pipe: Any, method: DifferenceOfMeans) -> None:
    with pytest.raises(SettingsError, match="strength is -1"):
        replace(method, strength=-1)
    with pytest.raises(SettingsError, match="measure them for this eraser"):
        replace(method, differences={GATE: torch.zeros(3, 32)})
    with pytest.raises(SettingsError, match="3 pairs and 2 seeds"):
        DifferenceOfMeans.measure(pipe, method.eraser, PAIRS, [0, 1], S)
    with pytest.raises(SettingsError, match="0 pairs and 0 seeds"):
        DifferenceOfMeans.measure(pipe, method.eraser, [], [], S)
    other = make_eraser(**SHUT)
    with attach(pipe, other), pytest.raises(SettingsError, match="measuring means needs the base model"):
        DifferenceOfMeans.measure(pipe, method.eraser, PAIRS, SEEDS, S)
