"""Erasers loaded to stay: set, disabled and taken off again; by image; beside what else people do to pipelines."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser
from neuraleraser import (
    attach,
    delete_erasers,
    disable_erasers,
    enable_erasers,
    eraser_trace,
    get_active_erasers,
    get_list_erasers,
    load_eraser,
    set_erasers,
    unload_erasers,
)
from neuraleraser.eraser import CORRECTION_KINDS, Eraser
from neuraleraser.errors import EraserNotAppliedError, FileError, SettingsError, SiteError


@pytest.fixture
def sd() -> Any:
    return pipelines.stable_diffusion()


def attached(pipe: Any, erasers: Any, strength: Any = 1.0, **call: Any) -> Tensor:
    with attach(pipe, erasers, strength):
        return pipelines.run(pipe, 0, **call)


# What the calls do.


@pytest.mark.parametrize("family", ["stable_diffusion", "flux"])
def test_loaded_set_disabled_unloaded(family: str, tmp_path: Path) -> None:
    pipe, eraser = pipelines.BUILDERS[family](), make_eraser(family)
    eraser.save(tmp_path / "cats.safetensors")
    eraser = Eraser.load(tmp_path / "cats.safetensors")  # in half precision
    base, whole, half = pipelines.run(pipe, 0), attached(pipe, eraser), attached(pipe, eraser, 0.5)
    assert load_eraser(pipe, tmp_path / "cats.safetensors") == "Cats"
    assert torch.equal(pipelines.run(pipe, 0), whole) and not torch.equal(whole, base)
    set_erasers(pipe, "Cats", 0.5)
    assert torch.equal(pipelines.run(pipe, 0), half)
    disable_erasers(pipe)
    assert torch.equal(pipelines.run(pipe, 0), base)
    set_erasers(pipe, ["Cats"], [torch.tensor(1.0)])
    assert torch.equal(pipelines.run(pipe, 0), whole)
    set_erasers(pipe, "Cats", 0)
    assert torch.equal(pipelines.run(pipe, 0), base)
    unload_erasers(pipe)
    assert not pipelines.left(pipe) and torch.equal(pipelines.run(pipe, 0), base)
    for idle in (unload_erasers, disable_erasers):
        idle(pipe)  # nothing is there: nothing to do
    assert load_eraser(pipe, eraser, name="Cats") == "Cats"  # the name is free again
    assert torch.equal(pipelines.run(pipe, 0), whole)


def test_several_act_as_if_attached_together(sd: Any) -> None:
    kinds = ("low_rank", "scaling", "scaling")
    many = {f"{kind} {i}": make_eraser(kind=kind, seed=20 * i, name=str(i)) for i, kind in enumerate(kinds)}
    for name, eraser in many.items():
        load_eraser(sd, eraser, name)
    loaded = pipelines.run(sd, 0)
    a, b, c = many
    set_erasers(sd, [c, a], [0.5, 2.0])  # b is not named: it rests
    some = pipelines.run(sd, 0)
    unload_erasers(sd)
    assert torch.equal(loaded, attached(sd, list(many.values())))
    assert torch.equal(some, attached(sd, [many[a], many[b], many[c]], [2.0, 0.0, 0.5]))
    torch.testing.assert_close(some, attached(sd, [many[a], many[c]], [2.0, 0.5]))


def test_what_is_loaded_later_leaves_strengths_as_they_were(sd: Any) -> None:
    first, second = make_eraser(), make_eraser(seed=30, name="Dogs")
    load_eraser(sd, first, "first")
    set_erasers(sd, "first", [[0.0, 1.5]])
    load_eraser(sd, second, "second")
    got = pipelines.run(sd, 0, n=2)
    unload_erasers(sd)
    assert torch.equal(got, attached(sd, [first, second], [[0.0, 1.5], 1.0], n=2))


def test_the_context_manager_stacks_on_what_is_loaded(sd: Any) -> None:
    load_eraser(sd, make_eraser())
    one = pipelines.run(sd, 0)
    with attach(sd, make_eraser(seed=50)):
        assert not torch.equal(pipelines.run(sd, 0), one)
    assert torch.equal(pipelines.run(sd, 0), one)


# Listed, rested, deleted, as diffusers has it for LoRAs.


def test_enabled_again_at_the_strengths_from_before(sd: Any) -> None:
    a, b = make_eraser(), make_eraser(seed=30, name="Dogs")
    base = pipelines.run(sd, 0, n=2)
    assert get_list_erasers(sd) == get_active_erasers(sd) == []
    enable_erasers(sd)  # nothing is there: nothing to do
    for eraser in (a, b):
        load_eraser(sd, eraser)
    set_erasers(sd, "Dogs", [[0.0, 1.5]])
    some = pipelines.run(sd, 0, n=2)
    assert get_list_erasers(sd) == ["Cats", "Dogs"] and get_active_erasers(sd) == ["Dogs"]
    for _ in range(2):  # twice is once
        disable_erasers(sd)
        assert get_active_erasers(sd) == [] and torch.equal(pipelines.run(sd, 0, n=2), base)
    enable_erasers(sd)
    assert get_active_erasers(sd) == ["Dogs"] and torch.equal(pipelines.run(sd, 0, n=2), some)
    disable_erasers(sd)
    set_erasers(sd, "Cats", 0.5)  # says anew what acts
    enable_erasers(sd)
    assert get_active_erasers(sd) == ["Cats"]


def test_what_is_loaded_while_others_rest_leaves_them_their_strengths(sd: Any) -> None:
    a, b = make_eraser(), make_eraser(seed=30, name="Dogs")
    load_eraser(sd, a)
    set_erasers(sd, "Cats", 0.5)
    disable_erasers(sd)
    load_eraser(sd, b)
    assert get_active_erasers(sd) == ["Dogs"]
    alone = pipelines.run(sd, 0)
    enable_erasers(sd)
    both = pipelines.run(sd, 0)
    unload_erasers(sd)
    assert torch.equal(alone, attached(sd, [a, b], [0.0, 1.0]))
    assert torch.equal(both, attached(sd, [a, b], [0.5, 1.0]))


def test_deleted_erasers_are_gone_and_the_others_as_they_were(sd: Any) -> None:
    many = {name: make_eraser(seed=20 * i, name=name) for i, name in enumerate("abc")}
    base = pipelines.run(sd, 0)
    for name, eraser in many.items():
        load_eraser(sd, eraser, action="detect" if name == "a" else "erase")
    set_erasers(sd, list("abc"), [0.3, 2.0, 0.5])
    pipelines.run(sd, 0)
    delete_erasers(sd, "b")
    assert get_list_erasers(sd) == ["a", "c"]
    rest = pipelines.run(sd, 0)
    assert [[f["eraser"] for f in r["fired"]] for r in eraser_trace(sd).records()] == [["a", "c"]] * 2
    assert {f["eraser"]: f["action"] for f in eraser_trace(sd).records()[0]["fired"]} == {"a": "detect", "c": "erase"}
    disable_erasers(sd)
    delete_erasers(sd, ["a"])
    assert torch.equal(pipelines.run(sd, 0), base)
    enable_erasers(sd)
    assert torch.equal(pipelines.run(sd, 0), rest)
    for names in ("a", ["c", "c"], ["c", "b"]):
        with pytest.raises(SettingsError, match=r"cannot be deleted: .*\['c'\]"):
            delete_erasers(sd, names)
    delete_erasers(sd, [])
    assert torch.equal(pipelines.run(sd, 0), rest) and not torch.equal(rest, base)
    delete_erasers(sd, "c")
    assert not pipelines.left(sd) and get_list_erasers(sd) == [] and torch.equal(pipelines.run(sd, 0), base)
    with pytest.raises(SettingsError, match=r"cannot be deleted: .*\[\]"):
        delete_erasers(sd, "c")
    assert torch.equal(rest, attached(sd, many["c"], 0.5))


# Refused, and nothing changed.


@pytest.mark.parametrize(
    "strengths",
    [-0.1, 2.01, float("nan"), float("inf"), [], [1.0, 1.0], [[1.0, 3.0]], [[]], [[[1.0]]], "much", None],
)
def test_strengths_out_of_range(sd: Any, strengths: Any) -> None:
    load_eraser(sd, make_eraser())
    set_erasers(sd, "Cats", 0.5)
    half = pipelines.run(sd, 0)
    with pytest.raises(SettingsError, match="from 0 to 2") as caught:
        set_erasers(sd, "Cats", strengths)
    assert "\n" not in str(caught.value)
    assert torch.equal(pipelines.run(sd, 0), half)


def test_strengths_for_different_numbers_of_images(sd: Any) -> None:
    load_eraser(sd, make_eraser(), "a")
    load_eraser(sd, make_eraser(seed=30, name="Dogs"), "b")
    with pytest.raises(SettingsError, match="image of the batch"):
        set_erasers(sd, ["a", "b"], [[1.0, 0.0], [1.0, 1.0, 0.5]])


def test_names(sd: Any) -> None:
    with pytest.raises(SettingsError, match=r"\['Cats'\] cannot be set.*\[\]"):
        set_erasers(sd, "Cats")
    load_eraser(sd, make_eraser())
    whole = pipelines.run(sd, 0)
    with pytest.raises(SettingsError, match=r"'Cats'.*delete_erasers"):
        load_eraser(sd, make_eraser(seed=50))
    with pytest.raises(SettingsError, match="not blank"):
        load_eraser(sd, make_eraser(seed=50), "")
    for names in ("Dogs", ["Cats", "Cats"], ["Cats", "Dogs"]):
        with pytest.raises(SettingsError, match="of those loaded"):
            set_erasers(sd, names, 0.5)
    assert torch.equal(pipelines.run(sd, 0), whole)


def test_an_eraser_that_cannot_be_loaded_leaves_the_others(sd: Any, tmp_path: Path) -> None:
    load_eraser(sd, make_eraser())
    whole = pipelines.run(sd, 0)
    with pytest.raises(SiteError):
        load_eraser(sd, make_eraser("flux"), "flux")
    with pytest.raises(FileError, match="holds no eraser"):
        load_eraser(sd, tmp_path, "none")
    assert torch.equal(pipelines.run(sd, 0), whole)
    unload_erasers(sd)
    assert not pipelines.left(sd)


# By image.


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_3", "flux", "pixart"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_each_image_has_its_own_strength(family: str, guidance: float) -> None:
    pipe = pipelines.BUILDERS[family]()
    call: dict[str, Any] = {"n": 3, "guidance": guidance}
    base = pipelines.run(pipe, 0, **call)
    load_eraser(pipe, make_eraser(family))
    alike = []
    for strength in (0.0, 1.0, 0.5):
        set_erasers(pipe, "Cats", strength)
        alike.append(pipelines.run(pipe, 0, **call))
    set_erasers(pipe, ["Cats"], torch.tensor([[0.0, 1.0, 0.5]]))
    mixed = pipelines.run(pipe, 0, **call)
    assert torch.equal(mixed[0], base[0])
    assert all(torch.equal(mixed[i], alike[i][i]) for i in range(3))
    assert not torch.equal(mixed[1], base[1]) and not torch.equal(alike[1][2], alike[2][2])


@pytest.mark.parametrize("kind", sorted(CORRECTION_KINDS))
def test_attached_by_image(sd: Any, kind: str) -> None:
    """Two erasers, each for one image: every image is as if it had been drawn with its own eraser alone."""
    a, b = make_eraser(kind=kind), make_eraser(kind=kind, seed=70, name="Dogs")
    both = attached(sd, [a, b], [[1.0, 0.0], [0.0, 1.0]], n=2)
    torch.testing.assert_close(both[0], attached(sd, a, n=2)[0])
    torch.testing.assert_close(both[1], attached(sd, b, n=2)[1])


def test_guidance_in_two_passes() -> None:
    pipe = pipelines.flux()
    call: dict[str, Any] = {"n": 2, "true_cfg_scale": 2.0}
    call |= {f"negative_{k}": v + 1 for k, v in pipelines.embeds(pipe, 2).items()}
    base, whole = pipelines.run(pipe, 0, **call), attached(pipe, make_eraser("flux"), **call)
    mixed = attached(pipe, make_eraser("flux"), [[1.0, 0.0]], **call)
    assert torch.equal(mixed[0], whole[0]) and torch.equal(mixed[1], base[1])


@pytest.mark.parametrize(("n", "guidance"), [(3, 1.0), (3, 4.0), (4, 1.0), (4, 4.0), (1, 4.0)])
def test_strengths_for_another_number_of_images(sd: Any, n: int, guidance: float) -> None:
    """No image, even where the rows could be shared out."""
    load_eraser(sd, make_eraser())
    set_erasers(sd, "Cats", [[1.0, 0.0]])
    images = []
    with pytest.raises(SettingsError, match="strengths for 2 images"):
        images.append(pipelines.run(sd, 0, n=n, guidance=guidance))
    assert not images
    assert pipelines.run(sd, 0, n=2, guidance=guidance).shape[0] == 2  # the next call is fine


# Beside others.


def test_fail_closed(sd: Any) -> None:
    load_eraser(sd, make_eraser())
    own, sd.unet = sd.unet, pipelines.stable_diffusion().unet
    images = []
    with pytest.raises(EraserNotAppliedError, match="did not run"):
        images.append(pipelines.run(sd, 0))
    assert not images
    sd.unet = own
    pipelines.run(sd, 0)


def test_nothing_is_fired_and_nothing_changed(sd: Any) -> None:
    base = pipelines.run(sd, 0, n=2)
    for i, kind in enumerate(sorted(CORRECTION_KINDS)):
        load_eraser(sd, make_eraser(kind=kind, seed=i, name=kind, **SHUT))
    assert torch.equal(pipelines.run(sd, 0, n=2), base)


def test_lora_beside(sd: Any) -> None:
    peft = pytest.importorskip("peft")
    base = pipelines.run(sd, 0)
    load_eraser(sd, make_eraser())
    erased = pipelines.run(sd, 0)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    sd.unet.add_adapter(config, adapter_name="a")
    both = pipelines.run(sd, 0)
    disable_erasers(sd)
    lora = pipelines.run(sd, 0)
    assert len({tuple(t.flatten().tolist()) for t in (base, erased, both, lora)}) == 4
    unload_erasers(sd)
    assert torch.equal(pipelines.run(sd, 0), lora)
    load_eraser(sd, make_eraser())  # the other way round
    assert torch.equal(pipelines.run(sd, 0), both)
    sd.unet.delete_adapters("a")
    assert torch.equal(pipelines.run(sd, 0), erased)


@pytest.mark.parametrize("first", [True, False])
def test_offloaded(sd: Any, first: bool) -> None:
    eraser = make_eraser()
    base, whole = pipelines.run(sd, 0), attached(sd, eraser)
    if first:
        sd.enable_model_cpu_offload(device="cpu")
    load_eraser(sd, eraser)
    sd.enable_model_cpu_offload(device="cpu")
    assert torch.equal(pipelines.run(sd, 0), whole)
    disable_erasers(sd)
    assert torch.equal(pipelines.run(sd, 0), base)
    unload_erasers(sd)
    sd.remove_all_hooks()
    assert torch.equal(pipelines.run(sd, 0), base)


def test_accelerate_hooks_on_every_block(sd: Any) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    whole = attached(sd, make_eraser())
    load_eraser(sd, make_eraser())
    for module in sd.unet.modules():
        if not list(module.children()):
            add_hook_to_module(module, AlignDevicesHook("cpu", offload=True, io_same_device=True))
    add_hook_to_module(sd.unet.mid_block.attentions[0], AlignDevicesHook("cpu", io_same_device=True))
    assert torch.equal(pipelines.run(sd, 0), whole)


@pytest.mark.parametrize("images", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_two_pipelines_in_two_threads(images: int) -> None:
    pipes = [pipelines.stable_diffusion(), pipelines.stable_diffusion()]
    erasers = [make_eraser(name="0"), make_eraser(seed=40, kind="scaling", name="1")]
    plans = [[(seed, (1.0, 0.5, 0.0, 2.0)[(seed + k) % 4]) for seed in range(images)] for k in (0, 1)]
    for pipe, eraser in zip(pipes, erasers, strict=True):
        load_eraser(pipe, eraser, "same name")

    def draw(pipe: Any, plan: list[tuple[int, float]], out: list[Tensor]) -> None:
        for seed, strength in plan:
            set_erasers(pipe, "same name", strength)
            out.append(pipelines.run(pipe, seed))

    alone: list[list[Tensor]] = [[], []]
    together: list[list[Tensor]] = [[], []]
    for i in (0, 1):
        draw(pipes[i], plans[i], alone[i])
    threads = [threading.Thread(target=draw, args=(pipes[i], plans[i], together[i])) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in (0, 1):
        assert len(together[i]) == images
        assert all(torch.equal(a, b) for a, b in zip(alone[i], together[i], strict=True))
    assert not torch.equal(alone[0][1], alone[1][1])
