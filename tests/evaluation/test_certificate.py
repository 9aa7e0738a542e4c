"""A certificate is found out where a figure, an image or its signature was altered, and rows can be drawn again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from PIL import Image

from helpers.commands import refused
from helpers.erasers import open_eraser
from helpers.measured import S
from helpers.stamp_judge import StampJudge, stamping
from neuraleraser.assessment import controls
from neuraleraser.canvas.words import VOCABULARY
from neuraleraser.cli import main
from neuraleraser.cli.verbs import MachineOptions
from neuraleraser.eraser import Eraser
from neuraleraser.errors import FileError, SettingsError
from neuraleraser.evaluation import certificate as module
from neuraleraser.evaluation import draw as drawing
from neuraleraser.evaluation.certificate import certify, compare_folder, read_certificate, redraw
from neuraleraser.evaluation.evaluate import evaluate
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.report_files import write_report
from neuraleraser.methods import EraserMethod
from neuraleraser.settings import EvaluateSettings

SHORT = replace(S, unhooked_checks=2)


@pytest.fixture(autouse=True)
def stamped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "generate", stamping)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pipe: Any, methods: list[Method]) -> Path:
    """The folder of an evaluation."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "generate", stamping)
        write_report(evaluate(pipe, methods, SHORT, folder, judge=StampJudge()), folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be altered."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "key")


def write_keys(folder: Path, name: str, private: Any = None) -> tuple[Path, Path]:
    private = private or ed25519.Ed25519PrivateKey.generate()
    own, public = folder / f"{name}.pem", folder / f"{name}-public.pem"
    pem = serialization.Encoding.PEM
    form = serialization.PrivateFormat.PKCS8
    own.write_bytes(private.private_bytes(pem, form, serialization.NoEncryption()))
    public.write_bytes(private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return own, public


def alter(path: Path, change: Callable[[dict[str, Any]], None], *, hash_too: bool = False) -> None:
    """Change a certificate's content, and with `hash_too` its hash to fit, as a forger would."""
    whole = json.loads(path.read_text())
    change(whole["content"])
    if hash_too:
        whole["sha256"] = module.hashlib.sha256(module._canonical(whole["content"])).hexdigest()
    path.write_text(json.dumps(whole))


def better(content: dict[str, Any]) -> None:
    content["figures"][0]["value"] += 0.01


def test_what_was_found_is_in_it(run: Path, tmp_path: Path, keys: tuple[Path, Path]):
    certify(run, tmp_path / "c.json", keys[0])
    content = read_certificate(tmp_path / "c.json", keys[1])
    figures = {(f["concept"], f["method"], f["figure"]): f for f in content["figures"]}
    report = json.loads((run / "report.json").read_text())
    for entry in report["concepts"]:
        for name, (low, high) in entry["ci"].items():
            f = figures[entry["name"], entry["method"], name]
            assert [f["value"], f["low"], f["high"]] == pytest.approx([entry[name], low, high], abs=1e-6)
            assert f["n"] == entry["ns"][name]
    pictures = [p for p in (run / "images").rglob("*.png") if "base-unhooked" not in str(p)]
    assert len(content["rows"]) == len(pictures) > 50
    assert compare_folder(content, run) == []


def test_an_altered_figure_is_found(run: Path, tmp_path: Path, keys: tuple[Path, Path]):
    path = tmp_path / "c.json"
    certify(run, path, keys[0])
    alter(path, better)
    with pytest.raises(FileError, match="was altered: its content does not have the hash"):
        read_certificate(path)
    certify(run, path, keys[0])
    alter(path, better, hash_too=True)
    with pytest.raises(FileError, match="was altered: its signature is not of this content"):
        read_certificate(path)
    certify(run, path)  # not signed, a forger may change all of it: the evaluation's folder finds him out
    alter(path, better, hash_too=True)
    (line,) = compare_folder(read_certificate(path), run)
    assert line.startswith("figure Van_Gogh, neuraleraser, ")


def test_an_altered_image_is_found(run: Path, tmp_path: Path):
    certify(run, tmp_path / "c.json")
    picture = next((run / "images" / "neuraleraser").rglob("*.png"))
    with Image.open(picture) as image:
        pixels = np.array(image)
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(picture)
    (line,) = compare_folder(read_certificate(tmp_path / "c.json"), run)
    assert line.startswith("neuraleraser of ") and line.endswith(f"seed {picture.stem}")


def test_a_signature_of_somebody_else_or_none_is_found(run: Path, tmp_path: Path, keys: tuple[Path, Path]):
    other = write_keys(tmp_path, "other")
    path = tmp_path / "c.json"
    certify(run, path, other[0])
    assert read_certificate(path)["rows"]
    with pytest.raises(FileError, match=r"is signed with another key than .*key-public\.pem"):
        read_certificate(path, keys[1])
    whole = json.loads(path.read_text())
    for signature in ("", "AAAA", whole["signature"][:-8] + "AAAAAA==", 3):
        path.write_text(json.dumps(whole | {"signature": signature}))
        with pytest.raises(FileError, match="its signature is not of this content"):
            read_certificate(path)
    certify(run, path)
    with pytest.raises(FileError, match="is not signed: ask for one that is"):
        read_certificate(path, keys[1])


def test_keys_and_files_that_are_none(run: Path, tmp_path: Path, keys: tuple[Path, Path]):
    path = tmp_path / "c.json"
    curve = write_keys(tmp_path, "curve", ec.generate_private_key(ec.SECP256R1()))
    for key, message in ((keys[1], "is no private key"), (curve[0], "is a key of another kind")):
        with pytest.raises(FileError, match=message):
            certify(run, path, key)
    assert not path.exists()
    certify(run, path, keys[0])
    for key, message in ((keys[0], "is no public key"), (curve[1], "is a key of another kind")):
        with pytest.raises(FileError, match=message):
            read_certificate(path, key)
    with pytest.raises(FileError, match="is no certificate of format 2"):
        read_certificate(run / "report.json")
    (run / "report.json").unlink()
    with pytest.raises(FileError, match=r"report\.json"):
        certify(run, path)


def test_a_content_of_another_form_is_refused(run: Path, tmp_path: Path):
    """Whoever has no key can still state a good hash."""
    path = tmp_path / "c.json"
    figure = {"concept": "a", "method": "b", "figure": "c", "value": 1, "low": 0, "high": 1, "n": 3}
    row = ["a", "", "g", 1, "p", "0"]
    for part, value in (
        ("rows", None), ("rows", [[1, 2]]), ("rows", [["a", "", "g", "x", "p", "0"]]), ("rows", [row, row]),
        ("rows", [[*row[:5], 3]]), ("figures", [{}]), ("figures", [figure, figure]), ("run", []), ("made", 3),
        *(("figures", [figure | {"high": high}]) for high in ("x", -1, True, 10**400)),
        ("figures", [figure | {"low": -9}]), ("made", "2026\x1b[2Kc.json: signed"), ("versions", 3), ("more", 1),
        ("run", {"model": "m", "methods": {"a": "x"}}), ("run", {"model": "m", "methods": {"a" * 5000: {}}}),
    ):  # fmt: skip
        certify(run, path)
        alter(path, lambda content, part=part, value=value: content.update({part: value}), hash_too=True)
        with pytest.raises(FileError, match="lacks what a certificate holds"):
            read_certificate(path)
    certify(run, path)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"verdict": "passed"}))
    with pytest.raises(FileError, match="no certificate of format 2"):
        read_certificate(path)
    path.write_text(json.dumps(whole).replace('"made": "2', '"made": "\\ud8002'))
    with pytest.raises(FileError, match=r"text that is no Unicode|lacks what"):
        read_certificate(path)


def test_one_that_is_made_up_is_found_by_the_run(run: Path, tmp_path: Path):
    """Without a signature all of it can be forged, with a good hash."""
    path = tmp_path / "c.json"
    forgeries: dict[str, Callable[[dict[str, Any]], None]] = {
        "nothing in it": lambda c: c.update(rows=[], figures=[]),
        "another model": lambda c: c["run"].update(model="x"),
        "other settings": lambda c: c["run"]["settings"].update(grid_rounds=9),
        "another eraser": lambda c: c["run"]["methods"]["neuraleraser"].update(Cats="0"),
        "other versions": lambda c: c["versions"].update(torch="0"),
        "a figure left out": lambda c: c["figures"].pop(),
        "a row left out": lambda c: c["rows"].pop(),
        "a row too many": lambda c: c["rows"].append(["none", "Cats", "grid", 1, "p", "0"]),
    }
    for what, forge in forgeries.items():
        certify(run, path)
        alter(path, forge, hash_too=True)
        assert compare_folder(read_certificate(path), run), what


def test_an_evaluation_that_has_not_ended_has_none(run: Path, tmp_path: Path):
    parts = sorted((run / "results").rglob("method=neuraleraser/**/*.parquet"))
    parts[-1].unlink()
    with pytest.raises(FileError, match=r"has no rows of neuraleraser|other figures than its rows"):
        certify(run, tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


def test_rows_are_drawn_again(run: Path, pipe: Any, methods: list[Method], tmp_path: Path):
    certify(run, tmp_path / "c.json")
    content = read_certificate(tmp_path / "c.json")
    few = redraw(content, pipe, methods, tmp_path / "few", share=0.05, seed=0, judge=StampJudge())
    more = redraw(content, pipe, methods, tmp_path / "more", share=0.5, seed=0, judge=StampJudge())
    assert 0 < few.drawn < more.drawn < len(content["rows"])
    assert few.different == more.different == few.outside == more.outside == ()
    for row in content["rows"]:
        row[5] = "0" * 64
    forged = redraw(content, pipe, methods, tmp_path / "forged", share=0.05, seed=0, judge=StampJudge())
    assert len(forged.different) == forged.drawn == few.drawn


def test_figures_outside_the_intervals_are_named(run: Path, pipe: Any, methods: list[Method], tmp_path: Path):
    certify(run, tmp_path / "c.json")
    content = read_certificate(tmp_path / "c.json")
    (ua,) = [f for f in content["figures"] if (f["method"], f["figure"]) == ("none", "ua") and f["concept"] == "Cats"]
    ua |= {"value": 0.9, "low": 0.8, "high": 1.0}
    found = redraw(content, pipe, methods, tmp_path / "again", share=1.0, seed=0, judge=StampJudge())
    assert found.outside == ("Cats, none, ua: 0.90, here 0.00",) and found.different == ()


def test_what_it_is_not_of_is_refused(run: Path, pipe: Any, methods: list[Method], tmp_path: Path):
    certify(run, tmp_path / "c.json")
    content = read_certificate(tmp_path / "c.json")
    other = EraserMethod(open_eraser("Van_Gogh", seed=7))
    with pytest.raises(SettingsError, match="not of this 'neuraleraser' of 'Van_Gogh'"):
        redraw(content, pipe, [other], tmp_path / "a", judge=StampJudge())
    with pytest.raises(SettingsError, match="the share is 0"):
        redraw(content, pipe, methods, tmp_path / "b", share=0, judge=StampJudge())
    with pytest.raises(SettingsError, match="of another model"):
        redraw(content | {"run": content["run"] | {"model": "x"}}, pipe, methods, tmp_path / "c", judge=StampJudge())


def test_the_verbs(run: Path, tmp_path: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]):
    path, key, public = tmp_path / "c.json", *keys
    assert main(["certify", str(run), "--out", str(path), "--key", str(key)]) == 0
    assert f"signed with {key}" in capsys.readouterr().out
    assert main(["verify", str(path), "--public-key", str(public), "--run", str(run)]) == 0
    assert "every image, figure and setting is as it says" in capsys.readouterr().out
    picture = next((run / "images" / "neuraleraser").rglob("*.png"))
    with Image.open(picture) as image:
        size = image.size
    Image.new("RGB", size).save(picture)
    assert main(["verify", str(path), "--run", str(run)]) == 1
    assert "1 differ:\n  neuraleraser of " in capsys.readouterr().out
    picture.unlink()
    parts = {path: path.read_bytes() for path in (run / "results").rglob("*.parquet")}
    assert "lacks 1 pictures" in refused(["verify", str(path), "--run", str(run)], capsys)
    assert all(path.read_bytes() == data for path, data in parts.items()), "whoever looks changes nothing"
    alter(path, better)
    assert "was altered" in refused(["verify", str(path)], capsys)
    assert "no certificate" in refused(["verify", str(run / "run.json")], capsys)
    assert "run.json" in refused(["certify", str(tmp_path), "--out", str(path)], capsys)
    for name in ("run.json", "report.json", "images/x.png"):
        (run / "images/x.png").touch()
        assert "would replace what the evaluation's" in refused(["certify", str(run), "--out", f"{run}/{name}"], capsys)


def test_settings_survive_the_record(run: Path, tmp_path: Path):
    from neuraleraser.evaluation.certificate import _settings_of

    certify(run, tmp_path / "c.json")
    found = _settings_of(read_certificate(tmp_path / "c.json")["run"])
    assert found == replace(SHORT, sampling=found.sampling) and isinstance(found, EvaluateSettings)


def test_the_verb_draws_again(
    pipe: Any, erasers: list[Eraser], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(MachineOptions, "open_pipeline", lambda self, model: pipe)
    monkeypatch.setattr(module, "default_judge", lambda pipe: StampJudge())
    files = [str(tmp_path / f"{e.name}.safetensors") for e in erasers]
    for e, file in zip(erasers, files, strict=True):
        e.save(file)
    loaded = [EraserMethod(Eraser.load(file)) for file in files]
    methods = [m for e in loaded for m in (e, *controls(e, VOCABULARY))]
    write_report(evaluate(pipe, methods, SHORT, tmp_path / "own", judge=StampJudge()), tmp_path / "own")
    path = tmp_path / "c.json"
    certify(tmp_path / "own", path)

    def verify(out: str, *more: str) -> int:
        given = ["verify", str(path), "--erasers", *files, "--share", "0.2", "--out", str(tmp_path / out), *more]
        return main(given)

    assert verify("good") == 0
    out = capsys.readouterr().out
    assert "have the same bits" in out and "no figure of these images is outside" in out
    assert "holds files" in refused(["verify", str(path), "--erasers", *files, "--out", str(tmp_path / "good")], capsys)
    alter(path, lambda content: [row.__setitem__(5, "0") for row in content["rows"]] and None, hash_too=True)
    assert verify("forged") == 1 and "0 of " in capsys.readouterr().out
    assert verify("elsewhere", "--other-machine") == 0
