"""Changing the denoiser's prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neuraleraser.errors import EraserNotAppliedError
from neuraleraser.sites.edits import HookedEdits
from neuraleraser.sites.finished import FinishedForward
from neuraleraser.sites.forwards import Begin
from neuraleraser.sites.guard import Call
from neuraleraser.sites.rows import Rows

OnForward = Callable[[FinishedForward, Rows], Tensor | None]
"""Takes a denoiser's forward that is over and the layout of its rows; returns a change of its prediction [rows, ...],
or None to leave it."""


@contextmanager
def edit_prediction(pipe: Any, start_call: Callable[[Call], OnForward]) -> Iterator[None]:
    """Context manager that adds to each prediction of the denoiser what a function returns.

    Rows whose change is 0 keep their bits.

    Args:
        pipe: The diffusers pipeline.
        start_call: Called as each drawing begins. It returns what is called at the end of each of the denoiser's
            forwards in it, so what is kept from step to step belongs to one drawing.

    Raises:
        SiteError: `pipe` is no diffusers pipeline.
        EraserNotAppliedError: The change has another shape than the prediction; the denoiser was replaced.

    Examples:
        >>> from neuraleraser.sites import edit_prediction
        >>> def weaker(finished, rows):
        ...     return -0.1 * finished.call.prediction
        >>> with edit_prediction(pipe, lambda call: weaker):
        ...     changed = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(changed, images)
        False
    """
    hooked = HookedEdits(pipe, {}, _PredictionEdit(start_call))
    try:
        yield
        hooked.check()
    finally:
        hooked.close()


@dataclass
class _PredictionEdit:
    """Observer that changes predictions. The state of a call is the function that its start returned."""

    start_call: Callable[[Call], OnForward]
    repeats: bool = False  # what it adds to a prediction stays

    def new_state(self, begin: Begin) -> None:
        """Return nothing: there are no edits."""

    def on_call_start(self, call: Call) -> OnForward:
        """Begin a drawing."""
        return self.start_call(call)

    def on_forward_start(self, call: OnForward, rows: Rows, text: Tensor | None, compiled: bool) -> Begin:
        """Return nothing."""
        return {}

    def on_forward_end(self, call: OnForward, rows: Rows, state: None, finished: FinishedForward) -> Tensor | None:
        """Return the change of the prediction."""
        change = call(finished, rows)
        expected = finished.call.prediction.shape
        if change is not None and change.shape != expected:
            raise EraserNotAppliedError(
                f"the change of the prediction is {list(change.shape)}, expected {list(expected)}: return one of "
                "each row"
            )
        return change

    def on_decode(self, call: OnForward) -> None:
        """Do nothing."""
