"""Log of a training run: lines of JSON, and TensorBoard's files where it is installed."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from neuraleraser.errors import FileError, MissingDependencyError
from neuraleraser.io.atomic import write_bytes
from neuraleraser.sae.train_settings import StepLog


class TrainingLog:
    """An `on_step` that appends each `StepLog` to `path` as a line of JSON, and to TensorBoard's files in the folder
    `tensorboard`, if given.

    A run that was killed goes on from its checkpoint, before what it wrote last: lines of steps that come again are
    taken out first. Raises FileError for a file that cannot be written, MissingDependencyError without TensorBoard.
    """

    def __init__(self, path: str | os.PathLike[str], tensorboard: str | os.PathLike[str] | None = None) -> None:
        self.path, self.folder = Path(path), tensorboard
        self._started = False
        self._board: Any = None
        if tensorboard is not None and find_spec("tensorboard") is None:
            raise MissingDependencyError("TensorBoard is not installed: pip install tensorboard, or do without")

    def __call__(self, log: StepLog) -> None:
        try:
            if not self._started:
                self._begin(log.step)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(log)) + "\n")
        except OSError as error:
            raise FileError(f"the log {self.path} cannot be written ({error.strerror}): pass another path") from error
        if self._board is not None:
            for name, value in asdict(log).items():
                if name != "step":
                    self._board.add_scalar(name, value, log.step)

    def _begin(self, step: int) -> None:
        """Open the files, and drop lines of this step and later ones, which come again."""
        self._started = True
        if self.folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(os.fspath(self.folder), purge_step=step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) < step]
            write_bytes(self.path, "".join(line + "\n" for line in kept).encode())

    def close(self) -> None:
        """Write out what TensorBoard still holds."""
        if self._board is not None:
            self._board.close()


def _step(line: str) -> float:
    """The step of a line; a line that was cut off by a kill belongs to none."""
    try:
        return float(json.loads(line)["step"])
    except (KeyError, TypeError, ValueError):
        return float("inf")
