"""Making of a subcommand from a function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import arg
from tyro.extras import SubcommandApp

from neuraleraser.settings import Sampling

app, canvas = SubcommandApp(), SubcommandApp()
Flat = arg(name="")
"""The fields of a settings object as options of their own, without a prefix."""


@dataclass(frozen=True)
class MachineOptions:
    """Options of every verb that opens a pipeline."""

    device: str | None = None
    """Device that runs the pipeline, such as cuda:1; None: the GPU if there is one, else the CPU."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Number format of the pipeline; None: bfloat16 on a GPU, float32 on a CPU (the canvas: bfloat16 where that is
    fast)."""

    @property
    def device_name(self) -> str:
        """Name of the device."""
        import torch

        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def open_pipeline(self, model: str) -> Any:
        """Open a pipeline by its name. Raises as `families.opening.open_pipeline` does."""
        import torch

        from neuraleraser.families.opening import open_pipeline

        return open_pipeline(model, getattr(torch, self.dtype) if self.dtype else None, device=self.device_name)


Machine = Annotated[MachineOptions, Flat]
"""Type of a verb's parameter that takes them."""
AUTOMATIC = MachineOptions()


def verb(group: SubcommandApp, name: str) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Register a function as a subcommand that is called only after all options were read: otherwise tyro would
    take a ValueError from inside it for a wrong option."""

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        @functools.wraps(function)
        def later(*args: Any, **kwargs: Any) -> Callable[[], int | None]:
            return functools.partial(function, *args, **kwargs)

        group.command(name=name)(later)
        return function

    return register


def check_sampling(**given: Any) -> None:
    """Raise SettingsError for a number out of range before the model is opened; None stands for the model's own."""
    Sampling(**{name: value for name, value in given.items() if value is not None})


def bars(rows: Sequence[tuple[str, int]], width: int = 48) -> str:
    """A histogram: a line for each (name, count), the longest bar `width` characters long."""
    most = max((count for _, count in rows), default=0) or 1
    names, numbers = max(len(name) for name, _ in rows), max(len(f"{count:,}") for _, count in rows)
    lines = []
    for name, count in rows:
        eighths = max(round(8 * width * count / most), 1 if count > 0 else 0)  # what is there can be seen
        bar = "█" * (eighths // 8) + ["", *"▏▎▍▌▋▊▉"][eighths % 8]
        lines.append(f"{name:>{names}}  {count:>{numbers},}  {bar}".rstrip())
    return "\n".join(lines)
