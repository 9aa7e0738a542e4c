"""Verdicts: one row an image. Every metric is a pure function of this table, and it is the unit of resuming.

table = Verdicts.of(styles, objects)
todo = [key for key, there in zip(keys, table.done(keys)) if not there]
table = table.append(rows_of(todo))
table.save("verdicts.parquet")
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neuraleraser.bench.files import write_bytes
from neuraleraser.errors import DataError, FileError

BASE = "base"
"""The method of images made without any eraser or rival: the twins of all others."""

KINDS = ("style", "object", "")
VERSION = 1
MAX_ROWS = 10_000_000
_META = b"neuraleraser"
_TEXT = ("method", "concept", "kind", "prompt", "prompt_group", "cell_style")
_SCALARS = {
    "seed": np.int64,
    "artefact": np.float32,
    "fired": np.bool_,
    "identical": np.bool_,
    "seconds": np.float32,
}


class Key(NamedTuple):
    """What tells one image from all others in a table."""

    method: str
    concept: str
    prompt: str
    seed: int
    prompt_group: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Verdict:
    """One row: what was asked for, and what the judge saw."""

    method: str
    """"base", "eraser", "none", "oracle" or a rival's name."""
    concept: str = ""
    """Name of the erased concept; "" for base."""
    kind: str = ""
    """Domain of the erased concept, "style" or "object"; "" for base."""
    prompt: str
    prompt_group: str = ""
    """Such as "seen phrasing", "held-out phrasing", "image-to-image"."""
    seed: int
    cell_style: str = ""
    """The style that the prompt asks for; "" if none."""
    cell_objects: Sequence[str] = ()
    """The objects that the prompt asks for."""
    p_style: Sequence[float] | np.ndarray
    """[styles] the judge's probability of each style, each in 0..1."""
    p_object: Sequence[float] | np.ndarray
    """[objects] the same for objects; multi-label, so they need not add up to 1."""
    artefact: float
    """Mahalanobis distance to the nearest real class in the judge's features."""
    fired: bool = False
    """Whether any feature of the eraser fired."""
    identical: bool = False
    """Whether the image has the same bits as its base twin."""
    seconds: float = 0.0
    """Sampling time of this image (its share of a batch)."""


@dataclass(frozen=True, eq=False)
class Verdicts:
    """The table: equally long columns (numpy arrays), row i of each belongs to image i.

    Text columns are object arrays of `str`, `cell_objects` an object array of tuples of `str`; `p_style` is
    [n, len(styles)] float32, `p_object` [n, len(objects)] float32. Build one with `Verdicts.of` or
    `Verdicts.load`, which check every value; treat the columns as read-only.
    """

    styles: tuple[str, ...]
    objects: tuple[str, ...]
    method: np.ndarray
    concept: np.ndarray
    kind: np.ndarray
    prompt: np.ndarray
    prompt_group: np.ndarray
    seed: np.ndarray
    cell_style: np.ndarray
    cell_objects: np.ndarray
    p_style: np.ndarray
    p_object: np.ndarray
    artefact: np.ndarray
    fired: np.ndarray
    identical: np.ndarray
    seconds: np.ndarray

    @classmethod
    def of(cls, styles: Sequence[str], objects: Sequence[str], rows: Iterable[Verdict] = ()) -> Verdicts:
        """A table over these class names with these rows.

        Raises:
            DataError: class names that are empty or repeated; a row with a label outside them, with the wrong
                number of probabilities, with a number that is not finite or not in range, or standing there
                twice.
        """
        rows = list(rows)
        columns: dict[str, Any] = {name: _objects([getattr(row, name) for row in rows]) for name in _TEXT}
        columns["cell_objects"] = _objects([tuple(row.cell_objects) for row in rows])
        for name, names in (("p_style", styles), ("p_object", objects)):
            columns[name] = _probabilities([getattr(row, name) for row in rows], name, len(names))
        try:
            for name, dtype in _SCALARS.items():
                columns[name] = np.array([getattr(row, name) for row in rows], dtype=dtype).reshape(len(rows))
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"Column {name!r} does not hold one {np.dtype(dtype)} a row: {error}.") from error
        return _checked(cls(styles=tuple(styles), objects=tuple(objects), **columns))

    def __len__(self) -> int:
        return len(self.seed)

    def append(self, rows: Iterable[Verdict]) -> Verdicts:
        """A new table: these rows after the present ones. Raises DataError as `of` does."""
        return concat([self, Verdicts.of(self.styles, self.objects, rows)])

    def where(self, rows: np.ndarray) -> Verdicts:
        """A new table of the rows chosen by a boolean mask [n], or by row numbers in the order given."""
        columns = {name: getattr(self, name)[rows] for name in _columns()}
        return Verdicts(styles=self.styles, objects=self.objects, **columns)

    def keys(self) -> list[Key]:
        """The key of each row, in row order."""
        parts = (self.method, self.concept, self.prompt, self.seed.tolist(), self.prompt_group)
        return [Key(*row) for row in zip(*parts, strict=True)]

    def done(self, keys: Iterable[Key]) -> np.ndarray:
        """For each of `keys`, whether its row is in the table: bool [len(keys)]."""
        here = set(self.keys())
        return np.array([tuple(key) in here for key in keys], dtype=bool)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a Parquet file atomically. Raises FileError if the system refuses."""
        pa, pq = _arrow()
        columns = [_to_arrow(pa, getattr(self, field.name), field.type) for field in _schema(pa, self)]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_arrays(columns, schema=_schema(pa, self)), sink, compression="zstd")
        write_bytes(path, sink.getvalue().to_pybytes())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Verdicts:
        """Read what `save` wrote.

        Raises:
            FileError: no such file, not Parquet, truncated, not verdicts, of a newer version, or with columns
                or values that no table may have.
        """
        pa, pq = _arrow()
        if not Path(path).is_file():
            raise FileError(f"There is no verdicts file at {str(path)!r}; `evaluate` writes one.")
        try:
            with pq.ParquetFile(path) as file:
                head = _header(path, file.schema_arrow.metadata or {})
                if file.metadata.num_rows > MAX_ROWS:
                    raise FileError(f"{str(path)!r} claims {file.metadata.num_rows:,} rows; at most {MAX_ROWS:,}.")
                table = file.read()
            empty = cls.of(head["styles"], head["objects"])
            if table.schema.remove_metadata() != _schema(pa, empty).remove_metadata():
                found = [f"{field.name}: {field.type}" for field in table.schema]
                raise FileError(
                    f"{str(path)!r} has the columns {found}; expected those of verdicts version {VERSION}: "
                    f"{_columns()}. Write it again with `evaluate`."
                )
            columns = {name: _from_arrow(table[name], getattr(empty, name)) for name in _columns()}
            return _checked(cls(styles=empty.styles, objects=empty.objects, **columns))
        except (pa.ArrowException, OSError, DataError, ValueError, TypeError) as error:
            reason = str(error).strip().rstrip(".") or type(error).__name__
            raise FileError(
                f"{str(path)!r} is not a readable verdicts file ({reason}); if it was cut short, "
                "delete it and run `evaluate` again."
            ) from error


def concat(tables: Sequence[Verdicts]) -> Verdicts:
    """One table of all rows, in order.

    Raises:
        DataError: no table, tables of judges with different class names, or an image that stands in two of
            them.
    """
    if not tables:
        raise DataError("concat() was given no tables; pass at least one.")
    first = tables[0]
    for number, table in enumerate(tables):
        if (table.styles, table.objects) != (first.styles, first.objects):
            raise DataError(
                f"Table {number} has other class names than table 0 ({len(table.styles)} styles and "
                f"{len(table.objects)} objects against {len(first.styles)} and {len(first.objects)}); "
                "verdicts of different judges do not go in one table."
            )
    columns = {name: np.concatenate([getattr(table, name) for table in tables]) for name in _columns()}
    return _checked(Verdicts(styles=first.styles, objects=first.objects, **columns))


def _columns() -> list[str]:
    return [field.name for field in fields(Verdicts)][2:]


def _objects(values: Sequence[Any]) -> np.ndarray:
    """A 1-d object array; np.array would turn equally long tuples into a matrix."""
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out


def _probabilities(rows: list[Any], name: str, width: int) -> np.ndarray:
    for number, row in enumerate(rows):
        if np.shape(row) != (width,):
            raise DataError(f"Row {number} has {name} of shape {np.shape(row)}; expected ({width},), one a class name.")
    try:
        return np.array(rows, dtype=np.float32).reshape(len(rows), width)
    except (TypeError, ValueError) as error:
        raise DataError(f"Column {name!r} does not hold numbers only: {error}.") from error


def _checked(table: Verdicts) -> Verdicts:
    """`table` itself, once every value is one that a metric can count."""
    for what, names in (("styles", table.styles), ("objects", table.objects)):
        if not names or "" in names or len(set(names)) != len(names):
            raise DataError(f"The class names of {what} are {list(names)}; expected at least one, none empty or twice.")
    if both := sorted(set(table.styles) & set(table.objects)):
        raise DataError(f"{both} are class names of styles and of objects; a cell could not tell them apart.")

    def refuse(bad: np.ndarray, column: str, expected: str) -> None:
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            value = getattr(table, column)[row]
            value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
            raise DataError(f"Row {row} has {column} = {value!r}; expected {expected}.")

    for name in _TEXT:
        refuse(np.array([not isinstance(value, str) for value in getattr(table, name)], dtype=bool), name, "text")
    refuse(~np.isin(table.kind, KINDS), "kind", f"one of {KINDS}")
    refuse(table.method == "", "method", "a name")
    refuse(
        (table.method != BASE) & ((table.concept == "") | (table.kind == "")),
        "method",
        f"{BASE!r}, or a concept and its kind beside it",
    )
    refuse((table.method == BASE) & (table.concept != ""), "concept", f"'' where the method is {BASE!r}")
    allowed = {"", *table.styles}
    refuse(
        np.array([style not in allowed for style in table.cell_style], dtype=bool),
        "cell_style",
        f"'' or one of {list(table.styles)}",
    )
    known = set(table.objects)
    wrong = [not known.issuperset(asked) or len(set(asked)) != len(asked) for asked in table.cell_objects]
    refuse(np.array(wrong, dtype=bool), "cell_objects", f"distinct names from {list(table.objects)}")
    for name in ("p_style", "p_object"):
        values = getattr(table, name)
        refuse(~((values >= 0) & (values <= 1)).all(axis=1), name, "probabilities in 0..1")
    refuse(~np.isfinite(table.artefact), "artefact", "a finite distance")
    refuse(~(np.isfinite(table.seconds) & (table.seconds >= 0)), "seconds", "a time that is not negative")
    seen: set[Key] = set()
    for row, key in enumerate(table.keys()):
        if key in seen:
            raise DataError(f"Row {row} is the second verdict on {key}; ask done() first, or leave one of them out.")
        seen.add(key)
    return table


def _arrow() -> tuple[Any, Any]:
    """pyarrow and its Parquet module, imported only where a file is read or written."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise FileError("Verdicts are Parquet files, which need pyarrow: pip install 'neuraleraser[bench]'.") from error
    return pyarrow, pyarrow.parquet


def _schema(pa: Any, table: Verdicts) -> Any:
    special = {
        "cell_objects": pa.list_(pa.string()),
        "p_style": pa.list_(pa.float32(), len(table.styles)),
        "p_object": pa.list_(pa.float32(), len(table.objects)),
    }
    types = {name: pa.string() for name in _TEXT} | special
    types |= {name: pa.from_numpy_dtype(np.dtype(dtype)) for name, dtype in _SCALARS.items()}
    head = {"kind": "verdicts", "version": VERSION, "styles": table.styles, "objects": table.objects}
    return pa.schema([(name, types[name]) for name in _columns()], metadata={_META: json.dumps(head).encode()})


def _to_arrow(pa: Any, column: np.ndarray, dtype: Any) -> Any:
    if column.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(column).reshape(-1)), type=dtype)
    return pa.array(column.tolist() if column.dtype == object else column, type=dtype)


def _from_arrow(column: Any, like: np.ndarray) -> np.ndarray:
    if column.null_count:
        raise DataError(f"{column.null_count} rows hold nothing in a column of type {column.type}")
    if like.ndim == 2:
        flat = np.concatenate(
            [np.asarray(chunk.flatten(), dtype=like.dtype) for chunk in column.chunks] or [like[0:0].reshape(-1)]
        )
        return flat.reshape(len(column), like.shape[1])
    if like.dtype != object:
        return column.to_numpy()
    values = column.to_pylist()
    return _objects([tuple(value) if isinstance(value, list) else value for value in values])


def _header(path: str | os.PathLike[str], metadata: dict[bytes, bytes]) -> dict[str, Any]:
    try:
        head = json.loads(metadata.get(_META, b"{}"))
        kind, version = (head.get("kind"), head.get("version")) if isinstance(head, dict) else (None, None)
    except (ValueError, RecursionError):
        head, kind, version = {}, None, None
    if kind != "verdicts" or not isinstance(version, int):
        raise FileError(f"{str(path)!r} is a Parquet file, but not of verdicts; pass one that `evaluate` wrote.")
    if version > VERSION:
        raise FileError(
            f"{str(path)!r} holds verdicts of version {version}, newer than {VERSION}: update neuraleraser."
        )
    for name in ("styles", "objects"):
        names = head.get(name)
        if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
            raise FileError(f"{str(path)!r} does not name its {name}; pass a file that `evaluate` wrote.")
    return head
