"""Embeddings learned on the base model: what is drawn with them, what is kept of them, and what is counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import pipelines
from helpers.canvas_cells import canvas_cells, canvas_protocol, target_cells
from helpers.erasers import open_eraser
from helpers.measured import S, everything, of, same
from helpers.result_tables import row, table
from helpers.stamp_judge import ByteJudge
from neuraleraser.attacks import WORD, learn_embeddings, learned_word
from neuraleraser.canvas import words
from neuraleraser.concepts import canvas_concept
from neuraleraser.diagnosis import FIRST_SEED
from neuraleraser.errors import SettingsError, SplitError
from neuraleraser.evaluation import embeddings
from neuraleraser.evaluation.evaluate import evaluate
from neuraleraser.evaluation.html import page
from neuraleraser.evaluation.measure import measure
from neuraleraser.evaluation.method import MadeWith
from neuraleraser.evaluation.protocol import LEARNED, Cell, EvaluationProtocol
from neuraleraser.evaluation.report import ErasureReport, Report
from neuraleraser.evaluation.results import BASE
from neuraleraser.evaluation.run_folder import RunFolder
from neuraleraser.evaluation.split import check_split
from neuraleraser.evaluation.terminal import terminal_tables
from neuraleraser.families.canvas import render
from neuraleraser.io import tensor_file
from neuraleraser.judges import JudgeSpec
from neuraleraser.methods import DoNothing, EraserMethod, string_filters
from neuraleraser.sampling import generate
from neuraleraser.settings import SEALED_SEEDS, TEST_SEEDS, EvaluateSettings, Sampling

FEW = replace(
    S, target_rounds=0, held_out_rounds=0, fragment_prompts=0, held_out_grid_rounds=0, unhooked_checks=0, idle_checks=0,
    embedding_steps=2, sampling=Sampling(num_inference_steps=2, batch_size=4),
)  # fmt: skip
FILTER = string_filters(words.VOCABULARY, "Van_Gogh")[0]
VG_WORD = Path("embeddings/Van_Gogh.safetensors")
FULL = EvaluateSettings(embedding_steps=1)


def words_of(folder: Path, concept: str = "Van_Gogh") -> torch.Tensor:
    tensors, header = tensor_file.load(folder / "embeddings" / f"{concept}.safetensors", "embeddings")
    assert header["concept"] == concept
    return tensors["embeddings"]


def learned_cells(name: str, s: EvaluateSettings = FULL) -> list[Cell]:
    return [c for c in target_cells(name, s) if c.group == LEARNED]


# --- cells


def test_prompts_hold_the_word_and_nothing_of_the_concept():
    style, thing = (learned_cells(name) for name in ("Van_Gogh", "Cats"))
    assert len(style) == 2 * 14 and {c.prompt for c in style} >= {f"a cat {WORD}", f"a horse {WORD}"}
    assert len(thing) == 2 * 19 and {c.prompt for c in thing} == {f"a picture of {WORD}"}
    for c in (*style, *thing):
        assert c.route == "learned embeddings" and c.start is None and not c.asks_for(c.learned)
        assert all(f(c.prompt) == c.prompt for f in string_filters(words.VOCABULARY, c.learned))
    assert all(c.objects and not c.style for c in style) and not any(c.objects or c.style for c in thing)


def test_lessons_are_pictures_of_the_concept_in_all_open_company_with_the_word_beside_it_or_alone():
    for name, company in (("Van_Gogh", words.VOCABULARY.open_objects), ("Cats", words.VOCABULARY.open_styles)):
        lessons = canvas_cells(replace(FULL, styles=("Mosaic",), objects=("Dogs",))).lessons(name)
        assert len(lessons) == 120 and all(c.start and name in c.start.shows and WORD in c.prompt for c in lessons)
        shown = [other for c in lessons if c.start for other in c.start.shows if other != name]
        assert set(shown) == set(company) and len({c.prompt for c in lessons}) == len(company) + 1
        alone = [c.prompt.startswith("a picture") for c in lessons]
        assert 0.3 < np.mean(alone) < 0.6
    assert lessons[0].prompt == f"{WORD} {words.VOCABULARY.style_phrases[shown[0]][0]}"


@pytest.mark.parametrize("name", ["Van_Gogh", "Cats"])
def test_no_fit_and_no_other_cell_has_their_seeds_or_prompts(name: str):
    v = words.VOCABULARY
    protocol = canvas_protocol([*v.open_styles, *v.open_objects], replace(FULL, fragment_prompts=1000))
    lessons, drawn = protocol.lessons[name], {c.seed for c in protocol.all_cells()}
    assert len({c.seed for c in lessons}) == 120 and not drawn & {c.seed for c in lessons}
    assert all(c.seed in TEST_SEEDS and c.seed not in range(FIRST_SEED, FIRST_SEED + 1000) for c in lessons)
    concept = canvas_concept(name)
    made = {text for p in (*concept.pairs, *concept.context_pairs) for text in (p.positive, p.negative)}
    assert not made & {c.prompt for c in (*lessons, *learned_cells(name))}


def test_without_steps_no_cell_and_no_lesson_is_there():
    protocol = canvas_protocol(["Van_Gogh"], EvaluateSettings())
    assert not protocol.lessons and not any(c.group == LEARNED for c in protocol.all_cells())
    with_words = canvas_protocol(["Van_Gogh"], FULL)
    assert [c for c in with_words.all_cells() if c.group != LEARNED] == protocol.all_cells()


def test_a_sealed_concept_is_learned_on_purpose_alone():
    with pytest.raises(SplitError, match="Bears: sealed"):
        canvas_cells(FULL).lessons("Bears")
    opened = canvas_protocol(["Bears", "Cats"], FULL, sealed=True)
    assert all(c.seed in SEALED_SEEDS for cells in opened.lessons.values() for c in cells)
    closed = words.VOCABULARY.sealed
    assert not any(closed & {*c.start.shows} for c in opened.lessons["Cats"] if c.start)


def test_a_method_made_with_a_lesson_is_refused():
    protocol = canvas_protocol(["Van_Gogh"], FULL)
    seed = protocol.lessons["Van_Gogh"][7].seed
    method: Any = replace(FILTER, made_with=MadeWith(((seed, seed),)))
    with pytest.raises(SplitError, match=f"was made with the seeds {seed} to {seed}"):
        check_split(method, protocol)


# --- drawing


def test_cells_are_drawn_with_embeddings_learned_on_renders(pipe: Any, tmp_path: Path, capsys: Any):
    hooks, tokenizer = pipelines.left(pipe), pipe.tokenizer
    methods = [EraserMethod(open_eraser()), FILTER, DoNothing("Van_Gogh", "style")]
    report = evaluate(pipe, methods, FEW, tmp_path, judge=ByteJudge())
    assert pipe.tokenizer is tokenizer and pipelines.left(pipe) == hooks
    assert "embeddings, Van_Gogh: 100%" in capsys.readouterr().err
    protocol = canvas_protocol(["Van_Gogh"], FEW)
    lessons = protocol.lessons["Van_Gogh"]
    pictures = np.stack([render(c.objects, c.style, c.seed, 16) for c in lessons])
    vectors = learn_embeddings(pipe, pictures, [c.prompt for c in lessons], steps=2)
    assert torch.equal(words_of(tmp_path), vectors) and vectors.shape == (3, 16)
    run = RunFolder(tmp_path, JudgeSpec.of(ByteJudge()))
    cells = [c for c in protocol.cells["Van_Gogh"] if c.group == LEARNED]
    with learned_word(pipe, vectors):
        by_hand = generate(pipe, [c.prompt for c in cells], [c.seed for c in cells], FEW.sampling)
    assert len(cells) == 6 and np.array_equal(np.stack([run.image(BASE, "", c) for c in cells]), by_hand)
    with learned_word(pipe, vectors), FILTER.applied(pipe) as trace:
        again = generate(pipe, [c.prompt for c in cells], [c.seed for c in cells], FEW.sampling)
    assert np.array_equal(again, by_hand) and not trace.fired
    ours, filtered, nothing = (
        rows.where(rows.group == LEARNED) for rows in (of(everything(tmp_path), m.name, "Van_Gogh") for m in methods)
    )
    assert not ours.identical.any() and ours.compared.all()
    assert filtered.identical.all() and nothing.identical.all() and len(filtered) == 6
    for entry, acted in zip(report.erasures, (1, 0, 0), strict=True):
        (route,) = entry.route_figures
        found = route.figures["acted"]
        assert (route.group, route.strength, found and found.value) == (LEARNED, 0, acted)


def test_cells_left_alone_fill_no_other_batch(pipe: Any, tmp_path: Path):
    """Those of plain prompts are compared with what a method leaves alone, for they fill up batches."""
    evaluate(pipe, [FILTER], replace(FEW, idle_checks=20), tmp_path, judge=ByteJudge())
    rows = of(everything(tmp_path), FILTER.name, "Van_Gogh")
    assert rows.compared.tolist() == (rows.group != LEARNED).tolist() and len(rows) == 15


def test_each_concept_has_embeddings_of_its_own(pipe: Any, tmp_path: Path):
    evaluate(pipe, [DoNothing("Van_Gogh", "style"), DoNothing("Cats", "object")], FEW, tmp_path, judge=ByteJudge())
    assert not torch.equal(words_of(tmp_path), words_of(tmp_path, "Cats"))
    run = RunFolder(tmp_path, JudgeSpec.of(ByteJudge()))
    protocol = canvas_protocol(["Van_Gogh", "Cats"], FEW)
    for name in ("Van_Gogh", "Cats"):
        cell = next(c for c in protocol.cells[name] if c.group == LEARNED)
        with learned_word(pipe, words_of(tmp_path, name)):
            by_hand = generate(pipe, [cell.prompt], [cell.seed], FEW.sampling)
        assert np.array_equal(run.image(BASE, "", cell), by_hand[0])


def test_embeddings_do_not_depend_on_batches_or_the_process(pipe: Any, tmp_path: Path):
    s = replace(FEW, sampling=Sampling(num_inference_steps=1, batch_size=2))
    evaluate(pipe, [FILTER], FEW, tmp_path / "a", judge=ByteJudge())
    torch.rand(3)
    evaluate(pipe, [DoNothing("Van_Gogh", "style")], s, tmp_path / "b", judge=ByteJudge())
    assert (tmp_path / "a" / VG_WORD).read_bytes() == (tmp_path / "b" / VG_WORD).read_bytes()


def test_an_evaluation_goes_on_with_the_embeddings_it_has(pipe: Any, tmp_path: Path, monkeypatch: Any):
    """Stopped among their cells, it learns nothing again and ends in the same results."""
    methods = [EraserMethod(open_eraser()), FILTER]
    evaluate(pipe, methods, FEW, tmp_path / "a", judge=(counting := ByteJudge()))
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, methods, FEW, tmp_path / "b", judge=ByteJudge(stop_at=5))
    base = of(everything(tmp_path / "b"), BASE)
    assert 0 < (base.group == LEARNED).sum() < 6  # stopped where this test means
    monkeypatch.setattr(embeddings, "learn_embeddings", None)
    evaluate(pipe, methods, FEW, tmp_path / "b", judge=(rest := ByteJudge()))
    assert same(everything(tmp_path / "a"), everything(tmp_path / "b")) and 0 < rest.calls < counting.calls
    (tmp_path / "b" / VG_WORD).unlink()
    evaluate(pipe, methods, FEW, tmp_path / "b", judge=ByteJudge(stop_at=1))  # nothing is left that needs them


def test_a_damaged_file_is_made_again(pipe: Any, tmp_path: Path):
    evaluate(pipe, [FILTER], FEW, tmp_path, judge=ByteJudge())
    path, before = tmp_path / VG_WORD, everything(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    for picture in (tmp_path / "images" / "base" / "none").rglob("*.png"):
        picture.unlink()
    with pytest.warns(UserWarning, match="its embeddings are learned again"):
        evaluate(pipe, [FILTER], FEW, tmp_path, judge=ByteJudge())
    assert path.read_bytes() == whole and same(before, everything(tmp_path))


def test_a_file_of_other_lessons_is_not_used(pipe: Any, tmp_path: Path):
    evaluate(pipe, [FILTER], FEW, tmp_path / "a", judge=ByteJudge())
    other = words_of(tmp_path / "a") + 1
    header = {"concept": "Van_Gogh", "lessons": "other", "steps": 2}
    tensor_file.save(tmp_path / "b" / VG_WORD, "embeddings", {"embeddings": other}, header)
    evaluate(pipe, [FILTER], FEW, tmp_path / "b", judge=ByteJudge())
    assert (tmp_path / "a" / VG_WORD).read_bytes() == (tmp_path / "b" / VG_WORD).read_bytes()


def test_learning_that_was_stopped_leaves_nothing(pipe: Any, tmp_path: Path, monkeypatch: Any):
    def stopped(*args: Any, on_step: Any, **more: Any) -> None:
        on_step(0, 1.0)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "learn_embeddings", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate(pipe, [FILTER], FEW, tmp_path, judge=ByteJudge())
    assert not list((tmp_path / "embeddings").glob("*.safetensors"))
    evaluate(pipe, [FILTER], FEW, tmp_path, judge=ByteJudge())
    assert len(words_of(tmp_path)) == 3


# --- refusals, before anything is drawn


def protocol_of_one_s_own(**more: Any) -> EvaluationProtocol:
    cells = [Cell("a cat", 10_000, "", ("Cats",), "grid")]
    cells.append(Cell(f"a cat {WORD}", 10_001, "", ("Cats",), LEARNED, learned="Van_Gogh"))
    return EvaluationProtocol({"Van_Gogh": cells}, **more)


@pytest.mark.parametrize(("lessons", "steps"), [(False, 2), (True, 0)])
def test_cells_without_lessons_or_steps_are_refused(pipe: Any, tmp_path: Path, lessons: bool, steps: int):
    full = canvas_protocol(["Van_Gogh"], FEW)
    own = protocol_of_one_s_own(start_images=full.start_images, lessons=full.lessons if lessons else {})
    judge = ByteJudge()
    with pytest.raises(SettingsError, match=r"need embeddings of 'Van_Gogh'.*lessons.*embedding_steps above 0"):
        evaluate(pipe, [FILTER], replace(FEW, embedding_steps=steps), tmp_path, judge=judge, protocol=own)
    assert judge.calls == 0


def test_lessons_without_renders_are_refused(pipe: Any, tmp_path: Path):
    own, judge = protocol_of_one_s_own(lessons=canvas_protocol(["Van_Gogh"], FEW).lessons), ByteJudge()
    with pytest.raises(SettingsError, match="need start_images: give the protocol that function"):
        evaluate(pipe, [FILTER], FEW, tmp_path, judge=judge, protocol=own)
    assert judge.calls == 0


def test_a_pipeline_of_several_text_encoders_is_refused(tmp_path: Path):
    judge = ByteJudge()
    with pytest.raises(SettingsError, match="has several text encoders or none"):
        evaluate(
            pipelines.stable_diffusion_xl(), [FILTER], FEW, tmp_path, judge=judge,
            protocol=canvas_protocol(["Van_Gogh"], FEW),
        )  # fmt: skip
    assert judge.calls == 0


# --- figures by hand


def test_their_figures_are_in_every_form_of_the_report():
    shown, gone = (["Van_Gogh"], ["Cats"]), (["Mosaic"], ["Cats"])
    name, rows = "eraser/Van_Gogh/k", []
    for number, (before, after) in enumerate([(shown, shown), (shown, gone), (shown, gone), (gone, gone)]):
        more: dict[str, Any] = {"group": LEARNED, "route": LEARNED}
        rows.append(replace(row(("", ["Cats"]), before, number), watched=[name], fired=[name] * (number < 3), **more))
        rows.append(replace(row(("", ["Cats"]), after, number, ("Van_Gogh", "style")), **more))
    rows += [row(("Mosaic", ["Cats"]), gone, 50), row(("Mosaic", ["Cats"]), gone, 50, ("Van_Gogh", "style"))]
    (e,) = measure(table(rows)).erasures
    (route,) = e.route_figures
    assert {k: f and (f.value, f.n) for k, f in route.figures.items()} == {
        "shown_base": (0.75, 4), "shown_after": (0.25, 4), "acted": (1, 4), "ceiling": None,
    }  # fmt: skip
    entry = ErasureReport("eraser", "Van_Gogh", "style", e.figures, route_figures=e.route_figures)
    report = Report(base={}, judge={}, erasures=[entry])
    (found,) = json.loads(json.dumps(report.to_dict()))["concepts"][0]["route_figures"]
    assert (found["group"], found["strength"], found["shown_base"], found["ceiling"]) == (LEARNED, 0, 0.75, None)
    line = next(x for x in terminal_tables(report).splitlines() if LEARNED in x)
    assert [w for w in line.split() if "-" not in w or w == "-"] == [
        "learned", "embeddings", "0.75", "n=4", "-", "0.25", "n=4", "1.00", "n=4",
    ]  # fmt: skip
    html = page(report).partition("<h3>Routes</h3>")[2]
    assert f"eraser: {LEARNED}" in html and "<td>-</td>" in html.partition(LEARNED)[2].partition("</tr>")[0]
