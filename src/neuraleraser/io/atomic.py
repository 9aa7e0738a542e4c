"""Writing files and folders so that a reader never meets half of one. Every writer of the package goes through here."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from neuraleraser.errors import DataError, FileError
from neuraleraser.io.names import printable
from neuraleraser.io.reading import MAX_JSON

STALE_TEMP_SECONDS = 3600
"""Age from which a temporary file counts as left by a write that was killed; younger ones may still be written."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Context manager: yield a temporary path beside `path`, and put what was written there in its place at the end.

    Folders on the way are made. Killed or failing at any moment, `path` holds what it held before or all of the new
    file; an exception (Ctrl-C, too) leaves nothing beside it. Raises FileError where the system refuses: a full disk,
    no permission, a folder at `path`.
    """
    path = Path(path)
    temp_path = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp_path
        with open(temp_path, "rb+") as file:
            os.fsync(file.fileno())  # else a power cut after the rename could leave an empty file
        os.replace(temp_path, path)
        _remove_stale_temp_files(path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # gone already, after a rename, or never made
            temp_path.unlink()


def write_error(path: Path, error: BaseException) -> FileError:
    """Return the refusal of a file that could not be written."""
    reason = (error.strerror if isinstance(error, OSError) else None) or printable(error)
    return FileError(
        f"{path} could not be written ({reason}), and what stood there is untouched: check the path, permissions and "
        "space, or pass another path"
    )


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path`, in one piece or not at all. Raises FileError."""
    with replacing(path) as temp_path:
        temp_path.write_bytes(data)


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
    """Write `value` to `path` as `untrusted.read_json` reads it.

    Raises DataError for what is not JSON or is over 16 MB, FileError where the system refuses.
    """
    try:
        text = json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise DataError(f"the header for {path} is not JSON ({error}): pass text, finite numbers, lists") from error
    if len(text) > MAX_JSON:
        raise DataError(f"{path} would be over {MAX_JSON >> 20} MB of JSON: shorten the header")
    write_bytes(path, text.encode())


def write_pickle(path: str | os.PathLike[str], value: Any) -> None:
    """Write tensors and plain values to `path` as `untrusted.read_pickle` reads them. Raises FileError."""
    import torch

    with replacing(path) as temp_path:
        try:
            torch.save(value, temp_path)
        except RuntimeError as error:  # torch's own writer
            raise write_error(Path(path), error) from error


@contextlib.contextmanager
def replacing_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Context manager: yield a temporary folder beside `folder`, and put it in its place at the end.

    The old folder is moved aside first and removed last: killed in between, `folder` may be missing, and both are still
    there under names that start with its own. Raises FileError where the system refuses.
    """
    folder = Path(folder)
    made, old = (folder.with_name(f"{folder.name}.{mark}-{secrets.token_hex(4)}") for mark in ("new", "old"))
    try:
        made.mkdir(parents=True)
        yield made
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(made, folder)
        except BaseException:
            if old.exists():
                os.replace(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise write_error(folder, error) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _remove_stale_temp_files(path: Path) -> None:
    """Remove what writes of `path` left beside it when they were killed."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > STALE_TEMP_SECONDS:
                stale.unlink()
