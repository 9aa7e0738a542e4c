"""Runs that stop, lose a file or meet another run's folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload

from helpers.canvas_cells import canvas_protocol
from helpers.measured import S, everything, of, same
from helpers.pipelines import stable_diffusion
from helpers.stamp_judge import StampJudge, stamping
from neuraleraser.eraser import Eraser
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation import draw as drawing
from neuraleraser.evaluation import run_folder
from neuraleraser.evaluation.evaluate import evaluate
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.protocol import Cell, EvaluationProtocol
from neuraleraser.evaluation.results import BASE, Row, part_folder
from neuraleraser.evaluation.run_folder import RunFolder, open_run
from neuraleraser.judges import JudgeSpec
from neuraleraser.methods import EraserMethod
from neuraleraser.settings import Sampling


@pytest.fixture(autouse=True)
def stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "generate", stamping)


@pytest.mark.parametrize("stop_at", [2, 8])
def test_a_run_that_was_stopped_goes_on(pipe: Any, methods: list[Method], tmp_path: Path, stop_at: int):
    whole, judge = StampJudge(), StampJudge(stop_at)
    methods = methods[:2]
    evaluate(pipe, methods, S, tmp_path / "whole", judge=whole)
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, methods, S, tmp_path / "stopped", judge=judge)
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "stopped").rglob("*.png")}
    parts = {p: p.read_bytes() for p in (tmp_path / "stopped").rglob("*.parquet")}
    assert len(parts) >= stop_at - 1 and not list((tmp_path / "stopped").rglob("*.part"))
    evaluate(pipe, methods, S, tmp_path / "stopped", judge=judge)
    assert same(everything(tmp_path / "whole"), everything(tmp_path / "stopped"))
    assert judge.calls <= whole.calls + 2  # only the interrupted batch was drawn twice, and one batch is split
    assert all(path.read_bytes() == data for path, data in parts.items()), "parts are appended, never written again"
    kept = sum(p.stat().st_mtime_ns == t for p, t in first.items())
    assert kept >= len(first) - S.sampling.batch_size


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:300] + bytes(99) + data[399:]]
)
@pytest.mark.parametrize("method", [BASE, "neuraleraser"])
def test_a_damaged_part_only_costs_its_drawing(
    pipe: Any, methods: list[Method], tmp_path: Path, damage: Callable[[bytes], bytes], method: str
):
    judge = StampJudge()
    evaluate(pipe, methods[:1], S, tmp_path, judge=judge)
    before = everything(tmp_path)
    path = sorted(tmp_path.glob(f"results/method={method}/*/part-*.parquet"))[0]
    path.write_bytes(damage(path.read_bytes()))
    calls = judge.calls
    with pytest.warns(UserWarning, match="its images are generated again"):
        evaluate(pipe, methods[:1], S, tmp_path, judge=judge)
    assert same(before, everything(tmp_path)) and judge.calls == calls + 1


def test_a_picture_that_is_gone_is_drawn_again(pipe: Any, methods: list[Method], tmp_path: Path):
    judge = StampJudge()
    evaluate(pipe, methods[:1], S, tmp_path, judge=judge)
    before = everything(tmp_path)
    pictures = [sorted((tmp_path / "images" / name).rglob("*.png"))[0] for name in (BASE, "neuraleraser")]
    for path in pictures:
        path.unlink()
    evaluate(pipe, methods[:1], S, tmp_path, judge=judge)
    assert same(before, everything(tmp_path)) and all(path.exists() for path in pictures)


def test_an_eraser_that_changed_is_measured_anew(pipe: Any, erasers: list[Eraser], tmp_path: Path):
    judge = StampJudge()
    before = evaluate(pipe, [EraserMethod(erasers[0])], S, tmp_path, judge=judge)
    shut = replace(erasers[0].gate, low=torch.full((2,), 1e9), high=torch.full((2,), 2e9))
    report = evaluate(pipe, [EraserMethod(replace(erasers[0], gate=shut))], S, tmp_path, judge=judge)
    assert before.erasures[0].figures["ua"].value > 0 == report.erasures[0].figures["ua"].value  # type: ignore[union-attr]
    assert of(everything(tmp_path), "neuraleraser", "Van_Gogh").identical.all()
    weak = evaluate(pipe, [EraserMethod(erasers[0], 0.5)], S, tmp_path, judge=judge)
    assert weak.erasures[0].method == "neuraleraser x0.5"


def test_a_folder_of_another_run_is_refused(pipe: Any, methods: list[Method], tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, methods[:1], S, tmp_path, judge=StampJudge(1))
    with pytest.raises(SettingsError, match="other settings"):
        evaluate(pipe, methods[:1], replace(S, target_rounds=2), tmp_path, judge=StampJudge())
    with pytest.raises(SettingsError, match="other model"):
        evaluate(stable_diffusion(seed=1), methods[:1], S, tmp_path, judge=StampJudge())
    strict = StampJudge()
    strict.thresholds["Cats"] = 0.9
    with pytest.raises(SettingsError, match="other judge"):
        evaluate(pipe, methods[:1], S, tmp_path, judge=strict)


def test_a_run_goes_on_with_other_timings_alone(pipe: Any, methods: list[Method], tmp_path: Path):
    evaluate(pipe, methods[:1], S, tmp_path, judge=StampJudge())
    judge = StampJudge()
    evaluate(pipe, methods[:1], replace(S, timings=3, timed_images=1), tmp_path, judge=judge)
    assert judge.calls == 0, "no image depends on them"
    sampling = replace(S.sampling or Sampling(), num_inference_steps=9)
    for others in ({"sampling": sampling}, {"unhooked_checks": 4}, {"idle_checks": 3}):
        with pytest.raises(SettingsError, match="other settings"):
            evaluate(pipe, methods[:1], replace(S, **others), tmp_path, judge=judge)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_pipeline_of_which_one_weight_differs_is_another(part: str, methods: list[Method], tmp_path: Path):
    pipe = stable_diffusion()
    protocol = EvaluationProtocol({})
    open_run(tmp_path, pipe, methods[:1], protocol, S, JudgeSpec.of(StampJudge()))
    weight = next(getattr(pipe, part).parameters())
    with torch.no_grad():
        weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(9.0))
    with pytest.raises(SettingsError, match="other model"):
        open_run(tmp_path, pipe, methods[:1], protocol, S, JudgeSpec.of(StampJudge()))


def test_number_format_and_sampler_are_of_the_model_and_offloading_is_not():
    def fingerprint(pipe: Any) -> str:
        return run_folder._fingerprint(pipe)

    pipe, other = stable_diffusion(), stable_diffusion()
    assert fingerprint(pipe) == fingerprint(other)
    other.scheduler = type(other.scheduler).from_config(other.scheduler.config, prediction_type="v_prediction")
    assert fingerprint(pipe) != fingerprint(other)
    half, rounded = stable_diffusion(), stable_diffusion()
    half.vae = half.vae.to(torch.bfloat16)
    rounded.vae = rounded.vae.to(torch.bfloat16).to(torch.float32)
    assert len({fingerprint(half), fingerprint(rounded), fingerprint(pipe)}) == 3
    offloaded = stable_diffusion()
    for part in ("unet", "vae", "text_encoder"):
        cpu_offload(getattr(offloaded, part), torch.device("cpu"))
    assert any(p.is_meta for p in offloaded.unet.parameters()) and fingerprint(offloaded) == fingerprint(pipe)


def test_rows_that_another_process_added_are_seen_and_not_added_again(pipe: Any, methods: list[Method], tmp_path: Path):
    evaluate(pipe, methods[:1], S, tmp_path, judge=StampJudge())
    before, spec = everything(tmp_path), JudgeSpec.of(StampJudge())
    one, other = RunFolder(tmp_path, spec), RunFolder(tmp_path, spec)
    base = one.results(BASE)
    shutil.rmtree(part_folder(tmp_path / "results", BASE, ""))
    (two := RunFolder(tmp_path, spec)).done(BASE)
    for run, rows in ((other, np.arange(5, 9)), (two, np.arange(3, len(base))), (other, np.arange(len(base)))):
        run.append(base.where(rows))
    assert len(list(tmp_path.glob("results/method=base/*/part-*"))) == 3
    assert same(before, everything(tmp_path)) and len(other.done(BASE)) == len(base)
    assert other.results(BASE).keys() == two.results(BASE).keys() == base.keys()  # whoever added them


def test_a_batch_is_drawn_by_the_one_that_claims_it(tmp_path: Path):
    spec, cells = JudgeSpec.of(StampJudge()), [Cell("a", 1, "", (), "grid"), Cell("b", 2, "", (), "grid")]
    one, other = RunFolder(tmp_path, spec), RunFolder(tmp_path, spec)
    with one.claimed(BASE, "", cells, wait=False) as mine:
        assert mine == cells
        with other.claimed(BASE, "", cells, wait=False) as theirs:
            assert theirs is None
        with other.claimed(BASE, "", cells[1:], wait=False) as theirs:
            assert theirs == cells[1:]
    row = Row(method=BASE, prompt="a", seed=1, group="grid", p_style=[0.1] * 3, p_object=[0.1] * 3, artefact=1.0)
    one.put_images(BASE, "", cells[:1], np.zeros((1, 8, 8, 3), np.uint8))
    one.append([row])
    with other.claimed(BASE, "", cells, wait=True) as theirs:
        assert theirs == cells[1:]


def test_two_processes_with_different_erasers_of_a_concept_are_told_apart(
    pipe: Any, erasers: list[Eraser], tmp_path: Path
):
    """One began, the other dropped its rows as those of a changed eraser: its further rows are refused."""
    first, cells = EraserMethod(erasers[0]), canvas_protocol(["Van_Gogh"], S)
    judge, spec = StampJudge(), JudgeSpec.of(StampJudge())
    run = open_run(tmp_path, pipe, [first], cells, S, spec)
    rows = drawing.draw(pipe, [first], cells, S, judge, run)
    shut = replace(erasers[0].gate, low=torch.full((2,), 1e9), high=torch.full((2,), 2e9))
    open_run(tmp_path, pipe, [EraserMethod(replace(erasers[0], gate=shut))], cells, S, spec)
    with pytest.raises(
        SettingsError, match="another process has begun to measure another 'neuraleraser' of 'Van_Gogh'"
    ):
        run.append(of(rows, "neuraleraser", "Van_Gogh"))
