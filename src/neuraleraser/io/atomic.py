"""Writing a file so that a reader never meets half of it."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from neuraleraser.errors import FileError


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` at `path`: written aside in the same folder, then renamed over it.

    Missing folders are made. Killed or failing at any moment, `path` holds either what it held before or all
    of `data`, and an exception (Ctrl-C too) leaves nothing beside it.

    Raises FileError if the system refuses (a full disk, no permission, `path` is a folder).
    """
    path = Path(path)
    temp_path = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temp_path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # else a power cut after the rename could leave an empty file
        os.replace(temp_path, path)
    except OSError as error:
        raise FileError(
            f"could not write {str(path)!r} ({error.strerror or error}): expected a folder with room "
            f"for {len(data):,} bytes; what stood there is untouched, so free some space or pass another path"
        ) from error
    finally:
        temp_path.unlink(missing_ok=True)
