"""The one file format: safetensors with a kind, a format version and a JSON header. Nothing else in the
package reads or writes tensors on disk.

Inside the safetensors metadata lie three strings: `kind` ("eraser", "sae", ...), `version` (of this format)
and `header` (a JSON object). A file is treated as coming from a stranger: bounded, checked, refused in one
sentence; nothing in it is ever executed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import secrets
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from neuraleraser.errors import DataError, FileError

VERSION = 1
STRAY = 3600  # seconds after which a file beside counts as left by a killed save
MAX_HEADER = 16 * 2**20  # bytes; safetensors' own bound is 100 MB
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
_AGAIN = "fetch or make it again"


def save(path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write `tensors` (up to 8 dimensions, any device, every number finite) and `header` (JSON) to `path`.

    Written aside and renamed, so `path` holds the old file or the new one, never half of one. Folders on the
    way are made. Raises DataError for what `load` would refuse, FileError when the disk does.
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
    # Cloned, because safetensors takes neither strided tensors nor two that share memory.
    own = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(own, aside, metadata={"kind": kind, "version": str(VERSION), "header": text})
        with open(aside, "rb+") as f:
            if struct.unpack("<Q", f.read(8))[0] > MAX_HEADER:
                raise DataError(f"the header for {path} is over {MAX_HEADER >> 20} MB: put bulk in tensors")
            os.fsync(f.fileno())
        os.replace(aside, path)
        _sweep(path)
    except (OSError, SafetensorError) as e:
        raise FileError(f"{path} could not be written ({e}): check the path, permissions and space") from e
    finally:
        with contextlib.suppress(OSError):  # gone already, after a rename, or never made
            aside.unlink()


def _sweep(path: Path) -> None:
    """Remove what saves of `path` left beside it when they were killed; younger files may still be written."""
    for stray in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - stray.stat().st_mtime > STRAY:
                stray.unlink()


def load(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU, as saved) and the header of a file of this kind.

    Raises FileError, in one sentence, for anything wrong: missing, truncated, not safetensors, another kind,
    a newer version, a header over 16 MB or not a JSON object, NaN or infinity in a tensor.
    """
    with _opened(path) as f:
        header = _read_header(Path(path), kind, f.metadata() or {})
        return _tensors(Path(path), f), header


def load_plain(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors (on the CPU, as saved) of a safetensors file that another library wrote, checked as `load`
    checks them. Raises FileError."""
    with _opened(path) as f:
        return _tensors(Path(path), f)


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[Any]:
    """The file, open and bounded; what the parser says of it while it is open becomes a FileError."""
    path = Path(path)
    _check_bounds(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as f:
            yield f
    except (OSError, SafetensorError, TypeError) as e:  # TypeError: a dimension beyond 64 bits
        raise FileError(f"{path} is not a whole safetensors file ({_short(str(e))}): {_AGAIN}") from e


def _tensors(path: Path, f: Any) -> dict[str, Tensor]:
    """Every tensor of an open file, once type, dimensions and numbers are as expected."""
    for name in f.keys():
        part = f.get_slice(name)
        if part.get_dtype() not in _DTYPES or len(part.get_shape()) > 8:
            raise FileError(f"{path} holds tensor {_short(name)} of an unknown type: {_AGAIN}")
    # Cloned, because the library maps the file: overwritten, it would change under its reader.
    tensors = {name: f.get_tensor(name).clone() for name in f.keys()}
    for name, x in tensors.items():
        if not _finite(x):
            raise FileError(f"{path} holds NaN or infinity in tensor {_short(name)}: {_AGAIN}")
    return tensors


def _check_bounds(path: Path) -> None:
    """Refuse, from the first eight bytes, what the parser should not even be shown."""
    try:
        with open(path, "rb") as f:
            first = f.read(8)
            size = os.fstat(f.fileno()).st_size
    except FileNotFoundError as e:
        raise FileError(f"{path} does not exist: check the path") from e
    except OSError as e:
        raise FileError(f"{path} could not be read ({e.strerror}): check the path and permissions") from e
    if len(first) < 8:
        raise FileError(f"{path} is not a safetensors file (it has only {size} bytes): {_AGAIN}")
    claimed = struct.unpack("<Q", first)[0]
    if claimed > MAX_HEADER:
        raise FileError(
            f"{path} claims a header of {claimed} bytes, over the bound of {MAX_HEADER >> 20} MB: "
            "it is damaged, not safetensors, or hostile"
        )
    if claimed > size - 8:
        raise FileError(f"{path} is truncated (a header of {claimed} bytes, a file of {size}): {_AGAIN}")


def _read_header(path: Path, kind: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The JSON header, once kind and version are as expected."""
    if not {"kind", "version", "header"} <= metadata.keys():
        raise FileError(f"{path} was not written by neuraleraser: pass a file of kind {kind!r}")
    if metadata["kind"] != kind:
        raise FileError(f"{path} is of kind {_short(metadata['kind'])}: pass a file of kind {kind!r}")
    version = metadata["version"]
    if not (version.isascii() and version.isdigit() and len(version) < 10):
        raise FileError(f"{path} has format version {_short(version)}, which is not a number: {_AGAIN}")
    if int(version) > VERSION:
        raise FileError(f"{path} has format version {version}, this neuraleraser reads up to {VERSION}: upgrade it")
    try:
        header = json.loads(metadata["header"], parse_float=_number, parse_constant=_number)
    except (ValueError, RecursionError) as e:
        raise FileError(f"{path} has a header that is not JSON ({type(e).__name__}): {_AGAIN}") from e
    if not isinstance(header, dict):
        raise FileError(f"{path} has a header that is not a JSON object: {_AGAIN}")
    return header


def _number(text: str) -> float:
    """A JSON number; refuses NaN, Infinity and what overflows to it, all of which Python would take."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that is not finite")
    return value


def _finite(x: Tensor) -> bool:
    """Whether every number of `x` (any shape) is finite, by its extremes: no copy of a large tensor."""
    if x.numel() == 0 or not x.is_floating_point():
        return True
    low, high = torch.aminmax(x)  # NaN propagates
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _short(text: str) -> str:
    """A stranger's string, safe to print in one line."""
    return repr(text if len(text) <= 100 else text[:97] + "...")
