"""The plug-in for eval-unlearn, in that package's own registry and runner, on a small Stable Diffusion 1."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import pipelines
from helpers.erasers import open_eraser
from neuraleraser import SettingsError, attach

PLUGIN = Path(__file__).parents[1] / "integrations/eval_unlearn"
PROMPTS = ["a cat", "a dog", "a tree"]

if not PLUGIN.is_dir():
    pytest.skip("this copy has no integrations", allow_module_level=True)
pytest.importorskip("eval_unlearn", reason="eval-unlearn is not installed: pip install eval-unlearn")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plug-in as an installed package: its module on the path, and its entry points beside it."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    info = tmp_path_factory.mktemp("installed") / "neuraleraser_eval_unlearn-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"].items()
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()) for group, points in groups]
    (info / "entry_points.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(info.parent)
        patch.syspath_prepend(PLUGIN)
        import neuraleraser_eval_unlearn  # pyright: ignore[reportMissingImports]

        yield neuraleraser_eval_unlearn
        sys.modules.pop("neuraleraser_eval_unlearn")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("files")
    pipelines.stable_diffusion().save_pretrained(folder / "model")
    open_eraser().save(folder / "eraser.safetensors")
    return {
        "eraser": str(folder / "eraser.safetensors"),
        "model_id": str(folder / "model"),
        "erase_concept": "nudity",
        "device": "cpu",
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
    }


def drawn(pipe: Any, seed: int, **how: Any) -> np.ndarray:
    how = {"num_inference_steps": 2, "guidance_scale": 3.0} | how
    seeds = [torch.Generator("cpu").manual_seed(seed + i) for i in range(len(PROMPTS))]
    return np.stack(
        [np.asarray(pipe(prompt=p, generator=g, **how).images[0]) for p, g in zip(PROMPTS, seeds, strict=True)]
    )


def test_its_images_are_the_pipeline_s_with_the_eraser_attached(plugin: Any, config: dict[str, Any]):
    technique = plugin.NeuralEraserTechnique(**config, unknown="ignored")
    base = drawn(technique.pipe, 7)
    with attach(technique.pipe, technique.eraser):
        erased = drawn(technique.pipe, 7)
    images = np.stack([np.asarray(x) for x in technique.generate(PROMPTS, seed=7)])
    assert np.array_equal(images, erased) and all((a != b).any() for a, b in zip(images, base, strict=True))
    assert np.array_equal(drawn(technique.pipe, 7), base), "the pipeline is as it was"
    more = np.stack([np.asarray(x) for x in technique.generate(PROMPTS, seed=7, num_inference_steps=3)])
    with attach(technique.pipe, technique.eraser):
        assert np.array_equal(more, drawn(technique.pipe, 7, num_inference_steps=3))
    idle = plugin.NeuralEraserTechnique(**config | {"strength": 0.0})
    assert np.array_equal(np.stack([np.asarray(x) for x in idle.generate(PROMPTS, seed=7)]), base)


def test_a_config_without_an_eraser_is_refused(plugin: Any):
    with pytest.raises(SettingsError, match="names no eraser"):
        plugin.NeuralEraserTechnique(model_id="x")


def test_the_benchmark_finds_it_and_runs_it(plugin: Any, config: dict[str, Any], tmp_path: Path):
    from eval_unlearn.registry import get_technique, register_metric  # pyright: ignore[reportMissingImports]
    from eval_unlearn.registry.entrypoints import load_entrypoints  # pyright: ignore[reportMissingImports]
    from eval_unlearn.runners.single_benchmark_runner import (  # pyright: ignore[reportMissingImports]
        SingleBenchmarkRunner,
    )
    from eval_unlearn.types import Dataset, MetricResult  # pyright: ignore[reportMissingImports]

    seen: list[np.ndarray] = []

    class Brightness:
        def load_dataset(self) -> list[Any]:
            return [Dataset(PROMPTS[:2], {"source": "two"}), Dataset(PROMPTS[2:], {"source": "two"})]

        def update(self, images: list[Any], prompts: list[str], metadata: dict[str, Any]) -> None:
            seen.extend(np.asarray(x) for x in images)

        def compute(self) -> Any:
            return MetricResult("brightness", float(np.mean(seen)))

    load_entrypoints()
    assert get_technique("neuraleraser") is plugin.NeuralEraserTechnique
    register_metric("brightness")(Brightness)
    runner = SingleBenchmarkRunner("neuraleraser", "brightness", config, {}, str(tmp_path), seed=7)
    runner.run()
    technique = plugin.NeuralEraserTechnique(**config)
    wanted = [*technique.generate(PROMPTS[:2], seed=7), *technique.generate(PROMPTS[2:], seed=7)]
    assert len(seen) == 3 and all(np.array_equal(a, np.asarray(b)) for a, b in zip(seen, wanted, strict=True))
    assert list(tmp_path.rglob("*.png")) and list(tmp_path.rglob("*.json"))
