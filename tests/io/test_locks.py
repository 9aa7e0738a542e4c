"""Locks between processes: one holds, another waits or goes on, and death lets go."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from neuraleraser.errors import FileError
from neuraleraser.io.locks import claimed, locked

HOLD = "import sys, time; from pathlib import Path; from neuraleraser.io.locks import {0}\n"
HOLD += "with {0}(Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"


@pytest.mark.parametrize("name", ["locked", "claimed"])
def test_another_process_holds_it_until_it_dies(tmp_path: Path, name: str) -> None:
    path, context = tmp_path / "a folder" / "lock", {"locked": locked, "claimed": claimed}[name]
    with subprocess.Popen([sys.executable, "-c", HOLD.format(name), str(path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with context(path, wait=False) as mine:
            assert not mine
        assert path.exists()
        holder.send_signal(signal.SIGKILL)
        with context(path) as mine:
            assert mine


def test_it_is_free_after_an_error_and_stays(tmp_path: Path) -> None:
    for context in (locked, claimed):
        with pytest.raises(ZeroDivisionError), context(tmp_path / "lock"):
            _ = 1 / 0
        assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock", wait=False) as mine:
        assert mine


def test_a_claim_is_gone_when_its_work_is_done(tmp_path: Path) -> None:
    path = tmp_path / "claim"
    with claimed(path):
        with claimed(path, wait=False) as mine:
            assert not mine
        assert path.exists()  # the one that did not get it removes nothing
    assert not path.exists()


def test_a_path_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "lock", tmp_path):
        with pytest.raises(FileError, match="could not be written"), locked(path):
            pass
