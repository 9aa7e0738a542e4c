"""The table: what it refuses, how its parts are kept on disk, and that other readers know them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from helpers.result_tables import JUDGE, row, style_story, table
from neuraleraser.errors import DataError, FileError
from neuraleraser.evaluation.results import BASE, VERSION, Key, Results, Row, concat, load_part
from neuraleraser.judges import JudgeSpec

PLAIN = row(("Mosaic", ["Cats"]), (["Mosaic"], ["Cats"]), 0)


def base_of(results: Results) -> Results:
    return results.where(results.method == BASE)


def test_a_part_comes_back_from_disk_as_it_was(tmp_path: Path):
    odd = dataclasses.replace(PLAIN, prompt="ünï \n'\"", seed=-(2**62), cell_objects=("Cats", "Dogs"), cell_style="")
    erased = style_story().where(style_story().method == "eraser")
    for number, part in enumerate((base_of(style_story()), table([odd]), erased)):
        path = part.save_part(tmp_path / "deep", number)
        back = load_part(path, JUDGE, str(part.method[0]), str(part.concept[0]))
        assert back.table.equals(part.table) and len(back) == len(part)
        assert not [name for name in os.listdir(path.parent) if not name.startswith("part-")]


def test_other_readers_know_the_folder(tmp_path: Path):
    whole = concat([style_story(), table([row(("", []), ([], []), 50, ("Cats", "object"), method="a b/c")])])
    whole.where(whole.method == BASE).save_part(tmp_path, 0)
    whole.where(whole.method == "eraser").save_part(tmp_path, 0)
    whole.where(whole.method == "a b/c").save_part(tmp_path, 0)
    read = pyarrow.dataset.dataset(tmp_path, partitioning="hive").to_table()
    assert read.num_rows == len(whole)
    assert set(read["method"].to_pylist()) == {BASE, "eraser", "a b/c"}
    assert set(read["concept"].to_pylist()) == {None, "Van_Gogh", "Cats"}
    ours = dict(zip(whole.keys(), whole.table["p_style"].to_pylist(), strict=True))
    names = ("method", "concept", "prompt", "seed", "group")
    for line in read.to_pylist():
        assert ours[Key(*(line[n] or "" if n == "concept" else line[n] for n in names))] == line["p_style"]


def test_columns_have_their_types():
    v = style_story()
    assert (v.p_style.shape, v.p_style.dtype) == ((20, 3), np.float32)
    assert (v.seed.dtype, v.artefact.dtype, v.identical.dtype) == (np.int64, np.float32, np.bool_)
    assert v.cell_objects[0] == ("Cats",) and v.cell_style[0] == "Van_Gogh"


def test_where_takes_masks_and_row_numbers():
    v = style_story()
    assert len(base_of(v)) == 10
    assert v.where(np.array([3, 1])).seed.tolist() == [3, 1]
    assert len(v.where(np.zeros(20, bool))) == 0


def test_columns_can_be_replaced_as_a_whole():
    v = base_of(style_story()).with_columns(method="none", concept="Cats", kind="object", watched=["x"], seconds=0.0)
    assert set(v.method) == {"none"} and v.table["watched"].to_pylist() == [["x"]] * 10
    assert v.lists_name("watched", ["x"] * 10).all() and not v.lists_name("fired", ["x"] * 10).any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"p_style": [0.5, 0.5]}, "row 0 has p_style = .*: expected 3 probabilities"),
        ({"p_style": [0.5, float("nan"), 0]}, "p_style.*0..1"),
        ({"p_style": [0.5, None, 0]}, "p_style"),
        ({"p_object": [0.5, 1.5, 0]}, "p_object.*0..1"),
        ({"p_object": ["a", "b", "c"]}, "do not hold"),
        ({"artefact": float("inf")}, "artefact = inf"),
        ({"artefact": None}, "artefact = None"),
        ({"seconds": -1.0}, "seconds"),
        ({"seed": 2**70}, "do not hold"),
        ({"seed": "seven"}, "do not hold"),
        ({"seed": None}, "seed = None"),
        ({"cell_objects": ["Cats", "Cats"]}, "distinct"),
        ({"kind": "colour"}, "kind = 'colour'"),
        ({"method": ""}, "method"),
        ({"method": "eraser"}, "a concept and its kind"),
        ({"concept": "Van_Gogh"}, "concept = 'Van_Gogh'"),
        ({"prompt": 7}, "do not hold"),
        ({"compared": "yes"}, "do not hold"),
    ],
)
def test_a_bad_row_is_refused_by_name(change, says):
    with pytest.raises(DataError, match=says):
        table([dataclasses.replace(PLAIN, **change)])


def test_bad_tables_are_refused():
    with pytest.raises(DataError, match="second one"):
        table([PLAIN, PLAIN])
    with pytest.raises(DataError, match="second one"):
        concat([table([PLAIN])] * 2)
    with pytest.raises(DataError, match="other classes or thresholds"):
        concat([table([PLAIN]), table([], dataclasses.replace(JUDGE, artefact_threshold=11.0))])
    with pytest.raises(DataError, match="no tables"):
        concat([])
    blind = dataclasses.replace(JUDGE, artefact_threshold=None)
    with pytest.raises(DataError, match=r"artefact = 1\.0: expected None"):
        table([PLAIN], blind)
    assert np.isnan(table([dataclasses.replace(PLAIN, artefact=None)], blind).artefact).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"styles": (), "objects": (), "thresholds": {}}, "at least one"),
        ({"styles": ("a", "a")}, "none twice"),
        ({"styles": ("", "b")}, "none empty"),
        ({"styles": ("Cats",)}, "none twice"),
        ({"thresholds": {"Cats": 0.5}}, "differ in"),
        ({"thresholds": {**JUDGE.thresholds, "Monet": 0.5}}, r"differ in \['Monet'\]"),
        ({"thresholds": {**JUDGE.thresholds, "Cats": float("nan")}}, "out of range"),
        ({"thresholds": {**JUDGE.thresholds, "Cats": 1.0}}, "out of range"),
        ({"artefact_threshold": float("inf")}, "artefact threshold is inf"),
        ({"artefact_threshold": 0.0}, "artefact threshold is 0.0"),
    ],
)
def test_a_judge_that_cannot_be_read_is_refused(change, says):
    with pytest.raises(DataError, match=says):
        dataclasses.replace(JUDGE, **change)


def rewritten(folder: Path, change) -> Path:
    """Save a good part, then let `change` make another pyarrow table of it."""
    path = table([PLAIN]).save_part(folder, 0)
    pq.write_table(change(pq.ParquetFile(path).read()), path)
    return path


def with_head(**values):
    def change(t: pa.Table) -> pa.Table:
        head = json.loads(t.schema.metadata[b"neuraleraser"]) | values
        return t.replace_schema_metadata({b"neuraleraser": json.dumps(head).encode()})

    return change


def with_column(name: str, values: pa.Array):
    return lambda t: t.set_column(t.schema.get_field_index(name), name, values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.replace_schema_metadata({}), "not of results"),
        (lambda t: t.replace_schema_metadata({b"neuraleraser": b"[" * 100_000}), "results"),
        (lambda t: t.replace_schema_metadata({b"neuraleraser": b"[1]"}), "not of results"),
        (with_head(kind="eraser"), "not of results"),
        (with_head(version=VERSION + 1), f"version {VERSION + 1}, newer than {VERSION}"),
        (with_head(judge="abc"), "other classes or thresholds"),
        (lambda t: t.drop_columns(["artefact"]), "columns"),
        (with_column("seed", pa.array(["x"])), "seed: string"),
        (with_column("prompt", pa.array([None], pa.string())), "prompt = None"),
        (with_column("cell_objects", pa.array([[None]], pa.list_(pa.string()))), "cell_objects"),
        (with_column("p_style", pa.array([[0.1, np.nan, 0.2]], pa.list_(pa.float32()))), "p_style"),
        (lambda t: pa.concat_tables([t, t]), "second one"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path: Path, change, says):
    path = rewritten(tmp_path, change)
    with pytest.raises(FileError, match=says):
        load_part(path, JUDGE, BASE, "")


def test_a_damaged_file_is_refused(tmp_path: Path):
    part = base_of(style_story())
    path = part.save_part(tmp_path, 0)
    with pytest.raises(FileError):
        load_part(tmp_path / "none.parquet", JUDGE, BASE, "")
    with pytest.raises(FileError, match="other classes"):
        load_part(path, JudgeSpec(("a",), (), {"a": 0.5}, 10.0), BASE, "")
    whole = path.read_bytes()
    for end in (0, 3, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(FileError, match="results"):
            load_part(path, JUDGE, BASE, "")
    rng, refused = np.random.default_rng(0), 0
    for _ in range(120):  # any changed byte: refused as a FileError, or without effect
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            assert load_part(path, JUDGE, BASE, "").table.equals(part.table)
        except FileError:
            refused += 1
    assert refused > 60


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch, failure, step):
    path = table([PLAIN]).save_part(tmp_path, 0)
    before = path.read_bytes()

    def fail(*_):
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(FileError if isinstance(failure, OSError) else KeyboardInterrupt, match=r"No space left|^$"):
        base_of(style_story()).save_part(tmp_path, 0)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_row_is_what_the_writer_needs_to_give():
    needed = {f.name for f in dataclasses.fields(Row) if f.default is dataclasses.MISSING}
    assert needed == {"method", "prompt", "seed", "p_style", "p_object"}
