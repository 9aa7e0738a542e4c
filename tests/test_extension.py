"""The measure of the design: one new file and one line that names it make a new part, which works from end to end.

The files are those that the how-to pages show. They are put into their rooms for a test, as if they lay there.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import neuraleraser
from helpers import pipelines
from helpers.erasers import open_eraser
from helpers.planted import planted
from helpers.stamp_judge import reader
from neuraleraser import families
from neuraleraser.eraser import CORRECTION_KINDS, Eraser, attach
from neuraleraser.evaluation.evaluate import evaluate
from neuraleraser.evaluation.protocol import TARGET, Cell, EvaluationProtocol
from neuraleraser.evaluation.report import Report
from neuraleraser.families import family_of, opening
from neuraleraser.families.defaults import default_sampling
from neuraleraser.fitting import published_references
from neuraleraser.methods import DoNothing
from neuraleraser.sae import ARCHITECTURES, SAE, StepLog, TrainSettings, measure_sae, pool_batches, train
from neuraleraser.sampling import generate
from neuraleraser.settings import EvaluateSettings, FitSettings, Sampling
from neuraleraser.sites import default_gate_site

PAGES = Path(__file__).parents[1] / "docs" / "how-to"
FEW = EvaluateSettings(
    grid_rounds=1,
    target_rounds=1,
    two_object_rounds=1,
    held_out_rounds=1,
    start_image_rounds=0,
    fragment_prompts=2,
    held_out_grid_rounds=0,
    unhooked_checks=2,
    idle_checks=1,
    timings=1,
    timed_images=2,
    sampling=Sampling(num_inference_steps=2, guidance_scale=3.0, batch_size=4),
)
Add = Callable[[str], ModuleType]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Add:
    """Adds the files of a how-to page to their rooms; returns the last as a module."""

    def added(page: str) -> ModuleType:
        files = re.findall(r'^```python title="src/(.+?)\.py"\n(.*?)^```', (PAGES / page).read_text(), re.S | re.M)
        for path, text in files:
            file = tmp_path / "new" / f"{path}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            name = path.replace("/", ".")
            room = importlib.import_module(name.rpartition(".")[0])
            monkeypatch.setattr(room, "__path__", [*room.__path__, str(file.parent)])
            monkeypatch.setitem(sys.modules, name, ModuleType(name))  # so that the name is free again afterwards
            del sys.modules[name]
        return importlib.import_module(files[-1][0].replace("/", "."))

    return added


def test_a_correction(add: Add, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shift = add("add-correction.md").Shift
    monkeypatch.setitem(CORRECTION_KINDS, shift.KIND, shift)
    old = open_eraser()
    site, width = old.corrections[0].site, old.corrections[0].width
    vector = torch.linspace(-3, 3, width)
    replace(old, corrections=(shift(site, vector),)).save(tmp_path / "shift.safetensors")
    eraser = Eraser.load(tmp_path / "shift.safetensors")
    torch.testing.assert_close(eraser.corrections[0].tensors()["vector"], vector, atol=1e-2, rtol=1e-2)  # float16

    pipe = pipelines.stable_diffusion()
    drawn = {}
    for name, erasers, strengths in (
        ("base", [], 1.0),
        ("one", [eraser], 1.0),
        ("off", [eraser], 0.0),
        ("beside", [eraser, open_eraser("Cats", "object", seed=1)], 1.0),
    ):
        with attach(pipe, erasers, strengths):
            drawn[name] = generate(pipe, ["a"], [0], Sampling(num_inference_steps=2, batch_size=1))
    assert (drawn["one"] != drawn["base"]).any() and (drawn["beside"] != drawn["one"]).any()
    assert (drawn["off"] == drawn["base"]).all()


def test_an_architecture(add: Add, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = add("add-architecture.md")
    monkeypatch.setitem(ARCHITECTURES, "relu", f"{module.__name__}:ReLU")
    _, x = planted(32, 16, 4000, active=2, seed=0)
    settings = TrainSettings(n_features=64, k=4, steps=200, architecture="relu", bf16=False, checkpoint_every=50)
    logs: list[StepLog] = []
    sae = train(pool_batches(x, 256), settings, on_step=logs.append)
    sae.save(tmp_path / "sae.safetensors")
    loaded = SAE.load(tmp_path / "sae.safetensors")
    figures = measure_sae(loaded, x)
    assert loaded.header["settings"]["architecture"] == "relu"
    assert figures["explained_variance"] > 0.6 and figures["l0"] == pytest.approx(logs[-1].l0, rel=0.3)

    def dying(step: int) -> Iterator[torch.Tensor]:
        for i, batch in enumerate(pool_batches(x, 256)(step)):
            if step + i == 120:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        train(dying, settings, checkpoint=tmp_path / "run.safetensors")
    resumed = train(pool_batches(x, 256), settings, checkpoint=tmp_path / "run.safetensors")
    assert torch.equal(resumed.W_enc, sae.W_enc)


def unchanged(report: Report, method: int) -> float:
    return report.to_dict()["concepts"][method]["unchanged_share"]


def test_a_judge_and_a_method(add: Add, tmp_path: Path) -> None:
    judge = add("add-judge.md").ColourJudge()
    red = np.zeros((1, 4, 4, 3), np.uint8) + np.array([9, 1, 1], np.uint8)
    assert judge(red).p_object.tolist() == [[1, 0, 0]] and judge(red).p_style.shape == (1, 0)
    method = add("add-method.md").NegativePrompt("Red", "object", "red")
    pipe, s = reader(), FEW.sampling
    base = generate(pipe, ["a red wall"], [3], s)
    with method.watched(pipe):
        assert (generate(pipe, ["a red wall"], [3], s) == base).all()
    with method.applied(pipe):
        assert (generate(pipe, ["a red wall"], [3], s) != base).any()
    assert (generate(pipe, ["a red wall"], [3], s) == base).all() and "encode_prompt" not in vars(pipe)

    cells = [Cell(f"a red wall {i}", i, "", ("Red",), TARGET) for i in range(4)]
    protocol = EvaluationProtocol({"Red": [*cells, Cell("a blue wall", 9, "", ("Blue",), TARGET)]})
    methods = [method, DoNothing("Red", "object")]
    report = evaluate(pipe, methods, FEW, tmp_path / "run", judge=judge, protocol=protocol)
    assert [e.method for e in report.erasures] == ["negative-prompt", "none"]
    assert unchanged(report, 0) < 1 == unchanged(report, 1)


def test_a_family(add: Add, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add("add-judge.md")
    walls = add("add-family.md").WALLS
    pixart = importlib.import_module("neuraleraser.families.pixart").PIXART
    for module in (families, opening, published_references):
        monkeypatch.setattr(module, "FAMILIES", (walls, *families.FAMILIES, pixart))
    assert family_of(pipelines.pixart()) is pixart

    pipe = reader()
    pipe.register_to_config(_name_or_path="someone/walls")
    assert family_of(pipe) is walls and default_sampling(pipe) == walls.sampling
    site = default_gate_site(pipe, "object")
    assert site == walls.sites[0].site
    fit = FitSettings(num_pictures=0, num_pairs=2, num_context_pairs=1, rank=1, steps=2)
    eraser = neuraleraser.erase(pipe, "crimson", num_images=10, settings=fit, folder=tmp_path / "references")
    assert (eraser.name, eraser.header.kind, eraser.gate.site) == ("Red", "object", site)
    assert eraser.header.sampling == walls.sampling
    report = evaluate(pipe, [DoNothing("Red", "object")], FEW, tmp_path / "run")
    assert unchanged(report, 0) == 1 and report.base["object_accuracy"] is not None
