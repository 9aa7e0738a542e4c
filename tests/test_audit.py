"""An audit is an evaluation of everything, and attacks, with a report and a certificate."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import pipelines
from helpers.canvas_cells import WITH_TINY
from helpers.commands import refused
from helpers.erasers import open_eraser
from helpers.measured import S, everything, same
from helpers.stamp_judge import StampJudge, reader, stamping
from neuraleraser import attacking, auditing, families
from neuraleraser.attacks import learn_embeddings, learned_word
from neuraleraser.auditing import FULL, QUICK, QUICK_ATTACKS, audit
from neuraleraser.cli import main
from neuraleraser.eraser import Eraser, Provenance
from neuraleraser.errors import FileError, SettingsError, SplitError
from neuraleraser.evaluation import draw as drawing
from neuraleraser.evaluation.certificate import compare_folder, read_certificate
from neuraleraser.evaluation.results import BASE
from neuraleraser.evaluation.run_folder import RunFolder
from neuraleraser.evaluation.terminal import terminal_tables
from neuraleraser.io import tensor_file
from neuraleraser.judges import JudgeSpec
from neuraleraser.methods import EraserMethod
from neuraleraser.settings import AttackBudget, EvaluateSettings

NONE, FEW = AttackBudget(steps=0), AttackBudget(steps=4, images=6)
ATTACKS = ["learned embeddings", "searched tokens", "perturbed encodings"]


@pytest.fixture(autouse=True, scope="module")
def family() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", WITH_TINY)
        patch.setattr(drawing, "generate", stamping)
        yield


def eraser() -> Any:
    e = open_eraser("Van_Gogh")
    return replace(e, header=replace(e.header, reference=Provenance(((0, 999),))))


def test_report_and_certificate_agree(tmp_path: Path):
    report = audit(reader(), eraser(), tmp_path / "audit", S, attacks=NONE, judge=StampJudge())
    assert [e.method for e in report.erasures] == ["neuraleraser", "string-filter-all", "string-filter-seen", "none"]
    files = {"report.html", "report.json", "figures.csv", "tables.tex", "contact.png", "certificate.json", "run.json"}
    assert files <= {path.name for path in (tmp_path / "audit").iterdir()}
    content = read_certificate(tmp_path / "audit/certificate.json")
    assert compare_folder(content, tmp_path / "audit") == []
    (kept,) = (tmp_path / "audit/erasers").iterdir()
    own = EraserMethod(Eraser.load(kept))
    assert content["run"]["methods"]["neuraleraser"] == {"Van_Gogh": own.key}, "of what a file holds"


def test_a_key_that_is_none_is_found_before_the_work(tmp_path: Path):
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(FileError, match="is no private key"):
        audit(reader(), eraser(), tmp_path / "audit", S, key=tmp_path / "key.pem", judge=StampJudge())
    assert not (tmp_path / "audit").exists()


# --- attacks


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory, family: None) -> Path:
    """A finished audit with attacks; no test changes it."""
    folder = tmp_path_factory.mktemp("attacked") / "audit"
    audit(reader(), eraser(), folder, S, attacks=FEW, judge=StampJudge())
    return folder


def input_of(folder: Path, method: str, attack: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return tensor_file.load(folder / "attacks" / method / f"{file_stem(attack)}.safetensors", "attack")


def file_stem(attack: str) -> str:
    return attacking.file_name(f"Van_Gogh, {attack}")


def own_method(folder: Path) -> EraserMethod:
    (kept,) = (folder / "erasers").iterdir()
    return EraserMethod(Eraser.load(kept))


def test_each_attack_stands_in_the_report_with_its_budget(attacked: Path):
    report = json.loads((attacked / "report.json").read_text())
    entry, *controls = report["concepts"]
    assert [a["attack"] for a in entry["attacks"]] == ATTACKS and not any(e["attacks"] for e in controls)
    for a in entry["attacks"]:
        assert a["ns"] == dict.fromkeys(("shown_base", "shown_after", "sound_after", "acted"), 6) and a["acted"] == 1
        assert a["seconds"] > 0 and a["seconds_base"] > 0
    assert [a["budget"] for a in entry["attacks"]] == [
        "4 steps of 8 pictures, 3 embeddings", "4 steps of 4 pictures, 5 tokens",
        "1 steps of 4 pictures a prompt, radius 1",
    ]  # fmt: skip
    named = entry["attacks"][1]  # whose prompts name the concept
    assert (named["shown_base"], named["shown_after"]) == (1, 0), "on the base, and with the eraser"
    rows = list(csv.DictReader((attacked / "figures.csv").read_text().splitlines()))
    (found,) = (r for r in rows if r["group"] == "attack by searched tokens" and r["figure"] == "shown_base")
    assert (found["value"], found["n"]) == ("1.0", "6")
    page = (attacked / "report.html").read_text()
    assert "neuraleraser: searched tokens" in page and "4 steps of 4 pictures, 5 tokens" in page


def test_the_certificate_has_their_figures_their_budget_and_a_hash_of_every_image(attacked: Path, tmp_path: Path):
    content = read_certificate(attacked / "certificate.json")
    groups = [f"attack by {name}" for name in ATTACKS]
    drawn = [(row[0], row[2]) for row in content["rows"] if row[2] in groups]
    assert sorted(drawn) == sorted((method, group) for method in (BASE, "neuraleraser") for group in groups * 6)
    figures = {f["figure"] for f in content["figures"] if f["method"] == "neuraleraser"}
    assert {f"{g}: {name}" for g in groups for name in ("shown_base", "shown_after", "sound_after", "acted")} <= figures
    assert content["run"]["attacks"] == {"steps": 4, "images": 6}
    assert compare_folder(content, attacked) == []


@pytest.mark.parametrize("place", ["base", "neuraleraser/Van_Gogh"])
def test_an_attacked_image_that_was_changed_is_found(attacked: Path, place: str):
    content = read_certificate(attacked / "certificate.json")
    seed = next(r[3] for r in content["rows"] if r[2] == "attack by learned embeddings" and r[0] == place.split("/")[0])
    (picture,) = (attacked / "images" / place).rglob(f"{seed}.png")
    before = picture.read_bytes()
    try:
        Image.new("RGB", (16, 16)).save(picture)
        (found,) = compare_folder(content, attacked)
    finally:
        picture.write_bytes(before)
    assert "attack by learned embeddings" in found


def test_an_attack_goes_through_the_eraser_and_its_images_are_drawn_with_what_it_found(attacked: Path):
    pipe, m = reader(), own_method(attacked)
    hooks = pipelines.left(pipe)
    task = attacking._task(pipe, m, S, FEW)
    for name, context in ((BASE, attacking.nullcontext), ("neuraleraser", m.applied)):
        found, header = input_of(attacked, name, "learned embeddings")
        by_hand = learn_embeddings(
            pipe, task.pictures, [c.prompt for c in task.lessons], applied=context, steps=4, batch_size=8
        )
        assert torch.equal(found["embeddings"], by_hand) and header["method"] == name
        cells = task.cells.attacked("Van_Gogh", "learned embeddings", 0, 6, "word")
        with learned_word(pipe, by_hand), context(pipe):
            images = stamping(pipe, [c.prompt for c in cells], [c.seed for c in cells], S.sampling)
        run = RunFolder(attacked, JudgeSpec.of(StampJudge()))
        kept = np.stack([run.image(name, "" if name == BASE else "Van_Gogh", c) for c in cells])
        assert np.array_equal(kept, images)
    assert not torch.equal(
        input_of(attacked, BASE, "learned embeddings")[0]["embeddings"],
        input_of(attacked, "neuraleraser", "learned embeddings")[0]["embeddings"],
    )
    assert pipelines.left(pipe) == hooks


def test_a_killed_audit_goes_on_and_repeats_no_finished_attack(
    attacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def killed(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(attacking, "perturb_encoding", killed)
        with pytest.raises(KeyboardInterrupt):
            audit(reader(), eraser(), tmp_path, S, attacks=FEW, judge=StampJudge())
    assert not (tmp_path / "report.json").exists() and not (tmp_path / "certificate.json").exists()
    for name in ("learn_embeddings", "searched_tokens"):
        monkeypatch.setattr(attacking, name, killed)
    audit(reader(), eraser(), tmp_path, S, attacks=FEW, judge=(judge := StampJudge()))
    assert judge.calls == 2, "the images of one attack, on the base and with the eraser"
    assert same(everything(attacked), everything(tmp_path))
    monkeypatch.setattr(attacking, "perturb_encoding", killed)
    again = audit(reader(), eraser(), tmp_path, S, attacks=FEW, judge=(judge := StampJudge()))
    assert judge.calls == 0 and len(again.erasures[0].attacks) == 3
    record = (tmp_path / "run.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(auditing, "run_attacks", killed)
        with pytest.raises(KeyboardInterrupt):
            audit(reader(), eraser(), tmp_path, S, attacks=FEW, judge=StampJudge())
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads(record), "an evaluation forgets no budget"


def test_a_damaged_input_is_searched_again(attacked: Path, tmp_path: Path):
    audit(reader(), eraser(), tmp_path, S, attacks=FEW, judge=StampJudge())
    path = tmp_path / "attacks" / "neuraleraser" / f"{file_stem('searched tokens')}.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.warns(UserWarning, match="the attack is made again"):
        audit(reader(), eraser(), tmp_path, S, attacks=FEW, judge=StampJudge())
    found = input_of(tmp_path, "neuraleraser", "searched tokens")[0]["embeddings"]
    assert torch.equal(found, input_of(attacked, "neuraleraser", "searched tokens")[0]["embeddings"])


def test_another_eraser_is_attacked_anew(tmp_path: Path):
    audit(reader(), eraser(), tmp_path, S, attacks=FEW, judge=StampJudge())
    base = input_of(tmp_path, BASE, "learned embeddings")[1]
    own = input_of(tmp_path, "neuraleraser", "learned embeddings")[1]
    e = open_eraser("Van_Gogh", seed=7)
    other = replace(e, header=replace(e.header, reference=Provenance(((0, 999),))))
    audit(reader(), other, tmp_path, S, attacks=FEW, judge=StampJudge())
    assert input_of(tmp_path, BASE, "learned embeddings")[1] == base, "the base model is the same"
    now = input_of(tmp_path, "neuraleraser", "learned embeddings")[1]
    assert now["key"] == own_method(tmp_path).key != own["key"]
    assert compare_folder(read_certificate(tmp_path / "certificate.json"), tmp_path) == []


@pytest.mark.parametrize("budget", [NONE, AttackBudget(8, 6), AttackBudget(4, 5)])
def test_attacks_of_another_budget_do_not_mix(attacked: Path, budget: AttackBudget):
    judge, before = StampJudge(), (attacked / "run.json").read_bytes()
    with pytest.raises(SettingsError, match=r"holds attacks of {'steps': 4, 'images': 6}, and .* asked for: pass"):
        audit(reader(), eraser(), attacked, S, attacks=budget, judge=judge)
    assert judge.calls == 0 and (attacked / "run.json").read_bytes() == before


def test_an_attack_that_does_not_take_the_pipeline_is_left_out_and_named(tmp_path: Path):
    pipe = reader()
    pipe.text_encoder_2 = torch.nn.Identity()
    report = audit(pipe, eraser(), tmp_path, S, attacks=FEW, judge=StampJudge())
    (note,) = (f for f in report.findings if "not run" in f.text)
    assert note.level == "note" and "StableDiffusionPipeline has several text encoders" in note.text
    assert all(name in note.text for name in ATTACKS) and not report.erasures[0].attacks
    assert note.text in (tmp_path / "report.html").read_text().replace("&#39;", "'") and note.text in terminal_tables(
        report
    )
    assert compare_folder(read_certificate(tmp_path / "certificate.json"), tmp_path) == []


def test_an_attack_that_fails_on_the_base_model_is_said_to_prove_little(attacked: Path):
    findings = json.loads((attacked / "report.json").read_text())["findings"]
    weak = [f["text"] for f in findings if "proves little" in f["text"]]
    assert [text.partition(" brings")[0] for text in weak] == [
        "the attack by learned embeddings", "the attack by perturbed encodings",
    ]  # fmt: skip


def test_an_eraser_made_with_an_attack_s_seeds_is_refused_before_the_work(tmp_path: Path):
    e, judge = eraser(), StampJudge()
    task = attacking._task(reader(), EraserMethod(e), S, FEW)
    seed = task.cells.attacked("Van_Gogh", "searched tokens", 1, 6, "word and name")[5].seed
    leaked = replace(e, header=replace(e.header, reference=Provenance(((seed, seed),))))
    with pytest.raises(SplitError, match=f"was made with the seeds {seed} to {seed}"):
        audit(reader(), leaked, tmp_path / "audit", S, attacks=FEW, judge=judge)
    assert judge.calls == 0 and not (tmp_path / "audit").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [([], AttackBudget()), (["--quick"], QUICK_ATTACKS), (["--quick", "--attack-steps", "0"], AttackBudget(0, 20))],
)
def test_the_verb_passes_a_budget(
    more: list[str], expected: AttackBudget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Asked(Exception):
        pass

    def run(pipe: Any, eraser: Any, out: Path, settings: EvaluateSettings, *, attacks: AttackBudget, key: Any) -> Any:
        raise Asked(attacks, settings)

    monkeypatch.setattr(auditing, "audit", run)
    eraser().save(tmp_path / "e.safetensors")
    with pytest.raises(Asked) as caught:
        main(["audit", str(tmp_path / "e.safetensors"), "--out", str(tmp_path / "out"), *more])
    assert caught.value.args == (expected, QUICK if "--quick" in more else FULL)


def test_every_kind_of_image_is_in_both_budgets():
    rounds = [f.name for f in fields(EvaluateSettings) if f.name.endswith(("_rounds", "_prompts", "_steps"))]
    for settings in (FULL, QUICK):
        missing = {name for name in rounds if not getattr(settings, name)}
        assert missing <= {"held_out_grid_rounds"}, "that is of the base model alone"


def test_the_verb_checks_what_it_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    missing = str(tmp_path / "none.safetensors")
    assert "there is no eraser" in refused(["audit", missing, "--out", str(tmp_path / "out")], capsys)
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused(["audit", missing, "--out", str(tmp_path / "file")], capsys)
