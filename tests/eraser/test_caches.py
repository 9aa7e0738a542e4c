"""diffusers' hooks on a denoiser: what skips or replays blocks is refused, what only moves weights is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks.group_offloading import apply_group_offloading
from diffusers.hooks.hooks import HookRegistry, ModelHook

from helpers import pipelines
from helpers.erasers import make_eraser
from neuraleraser import attach, load_eraser, record, unload_erasers
from neuraleraser.errors import EraserNotAppliedError
from neuraleraser.sites import candidate_sites


@pytest.fixture
def pipe() -> Any:
    return pipelines.flux()


def test_a_cache_switched_on_before(pipe: Any) -> None:
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.9))
    contexts = (attach(pipe, make_eraser("flux")), record(pipe, candidate_sites(pipe), lambda *_: None))
    for context in contexts:
        with (
            pytest.raises(EraserNotAppliedError, match=r"transformer_blocks\.0 carries.*'fbc_leader_block_hook'"),
            context,
        ):
            pass
    with pytest.raises(EraserNotAppliedError, match=r"disable_cache\(\)"):
        load_eraser(pipe, make_eraser("flux"))
    assert "progress_bar" not in vars(pipe) and not any(m._forward_hooks for m in pipe.transformer.modules())
    pipe.transformer.disable_cache()
    load_eraser(pipe, make_eraser("flux"))
    pipelines.run(pipe, 0)


def test_a_cache_switched_on_later(pipe: Any) -> None:
    load_eraser(pipe, make_eraser("flux"))
    whole = pipelines.run(pipe, 0)
    apply_first_block_cache(pipe.transformer, FirstBlockCacheConfig(threshold=0.9))
    images = []
    with pytest.raises(EraserNotAppliedError, match="carries"):
        images.append(pipelines.run(pipe, 0))
    assert not images
    for block in pipe.transformer.modules():
        HookRegistry.check_if_exists_or_initialize(block).remove_hook("fbc_leader_block_hook", recurse=False)
        HookRegistry.check_if_exists_or_initialize(block).remove_hook("fbc_block_hook", recurse=False)
    assert torch.equal(pipelines.run(pipe, 0), whole)
    unload_erasers(pipe)


def test_the_refusal_is_needed(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a cache that skips blocks passes unnoticed, although the blocks did not run."""
    for where in ("edits", "guard"):
        monkeypatch.setattr(f"neuraleraser.sites.{where}.check_caches", lambda *_: None)
    ran = []
    block = pipe.transformer.single_transformer_blocks[0]
    forward = block.forward
    block.forward = lambda *args, **kwargs: (ran.append(1), forward(*args, **kwargs))[1]
    load_eraser(pipe, make_eraser("flux"))
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    pipelines.run(pipe, 0, steps=4)
    assert len(ran) < 4


def test_unknown_hooks_are_refused_and_offloading_is_not(pipe: Any) -> None:
    whole = attached(pipe)
    apply_group_offloading(pipe.transformer, torch.device("cpu"), torch.device("cpu"), "leaf_level")
    assert torch.equal(attached(pipe), whole)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer.transformer_blocks[0])
    registry.register_hook(ModelHook(), "of tomorrow")
    with pytest.raises(EraserNotAppliedError, match="'of tomorrow'"):
        attached(pipe)


def attached(pipe: Any) -> torch.Tensor:
    with attach(pipe, make_eraser("flux")):
        return pipelines.run(pipe, 0)
