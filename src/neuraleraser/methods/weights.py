"""Methods that give a model other weights: what they share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from neuraleraser.errors import SettingsError


@contextmanager
def changed_weights(module: nn.Module, new: Mapping[str, Tensor]) -> Iterator[None]:
    """Context manager: parameters of a module, by name, have other values; afterwards their own, bit for bit.

    Raises SettingsError where the module has no such parameter, or one of another shape.
    """
    parameters = dict(module.named_parameters())
    for name, x in new.items():
        if name not in parameters or parameters[name].shape != x.shape:
            has = f"has {name} of {list(parameters[name].shape)}" if name in parameters else f"has no {name}"
            raise SettingsError(
                f"the weights have {name} of {list(x.shape)}, and this {type(module).__name__} {has}: "
                "use them with the model that they were made for"
            )
    old = {name: parameters[name].data for name in new}
    try:
        for name, x in new.items():
            parameters[name].data = x.to(old[name])
        yield
    finally:
        for name, x in old.items():
            parameters[name].data = x


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return a digest of names and values."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(weights[name].detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
