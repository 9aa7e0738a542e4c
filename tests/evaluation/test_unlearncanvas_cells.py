"""UnlearnCanvas's answer set: as published, and run for real on a small pipeline with small classifiers in files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.canvas_cells import WITH_TINY
from helpers.erasers import open_eraser
from helpers.pipelines import stable_diffusion
from helpers.small_judges import SMALL, small_classifier
from neuraleraser import families
from neuraleraser.assessment import evaluate_erasers
from neuraleraser.eraser import Provenance
from neuraleraser.errors import ConceptError, NeuralEraserError, SettingsError, SplitError
from neuraleraser.evaluation.evaluate import evaluate
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.protocol import GRID, EvaluationProtocol
from neuraleraser.evaluation.report import Report
from neuraleraser.evaluation.report_files import write_report
from neuraleraser.evaluation.run_folder import RunFolder
from neuraleraser.evaluation.unlearncanvas_cells import UNLEARNCANVAS_SEEDS, unlearncanvas_protocol
from neuraleraser.judges import (
    UNLEARNCANVAS_OBJECTS,
    UNLEARNCANVAS_STYLES,
    JudgeSpec,
    UnlearnCanvasJudge,
    unlearncanvas,
)
from neuraleraser.methods import DoNothing, EraserMethod
from neuraleraser.settings import EvaluateSettings, Sampling

PHOTOS = "Seed_Images"
SMALL_SAMPLING = Sampling(num_inference_steps=2, guidance_scale=9.0, batch_size=8, height=16, width=16)
S = EvaluateSettings(unhooked_checks=2, idle_checks=2, timings=1, timed_images=2, sampling=SMALL_SAMPLING)
PART: dict[str, Any] = {"styles": ("Van_Gogh", "Mosaic"), "objects": ("Cats", "Dogs", "Sea"), "seeds": (188, 288)}
"""Fewer than twenty images that ask for a style: whether the judge can read them is not decided by so few."""
SEEN: dict[str, Any] = {**PART, "styles": ("Abstractionism", "Watercolor"), "objects": ("Human", "Sandwiches", "Bears")}
"""Names that the small classifiers give to images of the small pipeline, so that some are right."""


@pytest.fixture(autouse=True, scope="module")
def family() -> None:
    """The small pipeline is of its own family here, a Stable Diffusion."""


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> UnlearnCanvasJudge:
    folder = tmp_path_factory.mktemp("classifiers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlearncanvas, "VIT_LARGE", SMALL)
        style, thing = (small_classifier(folder / f"{n}.pth", n) for n in (51, 20))
        return UnlearnCanvasJudge.load(style, thing)


@pytest.fixture
def pipe() -> Any:
    return stable_diffusion()


# --- as published


def test_the_official_answer_set():
    protocol = unlearncanvas_protocol(["Van_Gogh", "Cats"])
    cells = protocol.cells["Van_Gogh"]
    assert list(protocol.cells) == ["Van_Gogh", "Cats"] and protocol.cells["Cats"] == cells
    assert len(cells) == 51 * 20 * 5 and {c.group for c in cells} == {GRID}
    assert {(c.style, *c.objects) for c in cells} == {
        (s, o) for s in UNLEARNCANVAS_STYLES for o in UNLEARNCANVAS_OBJECTS
    }
    assert Counter(c.seed for c in cells) == dict.fromkeys((188, 288, 588, 688, 888), 51 * 20)
    assert {c.prompt for c in cells if c.asks_for("Cold_Warm") and c.asks_for("Human")} == {
        "A Human image in Cold Warm style."
    }
    assert {c.prompt for c in cells if c.asks_for(PHOTOS) and c.asks_for("Sea")} == {
        "A Sea image in Seed Images style."
    }
    assert sum(c.asks_for("Van_Gogh") for c in cells) == 100 and sum(c.asks_for("Cats") for c in cells) == 255


def test_saeurons_answer_set():
    cells = unlearncanvas_protocol("Van_Gogh", "saeuron").cells["Van_Gogh"]
    styled, plain = ([c for c in cells if bool(c.style) == has] for has in (True, False))
    assert len(styled) == 50 * 20 * 5 and len(plain) == 20 * 5
    assert {c.style for c in styled} == {*UNLEARNCANVAS_STYLES} - {PHOTOS}
    assert {c.prompt for c in styled if c.asks_for("Cold_Warm") and c.asks_for("Human")} == {
        "An image of Human in Cold Warm style."
    }
    assert {(c.prompt, c.seed) for c in plain} == {
        (f"An image of {o}.", seed) for o in UNLEARNCANVAS_OBJECTS for seed in UNLEARNCANVAS_SEEDS
    }


@pytest.mark.parametrize("variant", ["official", "saeuron"])
def test_every_image_has_a_place_of_its_own_and_is_sampled_as_published(variant: Any):
    protocol = unlearncanvas_protocol("Cats", variant)
    places = Counter((c.style, c.objects, c.seed) for c in protocol.cells["Cats"])
    assert max(places.values()) == 1
    s = protocol.sampling
    assert s and (s.num_inference_steps, s.guidance_scale, s.height, s.width) == (100, 9.0, 512, 512)
    assert not any("only a part" in note for note in protocol.notes)
    assert protocol.vocabulary is None and protocol.start_images is None


def test_a_part_of_it_says_so_and_keeps_the_order():
    protocol = unlearncanvas_protocol(
        "Cats", "saeuron", styles=("Winter", "Joy"), objects=["Sea", "Cats"], seeds=(188,)
    )
    assert [(c.style, *c.objects) for c in protocol.cells["Cats"]] == [
        *(("Joy", "Cats"), ("Joy", "Sea"), ("Winter", "Cats"), ("Winter", "Sea")),
        *(("", "Cats"), ("", "Sea")),
    ]
    assert protocol.notes[0].endswith("2 of 50 styles, 2 of 20 objects, seeds 188")


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"concepts": "Unicorns"}, ConceptError, "nothing to erase that is named 'Unicorns': pass one of Abstract"),
        ({"concepts": PHOTOS}, ConceptError, "nothing to erase that is named 'Seed_Images'"),
        ({"concepts": []}, ConceptError, "no concept was named"),
        ({"concepts": "Cats", "objects": ("Sea",)}, ConceptError, "Cats is not among the styles and objects"),
        ({"concepts": "Cats", "variant": "clean"}, SettingsError, "variant is 'clean': pass one of official, saeuron"),
        ({"concepts": "Cats", "styles": ("Magic",)}, SettingsError, "styles is Magic: pass some of Abstractionism"),
        ({"concepts": "Cats", "styles": ("Joy", "Joy")}, SettingsError, "styles is Joy, Joy: .* each once"),
        ({"concepts": "Cats", "variant": "saeuron", "styles": (PHOTOS,)}, SettingsError, "styles is Seed_Images"),
        ({"concepts": "Cats", "seeds": ()}, SettingsError, r"seeds is \(\): pass at least one"),
        ({"concepts": "Cats", "seeds": (1, 1)}, SettingsError, r"seeds is \(1, 1\)"),
        ({"concepts": "Cats", "seeds": (-1,)}, SettingsError, "seed is -1"),
    ],
)
def test_what_the_benchmark_has_not_is_refused(given: dict[str, Any], error: type[NeuralEraserError], said: str):
    with pytest.raises(error, match=said) as caught:
        unlearncanvas_protocol(**given)
    assert "\n" not in str(caught.value)


# --- run


def shares(
    judge: UnlearnCanvasJudge, folder: Path, method: str, protocol: EvaluationProtocol, concept: str
) -> dict[str, dict[str, tuple[float, int]]]:
    """The published figures, counted anew from the pictures on disk."""
    run, cells = RunFolder(folder, JudgeSpec.of(judge)), protocol.cells[concept]
    seen = judge(np.stack([run.image(method, concept, c) for c in cells]))
    style = np.array([judge.styles[i] == c.style for i, c in zip(seen.p_style.argmax(1), cells, strict=True)])
    thing = np.array([judge.objects[i] in c.objects for i, c in zip(seen.p_object.argmax(1), cells, strict=True)])
    styled = np.array([c.style not in ("", PHOTOS) for c in cells])
    target = np.array([c.asks_for(concept) for c in cells])
    own, other = (style, thing) if concept in judge.styles else (thing, style)
    inside, across = (styled, ~styled) if concept in judge.styles else (np.ones_like(styled), styled)

    def share(good: np.ndarray, rows: np.ndarray) -> tuple[float, int]:
        return float(good[rows].sum() / max(rows.sum(), 1)), int(rows.sum())

    return {
        "unlearncanvas": {
            "UA": share(~own, styled & target), "IRA": share(own, styled & ~target), "CRA": share(other, styled)
        },
        "saeuron": {
            "UA": share(~own, inside & target), "IRA": share(own, inside & ~target), "CRA": share(other, across)
        },
    }  # fmt: skip


def stated(report: Report, method: str, concept: str, source: str) -> dict[str, tuple[float, int]]:
    figures = report.of(method, concept).figures
    found = {name: figures[f"{source}_{name}"] for name in ("UA", "IRA", "CRA")}
    return {name: (m.value, m.n) for name, m in found.items() if isinstance(m, Estimate)}


@pytest.mark.parametrize(("variant", "source"), [("official", "unlearncanvas"), ("saeuron", "saeuron")])
def test_it_runs_and_its_figures_are_the_published_ones(
    pipe: Any, judge: UnlearnCanvasJudge, tmp_path: Path, variant: Any, source: str
):
    erasers = [open_eraser("Watercolor"), open_eraser("Human", "object", seed=1)]
    protocol = unlearncanvas_protocol(["Watercolor", "Human"], variant, **SEEN)
    report = evaluate_erasers(pipe, erasers, S, tmp_path, judge=judge, protocol=protocol)
    counts = {"official": ((6, 6, 12), (4, 8, 12)), "saeuron": ((6, 6, 6), (6, 12, 12))}[variant]
    values = set()
    for concept, ns in zip(("Watercolor", "Human"), counts, strict=True):
        for method in ("neuraleraser", "none"):
            found = stated(report, method, concept, source)
            wanted = shares(judge, tmp_path, method, protocol, concept)[source]
            np.testing.assert_allclose(list(found.values()), list(wanted.values()), atol=1e-6)
            assert tuple(n for _, n in found.values()) == ns
            values |= {value for value, _ in found.values()}
    assert values - {0.0, 1.0}  # else nothing was judged
    assert stated(report, "none", "Watercolor", source) != stated(report, "neuraleraser", "Watercolor", source)
    said = [finding.text for finding in report.findings]
    for part in ("num_inference_steps 2 instead of 100, height 16 instead of 512", "only a part", "no artefacts"):
        assert sum(part in text for text in said) == 1, said
    for entry in report.erasures:
        assert not [name for name, figure in entry.figures.items() if "artefact" in name and figure is not None]
    paths = write_report(report, tmp_path)
    assert json.loads(paths[1].read_text())["settings"]["protocol"] == protocol.name
    assert {m.method for m in report.erasures} == {"neuraleraser", "none"}  # no words are known that a filter deletes


def test_the_published_sampling_is_the_default_and_the_settings_come_before_it(
    pipe: Any, judge: UnlearnCanvasJudge, tmp_path: Path
):
    protocol = unlearncanvas_protocol("Cats", **PART)
    own = replace(protocol, sampling=replace(SMALL_SAMPLING, height=24, width=24))
    method = DoNothing("Cats", "object")
    quick = replace(S, sampling=None)
    report = evaluate(pipe, [method], quick, tmp_path / "published", judge=judge, protocol=own)
    assert report.settings["sampling"]["height"] == 24
    assert not any("sampled otherwise" in f.text for f in report.findings)
    run = RunFolder(tmp_path / "published", JudgeSpec.of(judge))
    assert run.image("base", "", own.cells["Cats"][0]).shape == (24, 24, 3)
    report = evaluate(pipe, [method], S, tmp_path / "mine", judge=judge, protocol=own)
    assert report.settings["sampling"]["height"] == 16
    assert any(f.text.endswith("height 16 instead of 24, width 16 instead of 24") for f in report.findings)


def test_a_model_that_the_classifiers_do_not_read_is_refused(pipe: Any, judge: UnlearnCanvasJudge, tmp_path: Path):
    """As a stock Stable Diffusion is: the base's own images are called wrong."""
    protocol = unlearncanvas_protocol("Cats", **{**PART, "seeds": UNLEARNCANVAS_SEEDS})
    with pytest.raises(SettingsError, match=r"the judge is right in .* known object.*Pass a judge that reads"):
        evaluate(pipe, [DoNothing("Cats", "object")], S, tmp_path, judge=judge, protocol=protocol)


def test_a_folder_is_of_one_protocol(pipe: Any, judge: UnlearnCanvasJudge, tmp_path: Path):
    """Pictures of both variants would lie in the same places."""
    one, other = (unlearncanvas_protocol("Cats", variant, **PART) for variant in ("official", "saeuron"))
    nameless = replace(one, name="")
    for first, then in ((one, other), (one, nameless), (nameless, one)):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        evaluate(pipe, [DoNothing("Cats", "object")], S, folder, judge=judge, protocol=first)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(SettingsError, match="an evaluation with other protocol: pass another folder"):
            evaluate(pipe, [DoNothing("Cats", "object")], S, folder, judge=judge, protocol=then)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_seeds_that_the_benchmark_gives_are_said_and_prompts_refused(
    pipe: Any, judge: UnlearnCanvasJudge, tmp_path: Path
):
    eraser = open_eraser("Cats", "object")
    protocol = unlearncanvas_protocol("Cats", **PART)
    known = replace(eraser.header, reference=Provenance(seeds=((100, 499),), prompts=("other",)))
    method = EraserMethod(replace(eraser, header=known))
    with pytest.raises(SplitError, match="with the seeds 100 to 499"):
        evaluate(pipe, [method], S, tmp_path, judge=judge, protocol=replace(protocol, name=""))
    leaked = replace(known, prompts=("A Cats image in Mosaic style.",))
    with pytest.raises(SplitError, match=r"was made with .A Cats image in Mosaic style\.., which would test it"):
        leaky = EraserMethod(replace(eraser, header=leaked))
        evaluate(pipe, [leaky], S, tmp_path, judge=judge, protocol=protocol)
    assert not list(tmp_path.iterdir())
    report = evaluate(pipe, [method], S, tmp_path, judge=judge, protocol=protocol)
    said = [f.text for f in report.findings if "made with seeds that" in f.text]
    assert said == [
        "'neuraleraser' of 'Cats' was made with seeds that UnlearnCanvas, official gives (188, 288), on other prompts"
    ]


def test_sealed_concepts_of_the_canvas_are_not_drawn_under_the_benchmark_s_names(
    pipe: Any, judge: UnlearnCanvasJudge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(families, "FAMILIES", WITH_TINY)
    protocol = unlearncanvas_protocol("Cats", **{**PART, "styles": ("Bricks", "Mosaic"), "objects": ("Cats", "Bears")})
    with pytest.raises(SplitError, match="Bears, Bricks: sealed"):
        evaluate(pipe, [DoNothing("Cats", "object")], S, tmp_path, judge=judge, protocol=protocol)
    assert not list(tmp_path.iterdir())
