"""Several SAEs from one pass: each as if alone, going on where each stopped, and losing nothing to a failure."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.planted import planted
from neuraleraser.errors import ConceptRefusedError, DataError, FileError, MissingDependencyError, SettingsError
from neuraleraser.io import tensor_file
from neuraleraser.sae import SAE, Run, TrainingLog, TrainSettings, pool_batches, train, train_together

SMALL = TrainSettings(n_features=16, k=2, steps=8, init_vectors=64, bf16=False, log_every=2, checkpoint_every=3)
SOURCES = {name: planted(16, d, 300, active=2, seed=i)[1] for i, (name, d) in enumerate((("wide", 12), ("slim", 8)))}
ALONE = {name: pool_batches(x, 32, seed=5) for name, x in SOURCES.items()}


def both(step: int) -> Iterator[dict[str, Any]]:
    streams = {name: stream(step) for name, stream in ALONE.items()}
    while True:
        yield {name: next(stream) for name, stream in streams.items()}


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


RUNS = {
    "wide": Run(SMALL),
    "wide, topk": Run(dataclasses.replace(SMALL, n_features=20, architecture="topk"), "wide"),
    "slim, long": Run(dataclasses.replace(SMALL, steps=11), "slim"),
}


@pytest.fixture(scope="module")
def together() -> dict[str, SAE]:
    return train_together(both, RUNS)


def test_each_is_trained_as_if_alone(together: dict[str, SAE]):
    assert list(together) == list(RUNS)
    for name, run in RUNS.items():
        assert same(together[name], train(ALONE[run.source or name], run.settings)), name


def test_an_error_that_holds_more_than_text_stays_what_it_is(tmp_path: Path):
    def refusing(step: int) -> Iterator[dict[str, Any]]:
        yield from itertools.islice(both(step), 9)
        raise ConceptRefusedError("refused", {0: ["Cats"]})

    runs = {name: dataclasses.replace(run, checkpoint=tmp_path / f"{i}") for i, (name, run) in enumerate(RUNS.items())}
    with pytest.raises(ConceptRefusedError, match=r"refused \(all steps before are kept in") as caught:
        train_together(refusing, runs)
    assert caught.value.images == {0: ["Cats"]}


def test_what_was_learnt_is_kept_when_the_stream_fails(together: dict[str, SAE], tmp_path: Path):
    def failing(step: int) -> Iterator[dict[str, Any]]:
        for i, item in enumerate(both(step), step):
            if i == 9:  # two runs are done
                raise DataError("NaN or infinity in the activations of site at timestep 7, prompts ['a']")
            yield item

    runs = {name: dataclasses.replace(run, checkpoint=tmp_path / f"{i}") for i, (name, run) in enumerate(RUNS.items())}
    with pytest.raises(DataError, match=rf"prompts \['a'\] \(all steps before are kept in {tmp_path / '2'}\)"):
        train_together(failing, runs)
    steps = [tensor_file.load(tmp_path / f"{i}", "sae-training")[1]["step"] for i in range(3)]
    assert steps == [8, 8, 9]
    done = train_together(both, runs)
    assert all(same(done[name], together[name]) for name in RUNS)


def test_one_that_diverges_takes_nothing_from_the_others(together: dict[str, SAE], tmp_path: Path):
    bad = dataclasses.replace(SMALL, learning_rate=1e30)
    runs = {"wide": Run(SMALL, checkpoint=tmp_path / "good"), "slim": Run(bad, checkpoint=tmp_path / "bad")}
    with pytest.raises(SettingsError, match="diverged at step"):
        train_together(both, runs)
    assert tensor_file.load(tmp_path / "good", "sae-training")[1]["step"] >= 1
    assert same(train(ALONE["wide"], SMALL, tmp_path / "good"), together["wide"])


def test_interrupted_runs_are_kept_at_their_last_step(together: dict[str, SAE], tmp_path: Path):
    def stopping(step: int) -> Iterator[dict[str, Any]]:
        for i, item in enumerate(both(step), step):
            if i == 5:
                raise KeyboardInterrupt
            yield item

    run = {"wide": Run(SMALL, checkpoint=tmp_path / "c")}
    with pytest.raises(KeyboardInterrupt):
        train_together(stopping, run)
    assert tensor_file.load(tmp_path / "c", "sae-training")[1]["step"] == 5
    assert same(train_together(both, run)["wide"], together["wide"])


def test_other_data_is_refused(tmp_path: Path):
    data = {"model": "canvas", "stream": {"batch": 32, "sites": ("a",)}}
    run = Run(SMALL, checkpoint=tmp_path / "c", data=data)
    done = train_together(both, {"wide": run})["wide"]
    assert done.header["data"] == data
    assert same(train_together(both, {"wide": run})["wide"], done)  # tuples, read back as lists, are the same
    with pytest.raises(SettingsError, match="made with model = 'canvas', not 'other'"):
        train_together(both, {"wide": dataclasses.replace(run, data=data | {"model": "other"})})


def test_missing_sources_and_no_runs():
    with pytest.raises(DataError, match="no source 'third', only 'wide', 'slim'"):
        train_together(both, {"x": Run(SMALL, "third")})
    with pytest.raises(SettingsError, match="no runs"):
        train_together(both, {})


def test_the_log_of_a_run_that_was_killed_has_every_step_once(tmp_path: Path):
    path = tmp_path / "deep" / "log.jsonl"
    first = TrainingLog(path)
    train(ALONE["wide"], SMALL, on_step=first)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8]
    path.write_text("\n".join(lines) + "\n" + lines[-1][:30])  # killed while it wrote
    train(ALONE["wide"], SMALL, on_step=TrainingLog(path))
    assert path.read_text().splitlines() == lines
    assert [p.name for p in path.parent.iterdir()] == ["log.jsonl"]


def test_logs_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileError, match="cannot be written"):
        train(ALONE["wide"], SMALL, on_step=TrainingLog(tmp_path))
    monkeypatch.setattr("neuraleraser.sae.training_log.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install tensorboard"):
        TrainingLog(tmp_path / "log", tmp_path)
