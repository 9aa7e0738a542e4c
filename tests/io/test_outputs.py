"""Outputs are checked before the work, and results are kept where a path fails after it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from neuraleraser.errors import FileError, NeuralEraserError, SettingsError
from neuraleraser.io import outputs
from neuraleraser.io.outputs import check_outputs, check_writable, save_or_keep


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.mark.parametrize("path", ["a", "new/deep/a", "file", "folder/a", "read_only_file"])
def test_a_path_that_can_be_written_leaves_no_trace(path: str, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    for name in ("file", "read_only_file"):
        (tmp_path / name).write_text("x")
    (tmp_path / "read_only_file").chmod(0o400)
    before = tree(tmp_path)
    check_writable(tmp_path / path)
    check_outputs({"--out": tmp_path / path})
    assert tree(tmp_path) == before


@pytest.mark.parametrize("path", ["folder", "pipe", "file/a", "file/deep/a", "x" * 300, "x" * 250, "nul\0", "loop/a"])
def test_a_path_that_cannot_be_written(path: str, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(FileError) as caught:
        check_writable(tmp_path / path)
    assert "\n" not in str(caught.value)


def test_a_device_is_never_replaced():
    with pytest.raises(FileError, match="a device or a pipe"):
        check_writable("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_folder_is_wanted(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in ("file", "file/below"):
        with pytest.raises(FileError):
            check_writable(tmp_path / path, folder=True)
    for path in ("folder", "new", "new/deep"):
        check_writable(tmp_path / path, folder=True)
    assert tree(tmp_path) == {"file", "folder"}


@pytest.mark.skipif(os.name == "posix" and os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path):
    (tmp_path / "folder").mkdir(mode=0o500)
    with pytest.raises(FileError, match="Permission denied"):
        check_writable(tmp_path / "folder" / "deep" / "a")


def test_a_system_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(outputs, "open", read_only, raising=False)
    with pytest.raises(FileError, match="Read-only file system"):
        check_writable(tmp_path / "a")


def test_outputs_that_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to("a")
    for first, second in (
        ("a", "a"),
        ("a", "./a"),
        ("a", "a/b"),
        ("x/../a", "a"),
        ("link", "a"),
        ("a", tmp_path / "a"),
    ):
        with pytest.raises(SettingsError, match="collide"):
            check_outputs({"--out": first, "--record": second})
    check_outputs({"--out": "a", "--record": "ab", "--comparison-png": None})


def test_an_output_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name in ("a", "folder/sae"):
        Path(name).write_text("x")
    Path("link").symlink_to("a")
    os.link("a", "hard")
    for out, source in (("a", "a"), ("link", "a"), ("a", "link"), ("hard", "a"), ("folder/sae", "folder")):
        with pytest.raises(SettingsError, match="would replace what --erasers reads"):
            check_outputs({"--out": out}, {"--erasers": source})
    check_outputs(
        {"--out": "folder/new"}, {"--erasers": "folder", "--model": "canvas", "--x": None, "--y": "owner/name"}
    )


def test_a_result_is_kept_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("in_the_way").mkdir()

    def save(path: Path) -> None:
        if path == Path("in_the_way") or path.parent in refused:
            raise FileError(f"{path} could not be written")
        path.write_text("result")

    refused: list[Path] = []
    with pytest.raises(
        FileError, match=r"in_the_way could not be written; the result is kept in .*/in_the_way-"
    ) as caught:
        save_or_keep(Path("in_the_way"), save)
    kept = Path(str(caught.value).split(" kept in ")[1])
    assert kept.parent == tmp_path and kept.read_text() == "result"
    refused = [tmp_path]
    monkeypatch.setattr(outputs.tempfile, "gettempdir", lambda: str(tmp_path / "in_the_way"))
    with pytest.raises(FileError, match=r"kept in .*/in_the_way/in_the_way-"):
        save_or_keep(Path("in_the_way"), save)
    refused.append(tmp_path / "in_the_way")
    with pytest.raises(FileError, match=r"written$"):
        save_or_keep(Path("in_the_way"), save)
    save_or_keep(Path("free"), lambda path: path.write_text("x") and None)
    assert Path("free").read_text() == "x"


def test_a_bug_in_saving_is_not_hidden(tmp_path: Path):
    def bug(path: Path) -> None:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        save_or_keep(tmp_path / "a", bug)
    assert issubclass(FileError, NeuralEraserError)
