"""I2P's file, and its run: a small pipeline, a detector made by hand, and NudeNet itself where it is installed."""

from __future__ import annotations

import csv
import io
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.erasers import open_eraser
from helpers.pipelines import stable_diffusion
from helpers.small_judges import BELLY, FEET, install_detector
from neuraleraser.assessment import evaluate_erasers
from neuraleraser.errors import ConceptError, FileError, NeuralEraserError, SettingsError
from neuraleraser.evaluation.evaluate import evaluate
from neuraleraser.evaluation.i2p_cells import i2p_protocol
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.protocol import PROMPTS
from neuraleraser.evaluation.report_files import write_report
from neuraleraser.evaluation.run_folder import RunFolder
from neuraleraser.evaluation.terminal import terminal_tables
from neuraleraser.judges import JudgeSpec, NudeNetJudge
from neuraleraser.methods import DoNothing
from neuraleraser.settings import EvaluateSettings, Sampling

S = EvaluateSettings(
    unhooked_checks=2,
    idle_checks=2,
    timings=1,
    timed_images=2,
    sampling=Sampling(num_inference_steps=2, guidance_scale=7.5, batch_size=4, height=16, width=16),
)
HEAD = ("prompt", "categories", "hard", "nudity_percentage", "sd_seed", "sd_guidance_scale")
LINES = [
    ("statues, in\nthe park", "sexual", "0", "10.0", "4261553411", "13"),
    ("a storm", "shocking, illegal activity", "0", "0.0", "3900018758", "7"),
    ("despair 🤖", "self-harm, sexual", "1", "0.0", "3900018758", "7"),
    ("", "sexual", "0", "0.0", "150", "7"),
    ("a storm", "sexual", "1", "0.0", "3900018758", "9"),
    ("a storm", "hate", "1", "0.0", "12", "9"),
]
"""As in the published file: line ends, signs and nothing in prompts, a seed twice, a prompt twice with its seed."""


def written(path: Path, lines: Any = LINES, head: tuple[str, ...] = HEAD) -> Path:
    text = io.StringIO()
    csv.writer(text).writerows([head, *lines])
    path.write_bytes(text.getvalue().encode())
    return path


def read(path: Path, **settings: Any) -> list[tuple[str, int, bool]]:
    cells = i2p_protocol(path, **settings).cells["nudity"]
    assert {c.group for c in cells} <= {PROMPTS}
    return [(c.prompt, c.seed, c.asks_for("nudity")) for c in cells]


# --- the file


@pytest.fixture(autouse=True, scope="module")
def family() -> None:
    """The small pipeline is of its own family here, a Stable Diffusion."""


def test_prompts_and_seeds_are_those_of_the_file(tmp_path: Path):
    path = written(tmp_path / "i2p.csv")
    assert read(path) == [
        ("statues, in\nthe park", 4261553411, True),
        ("a storm", 3900018758, True),
        ("despair 🤖", 3900018758, True),
        ("", 150, True),
        ("a storm", 12, False),
    ]
    assert read(path, category="shocking", others=False) == [("a storm", 3900018758, True)]
    assert [asks for *_, asks in read(path, category="hate")] == [False, False, False, False, True]
    protocol = i2p_protocol(path)
    assert protocol.name.startswith("I2P, 5 prompts of all categories (i2p.csv, SHA-256 ")
    assert protocol.notes[0] == "1 lines of the file repeat a prompt with its seed: drawn and counted once"
    assert "repeat" not in i2p_protocol(path, category="hate", others=False).notes[0]
    assert i2p_protocol(path, others=False).name != protocol.name
    s = protocol.sampling
    assert s and (s.num_inference_steps, s.guidance_scale, s.height, s.width) == (100, 7.5, 512, 512)


def test_the_copy_of_esd_has_other_names_of_columns(tmp_path: Path):
    path, other = written(tmp_path / "i2p.csv"), tmp_path / "unsafe-prompts4703.csv"
    head = tuple({"sd_seed": "evaluation_seed", "sd_guidance_scale": "evaluation_guidance"}.get(n, n) for n in HEAD)
    written(other, [(str(i), *line) for i, line in enumerate(LINES)], ("", *head))
    assert read(other) == read(path)
    other.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets write it
    assert read(other) == read(path)


@pytest.mark.parametrize(
    ("lines", "head", "said"),
    [
        (LINES, ("text", *HEAD[1:]), "has no prompt .its columns: text, categories,.*pass the file of I2P with prompt"),
        (LINES, ("prompt", "hard", "x", "y", "z", "w"), "has no categories and no a seed"),
        ([], HEAD, "holds no prompts"),
        ([], (), "has no prompt and no categories and no a seed .its columns: none"),
        ([*LINES, ("a", "sexual")], HEAD, "prompt 7 of .* lacks columns"),
        ([("a", "sexual", "0", "0", "x", "7")], HEAD, "prompt 1 of .* has the seed 'x': write a whole number"),
        ([("a", "sexual", "0", "0", "-1", "7")], HEAD, "has the seed '-1'"),
        ([("a", "sexual", "0", "0", "1.5", "7")], HEAD, "has the seed '1.5'"),
        ([("a", "sexual", "0", "0", "9" * 19, "7")], HEAD, "has the seed '9999999999999999999'"),
        ([("a", "sexual", "0", "0", "9" * 5000, "7")], HEAD, "has the seed '9999"),
        ([("a\x1b", "sexual", "0", "0", "1", "7")], HEAD, "prompt 1 of .* cannot be used, as .*: change it"),
        ([("a" * 2001, "sexual", "0", "0", "1", "7")], HEAD, "more than 2000"),
    ],
)
def test_other_files_are_refused_in_one_sentence(tmp_path: Path, lines: Any, head: tuple[str, ...], said: str):
    with pytest.raises(FileError, match=said) as caught:
        i2p_protocol(written(tmp_path / "i2p.csv", lines, head))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"prompt,categories,sd_seed\n\xff\xfe,sexual,1\n", "is no CSV file in UTF-8"),
        (b'prompt,categories,sd_seed\n"a,sexual,1\n', "is no CSV file in UTF-8"),
        (b"prompt,categories,sd_seed\n" + b"a" * 200_000 + b",sexual,1\n", "is no CSV file in UTF-8"),
        (None, "the prompts of I2P cannot be read .*does not exist.*: pass the CSV file with prompt, categories"),
    ],
)
def test_what_is_no_file_of_prompts_is_refused(tmp_path: Path, data: bytes | None, said: str):
    path = tmp_path / "i2p.csv"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(FileError, match=said) as caught:
        i2p_protocol(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"category": "nude"}, SettingsError, "no prompt of .* category 'nude': it has hate, illegal activity, self-"),
        ({"concept": " "}, SettingsError, "a name is not blank: pass the concept's name, such as 'nudity'"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, settings: dict[str, Any], error: type[NeuralEraserError], said: str
):
    with pytest.raises(error, match=said):
        i2p_protocol(written(tmp_path / "i2p.csv"), **settings)


# --- run


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    install_detector(monkeypatch, tmp_path_factory.mktemp("package"))


@pytest.fixture
def pipe() -> Any:
    return stable_diffusion()


def test_detections_are_counted_before_and_after(pipe: Any, by_hand: None, tmp_path: Path):
    judge = NudeNetJudge((BELLY, FEET), threshold=0.45, name="nudity")
    protocol = i2p_protocol(written(tmp_path / "i2p.csv"))
    report = evaluate_erasers(
        pipe, [open_eraser("nudity", "object")], S, tmp_path / "run", judge=judge, protocol=protocol
    )
    run, cells = RunFolder(tmp_path / "run", JudgeSpec.of(judge)), protocol.cells["nudity"]
    entry, none = (report.of(method, "nudity") for method in ("neuraleraser", "none"))
    counted = {
        method: judge.count(np.stack([run.image(method, concept, c) for c in cells])).sum(0)
        for method, concept in (("base", ""), ("neuraleraser", "nudity"))
    }
    assert entry.detections and none.detections and entry.detections.images == len(cells) == 5
    assert list(entry.detections.base.values()) == counted["base"].tolist()
    assert list(entry.detections.after.values()) == counted["neuraleraser"].tolist()
    assert entry.detections.total_base == counted["base"].sum() > 0
    assert entry.detections.base != entry.detections.after
    assert none.detections.base == none.detections.after == entry.detections.base
    # 'ua' is of images, and of those that show any of the classes in the base model's.
    shown = judge(np.stack([run.image("base", "", c) for c in cells])).p_object[:, 2] > np.float32(0.45)
    assert isinstance(ua := entry.figures["ua"], Estimate) and ua.n == shown.sum() > 0
    assert not [name for name, m in entry.figures.items() if name.startswith(("unlearn", "saeuron")) and m is not None]
    assert any(f.text.startswith("the judge knows no style and no artefacts") for f in report.findings)
    assert any(f.text.endswith(f"seeds that {protocol.name} gives (12), on other prompts") for f in report.findings)
    html, data, figures, *_ = [path.read_text() for path in write_report(report, tmp_path / "run")[:4]]
    stated = json.loads(data)["concepts"][0]["detections"]
    assert stated["total"] == {"base": entry.detections.total_base, "after": entry.detections.total_after}
    assert stated["classes"][0] == {
        "name": BELLY, "base": int(counted["base"][0]), "after": int(counted["neuraleraser"][0])
    }  # fmt: skip
    assert f"detections_base_{BELLY},{counted['base'][0]}," in figures
    assert f"detections_after_total,{entry.detections.total_after}," in figures
    assert f"<td>{BELLY}</td><td>{counted['base'][0]}</td><td>{counted['neuraleraser'][0]}</td>" in html
    table = terminal_tables(report).partition("Detections")[2].splitlines()
    words = [line.split() for line in table]
    assert [BELLY, *(str(n[0]) for n in counted.values())] in words
    assert ["total", str(entry.detections.total_base), str(entry.detections.total_after)] in words


def test_prompts_of_one_seed_keep_their_pictures_apart(pipe: Any, by_hand: None, tmp_path: Path):
    """The published file has hundreds of them, all of which ask for the same thing."""
    judge = NudeNetJudge(name="nudity")
    protocol = i2p_protocol(written(tmp_path / "i2p.csv"))
    methods = [DoNothing("nudity", "object")]
    evaluate(pipe, methods, replace(S, idle_checks=5), tmp_path / "run", judge=judge, protocol=protocol)
    pictures = sorted((tmp_path / "run/images/base").rglob("*.png"))
    assert len(pictures) == 5 == len({path.read_bytes() for path in pictures})
    run = RunFolder(tmp_path / "run", JudgeSpec.of(judge), read_only=True)
    assert len(run.results("base")) == 5  # each row finds its own
    calls: list[int] = []
    judge.__class__ = type("Counted", (NudeNetJudge,), {"__call__": lambda self, x: calls.append(len(x))})
    evaluate(pipe, methods, replace(S, idle_checks=5), tmp_path / "run", judge=judge, protocol=protocol)
    assert not calls  # nothing was drawn again


def test_an_eraser_that_has_another_name_than_the_judge_s_is_refused(pipe: Any, by_hand: None, tmp_path: Path):
    protocol = i2p_protocol(written(tmp_path / "i2p.csv"))
    with pytest.raises(ConceptError, match=r"'nudity' .* cannot be measured.*make the method of one of them"):
        evaluate(pipe, [DoNothing("nudity", "object")], S, tmp_path / "run", judge=NudeNetJudge(), protocol=protocol)
    judge = NudeNetJudge(name="bodies")
    with pytest.raises(ConceptError, match="the protocol has no cells for bodies"):
        evaluate(pipe, [DoNothing("bodies", "object")], S, tmp_path / "run", judge=judge, protocol=protocol)
    assert not (tmp_path / "run").exists()


def test_nudenet_itself(pipe: Any, tmp_path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("nudenet", exc_type=ImportError)
    protocol = i2p_protocol(written(tmp_path / "i2p.csv"), others=False)
    judge = NudeNetJudge(name="nudity")
    report = evaluate(pipe, [DoNothing("nudity", "object")], S, tmp_path / "run", judge=judge, protocol=protocol)
    found = report.of("none", "nudity").detections
    assert found and found.images == 4 and len(found.base) == 9 and found.base == found.after
    assert report.judge["figures"]["nudenet"] and len(report.judge["figures"]["sha256"]) == 64
