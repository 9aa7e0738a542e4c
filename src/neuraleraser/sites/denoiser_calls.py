"""The denoiser's own calls, as data: state, timestep, conditioning and prediction, to replay one with another's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from neuraleraser.families import known_names
from neuraleraser.sites.caller import find_caller
from neuraleraser.sites.modules import denoiser, forward_arguments, unwrap
from neuraleraser.sites.rows import CallFacts, Rows, decode_rows


@dataclass(frozen=True)
class DenoiserCall:
    """One forward of the denoiser: `state` [B, ...] noisy latents, `timestep` as it was given, `conditioning` (all
    other arguments by name), `prediction` [B, ...]; and the `layout` of its rows, where it was recorded whole."""

    state: Tensor
    timestep: Tensor
    conditioning: Mapping[str, Any]
    prediction: Tensor
    layout: Rows | None = None

    @property
    def text_tokens(self) -> int | None:
        """Tokens of the text that the denoiser was given, None without."""
        text = self.conditioning.get("encoder_hidden_states")
        return text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else None

    def rows(self, index: Any) -> DenoiserCall:
        """Return the same call of some images: what has one row per image is indexed, all else kept."""
        b = self.state.shape[0]
        timestep = self.timestep[index] if self.timestep.ndim and len(self.timestep) == b else self.timestep
        return DenoiserCall(
            self.state[index],
            timestep,
            {k: _rows(k, v, b, index) for k, v in self.conditioning.items()},
            self.prediction[index],
        )


def _rows(name: str, value: Any, b: int, index: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _rows(k, v, b, index) for k, v in value.items()}
    if isinstance(value, (tuple, list)) and all(isinstance(v, Tensor) for v in value):  # a ControlNet's residuals
        return [_rows(name, v, b, index) for v in value]
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] != b:
        return value
    return value if name in known_names(lambda family: family.position_arguments) else value[index]


def call_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> DenoiserCall:
    """Return a forward of a denoiser as data, from its arguments and its output."""
    names = forward_arguments(module)
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    state, timestep = given.pop(names[0]), given.pop("timestep")
    given.pop("return_dict", None)
    if not isinstance(timestep, Tensor):  # a loop of one's own may give a number
        timestep = torch.tensor(timestep, device=state.device)
    return DenoiserCall(state, timestep, given, predicted(output))


def predicted(output: Any) -> Tensor:
    """Return the prediction in what a denoiser returns."""
    return output[0] if isinstance(output, tuple) else next(iter(output.values()))


@contextmanager
def denoiser_calls(pipe: Any, on_call: Callable[[DenoiserCall], None]) -> Iterator[None]:
    """Context manager: calls `on_call` after each forward of the denoiser."""
    module = denoiser(pipe)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call, caller = call_of(unwrap(module), args, kwargs, output), find_caller()
        text = call.conditioning.get("encoder_hidden_states")
        text = text if isinstance(text, Tensor) else None
        layout = decode_rows(len(call.state), text, caller.facts if caller else CallFacts())
        on_call(replace(call, layout=layout))

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def replay(pipe: Any, state: Tensor, timestep: Tensor, conditioning: Mapping[str, Any]) -> Tensor:
    """Return the denoiser's prediction at `state` with `conditioning`, hooks and gradients as they are."""
    module = denoiser(pipe)
    first = forward_arguments(unwrap(module))[0]
    return module(**{first: state, "timestep": timestep}, **conditioning, return_dict=False)[0]
