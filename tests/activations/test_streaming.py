"""The endless stream of a running pipeline, and its shards: pure functions of (seed, step), checked when read."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import pipelines
from neuraleraser.activations import CONDITIONAL, Shards, activation_stream, sample, stream_data, write_shards
from neuraleraser.errors import DataError, FileError, SettingsError
from neuraleraser.io import atomic, tensor_file
from neuraleraser.sae import Run, TrainSettings, train_together
from neuraleraser.settings import SELECTION_SEEDS, STREAM_SEEDS, TEST_SEEDS, Sampling, StreamSettings
from neuraleraser.sites import Site

EARLY, LATE = Site("unet.mid_block.attentions.0"), Site("unet.up_blocks.1.attentions.0", "update")
PROMPTS = ["a", "b c", "d"]
SETTINGS = StreamSettings(
    train_batch_size=8,
    vectors_per_image=8,
    buffer_chunks=2,
    reuse=1,
    sampling=Sampling(num_inference_steps=2, batch_size=2),
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


def batches(stream: Any, step: int, count: int) -> list[dict[str, Any]]:
    opened = stream(step)
    found = list(itertools.islice(opened, count))
    opened.close()
    return found


def alike(a: list[dict[str, Tensor]], b: list[dict[str, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def test_a_stream_can_be_taken_up_at_any_step(pipe: Any):
    want = batches(activation_stream(pipe, PROMPTS, [EARLY, LATE], SETTINGS), 0, 7)
    assert {k: x.shape for k, x in want[0].items()} == {str(EARLY): (8, 32), str(LATE): (8, 16)}
    for step, prefetch in ((3, 0), (5, 2)):  # two batches a refill: in the middle, and at its start
        again = activation_stream(pipe, PROMPTS, [EARLY, LATE], dataclasses.replace(SETTINGS, prefetch=prefetch))
        assert alike(batches(again, step, 7 - step), want[step:])
    other = activation_stream(pipe, PROMPTS, [EARLY, LATE], dataclasses.replace(SETTINGS, stream_seed=1))
    assert not torch.equal(batches(other, 0, 1)[0][str(EARLY)], want[0][str(EARLY)])


def test_seeds_of_streams_are_no_others(pipe: Any):
    """Torch's generator on the CPU takes 32 bits of a seed."""
    assert not {s % 2**32 for s in (STREAM_SEEDS[0], STREAM_SEEDS[-1])} & {*SELECTION_SEEDS, *TEST_SEEDS}
    noise = [torch.rand(3, generator=torch.Generator().manual_seed(s)) for s in (5, 2**32 + 5, STREAM_SEEDS[0] + 5)]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


def test_a_sample_is_fair_whatever_the_number_of_calls(pipe: Any):
    """Each of the two steps and branches gives its share; all is kept where less was asked."""
    draw = {"pipe": pipe, "prompts": PROMPTS, "seeds": [1, 2, 3], "sites": [EARLY], "sampling": SETTINGS.sampling}
    every = sample(**draw, groups=1000, generator=torch.Generator())[EARLY]
    assert every.x.shape == (3 * 2 * 2 * 16, 1, 32)
    kept = sample(**draw, groups=32, generator=torch.Generator())[EARLY]
    assert kept.image.bincount().tolist() == [32] * 3
    assert 24 <= int((kept.branch == CONDITIONAL).sum()) <= 72  # of 96, half in the mean
    place = {tuple(v.tolist()): i for i, v in enumerate(every.x[:, 0])}
    found = [place[tuple(v.tolist())] for v in kept.x[:, 0]]
    assert len(set(found)) == len(found)  # without repeats
    assert torch.equal(every.image[found], kept.image) and torch.equal(every.branch[found], kept.branch)
    maps = sample(**draw, groups=4, group_size=3, generator=torch.Generator())[EARLY]
    assert maps.x.shape == (12, 3, 32)
    rows = torch.tensor([[place[tuple(v.tolist())] for v in m] for m in maps.x])
    assert (every.image[rows] == maps.image[:, None]).all() and (every.branch[rows] == maps.branch[:, None]).all()
    assert all(len(set(row.tolist())) == 3 for row in rows)


def test_labels_are_those_of_the_rows_own_prompt(pipe: Any):
    """At the first step a row is known by its prompt: the unconditional ones, and those of prompts without, have 0."""
    labels = torch.tensor([[1, 0], [0, 1], [1, 1]])
    s = dataclasses.replace(
        SETTINGS, group_size=2, train_batch_size=16, sampling=Sampling(num_inference_steps=1, batch_size=3)
    )
    x, y = batches(activation_stream(pipe, PROMPTS, [EARLY], s, labels), 0, 1)[0][str(EARLY)]
    assert x.shape == (16, 32) and y.shape == (8, 2)
    assert {tuple(row) for row in y.tolist()} <= {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert 0 < int((y.sum(1) == 0).sum()) < 8
    with pytest.raises(DataError, match=r"\(2, 2\) for 3 prompts"):
        activation_stream(pipe, PROMPTS, [EARLY], SETTINGS, labels[:2])


def test_bad_streams_are_refused(pipe: Any):
    with pytest.raises(DataError, match="no prompts"):
        activation_stream(pipe, [], [EARLY], SETTINGS)
    with pytest.raises(SettingsError, match="0 sites"):
        activation_stream(pipe, PROMPTS, [], SETTINGS)
    for wrong in (
        {"vectors_per_image": 0},
        {"num_images": -1},
        {"buffer_chunks": 0},
        {"train_batch_size": 9, "group_size": 2},
    ):
        with pytest.raises(SettingsError):
            dataclasses.replace(SETTINGS, **wrong)
    few = dataclasses.replace(SETTINGS, vectors_per_image=100)
    with pytest.raises(DataError, match=r"mid_block.*has 64 vectors per image, fewer than vectors_per_image = 100"):
        next(activation_stream(pipe, PROMPTS, [EARLY], few)(0))
    wide = dataclasses.replace(SETTINGS, group_size=34, vectors_per_image=68, train_batch_size=68, reuse=9)
    with pytest.raises(DataError, match="has 16 positions, too few for a group of 34: pass a smaller group_size"):
        next(activation_stream(pipe, PROMPTS, [EARLY], wide)(0))


def test_nan_is_named_and_what_was_learnt_is_kept(tmp_path: Path):
    """The weights go bad when the third batch of images comes; the thread meets it, the trainer says it."""
    pipe = pipelines.stable_diffusion()
    pool = activation_stream(pipe, PROMPTS, [EARLY], SETTINGS)
    draw = pool.chunk

    def chunk(number: int, stopped: Any) -> Any:
        if number == 3:
            pipe.unet.mid_block.attentions[0].proj_out.bias.data[4] = float("inf")
        return draw(number, stopped)

    pool.chunk = chunk
    settings = TrainSettings(n_features=40, k=2, steps=20, init_vectors=16, bf16=False)
    run = {"x": Run(settings, str(EARLY), tmp_path / "c")}
    message = r"unet\.mid_block\.attentions\.0.* timestep \d+, prompts \['.*\(all steps before are kept in .*c\)"
    with pytest.raises(DataError, match=message):
        train_together(pool, run)
    assert tensor_file.load(tmp_path / "c", "sae-training")[1]["step"] == 6


@pytest.fixture(scope="module")
def recorded(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return write(pipe, tmp_path_factory.mktemp("shards"))


def write(pipe: Any, folder: Path, on_shard: Any = None, **settings: Any) -> Shards:
    s = dataclasses.replace(SETTINGS, num_images=6, **settings)
    labels = torch.tensor([[1], [0], [1]], dtype=torch.uint8)
    pool = activation_stream(pipe, PROMPTS, [EARLY, LATE], s, labels)
    return write_shards(pool, folder, 3, stream_data("tiny", PROMPTS, s), on_shard)


def test_shards_are_the_stream_whole_and_mixed(pipe: Any, recorded: Shards):
    found = {s: [recorded.load(i)[s] for i in range(3)] for s in recorded.sources}
    assert list(found) == [str(EARLY), str(LATE)] and recorded.rows == 16
    assert all(len(x) == len(y) == 16 for parts in found.values() for x, y in parts)
    x = torch.cat([x for x, _ in found[str(EARLY)]])
    assert len({tuple(v.tolist()) for v in x}) == 6 * 8  # of each image as many as asked, none twice
    streamed = batches(recorded.batches(8, seed=1), 0, 12)
    assert len({tuple(v.tolist()) for item in streamed[:6] for v in item[str(EARLY)][0]}) == 48
    again = batches(Shards.open(recorded.folder).batches(8, seed=1, prefetch=0), 5, 7)
    assert all(torch.equal(a[str(LATE)][0], b[str(LATE)][0]) for a, b in zip(again, streamed[5:], strict=True))
    assert not torch.equal(streamed[0][str(EARLY)][0], streamed[6][str(EARLY)][0])


class Killed(BaseException):
    pass


def contents(folder: Path) -> dict[str, Any]:
    """Tensors and headers of every file: safetensors writes the fields of a header in any order."""
    found = {}
    for path in folder.iterdir():
        kind = "activations" if path.stem == "index" else "activations-shard"
        tensors, header = tensor_file.load(path, kind)
        found[path.name] = {name: x.tolist() for name, x in tensors.items()}, header
    return found


@pytest.mark.parametrize("when", range(6))
def test_recording_that_was_killed_goes_on(
    pipe: Any, recorded: Shards, tmp_path: Path, when: int, monkeypatch: pytest.MonkeyPatch
):
    """Before each of the six renames: of three shards, and of the index after each."""
    rename, count = atomic.os.replace, 0

    def dying(*args: Any) -> None:
        nonlocal count
        count += 1
        if count > when:
            raise Killed
        rename(*args)

    monkeypatch.setattr(atomic.os, "replace", dying)
    with pytest.raises(Killed):
        write(pipe, tmp_path)
    monkeypatch.undo()
    with pytest.raises(FileError, match=r"does not exist|run `neuraleraser collect` again"):
        Shards.open(tmp_path)
    drawn: list[int] = []
    write(pipe, tmp_path, drawn.append)
    assert drawn == list(range(when // 2, 3))
    assert contents(tmp_path) == contents(recorded.folder)


def test_damaged_shards_are_named(pipe: Any, recorded: Shards, tmp_path: Path):
    shutil.copytree(recorded.folder, tmp_path / "s")
    shards, paths = Shards.open(tmp_path / "s"), [tmp_path / "s" / f"shard-{i:06d}.safetensors" for i in range(3)]
    good = [path.read_bytes() for path in paths]
    paths[1].write_bytes(good[1][:-7])
    with pytest.raises(FileError, match=r"shard-000001\.safetensors is truncated .*field bytes says"):
        shards.load(1)
    paths[1].write_bytes(good[1][:-1] + bytes([good[1][-1] ^ 1]))
    with pytest.raises(FileError, match=r"shard-000001\.safetensors was altered: .*field sha256"):
        shards.load(1)
    paths[1].write_bytes(good[2])
    with pytest.raises(FileError, match=r"shard-000001\.safetensors is shard 2 under another name: .*field sha256"):
        shards.load(1)
    paths[1].unlink()
    with pytest.raises(FileError, match=r"shard-000001\.safetensors does not exist: run"):
        next(iter(itertools.islice(shards.batches(8, buffer_chunks=3)(0), 1)))
    redrawn: list[int] = []
    write(pipe, tmp_path / "s", redrawn.append)
    assert redrawn == [1] and contents(tmp_path / "s") == contents(recorded.folder)


def test_a_damaged_index_is_named(recorded: Shards, tmp_path: Path):
    path = tmp_path / "index.safetensors"
    _, header = tensor_file.load(recorded.folder / path.name, "activations")
    for change, field in (
        ({"count": 0}, "count is 0"),
        ({"rows": "16"}, "rows is '16'"),
        ({"sources": []}, "0 sources"),
        ({"sources": [3]}, "sources are no names"),
        ({"shards": [[-1, ""]]}, "bytes is -1"),
        ({"shards": [7]}, "cannot unpack"),
        ({"shards": [[1, "x"]] * 4}, "4 shards of 3"),
        ({"data": []}, "field data"),
    ):
        tensor_file.save(path, "activations", {}, header | change)
        with pytest.raises(FileError, match=rf"index\.safetensors is no whole index .*{field}"):
            Shards.open(tmp_path)
    header.pop("count")
    tensor_file.save(path, "activations", {}, header)
    with pytest.raises(FileError, match="field 'count'"):
        Shards.open(tmp_path)


def test_another_stream_does_not_go_on_in_the_folder(pipe: Any, recorded: Shards):
    before = contents(recorded.folder)
    with pytest.raises(SettingsError, match=r"holds a stream of stream = .*pass those, or another folder"):
        write(pipe, recorded.folder, stream_seed=1)
    assert contents(recorded.folder) == before
    with pytest.raises(SettingsError, match="a batch of 4096 rows is larger than what a refill gives, 16"):
        recorded.batches(4096)
    assert json.dumps(dict(recorded.data))
