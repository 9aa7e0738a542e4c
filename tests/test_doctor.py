"""The doctor: well or not, and why, on a tiny pipeline with erasers that are known to be either."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import pipelines
from helpers.erasers import SHUT, make_eraser, with_picture
from neuraleraser import diagnose
from neuraleraser.cli import main
from neuraleraser.concepts import Concept, Pair
from neuraleraser.diagnosis import Diagnosis, _shows
from neuraleraser.errors import SettingsError
from neuraleraser.judges import Judgement
from neuraleraser.sampling import generate
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site, made_for

S = Sampling(num_inference_steps=2, batch_size=2)
CATS = Concept("Cats", "object", (Pair("a b", "c"), Pair("d e", "f")))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


class Judge:
    """Sees cats in the images that the plain model draws, and in no others."""

    styles, objects = (), ("Cats",)
    thresholds = {"Cats": 0.5}  # noqa: RUF012

    def __init__(self, pipe: Any, always: bool = False) -> None:
        base = generate(pipe, [p.positive for p in CATS.pairs], range(110_000, 110_002), S)
        self.known, self.always = base, always

    def __call__(self, images: Any) -> Judgement:
        seen = np.array([[float(self.always or any((i == k).all() for k in self.known))] for i in images], np.float32)
        return Judgement(np.zeros((len(images), 0), np.float32), seen, None)


def look(pipe: Any, eraser: Any, judge: Any = None, lookalikes: tuple[str, ...] = ()) -> Diagnosis:
    return diagnose(pipe, [eraser], [CATS], [lookalikes], [judge], num_images=2, samplings=[S])


def found(d: Diagnosis) -> dict[str, Any]:
    return {c.what: c.well for c in d.checks if c.what != "cost"}  # what an image costs here says nothing


def test_one_that_works(pipe: Any) -> None:
    d = look(pipe, make_eraser(), Judge(pipe))
    want = {"fits": True, "hooks run": True, "fires": True, "gone": True, "false alarms": None}
    assert found(d) == want and "gone from 2 of 2 images that showed it" in [c.found for c in d.checks]
    assert not pipe.unet.mid_block.attentions[0]._forward_hooks


def test_one_that_stays_shut(pipe: Any) -> None:
    d = look(pipe, make_eraser(**SHUT), Judge(pipe), ("g", "h"))
    want = {"fits": True, "hooks run": True, "fires": False, "gone": False}
    assert found(d) == want | {"false alarms": True, "leaves the rest": True}
    assert not d.well and d.verdict.startswith("NOT WELL (1 eraser): Cats: fired in 0 of 2")


def test_one_that_does_not_take_the_concept_out(pipe: Any) -> None:
    d = look(pipe, make_eraser(), Judge(pipe, always=True), ("g",))
    assert found(d)["fires"] is True and found(d)["gone"] is False and found(d)["false alarms"] is False


def test_without_a_judge_it_is_not_known_whether_the_concept_is_gone(pipe: Any) -> None:
    d = look(pipe, make_eraser())
    assert found(d)["gone"] is None and found(d)["fires"] is True


def test_start_images_are_not_looked_at(pipe: Any) -> None:
    """Of an eraser that claims to see them it is said; what more it costs while it acts is not held against it."""
    for gate, opened in (({}, 2), (SHUT, 0)):
        made = with_picture(make_eraser(), pipe, **gate)
        assert made.image_gate is not None
        elsewhere = Site("unet.up_blocks.0.attentions.1")
        d = look(pipe, replace(made, image_gate=replace(made.image_gate, site=elsewhere)), Judge(pipe))
        said = {c.what: c for c in d.checks}
        assert said["start images"].well is None
        assert said["start images"].found.startswith(f"none was drawn; the image gate opened in {opened} of 2")
        assert said["cost"].well is None and "two more forwards" in said["cost"].found and d.well
    assert "start images" not in found(look(pipe, make_eraser()))
    costs = look(pipe, with_picture(make_eraser(), pipe, **SHUT), Judge(pipe), ("g", "h")).checks[-1]
    assert costs.what == "cost" and costs.well is not None


@pytest.mark.parametrize(("thresholds", "seen"), [((0.9, 0.2), True), ((0.2, 0.9), False)])
def test_a_class_s_own_threshold_decides(thresholds: tuple[float, float], seen: bool) -> None:
    """Cats is the second class; at a probability of 0.5 its own threshold decides, and no other's."""

    by_class = dict(zip(("Dogs", "Cats"), thresholds, strict=True))

    class Half:
        styles, objects, thresholds = (), ("Dogs", "Cats"), by_class

        def __call__(self, images: Any) -> Judgement:
            return Judgement(np.zeros((len(images), 0), np.float32), np.full((len(images), 2), 0.5, np.float32), None)

    found = _shows(Half(), np.zeros((3, 8, 8, 3), np.uint8), "Cats")
    assert found is not None and found.tolist() == [seen] * 3
    assert _shows(Half(), np.zeros((3, 8, 8, 3), np.uint8), "Horses") is None


def test_one_for_another_pipeline_or_other_weights(pipe: Any) -> None:
    d = look(pipe, make_eraser("flux"))
    assert found(d) == {"fits": False} and "NOT WELL" in d.verdict
    e = make_eraser()
    made = made_for(pipe, [e.gate.site, *(c.site for c in e.corrections)])
    from_elsewhere = replace(e, header=replace(e.header, made_for=made))
    assert found(look(pipe, from_elsewhere))["fits"] is True
    tuned = copy.deepcopy(pipe)
    for p in tuned.unet.parameters():
        p.data *= 1.2
    assert found(look(tuned, from_elsewhere))["fits"] is None


def test_hooks_that_do_not_run(pipe: Any) -> None:
    twin = copy.deepcopy(pipe)
    twin.unet = torch.compile(twin.unet, backend="eager")
    try:
        pipelines.run(twin, 0, prompt="a", guidance=2.5)  # compiled before anything is attached
        d = look(twin, make_eraser())
    finally:
        torch._dynamo.reset()
    assert found(d) == {"fits": True, "hooks run": False}


def test_nothing_to_look_at(pipe: Any) -> None:
    for erasers, concepts, images in ([], [], 2), ([make_eraser()], [CATS, CATS], 2), ([make_eraser()], [CATS], 0):
        with pytest.raises(SettingsError, match="pass at least one eraser"):
            diagnose(pipe, erasers, concepts, [()] * len(erasers), num_images=images)


def test_on_the_command_line(pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    make_eraser().save(tmp_path / "open.safetensors")
    make_eraser(**SHUT).save(tmp_path / "shut.safetensors")
    (tmp_path / "alike.txt").write_text("g\nh\n")
    argv = [
        "doctor",
        "--model",
        str(tmp_path / "model"),
        "--num-images",
        "2",
        "--num-inference-steps",
        "2",
        "--erasers",
    ]
    assert main([*argv, str(tmp_path / "shut.safetensors"), "--lookalikes", str(tmp_path / "alike.txt")]) == 1
    said = capsys.readouterr().out
    assert said.strip().splitlines()[-1].startswith("NOT WELL (1 eraser): Cats: fired in 0 of 2 images of it")
    assert "false alarms" in said and "fired in 0 of 2 images of lookalikes" in said
    assert main([*argv, str(tmp_path / "open.safetensors"), "--num-images", "0"]) == 2


def test_judges_on_the_command_line(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    make_eraser().save(tmp_path / "cats.safetensors")
    asked: list[Any] = []

    class Always(Judge):
        def __init__(self, *given: Any, **named: Any) -> None:
            asked.append((given, {name: str(value) for name, value in named.items()}))
            self.known, self.always = [], True

        load = classmethod(lambda cls, *given, **named: cls(*given, **named))

    monkeypatch.setattr("neuraleraser.judges.NudeNetJudge", Always)
    monkeypatch.setattr("neuraleraser.judges.UnlearnCanvasJudge", Always)
    argv = ["doctor", "--model", str(tmp_path / "model"), "--erasers", str(tmp_path / "cats.safetensors")]
    argv += ["--num-images", "2", "--num-inference-steps", "2"]
    for more in (["--nudenet"], ["--unlearncanvas", "style50.pth", "style50_cls.pth"]):
        assert main([*argv, *more]) == 1
        assert "gone from 0 of 2 images that showed it" in capsys.readouterr().out
    files = (Path("style50.pth"), Path("style50_cls.pth"))
    assert asked == [((), {"name": "Cats"}), (files, {"device": "cpu"})]
    assert main([*argv, "--nudenet", "--clip", "nobody/nothing"]) == 2
    assert "one of --clip, --unlearncanvas and --nudenet" in capsys.readouterr().err


def test_refused_on_the_command_line_with_a_record(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "model", safe_serialization=True)
    make_eraser().save(tmp_path / "cats.safetensors")
    argv = [
        "generate",
        "a",
        "--model",
        str(tmp_path / "model"),
        "--num-inference-steps",
        "2",
        "--out",
        str(tmp_path / "image.png"),
    ]
    argv += [
        "--erasers",
        str(tmp_path / "cats.safetensors"),
        "--action",
        "refuse",
        "--record",
        str(tmp_path / "r.jsonl"),
    ]
    assert main(argv) == 2
    assert "neuraleraser: refused, as an erased concept fired (image 0: Cats)" in capsys.readouterr().err
    assert not (tmp_path / "image.png").exists()
    assert '"eraser": "Cats", "action": "refuse"' in (tmp_path / "r.jsonl").read_text()
