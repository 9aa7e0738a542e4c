"""Writing in one piece: files and folders hold the old or the new, whatever fails."""

from __future__ import annotations

import ast
import os
import time
from pathlib import Path
from typing import Any

import pytest

import neuraleraser
from neuraleraser.errors import FileError
from neuraleraser.io import atomic
from neuraleraser.io.atomic import replacing, replacing_folder, write_bytes

SOURCE = Path(neuraleraser.__file__).parent


def test_a_file_is_replaced_whole_and_its_folder_is_made(tmp_path: Path):
    path = tmp_path / "new" / "a"
    write_bytes(path, b"one")
    write_bytes(path, b"two")
    assert path.read_bytes() == b"two" and [p.name for p in path.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a bug")])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(FileError if isinstance(error, OSError) else type(error)), replacing(path) as temp_path:
        temp_path.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("stage", ["inside", "rename"])
def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "f"
    for text in ("one", "two"):
        with replacing_folder(folder) as temp_folder:
            (temp_folder / "a").write_text(text)
        assert (folder / "a").read_text() == text and [p.name for p in tmp_path.iterdir()] == ["f"]
    rename = os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(target) == folder and ".new-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    if stage == "rename":
        monkeypatch.setattr(atomic.os, "replace", failing)
    with pytest.raises(FileError if stage == "rename" else ValueError), replacing_folder(folder) as temp_folder:
        (temp_folder / "a").write_text("three")
        if stage == "inside":
            raise ValueError("a bug")
    assert (folder / "a").read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_what_a_killed_write_left_is_removed_by_the_next_write_of_the_same_file(tmp_path: Path):
    for name in (".a.0.tmp", ".a.1.tmp", ".b.0.tmp"):
        (tmp_path / name).write_bytes(b"half")
    old = time.time() - 2 * atomic.STALE_TEMP_SECONDS
    for name in (".a.0.tmp", ".b.0.tmp"):
        os.utime(tmp_path / name, (old, old))
    write_bytes(tmp_path / "a", b"x")
    assert {p.name for p in tmp_path.iterdir()} == {"a", ".a.1.tmp", ".b.0.tmp"}


WRITERS = {"write_bytes", "write_text", "save_pretrained", "touch", "mkdir", "rename"}
"""Methods that write to the disk by hand; `open` in a writing mode, too."""
ALLOWED = {
    ("sae/training_log.py", "open"),  # appends line by line
    ("sae/training_log.py", "mkdir"),
    ("canvas/train.py", "save_pretrained"),  # into the temporary folder
    ("canvas/data.py", "open"),  # the temporary file
    ("eraser/eraser.py", "write_text"),  # into a temporary folder, to upload
    ("eraser/eraser.py", "save_pretrained"),
}


def by_hand(source: str) -> set[str]:
    """The calls of a module that write to the disk without `io`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(attr="replace", value=ast.Name(id="os"))):
                found.add("os.replace")
            case ast.Call(func=ast.Attribute(attr=name)) if name in WRITERS:
                found.add(name)
            case ast.Call(func=ast.Name(id="open"), args=[_, ast.Constant(value=str(mode)), *_]):
                found |= {"open"} if set(mode) & set("wax+") else set()
    return found


def test_no_room_writes_files_by_hand():
    assert by_hand("os.replace(a, b); p.write_text(t); open(p, 'ab')") == {"os.replace", "write_text", "open"}
    found = {
        (str(path.relative_to(SOURCE)), call)
        for path in SOURCE.rglob("*.py")
        if path.relative_to(SOURCE).parts[0] != "io"
        for call in by_hand(path.read_text(encoding="utf-8"))
    }
    assert found <= ALLOWED, found - ALLOWED
