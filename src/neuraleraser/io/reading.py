"""Reading strangers' files: regular files only, of a bounded size, and JSON that means one thing. Loads no torch."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from neuraleraser.errors import FileError

MAX_JSON = 16 * 2**20
"""Bytes of a JSON file, at most."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NONBLOCK = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)  # Windows has neither, and no pipes in folders


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file to read its bytes.

    Pipes, devices, sockets and folders are refused without waiting for them. Raises FileError for those, for a file
    that is missing, and where the system refuses.
    """
    path = Path(path)
    try:
        _check_regular(path, os.stat(path))  # before it is opened: opening a device can act on it
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | _NONBLOCK, 0)
        try:
            _check_regular(path, os.fstat(descriptor))  # it may be another by now
            return os.fdopen(descriptor, "rb")
        except BaseException:
            os.close(descriptor)
            raise
    except FileNotFoundError as error:
        raise FileError(f"{path} does not exist: check the path") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else "its path is none"
        raise FileError(f"{path} could not be read ({reason}): check the path and permissions") from error


def check_regular(path: str | os.PathLike[str]) -> int:
    """Return the size in bytes of a regular file that can be read. Raises FileError as `open_regular` does."""
    with open_regular(path) as file:
        return os.fstat(file.fileno()).st_size


def _check_regular(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise FileError(f"{path} could not be read (it is {kind}): pass a regular file")


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """Return the bytes of a regular file. Raises FileError as `open_regular` does, and for more than `most` bytes."""
    with open_regular(path) as file:
        try:
            data = file.read(most + 1)
        except OSError as error:
            raise FileError(f"{path} could not be read ({error.strerror}): check the disk") from error
    if len(data) > most:
        raise FileError(f"{path} is over the bound of {most:,} bytes for such a file: pass a smaller one")
    return data


def parse_json(text: str | bytes) -> Any:
    """Parse JSON that has one meaning: no NaN, infinity or number that overflows to it, no key twice in an object, no
    nesting too deep to read. Raises ValueError."""
    try:
        return json.loads(text, parse_float=_number, parse_constant=_number, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is not finite")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found
