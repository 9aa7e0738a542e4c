"""`neuraleraser evaluate` by UnlearnCanvas and by I2P, on a small pipeline of the real class."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from diffusers.schedulers.scheduling_pndm import PNDMScheduler

from helpers.commands import refused
from helpers.erasers import open_eraser
from helpers.pipelines import stable_diffusion
from helpers.small_judges import SMALL, install_detector, small_classifier, small_clip
from neuraleraser.cli import main
from neuraleraser.evaluation import i2p_cells, unlearncanvas_cells
from neuraleraser.judges import unlearncanvas
from neuraleraser.settings import Sampling

FEW = ["--unhooked-checks", "1", "--idle-checks", "1", "--timings", "1", "--timed-images", "1", "--batch-size", "4"]
PART = ["--styles", "Van_Gogh", "Mosaic", "--objects", "Cats", "Sea", *FEW]


@pytest.fixture
def pndm(tmp_path: Path) -> str:
    """A pipeline with another sampler than SAeUron's."""
    pipe = stable_diffusion()
    pipe.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    return str(tmp_path / "model")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with erasers, classifiers and prompts; images are small, and drawn in few steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(unlearncanvas, "VIT_LARGE", SMALL)
    for module, name in ((unlearncanvas_cells, "UNLEARNCANVAS_SAMPLING"), (i2p_cells, "I2P_SAMPLING")):
        given = getattr(module, name)
        small = Sampling(given.num_inference_steps // 50, given.guidance_scale, 4, 16, 16)
        monkeypatch.setattr(module, name, small)
    install_detector(monkeypatch, tmp_path)
    small_classifier(tmp_path / "style50.pth", 51)
    small_classifier(tmp_path / "style50_cls.pth", 20)
    open_eraser("Van_Gogh").save("vg.safetensors")
    open_eraser("nudity", "object").save("nudity.safetensors")
    Path("i2p.csv").write_text("prompt,categories,sd_seed\na statue,sexual,42000\na storm,shocking,7000\n")
    return tmp_path


CLASSIFIERS = ["--unlearncanvas", "style50.pth", "style50_cls.pth"]


def measured(argv: list[str]) -> dict[str, Any]:
    assert main(["evaluate", "--out", "run", *argv]) == 0
    return json.loads(Path("run/report.json").read_text())


@pytest.mark.parametrize(
    ("variant", "scheduler", "images"), [("official", "PNDM", 2 * 2 * 5), ("saeuron", "DDIM", 3 * 2 * 5)]
)
def test_unlearncanvas(
    here: Path, pndm: str, monkeypatch: pytest.MonkeyPatch, variant: str, scheduler: str, images: int, capsys: Any
):
    monkeypatch.setattr("neuraleraser.evaluation.base_check.READABLE", 0.0)  # the classifiers are random
    found = measured(["--erasers", "vg.safetensors", "--model", pndm, *CLASSIFIERS, "--variant", variant, *PART])
    assert found["versions"]["pipeline"] == f"StableDiffusionPipeline, {scheduler}Scheduler"
    assert found["settings"]["sampling"] == {
        "num_inference_steps": 2, "guidance_scale": 9.0, "batch_size": 4, "height": 16, "width": 16, "strength": 0.8,
        "pad_last_batch": True,
    }  # fmt: skip
    assert [(c["method"], c["name"]) for c in found["concepts"]] == [("neuraleraser", "Van_Gogh"), ("none", "Van_Gogh")]
    assert len(list(Path("run/images/base").rglob("*.png"))) == images
    assert found["concepts"][0]["ns"]["unlearncanvas_UA"] == 10 and found["concepts"][0]["overhead"] > 0
    assert "UnlC. UA" in capsys.readouterr().out


def test_options_come_before_what_was_published(here: Path, model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("neuraleraser.evaluation.base_check.READABLE", 0.0)
    steps = ["--num-inference-steps", "1", "--guidance-scale", "4"]
    found = measured(["--erasers", "vg.safetensors", "--model", model, *CLASSIFIERS, *PART, *steps])
    said = "num_inference_steps 1 instead of 2, guidance_scale 4 instead of 9"
    assert any(f["text"].endswith(said) for f in found["findings"])


def test_clip_scores_and_distances_in_its_features(
    here: Path, model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("neuraleraser.evaluation.base_check.READABLE", 0.0)
    clip = str(small_clip(tmp_path / "clip"))
    found = measured(["--erasers", "vg.safetensors", "--model", model, *CLASSIFIERS, *PART, "--clip", clip])
    ours, none = found["concepts"]
    assert found["judge"]["clip"] == found["judge"]["features"] == clip, "the classifiers show no features"
    assert ours["clip"]["ns"] == {"target_base": 10, "target": 10, "others_base": 10, "others": 10}
    assert none["clip"]["target"] == none["clip"]["target_base"] and none["distance"]["fid"] < 1e-6
    assert ours["distance"]["ns"] == {"kid": 10}
    page = Path("run/report.html").read_text()
    assert "CLIP scores" in page and f"In the features of {clip}" in page


def test_i2p(here: Path, model: str, capsys: Any):
    argv = ["--erasers", "nudity.safetensors", "--model", model, "--i2p", "i2p.csv", *FEW]
    found = measured([*argv, "--nudenet-threshold", "0.45", "--clip", str(small_clip(here / "clip"))])
    assert found["concepts"][0]["clip"]["others"] is None, "one prompt of another category is too few"
    assert found["judge"]["thresholds"]["nudity"] == pytest.approx(0.45)
    detections = found["concepts"][0]["detections"]
    assert detections["images"] == 2 and len(detections["classes"]) == 9
    assert "Detections" in capsys.readouterr().out
    assert main(["evaluate", *argv, "--sexual-only", "--out", "other"]) == 0
    found = json.loads(Path("other/report.json").read_text())
    assert found["concepts"][0]["detections"]["images"] == 1
    assert found["judge"]["thresholds"]["nudity"] == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--erasers", "vg.safetensors", *CLASSIFIERS, "--i2p", "i2p.csv"], "there is one protocol at a time"),
        (
            ["--sealed", "--i2p", "i2p.csv"],
            "pass none of --erasers, --calibrate, --unlearncanvas, --i2p and --clip with it",
        ),
        (
            ["--sealed", "--clip", "clip"],
            "pass none of --erasers, --calibrate, --unlearncanvas, --i2p and --clip with it",
        ),
        (
            ["--erasers", "vg.safetensors", *CLASSIFIERS, "--clip", "no-clip"],
            "the CLIP model 'no-clip' could not be opened",
        ),
        (["--erasers", "vg.safetensors", "nudity.safetensors", "--i2p", "i2p.csv"], "2 erasers and --i2p: pass one"),
        (["--erasers", "vg.safetensors", *CLASSIFIERS, "--clip", "i2p.csv"], "the CLIP model 'i2p.csv' is a file"),
        (["--erasers", "vg.safetensors", *CLASSIFIERS, "--clip", ""], "the CLIP model '' could not be opened"),
        (["--erasers", "nudity.safetensors", *CLASSIFIERS], "nothing to erase that is named 'nudity'"),
        (["--erasers", "vg.safetensors", *CLASSIFIERS, "--styles", "Magic"], "styles is Magic: pass some of"),
        (["--erasers", "vg.safetensors", "--unlearncanvas", "no.pth", "style50_cls.pth"], "no.pth does not exist"),
        (["--erasers", "nudity.safetensors", "--i2p", "no.csv"], "the prompts of I2P cannot be read"),
        (["--erasers", "nudity.safetensors", "--i2p", "vg.safetensors"], "is no CSV file in UTF-8"),
        (["--erasers", "nudity.safetensors", "--i2p", "i2p.csv", "--nudenet-threshold", "0.1"], "threshold is 0.1"),
        (["--erasers", "vg.safetensors", "--model", "MODEL", "--i2p", "i2p.csv"], "(kind 'style') cannot be measured"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_leaves_nothing(
    here: Path, model: str, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    before = sorted(here.rglob("*"))
    given = [model if word == "MODEL" else word for word in argv]
    assert said in refused(["evaluate", "--out", "run", *given], capsys)
    assert sorted(here.rglob("*")) == before


def test_without_nudenet_the_extra_is_named(
    here: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    argv = ["evaluate", "--erasers", "nudity.safetensors", "--model", model, "--i2p", "i2p.csv", "--out", "run"]
    assert "needs nudenet" in refused(argv, capsys) and not Path("run").exists()
