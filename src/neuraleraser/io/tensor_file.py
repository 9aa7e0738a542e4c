"""The one file format: safetensors with a kind, a format version and a JSON header. Nothing else in the
package reads or writes tensors on disk.

Inside the safetensors metadata lie three strings: `kind` ("eraser", "sae", ...), `version` (of this format)
and `header` (a JSON object). A file is treated as coming from a stranger: bounded, checked, refused in one
sentence; nothing in it is ever executed.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuraleraser.errors import DataError, FileError
from neuraleraser.io.atomic import replacing, write_error
from neuraleraser.io.names import printable
from neuraleraser.io.reading import open_regular, parse_json

VERSION = 1
MAX_HEADER = 16 * 2**20  # bytes; safetensors' own bound is 100 MB
MAX_BYTES = {"eraser": 2**26, "background": 2**32, "sae": 2**34, "judge": 2**28, "profile": 2**32}
"""Bytes of a file of a kind that strangers may have made, at most. The format allows no tensor more bytes than its file
has, so this bounds what is allocated, and it is checked before the file is mapped.

An eraser has kilobytes; the largest that `fit` makes (rank 32, three corrections 4,096 wide, ten time bins) has 16 MB,
and four times that is the bound. An SAE of 131,072 features on 4,096 dimensions has 4 GB in float32, again times four.
"""
MAX_OTHER_BYTES = 2**38
"""The bound of other kinds (activations, checkpoints), which are read where they were written."""
# What every torch can check for NaN; float8, float4 and complex are refused rather than half supported.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_RETRY_HINT = "fetch or make it again"


def save(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write `tensors` (up to 8 dimensions, any device, every number finite) and `header` (JSON) to `path`.

    `path` holds the old file or the new one, never half of one. Folders on the way are made. Raises DataError for
    what `load` would refuse, FileError when the disk does.
    """
    path = Path(path)
    try:
        text = json.dumps(dict(header), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise DataError(f"the header for {path} is not JSON ({e}): pass text, finite numbers, lists") from e
    for name, x in tensors.items():
        if name == "__metadata__":
            raise DataError(f"no tensor for {path} may be called {name!r}: the format keeps that name")
        if x.dtype not in _DTYPES.values() or x.layout != torch.strided or x.is_meta or x.ndim > 8:
            raise DataError(
                f"tensor {name!r} for {path} is {x.dtype}, {x.layout}, {x.ndim}-d on {x.device}: pass a "
                "dense bool, integer or 16- to 64-bit float tensor of at most 8 dimensions"
            )
        if not _finite(x):
            raise DataError(f"tensor {name!r} for {path} holds NaN or infinity, so it was not written")
    total, most = sum(x.numel() * x.element_size() for x in tensors.values()), _most(kind)
    if total + 2 * len(text) > most:
        raise DataError(f"{path} would hold {total:,} bytes of tensors: a file of kind {kind!r} has at most {most:,}")
    # Cloned, because safetensors takes neither strided tensors nor two that share memory.
    own = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    with replacing(path) as temp_path:
        try:
            save_file(own, temp_path, metadata={"kind": kind, "version": str(VERSION), "header": text})
        except SafetensorError as e:
            raise write_error(path, e) from e
        with open(temp_path, "r+b") as f:
            size = struct.unpack("<Q", f.read(8))[0]
            if size > MAX_HEADER:
                raise DataError(f"the header for {path} is over {MAX_HEADER >> 20} MB: put bulk in tensors")
            # The library writes the metadata in an order that changes from run to run; what is saved twice is one file.
            entries = json.loads(f.read(size))
            entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
            settled = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
            if len(settled) == size:  # as it is, but for the order
                f.seek(8)
                f.write(settled)


def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU, as saved) and the header of a file of this kind.

    Raises FileError, in one sentence, for anything wrong: missing, no regular file, larger than its kind may be,
    truncated, not safetensors, another kind, a newer version, a header over 16 MB or not a JSON object, NaN or
    infinity in a tensor, more than memory holds.
    """
    with _opened(path, _most(kind)) as f:
        header = _read_header(Path(path), kind, f.metadata() or {})
        return _tensors(Path(path), f), header


def _most(kind: str) -> int:
    """Bytes that a file of this kind has at most."""
    return MAX_BYTES.get(kind, MAX_OTHER_BYTES)


def kind_of(path: str | os.PathLike[str]) -> str | None:
    """Return the kind that a file says it is of; None for what is no file of ours."""
    try:
        with _opened(path, MAX_OTHER_BYTES) as f:
            return (f.metadata() or {}).get("kind")
    except FileError:
        return None


def load_foreign(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors (on the CPU, as saved) of a safetensors file that another library wrote, checked as `load` checks
    those of an SAE. Raises FileError."""
    with _opened(path, MAX_BYTES["sae"]) as f:
        return _tensors(Path(path), f)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str], most: int) -> Iterator[Any]:
    """The file, open and bounded; what the parser says of it while it is open becomes a FileError."""
    path = Path(path)
    _check_bounds(path, most)
    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            yield f
    except (OSError, SafetensorError, TypeError) as e:  # TypeError: a dimension beyond 64 bits
        raise FileError(f"{path} is not a whole safetensors file ({printable(e)}): {_RETRY_HINT}") from e
    except (MemoryError, RuntimeError) as e:  # RuntimeError: torch's own allocator
        raise FileError(f"{path} does not fit into memory ({printable(e)}): load it where there is more") from e


def _tensors(path: Path, f: Any) -> dict[str, Tensor]:
    """Every tensor of an open file, once type, dimensions and numbers are as expected."""
    for name in f.keys():
        part = f.get_slice(name)
        if part.get_dtype() not in _DTYPES or len(part.get_shape()) > 8:
            raise FileError(f"{path} holds tensor {printable(name)!r} of an unknown type: {_RETRY_HINT}")
    # Cloned, because the library maps the file: overwritten, it would change under its reader.
    tensors = {name: f.get_tensor(name).clone() for name in f.keys()}
    for name, x in tensors.items():
        if not _finite(x):
            raise FileError(f"{path} holds NaN or infinity in tensor {printable(name)!r}: {_RETRY_HINT}")
    return tensors


def _check_bounds(path: Path, most: int) -> None:
    """Refuse, from its size and first eight bytes, what the parser should not even be shown."""
    with open_regular(path) as f:
        try:
            first = f.read(8)
            size = os.fstat(f.fileno()).st_size
        except OSError as e:
            raise FileError(f"{path} could not be read ({e.strerror}): check the disk") from e
    if len(first) < 8:
        raise FileError(f"{path} is not a safetensors file (it has only {size} bytes): {_RETRY_HINT}")
    if size > most:
        raise FileError(
            f"{path} has {size:,} bytes, over the bound of {most:,} for a file of its kind: pass another file"
        )
    claimed = struct.unpack("<Q", first)[0]
    if claimed > MAX_HEADER:
        raise FileError(
            f"{path} claims a header of {claimed} bytes, over the bound of {MAX_HEADER >> 20} MB: "
            "it is damaged, not safetensors, or hostile"
        )
    if claimed > size - 8:
        raise FileError(f"{path} is truncated (a header of {claimed} bytes, a file of {size}): {_RETRY_HINT}")


def _read_header(path: Path, kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON header, once kind and version are as expected."""
    if not {"kind", "version", "header"} <= metadata.keys():
        raise FileError(f"{path} was not written by neuraleraser: pass a file of kind {kind!r}")
    if metadata["kind"] != kind:
        raise FileError(f"{path} is of kind {printable(metadata['kind'])!r}: pass a file of kind {kind!r}")
    version = metadata["version"]
    if not (version.isascii() and version.isdigit() and len(version) < 10):
        raise FileError(f"{path} has format version {printable(version)!r}, which is not a number: {_RETRY_HINT}")
    if int(version) > VERSION:
        raise FileError(f"{path} has format version {version}, this neuraleraser reads up to {VERSION}: upgrade it")
    try:
        header = parse_json(metadata["header"])
    except ValueError as e:
        raise FileError(f"{path} has a header that is not JSON ({printable(e)}): {_RETRY_HINT}") from e
    if not isinstance(header, dict):
        raise FileError(f"{path} has a header that is not a JSON object: {_RETRY_HINT}")
    return header


def _finite(x: Tensor) -> bool:
    """True if every number of `x` (any shape) is finite, by its extremes: no copy of a large tensor."""
    if x.numel() == 0 or not x.is_floating_point():
        return True
    low, high = torch.aminmax(x)  # NaN propagates
    return bool(torch.isfinite(low) & torch.isfinite(high))
