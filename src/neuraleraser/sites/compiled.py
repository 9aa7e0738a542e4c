"""Boundaries around compiled modules: code that looks at a forward must run outside its graph."""

from __future__ import annotations

from typing import Any

from torch import nn

from neuraleraser.sites.forwards import ComponentHooks
from neuraleraser.sites.modules import unwrap


class GuardedCall:
    """A compiled call between the start and the end of its forward, for all attachments in the module."""

    def __init__(self, module: nn.Module, inner: Any) -> None:
        self.module, self.inner = module, inner
        self.hooks: list[ComponentHooks] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        opened: list[ComponentHooks] = []
        try:
            for hooks in self.hooks:
                hooks.open_boundary(self.module, args, kwargs)
                opened.append(hooks)
            output = self.inner(*args, **kwargs)
        except BaseException:
            for hooks in opened:
                hooks.drop_boundary()
            raise
        while opened:
            try:
                changed = opened.pop(0).close_boundary(self.module, args, kwargs, output)
            except BaseException:
                for hooks in opened:
                    hooks.drop_boundary()
                raise
            output = output if changed is None else changed
        return output


def add_guard(held: nn.Module, hooks: ComponentHooks) -> None:
    """Put a boundary for `hooks` around a component, as its pipeline holds it, where it is compiled."""
    root = unwrap(held)
    if held is not root:  # torch.compile(module)
        _insert(held, "forward", root, hooks)
    if root._compiled_call_impl is not None:  # module.compile()
        _insert(root, "_compiled_call_impl", root, hooks)


def remove_guard(held: nn.Module, hooks: ComponentHooks) -> None:
    """Take the boundary for `hooks` off again."""
    root = unwrap(held)
    if held is not root:
        _remove(held, "forward", hooks)
    _remove(root, "_compiled_call_impl", hooks)


def _insert(owner: nn.Module, name: str, root: nn.Module, hooks: ComponentHooks) -> None:
    """Add `hooks` to the guarded call at attribute `name`, which is made if it is not there."""
    call = getattr(owner, name)
    if not isinstance(call, GuardedCall):
        call = GuardedCall(root, call)
        setattr(owner, name, call)
    if hooks not in call.hooks:
        call.hooks.append(hooks)


def _remove(owner: nn.Module, name: str, hooks: ComponentHooks) -> None:
    call = getattr(owner, name)
    if isinstance(call, GuardedCall):
        call.hooks = [other for other in call.hooks if other is not hooks]
        if not call.hooks:
            setattr(owner, name, call.inner)
