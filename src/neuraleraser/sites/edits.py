"""`record` and `edit`: hooks on, hooks off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic
from weakref import WeakSet

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neuraleraser.errors import SiteError
from neuraleraser.site import Site
from neuraleraser.sites import compiled
from neuraleraser.sites.caches import check_caches
from neuraleraser.sites.edit import Edit, EditContext, EditFunction, F, FunctionEdit
from neuraleraser.sites.forwards import ComponentHooks
from neuraleraser.sites.guard import CallGuard, Observer, Unobserved, join_pipeline, leave_pipeline
from neuraleraser.sites.hooks import SiteHook
from neuraleraser.sites.modules import (
    check_stream,
    components,
    forward_arguments,
    is_denoiser,
    is_text_encoder,
    resolve,
    unwrap,
)
from neuraleraser.sites.threads import WeakReference

_OPEN: WeakSet[CallGuard[Any, Any]] = WeakSet()
"""Guards of hooks that somebody holds, and will take off."""


def no_state() -> None:
    """Return the state of edits that share none."""


def record(
    pipe: Any, sites: Iterable[Site], on_activations: Callable[[Site, Tensor, EditContext[None]], None]
) -> AbstractContextManager[None]:
    """Context manager that calls a function with the activations at each pass through each site.

    Args:
        pipe: The diffusers pipeline.
        sites: The sites.
        on_activations: Called as `on_activations(site, x, context)` with x [B, positions, d]. x is a view of the
            model's own tensor where its layout allows, in the model's dtype, with its gradient: copy what you keep,
            change nothing.

    Returns:
        The context.

    Raises:
        NeuralEraserError: As for `edit`.

    Examples:
        >>> shapes = []
        >>> with record(pipe, [site], lambda site, x, context: shapes.append(x.shape)):
        ...     drawn = generate(pipe, prompts, [0, 1], quick)
        >>> shapes  # two steps, two guidance branches of two images
        [torch.Size([4, 64, 128]), torch.Size([4, 64, 128])]
    """
    return _hooked(pipe, {site: _Recorder(site, on_activations) for site in sites}, Unobserved(no_state, repeats=False))


def edit(
    pipe: Any, edits: Mapping[Site, EditFunction[F]], new_state: Callable[[], F] = no_state
) -> AbstractContextManager[None]:
    """Context manager that adds to each site what its function returns.

    The delta is cast to the output's dtype, and where it is 0 the output keeps its bits. Adding to an update is adding
    to the output.

    Args:
        pipe: The diffusers pipeline.
        edits: A function per site. It gets x [B, positions, d], the tap's value in the model's dtype, and an
            `EditContext`; it returns a delta [B, positions, d], or None to leave the output alone.
        new_state: Makes the state that all functions share in one forward (`context.forward`).

    Raises:
        SiteError: The pipeline does not have a site.
        EraserNotAppliedError: An edit did not run in a denoiser's forward, found no timestep, returned another shape,
            or met NaN or infinity (on a CPU at the end of the forward; on a GPU when latents are decoded, or at the end
            of this context); or a cache that skips blocks is on.

    Examples:
        >>> with edit(pipe, {site: lambda x, context: -0.5 * x}):  # half of what is there
        ...     changed = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(changed, images)
        False
    """
    return _hooked(pipe, edits, Unobserved(new_state))


@contextmanager
def _hooked(pipe: Any, edits: Mapping[Site, EditFunction[F]], observer: Unobserved[F]) -> Iterator[None]:
    """Context manager in which functions edit."""
    hooked = HookedEdits(pipe, {site: FunctionEdit(f) for site, f in edits.items()}, observer)
    try:
        yield
        hooked.check()
    finally:
        hooked.close()


class HookedEdits(Generic[F]):
    """Edits hooked into a pipeline's modules until `close`. Raises as `edit` does.

    `observer` learns of the calls that run them. Plain fields only, so that a deep copy of a pipeline that keeps its
    edits has hooks of its own.
    """

    def __init__(self, pipe: Any, edits: Mapping[Site, Edit[F]], observer: Observer[F, Any]) -> None:
        found = _resolve(pipe, edits)  # nothing is touched before every site is found
        parts = {name: unwrap(module) for name, module in components(pipe).items()}
        self.pipeline = WeakReference(pipe)
        self.guard = CallGuard(pipe, observer)
        hooked = {site.path.split(".")[0]: None for here in found.values() for site, _ in here}
        named = dict.fromkeys([*hooked, *(name for name in parts if is_denoiser(name) or is_text_encoder(name))])
        for name in hooked:
            check_caches(name, parts[name])
        self.components = {name: ComponentHooks(name, parts[name], self.guard) for name in named}
        self.handles: list[RemovableHandle] = []
        for name, hooks in self.components.items():
            self.handles.append(parts[name].register_forward_pre_hook(hooks.start, with_kwargs=True))
        for (module, _), here in found.items():
            hook = SiteHook(self.components[here[0][0].path.split(".")[0]], module, here)
            if here[0][0].tap == "input":
                self.handles.append(module.register_forward_pre_hook(hook.edit_input, with_kwargs=True))
                continue
            self.handles.append(module.register_forward_hook(hook, with_kwargs=True))
            _move_output_capture_hooks_last(module)
        for name, hooks in self.components.items():
            self.handles.append(parts[name].register_forward_hook(hooks.end, with_kwargs=True))
        self.handles += self.guard.hook_autoencoders(pipe)
        self.guard.watch(self.components)
        join_pipeline(pipe, self.guard)
        _OPEN.add(self.guard)

    def check(self) -> None:
        """Raise what could not be raised earlier: NaN or infinity on a GPU, hooks that no call ran."""
        self.guard.check(self.pipeline.get())

    def close(self) -> None:
        """Take everything off again; the second time does nothing."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        _OPEN.discard(self.guard)
        pipe = self.pipeline.get()
        held = components(pipe) if pipe is not None else {}
        if pipe is not None:
            leave_pipeline(pipe, self.guard)
        for name, hooks in self.components.items():
            hooks.active = False
            if name in held:
                compiled.remove_guard(held[name], hooks)


def remove_copied_hooks(pipe: Any) -> None:
    """Take off the hooks that came with a deep copy of a pipeline, or of a part, that was hooked: nobody else can."""
    for part in components(pipe).values():
        for module in unwrap(part).modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    guard = _guard_of(hook)
                    if guard is not None and guard not in _OPEN:
                        del hooks[key]
                        for marks in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                            marks.pop(key, None)
                        leave_pipeline(pipe, guard)


def _guard_of(hook: Any) -> CallGuard[Any, Any] | None:
    """Return the guard of a hook of ours; None of other hooks."""
    owner = getattr(hook, "__self__", hook)
    owner = owner.component if isinstance(owner, SiteHook) else owner
    owner = owner.guard if isinstance(owner, ComponentHooks) else owner
    return owner if isinstance(owner, CallGuard) else None


def _move_output_capture_hooks_last(module: nn.Module) -> None:
    """Put transformers' own hooks behind ours.

    From its first call with `output_hidden_states` on, a text encoder collects its layers' outputs by forward hooks
    that stay. One that runs before ours collects what the edit has not touched, and SDXL and SD3 take the prompt's
    embedding from there, not from the encoder's end.
    """
    hooks = module._forward_hooks
    for key, hook in list(hooks.items()):
        if getattr(hook, "__module__", "") == "transformers.utils.output_capturing":
            hooks[key] = hooks.pop(key)  # to the end


@dataclass
class _Recorder:
    """Edit function that only reports. A class, so that a copied or pickled model can carry it."""

    site: Site
    on_activations: Callable[[Site, Tensor, EditContext[None]], None]

    def __call__(self, x: Tensor, context: EditContext[None]) -> None:
        self.on_activations(self.site, x, context)


def _resolve(pipe: Any, edits: Mapping[Site, Edit[F]]) -> dict[tuple[nn.Module, bool], list[tuple[Site, Edit[F]]]]:
    """Return the edits by module and by whether they edit its input. SiteError for what the pipeline has not."""
    for site in edits:
        if not isinstance(site, Site):
            raise SiteError(f"{site!r} is a {type(site).__name__}, expected a Site; Site.parse(text) makes one.")
    found: dict[tuple[nn.Module, bool], list[tuple[Site, Edit[F]]]] = {}
    for site in sorted(edits):  # an order that does not depend on the caller's
        module = resolve(pipe, site)
        check_stream(site, module)
        found.setdefault((module, site.tap == "input"), []).append((site, edits[site]))
    for name in filter(is_denoiser, {site.path.split(".")[0] for site in edits}):
        component = unwrap(components(pipe)[name])
        arguments = forward_arguments(component)
        if "timestep" not in arguments:
            raise SiteError(
                f"{type(component).__name__} is no denoiser that is known: its forward takes no argument named "
                f"timestep, only {', '.join(arguments)}."
            )
    return found
