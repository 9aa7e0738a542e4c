"""A denoiser's forward that is over, and may be asked again with another text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import EraserNotAppliedError
from neuraleraser.sites.denoiser_calls import DenoiserCall
from neuraleraser.sites.rows import Rows
from neuraleraser.sites.schedulers import with_many_steps
from neuraleraser.sites.start_images import noised

TEXT_ARGUMENTS = (
    "encoder_hidden_states",
    "encoder_attention_mask",
    "encoder_hidden_states_mask",
    "pooled_projections",
    "txt_ids",
    "added_cond_kwargs.text_embeds",
)
"""Arguments of denoisers that a prompt decides, in all of diffusers' classes; of those in a mapping, both names."""
_NEAR = 0.1
"""Share of the noise levels from which on no timestep of a short schedule is near another: a look would not see."""
_NO_ROWS = ("txt_ids",)
"""Those that are the same for all rows."""

Text = Mapping[str, Tensor]
"""One prompt as a denoiser is given it: its text arguments by name, each with one row."""


def text_of(conditioning: Mapping[str, Any], row: int) -> dict[str, Tensor]:
    """Return the text that one row of a call's conditioning was given."""
    found: dict[str, Tensor] = {}
    for name in TEXT_ARGUMENTS:
        first, _, inner = name.partition(".")
        value = conditioning.get(first)
        value = value.get(inner) if inner and isinstance(value, Mapping) else value
        if isinstance(value, Tensor):
            found[name] = value if name in _NO_ROWS else value[row : row + 1]
    return found


def with_text(conditioning: Mapping[str, Any], texts: Sequence[Text]) -> dict[str, Any]:
    """Return a conditioning of as many rows as there are texts, each given its own.

    Raises EraserNotAppliedError where the call has other text arguments than the texts.
    """
    given = set(text_of(conditioning, 0))
    if given != set(texts[0]):
        raise EraserNotAppliedError(
            f"the denoiser is given {', '.join(sorted(given)) or 'no text'}, and the eraser's prompts are "
            f"{', '.join(sorted(texts[0]))}: use it with the pipeline it was made for"
        )
    new = dict(conditioning)
    for name in texts[0]:
        first, _, inner = name.partition(".")
        held = conditioning[first][inner] if inner else conditioning[first]
        value = texts[0][name] if name in _NO_ROWS else torch.cat([text[name] for text in texts])
        value = value.to(held.device, held.dtype)
        new[first] = {**new[first], inner: value} if inner else value
    return new


@dataclass(frozen=True)
class Step:
    """One step of sampling: the state and the timestep of which the denoiser is asked.

    Guidance in two passes asks twice in one step.
    """

    state: Tensor
    timestep: Tensor

    def is_of(self, call: DenoiserCall) -> bool:
        """Return True if a forward is of this step."""
        return call.state is self.state and torch.equal(call.timestep, self.timestep)


@dataclass(frozen=True)
class FinishedForward:
    """A denoiser's forward that is over.

    run: runs the denoiser on a state, a timestep and a conditioning, without hooks of ours. look_at: the same with the
    hooks of this attachment, for rows of some layout; it returns the edits' state. take_again: runs this forward again,
    with the hooks of all attachments that edit; it takes what the edits begin with, by numbers of their owner's, and
    which rows are wanted, bool [rows]; it returns the edits' state and the change of the prediction [rows, ...].
    """

    call: DenoiserCall
    run: Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]
    look_at: Callable[[Tensor, Tensor, Mapping[str, Any], Rows], Any]
    take_again: Callable[[Mapping[int, Tensor], Tensor], tuple[Any, Tensor]]

    @property
    def step(self) -> Step:
        """The step that it is of."""
        return Step(self.call.state, self.call.timestep)

    def predict(self, rows: Sequence[int], texts: Sequence[Text]) -> list[Tensor]:
        """Return the base model's predictions [rows, ...] for some rows with each of `texts`, in one forward.

        Raises EraserNotAppliedError where the texts do not fit the denoiser.
        """
        index = torch.tensor(list(rows) * len(texts), device=self.call.state.device)
        part = self.call.rows(index)
        each = [text for text in texts for _ in rows]
        return list(self.run(part.state, part.timestep, with_text(part.conditioning, each)).chunk(len(texts)))

    def look(self, scheduler: Any, latents: Tensor, times: Sequence[float]) -> tuple[Rows, Any] | None:
        """Show the denoiser the start images' latents [images, C, h, w] with less noise, in one forward.

        times: timesteps, as the denoiser is given them; the nearest of the schedule are taken, or of a longer one where
        it has none that is near. The rows have the text of the first rows of this forward, and ask for nothing
        (`Rows.counts`): only the picture counts.

        Returns the layout of the rows, a block for each time, and the edits' state; None where the latents do not fit
        the denoiser's state.
        """
        n, call = len(latents), self.call
        schedule = torch.as_tensor(scheduler.timesteps).double().cpu()
        unit = 1.0 if max(times) > 1 or float(schedule.max()) <= 1 else float(scheduler.config.num_train_timesteps)
        span = float(scheduler.config.num_train_timesteps) if max(times) * unit > 1 else 1.0
        if max(float((schedule - time * unit).abs().min()) for time in times) > _NEAR * span:
            scheduler = with_many_steps(scheduler)
            schedule = torch.as_tensor(scheduler.timesteps).double().cpu()
        nearest = sorted({int((schedule - time * unit).abs().argmin()) for time in times})
        index = torch.arange(n, device=call.state.device)
        found = [noised(scheduler, latents.to(call.state), call.state[index], scheduler.timesteps[i]) for i in nearest]
        states = [x for x in found if x is not None]
        if not states:
            return None
        at = torch.stack([torch.as_tensor(scheduler.timesteps[i]) / unit for i in nearest]).repeat_interleave(n)
        part = call.rows(index.repeat(len(states)))
        rows = Rows(n, (True,) * len(states), (False,) * len(states))
        dtype = call.timestep.dtype if unit == 1 else at.dtype
        return rows, self.look_at(torch.cat(states), at.to(call.state.device, dtype), part.conditioning, rows)
