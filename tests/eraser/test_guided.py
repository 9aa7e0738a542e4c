"""An image gate and the guided correction: the prediction moves where the gate is open, and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import FAMILIES, SHUT, make_eraser, random, with_picture
from neuraleraser import ConceptRefusedError, attach
from neuraleraser.eraser import Eraser, Guided
from neuraleraser.eraser.gate import SHUT_BOUND, Gate
from neuraleraser.eraser.guided import HELD
from neuraleraser.errors import DataError, EraserNotAppliedError, FileError
from neuraleraser.sites import DenoiserCall, denoiser, denoiser_calls, record, replay


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


def picture_only(family: str, pipe: Any, **gate: Any) -> Eraser:
    """An eraser whose prompt gate stays shut."""
    return with_picture(make_eraser(family, **SHUT), pipe, **gate)


def forwards(pipe: Any, **call: Any) -> tuple[Tensor, list[DenoiserCall]]:
    """The images of a run, and its denoiser calls."""
    calls: list[DenoiserCall] = []
    with denoiser_calls(pipe, calls.append):
        images = pipelines.run(pipe, 0, **call)
    return images, calls


def given_text(call: DenoiserCall, text: Any) -> dict[str, Any]:
    """The call's conditioning, each row with one text: written out anew."""
    rows = len(call.state)
    new: dict[str, Any] = dict(call.conditioning)
    for name, x in text.items():
        value = x if name == "txt_ids" else x.repeat(rows, *[1] * (x.ndim - 1))
        if name == "added_cond_kwargs.text_embeds":
            new["added_cond_kwargs"] = {**new["added_cond_kwargs"], "text_embeds": value}
        else:
            new[name] = value
    return new


@pytest.mark.parametrize("family", FAMILIES)
def test_while_open_the_prediction_moves_by_the_formula(family: str) -> None:
    """v(x) + weight opening (v(x, without) - v(x, shown)), of every row alike."""
    pipe = pipelines.BUILDERS[family]()
    eraser = picture_only(family, pipe)
    assert eraser.guided is not None and eraser.image_gate is not None
    gate = eraser.image_gate
    with attach(pipe, eraser):
        _, calls = forwards(pipe, n=2)
    with torch.no_grad():
        for call in calls:
            seen: list[tuple[Tensor, Tensor]] = []
            with record(pipe, [gate.site], lambda site, x, c, seen=seen: seen.append((x, c.timestep))):
                base = replay(pipe, call.state, call.timestep, call.conditioning)
            without, shown = (
                replay(pipe, call.state, call.timestep, given_text(call, text))
                for text in (eraser.guided.without, eraser.guided.shown)
            )
            opening = gate(*seen[0]).view(-1, 2).amax(0).repeat(len(base) // 2).view(-1, *[1] * (base.ndim - 1))
            assert bool((opening > 0).all())
            wanted = base + eraser.guided.weight * opening * (without - shown)
            torch.testing.assert_close(call.prediction, wanted, rtol=1e-3, atol=1e-4)
            assert not torch.allclose(call.prediction, base, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_while_shut_no_bit_changes_and_nothing_more_is_run(family: str) -> None:
    pipe = pipelines.BUILDERS[family]()
    base = pipelines.run(pipe, 0, n=2)
    eraser, opened = with_picture(make_eraser(family, **SHUT), pipe, **SHUT), picture_only(family, pipe)
    assert eraser.image_gate is not None
    block = dict(denoiser(pipe).named_modules())[eraser.image_gate.site.path.partition(".")[2]]
    passes: list[int] = []
    handle = block.register_forward_hook(lambda *_: passes.append(1))
    with attach(pipe, eraser) as trace:
        assert torch.equal(pipelines.run(pipe, 0, n=2), base)
    assert not trace.fired and len(passes) == 2
    with attach(pipe, opened):
        pipelines.run(pipe, 0, n=2)
    handle.remove()
    assert len(passes) == 6  # one more forward a step, of both texts


def test_images_do_not_see_each_other(sd: Any) -> None:
    """One image is open, the other keeps its bits; and each is what it is alone."""
    eraser = picture_only("stable_diffusion", sd)
    assert eraser.image_gate is not None
    gate, base = eraser.image_gate, pipelines.run(sd, 0, n=2)
    found: list[Tensor] = []
    with record(sd, [gate.site], lambda site, x, c: found.append(gate.evidence(x))):
        pipelines.run(sd, 0, n=2, steps=1)
    most = found[0].view(-1, 2).amax(0)
    low = torch.full_like(gate.low, float(most.mean()))
    one = replace(eraser, image_gate=replace(gate, low=low, high=low + 1e-3))
    loud = int(most.argmax())
    with attach(sd, one) as trace:
        images = pipelines.run(sd, 0, n=2, steps=1)
    assert trace.fired.keys() == {loud}
    before = pipelines.run(sd, 0, n=2, steps=1)
    assert torch.equal(images[1 - loud], before[1 - loud]) and not torch.equal(images[loud], before[loud])
    assert torch.equal(pipelines.run(sd, 0, n=2), base)


def test_two_passes_move_as_one_batch() -> None:
    """Where guidance takes two forwards, what the first saw moves both."""
    pipe = pipelines.flux()
    eraser = picture_only("flux", pipe)
    _, plain = forwards(pipe, true_cfg_scale=3.0, **_two_texts(pipe))
    with attach(pipe, eraser):
        _, calls = forwards(pipe, true_cfg_scale=3.0, **_two_texts(pipe))
    assert len(calls) == len(plain) == 4
    deltas = []
    with torch.no_grad():
        for call in calls[:2]:
            base = replay(pipe, call.state, call.timestep, call.conditioning)
            deltas.append(call.prediction - base)
    assert calls[0].state is calls[1].state and float(deltas[0].abs().max()) > 1e-3
    torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-3, atol=1e-5)


def _two_texts(pipe: Any) -> dict[str, Any]:
    made = pipelines.embeds(pipe)
    return made | {f"negative_{name}": x.flip(1) for name, x in made.items() if name.startswith(("prompt", "pooled"))}


def _second_sees_more(pipe: Any) -> tuple[Eraser, Gate, dict[str, Any], tuple[float, float]]:
    """An eraser of pictures, its gate, two texts in such an order that it finds more in the second pass of the first
    step, and its evidence in both."""
    eraser, texts = picture_only("flux", pipe), _two_texts(pipe)
    assert eraser.image_gate is not None
    gate, found = eraser.image_gate, list[float]()
    with record(pipe, [gate.site], lambda site, x, c: found.append(float(gate.evidence(x)))):
        pipelines.run(pipe, 0, true_cfg_scale=3.0, steps=1, **texts)
    first, second = found
    if first > second:
        texts = {name: texts[_other_side(name)] for name in texts}
    return eraser, gate, texts, (min(found), max(found))


def test_the_second_pass_of_a_step_repeats_the_first_s_change() -> None:
    """What the gate sees in the second pass alone changes nothing: else the two would not move alike."""
    pipe = pipelines.flux()
    eraser, gate, texts, (low, high) = _second_sees_more(pipe)
    half_open = replace(gate, low=torch.full_like(gate.low, low - (high - low) / 2))
    half_open = replace(half_open, high=half_open.low + 2 * (high - low))
    with attach(pipe, replace(eraser, image_gate=half_open)):
        _, calls = forwards(pipe, true_cfg_scale=3.0, steps=1, **texts)
    with torch.no_grad():
        deltas = [c.prediction - replay(pipe, c.state, c.timestep, c.conditioning) for c in calls]
    assert len(deltas) == 2 and float(deltas[0].abs().max()) > 1e-3
    torch.testing.assert_close(deltas[0], deltas[1], rtol=1e-3, atol=1e-5)


def test_what_the_second_pass_alone_sees_acts_from_the_next_step_on() -> None:
    pipe = pipelines.flux()
    eraser, gate, texts, found = _second_sees_more(pipe)
    low = torch.tensor([1e6, sum(found) / 2])  # shut in the second step
    high = torch.tensor([2e6, sum(found) / 2 + 1e-4])
    with attach(pipe, replace(eraser, image_gate=replace(gate, low=low, high=high))):
        _, calls = forwards(pipe, true_cfg_scale=3.0, steps=2, **texts)
    with torch.no_grad():
        moves = [c.prediction - replay(pipe, c.state, c.timestep, c.conditioning) for c in calls]
    changed = [bool(move.abs().max() > 1e-3) for move in moves]
    assert changed == [False, False, True, True]


def test_a_loop_of_one_s_own_may_stop_guiding(sd: Any) -> None:
    """Rows are images there, so their number changes; what was open is forgotten, and the gates look on."""
    eraser = picture_only("stable_diffusion", sd, low=0.0)
    sd.scheduler.set_timesteps(2)
    x, text = random(4, 4, 8, 8), random(4, 5, sd.unet.config.cross_attention_dim)
    with attach(sd, eraser), torch.no_grad():
        for rows, time in zip((4, 2), sd.scheduler.timesteps, strict=True):
            moved = sd.unet(x[:rows], time, encoder_hidden_states=text[:rows]).sample
            assert moved.shape[0] == rows and bool(moved.isfinite().all())
    with torch.no_grad():
        assert not torch.allclose(moved, sd.unet(x[:2], time, encoder_hidden_states=text[:2]).sample, atol=1e-3)


def test_a_loop_of_one_s_own_may_give_a_number_for_a_timestep(sd: Any) -> None:
    x, text = random(2, 4, 8, 8), random(2, 5, sd.unet.config.cross_attention_dim)
    with attach(sd, picture_only("stable_diffusion", sd, low=0.0)), torch.no_grad():
        sd.scheduler.set_timesteps(2)
        by_number = sd.unet(x, 500, encoder_hidden_states=text).sample
        sd.scheduler.set_timesteps(2)
        by_tensor = sd.unet(x, torch.tensor(500), encoder_hidden_states=text).sample
    torch.testing.assert_close(by_number, by_tensor)


def _other_side(name: str) -> str:
    return name.removeprefix("negative_") if name.startswith("negative_") else f"negative_{name}"


@pytest.mark.parametrize(("shut", "share"), [(SHUT_BOUND, 1.0), (1e6, HELD)])
def test_once_open_an_image_stays_open_for_the_rest_of_its_call(sd: Any, shut: float, share: float) -> None:
    """The gate is shut at the second step's timestep: the loud image moves there, too, but not what the next call
    draws. Where the gate is blind it moves as before, where it sees nothing any more by a share of that."""
    eraser = picture_only("stable_diffusion", sd)
    assert eraser.image_gate is not None and eraser.guided is not None
    gate, steps = eraser.image_gate, []
    for seed in (0, 1):
        with record(sd, [gate.site], lambda site, x, c: steps.append(float(gate.evidence(x).max()))):
            pipelines.run(sd, seed)
    found = steps[::2]  # at the first of two steps
    loud, quiet = (0, 1) if found[0] > found[1] else (1, 0)
    low = torch.tensor([shut, sum(found) / 2])  # of t = 1 and of t = 501
    one = replace(eraser, image_gate=replace(gate, low=low, high=torch.tensor([2 * shut, sum(found) / 2 + 1e-3])))
    plain = pipelines.run(sd, quiet)
    calls: list[DenoiserCall] = []
    with attach(sd, one) as trace:
        with denoiser_calls(sd, calls.append):
            pipelines.run(sd, loud)
        assert torch.equal(pipelines.run(sd, quiet), plain)
    assert trace.fired == {0: {"Cats": [501.0]}} and len(calls) == 2
    with torch.no_grad():
        for call, part in zip(calls, (1.0, share), strict=True):
            base = replay(sd, call.state, call.timestep, call.conditioning)
            without, shown = (
                replay(sd, call.state, call.timestep, given_text(call, text))
                for text in (eraser.guided.without, eraser.guided.shown)
            )
            torch.testing.assert_close(
                call.prediction, base + part * eraser.guided.weight * (without - shown), rtol=1e-3, atol=1e-4
            )
            assert not torch.allclose(call.prediction, base, atol=1e-3)


def test_a_negative_prompt_opens_an_image_gate(sd: Any) -> None:
    """Of an image gate all rows count: what it sees is the picture, not what was asked for."""
    eraser = picture_only("stable_diffusion", sd)
    with attach(sd, eraser, action="detect") as trace:
        both = pipelines.run(sd, 0, n=1)
    assert torch.equal(both, pipelines.run(sd, 0, n=1)) and trace.fired[0]["Cats"]
    (record_,) = trace.records()
    assert [line["site"] for line in record_["fired"]] == [str(eraser.parts[1].gate.site)]


def test_refusing_also_by_the_image_gate(sd: Any) -> None:
    with (
        pytest.raises(ConceptRefusedError, match="image 0: Cats"),
        attach(sd, picture_only("stable_diffusion", sd), action="refuse"),
    ):
        pipelines.run(sd, 0)


def test_strength_scales_the_change(sd: Any) -> None:
    eraser, base = picture_only("stable_diffusion", sd), pipelines.run(sd, 0, steps=1)
    with attach(sd, eraser, 0.0):
        assert torch.equal(pipelines.run(sd, 0, steps=1), base)
    with attach(sd, eraser, 0.5):
        half = pipelines.run(sd, 0, steps=1)
    with attach(sd, eraser):
        whole = pipelines.run(sd, 0, steps=1)
    torch.testing.assert_close(half - base, 0.5 * (whole - base), rtol=1e-3, atol=1e-4)


def test_gradients_run_through_the_change(sd: Any) -> None:
    eraser = picture_only("stable_diffusion", sd)
    made = {name: x.requires_grad_() for name, x in pipelines.embeds(sd).items()}
    with attach(sd, eraser):
        pipelines.run(sd, 0, steps=1, grad=True, **made).square().sum().backward()
    assert made["prompt_embeds"].grad is not None and bool(made["prompt_embeds"].grad.any())


def test_saved_and_read_again(sd: Any, tmp_path: Path) -> None:
    eraser = picture_only("stable_diffusion", sd)
    eraser.save(tmp_path / "e.safetensors")
    again = Eraser.load(tmp_path / "e.safetensors")
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "e.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert again.guided is not None and again.guided.prompts == ("b", "a") and again.image_gate is not None
    assert again.image_gate.picture and not again.gate.picture
    with attach(sd, again):
        first = pipelines.run(sd, 0)
    with attach(sd, Eraser.load(tmp_path / "again.safetensors")):
        assert torch.equal(pipelines.run(sd, 0), first)
    assert again.content_hash != make_eraser(**SHUT).content_hash


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight": 0.0}, "its weight is 0"),
        ({"weight": float("nan")}, "its weight is nan"),
        ({"shown": {}}, "do not have the same text arguments"),
        ({"without": {"colour": torch.ones(1)}, "shown": {"colour": torch.ones(1)}}, "the same text arguments"),
    ],
)
def test_a_correction_that_cannot_be_is_refused(sd: Any, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    eraser = picture_only("stable_diffusion", sd)
    assert isinstance(eraser.guided, Guided)
    broken = replace(eraser, guided=replace(eraser.guided, **change))
    with pytest.raises(DataError, match=said):
        broken.save(tmp_path / "e.safetensors")
    with pytest.raises(DataError, match=said), attach(sd, broken):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_without_one_of_the_two_is_refused(sd: Any, tmp_path: Path) -> None:
    eraser = picture_only("stable_diffusion", sd)
    with pytest.raises(DataError, match="come together"):
        replace(eraser, guided=None).save(tmp_path / "e.safetensors")
    from neuraleraser.io import tensor_file

    eraser.save(tmp_path / "e.safetensors")
    tensors, header = tensor_file.load(tmp_path / "e.safetensors", "eraser")
    for prefix in ("guided/", "image_gate/"):
        kept = {name: x for name, x in tensors.items() if not name.startswith(prefix)}
        tensor_file.save(tmp_path / "less.safetensors", "eraser", kept, header)
        with pytest.raises(FileError):
            Eraser.load(tmp_path / "less.safetensors")


def test_prompts_of_another_pipeline_are_an_error(sd: Any) -> None:
    eraser = picture_only("stable_diffusion", sd)
    assert eraser.guided is not None
    strange = {"pooled_projections": torch.ones(1, 4)}
    other = replace(eraser, guided=replace(eraser.guided, without=strange, shown=strange))
    with pytest.raises(EraserNotAppliedError, match="pooled_projections"), attach(sd, other):
        pipelines.run(sd, 0)
