"""Results: one row per image, the table that every metric is a pure function of.

In memory a typed view of a `pyarrow.Table`; on disk partitioned Parquet, appended one small file a batch:

    results/method=neuraleraser/concept=Van_Gogh/part-00000.parquet

A file holds all columns but the two of its path, with page checksums, and the judge's classes and thresholds in its
metadata, so that any Parquet reader that knows Hive partitions reads the whole folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from neuraleraser.errors import DataError, FileError
from neuraleraser.io.atomic import write_bytes
from neuraleraser.io.dependencies import import_optional
from neuraleraser.judges import JudgeSpec

BASE = "base"
"""Method of the images of the pipeline itself: the twins of all others. Methods that can tell where they would act
watch while they are drawn, and change nothing."""
UNHOOKED = "base-unhooked"
"""Method of a sample of base images generated once more with nothing attached, to compare."""

ROW_KINDS = ("style", "object", "")
"""Kind of the concept that a row's method erases; "" in rows of the base."""
VERSION = 2
MAX_ROWS = 10_000_000
_META = b"neuraleraser"
_PARTITION = ("method", "concept")
_TEXT = ("method", "method_key", "concept", "kind", "group", "route", "prompt", "cell_style")
_LISTS = ("cell_objects", "watched", "fired", "start")


class Key(NamedTuple):
    """Identity of one image in a table."""

    method: str
    concept: str
    prompt: str
    seed: int
    group: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """One image: what was asked for, what was done, and what the judge read."""

    method: str
    """"base", or the name of a method."""
    concept: str = ""
    """Name of the erased concept; "" for base."""
    kind: str = ""
    """Domain of the erased concept, "style" or "object"; "" for base."""
    method_key: str = ""
    """Digest of everything that acts in the method; "" for base."""
    prompt: str
    seed: int
    group: str = ""
    """Group of cells that the image belongs to: see `protocol`."""
    route: str = ""
    """Route by which the concept enters: "named", "paraphrased", "fragments", "start image", "inpainting",
    "inverted latents", "learned embeddings", "attack"."""
    cell_style: str = ""
    """The style that the prompt asks for; "" if none."""
    cell_objects: Sequence[str] = ()
    """The objects that the prompt asks for."""
    p_style: Sequence[float] | np.ndarray
    """[styles] the judge's probability of each style, each in 0..1."""
    p_object: Sequence[float] | np.ndarray
    """[objects] the same for objects; multi-label, so they need not add up to 1."""
    artefact: float | None = None
    """Distance to the nearest class of real images in the judge's features; None from a judge that measures none."""
    watched: Sequence[str] = ()
    """Identities (`identity`) of the methods that noted where they act, or on a base image would act."""
    fired: Sequence[str] = ()
    """Those of `watched` that acted, or on a base image would act."""
    compared: bool = False
    """True if the image was drawn with the method applied and compared with its base twin bit for bit; False if it is
    the base's, because the method said that it would not act."""
    identical: bool = False
    """True if the image has the bits of its base twin."""
    start: Sequence[str] = ()
    """Names that the start image shows; none where there is no start image."""
    strength: float = 0.0
    """How much of the way back to noise the start image was taken; 0 where there is none."""
    seconds: float = 0.0
    """Sampling time of this image (its share of a batch); 0 where nothing was drawn."""


def identity(method: str, concept: str, key: str) -> str:
    """Return what `watched` and `fired` call a method."""
    return f"{method}/{concept}/{key}"


@dataclass(frozen=True, eq=False)
class Results:
    """The table and the judge that read it. Build one with `Results.of` or `load`, which check every value.

    Columns are those of `Row`; as numpy arrays they are attributes of this class (text as object arrays).
    """

    judge: JudgeSpec
    table: Any
    """pyarrow.Table"""

    @classmethod
    def of(cls, judge: JudgeSpec, rows: Iterable[Row] = ()) -> Results:
        """Return a table of these rows.

        Raises DataError for a row with the wrong number of probabilities, a value that is not in range, or a second
        row of one image.
        """
        pa, _ = _arrow()
        plain = [{f.name: getattr(row, f.name) for f in fields(Row)} for row in rows]
        try:
            return _validate(cls(judge, pa.Table.from_pylist(plain, schema=_schema(pa))))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"rows of results do not hold what their columns take ({error})") from error

    def __len__(self) -> int:
        return self.table.num_rows

    def where(self, rows: np.ndarray) -> Results:
        """Return the rows chosen by a boolean mask [n], or by row numbers in the order given."""
        rows = np.asarray(rows)
        numbers = np.flatnonzero(rows) if rows.dtype == bool else rows
        return replace(self, table=self.table.take(np.asarray(numbers, np.int64)))

    def with_columns(self, **values: Any) -> Results:
        """Return the table with columns replaced: one value for all rows, or one per row."""
        pa, _ = _arrow()
        table = self.table
        for name, value in values.items():
            field = table.schema.field(name)
            column = value if isinstance(value, pa.ChunkedArray) else pa.array([value] * len(self), field.type)
            table = table.set_column(table.schema.get_field_index(name), field, column)
        return replace(self, table=table)

    def keys(self) -> list[Key]:
        """Return the key of each row, in row order."""
        return [Key(*row) for row in zip(*(self.table[name].to_pylist() for name in Key._fields), strict=True)]

    def save_part(self, folder: Path, number: int) -> Path:
        """Write these rows, all of one method and concept, as a part of the results in `folder`; returns its path.

        Raises FileError if the system refuses.
        """
        pa, pq = _arrow()
        sink = pa.BufferOutputStream()
        head = {"kind": "results", "version": VERSION, "judge": asdict(self.judge)}
        table = self.table.drop_columns(list(_PARTITION)).replace_schema_metadata({_META: json.dumps(head).encode()})
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        path = part_folder(folder, *self.keys()[0][:2]) / f"part-{number:05d}.parquet"
        write_bytes(path, sink.getvalue().to_pybytes())
        return path

    # --- columns as numpy arrays [n]

    @cached_property
    def method(self) -> np.ndarray:
        """Names of the methods: object [n]."""
        return self._objects("method")

    @cached_property
    def concept(self) -> np.ndarray:
        """Concepts that were erased, "" for the base: object [n]."""
        return self._objects("concept")

    @cached_property
    def kind(self) -> np.ndarray:
        """Kinds of these concepts, "" for the base: object [n]."""
        return self._objects("kind")

    @cached_property
    def group(self) -> np.ndarray:
        """Groups of the cells: object [n]."""
        return self._objects("group")

    @cached_property
    def prompt(self) -> np.ndarray:
        """Prompts: object [n]."""
        return self._objects("prompt")

    @cached_property
    def seed(self) -> np.ndarray:
        """Seeds: int64 [n]."""
        return self.table["seed"].to_numpy()

    @cached_property
    def cell_style(self) -> np.ndarray:
        """Styles that the prompts ask for: object [n]."""
        return self._objects("cell_style")

    @cached_property
    def cell_objects(self) -> list[tuple[str, ...]]:
        """Objects that the prompts ask for."""
        return [tuple(names) for names in self.table["cell_objects"].to_pylist()]

    @cached_property
    def start(self) -> list[tuple[str, ...]]:
        """Names that the start images show."""
        return [tuple(names) for names in self.table["start"].to_pylist()]

    @cached_property
    def strength(self) -> np.ndarray:
        """Strengths at which start images were taken, 0 without one: float64 [n]."""
        return self.table["strength"].to_numpy()

    @cached_property
    def p_style(self) -> np.ndarray:
        """[n, styles] float32"""
        return self._matrix("p_style", len(self.judge.styles))

    @cached_property
    def p_object(self) -> np.ndarray:
        """[n, objects] float32"""
        return self._matrix("p_object", len(self.judge.objects))

    @cached_property
    def artefact(self) -> np.ndarray:
        """float32, NaN from a judge that measures none"""
        return self.table["artefact"].to_numpy(zero_copy_only=False).astype(np.float32)

    @cached_property
    def compared(self) -> np.ndarray:
        """Tells which images were compared with the base: bool [n]."""
        return self.table["compared"].to_numpy(zero_copy_only=False)

    @cached_property
    def identical(self) -> np.ndarray:
        """Tells which images have the bits of the base: bool [n]."""
        return self.table["identical"].to_numpy(zero_copy_only=False)

    def lists_name(self, column: str, names: Sequence[str]) -> np.ndarray:
        """Tell for each row whether its list `column` holds its own one of `names` [n]: bool [n]."""
        return np.array([n in some for n, some in zip(names, self.table[column].to_pylist(), strict=True)], dtype=bool)

    def identities(self) -> list[str]:
        """Return the identity of each row's method."""
        columns = (self.table[name].to_pylist() for name in ("method", "concept", "method_key"))
        return [identity(*row) for row in zip(*columns, strict=True)]

    def _objects(self, name: str) -> np.ndarray:
        return np.array(self.table[name].to_pylist(), dtype=object)

    def _matrix(self, name: str, width: int) -> np.ndarray:
        return np.asarray(_arrow_compute().list_flatten(self.table[name]).to_numpy(), np.float32).reshape(
            len(self), width
        )


def concat(tables: Sequence[Results]) -> Results:
    """Return one table of all rows, in order.

    Raises DataError for no table, tables of judges with other classes or thresholds, or an image in two of them.
    """
    pa, _ = _arrow()
    if not tables:
        raise DataError("no tables were given: pass at least one")
    for number, table in enumerate(tables):
        if table.judge != tables[0].judge:
            raise DataError(
                f"table {number} was read by a judge with other classes or thresholds than table 0: results of "
                "different judges do not go in one table"
            )
    return _validate(replace(tables[0], table=pa.concat_tables([t.table for t in tables])))


def part_folder(folder: Path, method: str, concept: str) -> Path:
    """Return where the parts of a method and concept lie below `folder`."""
    concept = quote(concept, safe="") if concept else "__HIVE_DEFAULT_PARTITION__"
    return folder / f"method={quote(method, safe='')}" / f"concept={concept}"


def load_part(path: Path, judge: JudgeSpec, method: str, concept: str) -> Results:
    """Read one part of a method and concept.

    Raises FileError for a file that is missing, damaged or cut short, not of results, of a newer version, of another
    judge, or with values that no table may have.
    """
    pa, pq = _arrow()
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_head(path, file.schema_arrow.metadata or {}, judge)
            if file.metadata.num_rows > MAX_ROWS:
                raise FileError(f"{path} claims {file.metadata.num_rows:,} rows: at most {MAX_ROWS:,} are read")
            table = file.read().replace_schema_metadata(None)
        schema = _schema(pa)
        for name, value in zip(_PARTITION, (method, concept), strict=True):
            column = pa.array([value] * table.num_rows, pa.string())
            table = table.add_column(schema.get_field_index(name), schema.field(name), column)
        if table.schema != schema:
            found = [f"{field.name}: {field.type}" for field in table.schema]
            raise FileError(f"{path} has the columns {found}: expected those of results of version {VERSION}")
        return _validate(Results(judge, table))
    except (pa.ArrowException, OSError, DataError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise FileError(f"{path} is not a whole part of results ({reason}): delete it and evaluate again") from error


def _check_head(path: Path, metadata: Mapping[bytes, bytes], judge: JudgeSpec) -> None:
    """Raise FileError unless a file holds results of this version, read by this judge."""
    try:
        head = json.loads(metadata.get(_META, b"{}"))
        kind, version = (head.get("kind"), head.get("version")) if isinstance(head, dict) else (None, None)
    except (ValueError, RecursionError):
        head, kind, version = {}, None, None
    if kind != "results" or not isinstance(version, int):
        raise FileError(f"{path} is a Parquet file, but not of results: pass one that `evaluate` wrote")
    if version > VERSION:
        raise FileError(f"{path} holds results of version {version}, newer than {VERSION}: update neuraleraser")
    if head.get("judge") != json.loads(json.dumps(asdict(judge))):
        raise FileError(f"{path} was read by a judge with other classes or thresholds: pass another folder")


def _arrow() -> tuple[Any, Any]:
    """Return pyarrow and its Parquet module, imported only where results are made or read."""
    parquet = import_optional("pyarrow.parquet", "a measurement, whose results are Parquet files,", "evaluate")
    return import_module("pyarrow"), parquet


def _arrow_compute() -> Any:
    import pyarrow.compute

    return pyarrow.compute


def _schema(pa: Any) -> Any:
    types = dict.fromkeys(_TEXT, pa.string()) | dict.fromkeys(_LISTS, pa.list_(pa.string()))
    types |= dict.fromkeys(("p_style", "p_object"), pa.list_(pa.float32()))
    types |= {"seed": pa.int64(), "strength": pa.float64(), "artefact": pa.float32(), "seconds": pa.float32()}
    types |= {"compared": pa.bool_(), "identical": pa.bool_()}
    return pa.schema([(f.name, types[f.name]) for f in fields(Row)])


def _validate(results: Results) -> Results:
    """Return `results` itself, once every value is one that a metric can count."""
    pc, table, judge = _arrow_compute(), results.table, results.judge

    def refuse(bad: np.ndarray, column: str, expected: str) -> None:
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            raise DataError(f"row {row} has {column} = {table[column][row].as_py()!r}: expected {expected}")

    for name in table.column_names:
        column = table[name]
        if name != "artefact":
            refuse(column.is_null().to_numpy(zero_copy_only=False), name, "a value")
        if name in (*_LISTS, "p_style", "p_object") and pc.list_flatten(column).null_count:
            raise DataError(f"column {name} holds a list with nothing in it")
    method, concept, kind = results.method, results.concept, results.kind
    is_base = np.isin(method, (BASE, UNHOOKED))
    refuse(method == "", "method", "a name")
    refuse(~np.isin(kind, ROW_KINDS), "kind", f"one of {ROW_KINDS}")
    refuse(~is_base & ((concept == "") | (kind == "")), "method", f"{BASE!r}, or a concept and its kind beside it")
    refuse(is_base & (concept != ""), "concept", "'' for the base")
    refuse(
        np.array([len(set(o)) != len(o) for o in results.cell_objects], dtype=bool), "cell_objects", "distinct names"
    )
    for name, classes in (("p_style", judge.styles), ("p_object", judge.objects)):
        lengths = pc.list_value_length(table[name]).to_numpy()
        refuse(lengths != len(classes), name, f"{len(classes)} probabilities, one a class")
        values = results._matrix(name, len(classes))
        refuse(np.any(~((values >= 0) & (values <= 1)), axis=1), name, "probabilities in 0..1")
    lacking = table["artefact"].is_null().to_numpy(zero_copy_only=False)
    if judge.artefact_threshold is None:
        refuse(~lacking, "artefact", "None from a judge that measures no artefacts")
    else:
        refuse(~np.isfinite(results.artefact), "artefact", "a finite distance")
    refuse(~((results.strength >= 0) & (results.strength <= 1)), "strength", "a number in 0..1")
    seconds = table["seconds"].to_numpy()
    refuse(~(np.isfinite(seconds) & (seconds >= 0)), "seconds", "a time that is not negative")
    seen: set[Key] = set()
    for row, key in enumerate(results.keys()):
        if key in seen:
            raise DataError(f"row {row} is the second one of {key}: expected one row per image")
        seen.add(key)
    return results
