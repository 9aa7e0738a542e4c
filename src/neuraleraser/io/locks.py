"""Locks between processes, on files. They end with the process that holds them, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from neuraleraser.io.atomic import write_error


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Context manager: hold the lock of a file, which is made if it is not there, and stays.

    Yields False, without the lock, where another holds it and `wait` is False. Raises FileError where the system
    refuses.
    """
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as error:  # a file system without locks
        raise write_error(path, error) from error
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def claimed(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Context manager: as `locked`, for work that is done once. At its end the file is removed; where the work failed
    or was killed it stays, and the next one may claim it.

    Whoever holds the claim looks first whether the work is done.
    """
    with locked(path, wait=wait) as mine:
        yield mine
        if mine:
            with contextlib.suppress(OSError):  # Windows removes no file that is open
                path.unlink()
