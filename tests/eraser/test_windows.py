"""Gates that read windows of positions: their arithmetic, alone and together, the grids they need, and their files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser, make_gate, random, with_picture
from neuraleraser import attach
from neuraleraser.eraser import Eraser
from neuraleraser.eraser.batched import BatchedGates
from neuraleraser.eraser.gate import pre_activations
from neuraleraser.errors import DataError, FileError, SiteError
from neuraleraser.sites import Site, candidate_sites, cross_attention_sites, record

SITE = Site("unet.mid_block.attentions.0")
SIDES = st.integers(1, 5)
WINDOWS = st.sampled_from([1, 3, 5])


def naive_windows(x: Tensor, rows: Tensor, bias: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
    """The sum over each position's neighbours, one at a time; those outside the grid are left out."""
    (height, width), half = grid, window // 2
    kernels = rows.view(len(rows), x.shape[2], window, window)
    out = bias.expand(*x.shape[:2], len(rows)).clone()
    for row in range(height):
        for column in range(width):
            for down in range(-half, half + 1):
                for right in range(-half, half + 1):
                    at, beside = row + down, column + right
                    if 0 <= at < height and 0 <= beside < width:
                        kernel = kernels[:, :, down + half, right + half]
                        out[:, row * width + column] += x[:, at * width + beside] @ kernel.T
    return out


@given(SIDES, SIDES, WINDOWS, st.integers(0, 99))
def test_a_window_is_the_sum_over_neighbours(height: int, width: int, window: int, seed: int) -> None:
    x = random(2, height * width, 3, seed=seed).double()
    rows, bias = random(4, 3 * window**2, seed=seed + 1).double(), random(4, seed=seed + 2).double()
    found = pre_activations(x, rows, bias, window, (height, width))
    torch.testing.assert_close(found, naive_windows(x, rows, bias, window, (height, width)))


@given(st.lists(st.tuples(WINDOWS, st.sampled_from([1.0, 0.3])), min_size=1, max_size=4), SIDES, SIDES)
def test_gates_of_several_windows_together(kinds: list[tuple[int, float]], height: int, width: int) -> None:
    gates = [
        make_gate(SITE, 3, seed=9 * i, window=window, share=share, threshold=0.3, low=0.1, high=9.0)
        for i, (window, share) in enumerate(kinds)
    ]
    x, t, grid = random(3, height * width, 3, seed=7), torch.tensor([30.0, 420.0, 980.0]), (height, width)
    together = BatchedGates(gates)
    evidence, pre = together.evidence(x, grid)
    low, width = together.bounds_at(t)
    opening = ((evidence - low) / width).clamp(0, 1)
    for column, i in enumerate(together.order):
        torch.testing.assert_close(opening[:, column], gates[i](x, t, grid))
        torch.testing.assert_close(evidence[:, column], gates[i].evidence(x, grid))
        where = gates[i].activations(x, grid) @ gates[i].weight
        torch.testing.assert_close(together.evidence_by_position(pre)[..., column], where)


@pytest.mark.parametrize("grid", [None, (4, 4), (12, 0)])
def test_a_window_without_its_grid_is_an_error(grid: tuple[int, int] | None) -> None:
    x, gate = random(2, 12, 3), make_gate(SITE, 3, window=3)
    with pytest.raises(SiteError, match=r"windows of 3 x 3 positions, and the 12 of its site"):
        gate.evidence(x, grid)
    with pytest.raises(SiteError, match="form no known grid"):
        BatchedGates([make_gate(SITE, 3, seed=5), gate]).evidence(x, grid)
    assert gate.width == 3 and gate.evidence(x, (3, 4)).shape == (2,)


def test_latents_in_packs_have_no_grid() -> None:
    """FLUX's positions come as a row, of which no one says how long its lines are."""
    pipe = pipelines.flux()
    eraser = with_picture(make_eraser("flux", **SHUT), pipe, window=3)
    assert eraser.image_gate is not None and set(grids_seen(pipe, eraser.image_gate.site)) == {None}
    with pytest.raises(SiteError, match="form no known grid"), attach(pipe, eraser):
        pipelines.run(pipe, 0, steps=1)


def grids_seen(pipe: Any, *sites: Site, **call: Any) -> list[tuple[int, int] | None]:
    """The grids that hooks at sites are given in one step."""
    seen: list[tuple[int, int] | None] = []
    with record(pipe, sites, lambda site, x, context: seen.append(context.grid)):
        pipelines.run(pipe, 0, steps=1, **call)
    return seen


@pytest.mark.parametrize("family", ["stable_diffusion_3", "pixart", "sana"])
def test_the_grid_of_a_transformer_is_that_of_its_patches(family: str) -> None:
    pipe = pipelines.EVERY[family]()
    patches = (12, 8) if family == "sana" else (6, 4)  # 12 x 8 latents in patches of 1 or of 2 a side
    site = candidate_sites(pipe)[0]
    assert set(grids_seen(pipe, site, height=24, width=16)) == {patches}


def deep_unet() -> Any:
    """Stable Diffusion with a UNet of three depths."""
    down, up = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    return pipelines.stable_diffusion(block_out_channels=(16, 32, 32), down_block_types=down, up_block_types=up)


@pytest.fixture(scope="module")
def deep() -> Any:
    return deep_unet()


@pytest.mark.parametrize("size", [(8, 8), (8, 4), (4, 12), (7, 5), (9, 6), (5, 11)])
def test_the_grid_at_every_depth_of_a_unet(deep: Any, size: tuple[int, int]) -> None:
    """As the blocks' own outputs have it: each depth holds half of each side, rounded up."""
    blocks = candidate_sites(deep)
    shapes: dict[Site, tuple[int, ...]] = {}
    modules = dict(deep.unet.named_modules())
    handles = [
        modules[site.path.partition(".")[2]].register_forward_hook(
            lambda module, args, out, site=site: shapes.update({site: tuple(out[0].shape[-2:])})
        )
        for site in blocks
    ]
    seen: dict[Site, tuple[int, int] | None] = {}
    with record(deep, [*blocks, *cross_attention_sites(deep)], lambda site, x, c: seen.update({site: c.grid})):
        text = random(2, pipelines.WORDS, pipelines.WIDTH)
        deep.unet(random(2, 4, *size), torch.tensor(500), encoder_hidden_states=text, return_dict=False)
    for handle in handles:
        handle.remove()
    assert len({grid for grid in shapes.values()}) == 3 and {site: seen[site] for site in blocks} == shapes
    for site in cross_attention_sites(deep):
        assert seen[site] == next(shapes[b] for b in blocks if site.path.startswith(f"{b.path}."))


def test_the_text_has_no_grid(deep: Any) -> None:
    site = Site(candidate_sites(deep)[0].path, "input", "text")
    assert set(grids_seen(deep, site)) == {None}


@pytest.fixture
def eraser() -> Eraser:
    pipe = pipelines.stable_diffusion()
    return with_picture(make_eraser(), pipe, window=3)


def test_window_and_picture_survive_the_file(eraser: Eraser, tmp_path: Path) -> None:
    eraser.save(tmp_path / "e.safetensors")
    back = Eraser.load(tmp_path / "e.safetensors")
    assert back.image_gate is not None and eraser.image_gate is not None
    assert (back.image_gate.window, back.image_gate.picture) == (3, True)
    assert (back.gate.window, back.gate.picture) == (1, False) and back.image_gate.width == 32
    near = replace(eraser.image_gate, rows=eraser.image_gate.rows.half().float())
    x = random(2, 6, 32, seed=4)
    assert torch.equal(back.image_gate.evidence(x, (2, 3)), near.evidence(x, (2, 3)))


@pytest.mark.parametrize("window", [0, 2, -1, -3, 5, 9, 1.5, "3", True, None, [3], 10**40])
def test_windows_that_cannot_be(eraser: Eraser, tmp_path: Path, window: Any) -> None:
    eraser.save(tmp_path / "good.safetensors")
    with safe_open(tmp_path / "good.safetensors", "pt") as f:
        tensors, header = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["header"])
    header["image_gate"]["window"] = window
    metadata = {"kind": "eraser", "version": "1", "header": json.dumps(header)}
    save_file(tensors, tmp_path / "bad.safetensors", metadata=metadata)
    with pytest.raises(FileError, match=r"bad\.safetensors.*window"):
        Eraser.load(tmp_path / "bad.safetensors")


def test_a_window_that_its_rows_do_not_fit_is_not_written(eraser: Eraser, tmp_path: Path) -> None:
    assert eraser.image_gate is not None
    wide = torch.zeros(len(eraser.image_gate.rows), 32 * 81)  # which would widen all gates of its site
    for window, rows in ((2, eraser.image_gate.rows), (5, eraser.image_gate.rows), (9, wide)):
        with pytest.raises(DataError, match=rf"windows of {window} x {window} and rows of .*up to 7"):
            gate = replace(eraser.image_gate, window=window, rows=rows)
            replace(eraser, image_gate=gate).save(tmp_path / "e.safetensors")
