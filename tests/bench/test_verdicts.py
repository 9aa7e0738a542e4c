"""The table: what it refuses, how it is kept on disk, and that a killed run goes on from it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tables import OBJECTS, STYLES, row, style_story, table

from neuraleraser.bench.verdicts import BASE, VERSION, Key, Verdict, Verdicts, concat
from neuraleraser.errors import DataError, FileError

PLAIN = row(("Mosaic", ["Cats"]), (["Mosaic"], ["Cats"]), 0)


def same(one: Verdicts, two: Verdicts) -> bool:
    return all(
        np.array_equal(a, b) and getattr(a, "dtype", None) == getattr(b, "dtype", None)
        for a, b in ((getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(Verdicts))
    )


def test_a_table_comes_back_from_disk_as_it_was(tmp_path: Path):
    whole = style_story()
    odd = dataclasses.replace(PLAIN, prompt="ünï \n'\"", seed=-(2**62), cell_objects=("Cats", "Dogs"), cell_style="")
    for v in (whole, table([]), table([odd])):
        v.save(tmp_path / "deep" / "verdicts.parquet")
        assert same(Verdicts.load(tmp_path / "deep" / "verdicts.parquet"), v)
    assert os.listdir(tmp_path / "deep") == ["verdicts.parquet"]


def test_columns_have_their_types():
    v = style_story()
    assert (v.p_style.shape, v.p_style.dtype) == ((20, 3), np.float32)
    assert (v.seed.dtype, v.artefact.dtype, v.fired.dtype) == (np.int64, np.float32, np.bool_)
    assert v.cell_objects[0] == ("Cats",)


def test_a_killed_run_goes_on_and_ends_in_the_same_table(tmp_path: Path):
    rows = [row(("Mosaic", ["Cats"]), (["Mosaic"], ["Cats"]), i) for i in range(7)]
    keys = table(rows).keys()
    path = tmp_path / "verdicts.parquet"
    v = table(rows[:3])
    v.save(path)  # and here it was killed
    v = Verdicts.load(path)
    assert v.done(keys).tolist() == [True] * 3 + [False] * 4
    for r, there in zip(rows, v.done(keys), strict=True):
        v = v if there else v.append([r])
    v.save(path)
    assert same(Verdicts.load(path), table(rows))
    assert v.done([Key(BASE, "", "prompt 1", 1, "other group"), ("", "", "", 0, "")]).tolist() == [
        False,
        False,
    ]
    assert v.done([]).shape == (0,)


def test_where_takes_masks_and_row_numbers():
    v = style_story()
    assert len(v.where(v.method == BASE)) == 10
    assert v.where(np.array([3, 1])).seed.tolist() == [3, 1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"p_style": [0.5, 0.5]}, r"p_style of shape \(2,\)"),
        ({"p_style": [0.5, float("nan"), 0]}, "p_style.*0..1"),
        ({"p_object": [0.5, 1.5, 0]}, "p_object.*0..1"),
        ({"p_object": ["a", "b", "c"]}, "p_object"),
        ({"artefact": float("inf")}, "artefact = inf"),
        ({"seconds": -1.0}, "seconds"),
        ({"seed": 2**70}, "seed"),
        ({"seed": "seven"}, "seed"),
        ({"cell_style": "Monet"}, "cell_style = 'Monet'"),
        ({"cell_objects": ["Cats", "Frogs"]}, "Frogs"),
        ({"cell_objects": ["Cats", "Cats"]}, "distinct"),
        ({"kind": "colour"}, "kind = 'colour'"),
        ({"method": ""}, "method"),
        ({"method": "eraser"}, "concept and its kind"),
        ({"concept": "Van_Gogh"}, "concept = 'Van_Gogh'"),
        ({"prompt": 7}, "prompt = 7"),
    ],
)
def test_a_bad_row_is_refused_by_name(change, says):
    with pytest.raises(DataError, match=says):
        table([dataclasses.replace(PLAIN, **change)])


def test_bad_tables_are_refused():
    with pytest.raises(DataError, match="second verdict"):
        table([PLAIN, PLAIN])
    with pytest.raises(DataError, match="second verdict"):
        table([PLAIN]).append([PLAIN])
    with pytest.raises(DataError, match="Row 0 has p_style of shape"):
        Verdicts.of((*STYLES, "Monet"), OBJECTS, [PLAIN])
    with pytest.raises(DataError, match="other class names"):
        concat([table([PLAIN]), Verdicts.of(STYLES[::-1], OBJECTS)])
    with pytest.raises(DataError, match="no tables"):
        concat([])
    for styles in ((), ("a", "a"), ("",), ("Cats",)):
        with pytest.raises(DataError, match="class names"):
            Verdicts.of(styles, OBJECTS)


def rewritten(path: Path, change) -> None:
    """Save a good table, then let `change` make another pyarrow table of it."""
    table([PLAIN]).save(path)
    pq.write_table(change(pq.read_table(path)), path)


def with_head(**values):
    def change(t: pa.Table) -> pa.Table:
        head = json.loads(t.schema.metadata[b"neuraleraser"]) | values
        return t.replace_schema_metadata({b"neuraleraser": json.dumps(head).encode()})

    return change


def with_column(name: str, values: pa.Array):
    return lambda t: t.set_column(t.schema.get_field_index(name), name, values)


P = pa.FixedSizeListArray.from_arrays(pa.array([0.1, np.nan, 0.2], pa.float32()), 3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.replace_schema_metadata({}), "not of verdicts"),
        (lambda t: t.replace_schema_metadata({b"neuraleraser": b"[" * 100_000}), "verdicts"),
        (lambda t: t.replace_schema_metadata({b"neuraleraser": b"[1]"}), "not of verdicts"),
        (with_head(kind="eraser"), "not of verdicts"),
        (with_head(version=VERSION + 1), f"version {VERSION + 1}, newer than {VERSION}"),
        (with_head(styles="abc"), "does not name its styles"),
        (with_head(styles=["a", "b"]), "columns"),
        (with_head(objects=["a", "b", "c"]), "cell_objects"),
        (lambda t: t.drop_columns(["artefact"]), "columns"),
        (with_column("seed", pa.array(["x"])), "seed: string"),
        (with_column("prompt", pa.array([None], pa.string())), "hold nothing"),
        (with_column("cell_objects", pa.array([[None]], pa.list_(pa.string()))), "cell_objects"),
        (with_column("p_style", P), "p_style"),
        (lambda t: pa.concat_tables([t, t]), "second verdict"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path: Path, change, says):
    path = tmp_path / "verdicts.parquet"
    rewritten(path, change)
    with pytest.raises(FileError, match=says):
        Verdicts.load(path)


def test_a_damaged_file_is_refused(tmp_path: Path):
    path = tmp_path / "verdicts.parquet"
    with pytest.raises(FileError, match="no verdicts file"):
        Verdicts.load(path)
    with pytest.raises(FileError, match="no verdicts file"):
        Verdicts.load(tmp_path)
    style_story().save(path)
    whole = path.read_bytes()
    for end in (0, 3, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(FileError, match="verdicts"):
            Verdicts.load(path)
    rng = np.random.default_rng(0)
    for _ in range(60):  # any flipped byte: refused as a FileError, or harmless
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            Verdicts.load(path)
        except FileError:
            pass


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch, failure, step):
    path = tmp_path / "verdicts.parquet"
    table([PLAIN]).save(path)
    before = path.read_bytes()

    def fail(*_):
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(FileError if isinstance(failure, OSError) else KeyboardInterrupt, match=r"No space left|^$"):
        style_story().save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_row_is_what_the_writer_needs_to_give():
    needed = {f.name for f in dataclasses.fields(Verdict) if f.default is dataclasses.MISSING}
    assert needed == {"method", "prompt", "seed", "p_style", "p_object", "artefact"}
