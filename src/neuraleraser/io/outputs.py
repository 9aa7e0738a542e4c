"""Checks before long work that its results can be written, and another place for them where that fails in the end."""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from neuraleraser.errors import FileError, SettingsError
from neuraleraser.io.names import printable


def check_writable(path: str | os.PathLike[str], *, folder: bool = False) -> None:
    """Check that a file can be written at `path`, or with `folder` files into that folder; nothing is left behind.

    A small file is written for a moment where the first missing folder would be made. What stands at `path` already is
    replaced later, so it may be read-only. Raises FileError for a folder where a file is to go and the other way round,
    for a device or a pipe, for a name that is too long, and where the system refuses to write.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode if os.path.exists(path) else None
        if mode is not None and stat.S_ISDIR(mode) != folder:
            what, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
            raise FileError(f"{str(path)!r} is {what}: pass the path of {wanted}")
        if mode is not None and not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
            raise FileError(f"{str(path)!r} is a device or a pipe, which would be replaced: pass the path of a file")
        there = path if folder else path.parent
        while not os.path.lexists(there) and there != there.parent:
            there = there.parent
        name = "x" if folder else path.name
        probe = there / f".{name}.{secrets.token_hex(4)}.tmp"  # as long as the name that `atomic.replacing` takes
        with open(probe, "xb"):
            pass
        probe.unlink()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = (error.strerror if isinstance(error, OSError) else None) or printable(error)
        raise FileError(f"{printable(path)} cannot be written ({reason}): pass another path") from error


def check_outputs(
    outputs: Mapping[str, str | os.PathLike[str] | None],
    inputs: Mapping[str, str | os.PathLike[str] | None] | None = None,
    *,
    folders: Mapping[str, str | os.PathLike[str] | None] | None = None,
) -> None:
    """Check that every output can be written, and that none is another, or is read.

    All map an option's name to its path; None and inputs that are no paths (Hub ids) are passed over. `outputs` are
    files, `folders` are folders that files go into. Raises FileError as `check_writable` does, and SettingsError for
    two options with one path, a file below another one's path, and an existing file inside a folder that is read.
    """
    files = {name: Path(path) for name, path in outputs.items() if path is not None}
    for name, path in files.items():
        real = os.path.realpath(path)
        for other, second in files.items():
            if other != name and (real == os.path.realpath(second) or _is_below(real, os.path.realpath(second))):
                raise SettingsError(f"{name} {str(path)!r} and {other} {str(second)!r} collide: pass two paths")
        for other, source in (inputs or {}).items():
            if source is None or not os.path.exists(source):
                continue
            read = os.path.realpath(source)
            if real == read or (os.path.exists(path) and (os.path.samefile(path, source) or _is_below(real, read))):
                raise SettingsError(f"{name} {str(path)!r} would replace what {other} reads: pass another path")
        check_writable(path)
    for path in (folders or {}).values():
        if path is not None:
            check_writable(path, folder=True)


def save_or_keep(path: Path, save: Callable[[Path], None]) -> None:
    """Call `save(path)`; where that raises FileError, save to the current folder or else to the one for temporary
    files, and raise a FileError that names the place. So the result of long work is not lost."""
    try:
        save(path)
    except FileError as error:
        for folder in (Path.cwd(), Path(tempfile.gettempdir())):
            kept = folder / f"{path.stem[:60]}-{secrets.token_hex(4)}{path.suffix}"
            try:
                save(kept)
            except FileError:
                continue
            raise FileError(f"{error}; the result is kept in {kept}") from error
        raise


def _is_below(path: str, folder: str) -> bool:
    return Path(folder) in Path(path).parents
