"""`record` and `edit`: hooks on, checks around the pipeline's own call, hooks off."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neuraleraser.errors import NeuralEraserError, SiteError
from neuraleraser.sites.caches import check_caches
from neuraleraser.sites.hooks import Call, Edit, State, Tap
from neuraleraser.sites.place import DENOISERS, Site, check_stream, forward_arguments, resolve, unwrap


def record(pipe: Any, sites: Iterable[Site], on: Callable[[Site, Tensor, Call], None]) -> AbstractContextManager[None]:
    """Context manager: calls `on(site, x, call)` with x [B, positions, d] at each pass through each site.

    x is a view of the model's own tensor where its layout allows, in the model's dtype, with its gradient:
    copy what you keep, change nothing. Raises as `edit` does.
    """
    return edit(pipe, {site: _Tell(site, on) for site in sites})


@contextmanager
def edit(pipe: Any, edits: Mapping[Site, Edit]) -> Iterator[None]:
    """Context manager: adds to each site what its callable returns.

    Each callable gets x [B, positions, d], the tap's value in the model's dtype, and a `Call`; it returns a
    delta [B, positions, d], or None to leave the output alone. The delta is cast to the output's dtype, and
    where it is 0 the output keeps its bits. Adding to an update is adding to the output.

    Raises SiteError for a site that this pipeline has not; NotApplied where an edit did not run in a denoiser
    forward or in a whole call of the pipeline, found no timestep, returned another shape, or met NaN or
    infinity (on a CPU at the end of the forward; on a GPU or compiled, at the end of the pipeline's call or
    of this context, whichever comes first), and where a cache that skips blocks is on.
    """
    hung = Edits(pipe, edits)
    try:
        yield
        hung.check()
    finally:
        hung.close()


class Edits:
    """Edits hung in a pipeline until `close`: what `edit` holds while it is open. Raises as `edit` does.

    `after` is called once in each call of the pipeline, when its steps are done and before images are returned, with
    the number of images that it draws (None where the pipeline does not tell); where the steps failed, with 0.
    Plain fields only, so that a deep copy of a pipeline that keeps its `Edits` has hooks and `Edits` of its own.
    """

    def __init__(
        self, pipe: Any, edits: Mapping[Site, Edit], after: Callable[[int | None], None] | None = None
    ) -> None:
        self.pipe, self.after = pipe, after
        self.roots = _plan(pipe, edits)  # nothing is touched before every site is found
        for root in self.roots:
            check_caches(root.state.name, root.module)
        self.watch = _watch(pipe)
        self.watch.hung.append(self)
        self.handles: list[RemovableHandle] = []
        for root in self.roots:
            self.handles.append(root.module.register_forward_pre_hook(root.state.enter, with_kwargs=True))
            for module, tap in root.taps:
                if tap.edits[0][0].tap == "input":
                    self.handles.append(module.register_forward_pre_hook(tap.before, with_kwargs=True))
                    continue
                self.handles.append(module.register_forward_hook(tap, with_kwargs=True))
                _let_captures_see(module)
            self.handles.append(root.module.register_forward_hook(root.state.leave))

    def check(self) -> None:
        """NotApplied for what a compiled forward could not raise itself."""
        for root in self.roots:
            root.state.check_missed("a compiled forward")
            root.state.check_finite()

    def close(self) -> None:
        """Take everything off again; the second time does nothing."""
        if self not in self.watch.hung:
            return
        for handle in self.handles:
            handle.remove()
        self.watch.hung.remove(self)
        for root in self.roots:
            for _, tap in root.taps:
                tap.live = False
        if not self.watch.hung:
            self.watch.restore(self.pipe)


def _let_captures_see(module: nn.Module) -> None:
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
class _Tell:
    """An edit that only reports. A class, so that a copied or pickled model can carry it."""

    site: Site
    on: Callable[[Site, Tensor, Call], None]

    def __call__(self, x: Tensor, call: Call) -> None:
        self.on(self.site, x, call)


@dataclass(eq=False)
class _Root:
    """One component of the pipeline, and what one context hangs in it."""

    module: nn.Module
    state: State
    taps: list[tuple[nn.Module, Tap]]


def _plan(pipe: Any, edits: Mapping[Site, Edit]) -> list[_Root]:
    for site in edits:
        if not isinstance(site, Site):
            raise SiteError(f"{site!r} is a {type(site).__name__}, expected a Site; Site.parse(text) makes one.")
    roots: dict[str, _Root] = {}
    found: dict[tuple[nn.Module, bool], list[tuple[Site, Edit]]] = {}
    for site in sorted(edits):  # an order that does not depend on the caller's
        module = resolve(pipe, site)
        check_stream(site, module)
        found.setdefault((module, site.tap == "input"), []).append((site, edits[site]))
    for (module, _), here in found.items():
        name = here[0][0].path.split(".")[0]
        if name not in roots:
            component = unwrap(getattr(pipe, name))
            arguments = forward_arguments(component)
            if name in DENOISERS and "timestep" not in arguments:
                raise SiteError(
                    f"{type(component).__name__} is no denoiser that is known: its forward takes no argument "
                    f"named timestep, only {', '.join(arguments)}."
                )
            index = arguments.index("timestep") if "timestep" in arguments else None
            roots[name] = _Root(component, State(name, index), [])
        root = roots[name]
        tap = Tap(root.state, module, here)
        root.state.taps.append(tap)
        root.taps.append((module, tap))
    return list(roots.values())


class _Watch:
    """Checks around the pipeline's call, shared by all contexts open on it.

    diffusers calls `progress_bar` before it denoises and `maybe_free_model_hooks` just before it returns:
    both are shadowed on the instance. A call in which no hook ran (a denoiser compiled before, or replaced)
    is noticed at its end, even where an earlier forward did run them. Some pipelines (SDXL's inpainting, asked for
    latents) return without the second, so the end of the bar's own `with` is watched too. `prepare_latents` tells
    how many images a call draws: the rows of what it returns.
    """

    def __init__(self, pipe: Any) -> None:
        self.hung: list[Edits] = []
        self.images: int | None = None
        self.told = True  # whether those who are hung were told of the end of the call
        self.own = {name: vars(pipe)[name] for name in _SHADOWED if name in vars(pipe)}
        self.progress_bar, self.free = pipe.progress_bar, pipe.maybe_free_model_hooks
        self.prepare = getattr(pipe, "prepare_latents", None)

    @property
    def roots(self) -> list[_Root]:
        return [root for edits in self.hung for root in edits.roots]

    def prepared(self, *args: Any, **kwargs: Any) -> Any:
        made = self.prepare(*args, **kwargs)  # pyright: ignore[reportOptionalCall]: shadowed only where there is one
        latents = made[0] if isinstance(made, tuple) else made
        self.images = latents.shape[0] if isinstance(latents, Tensor) else None
        return made

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        self.told = False
        for root in self.roots:
            check_caches(root.state.name, root.module)  # one may have been switched on since
            if root.state.timestep_index is not None:  # text encoders ran before this
                root.state.forget()
        bar = self.progress_bar(*args, **kwargs)
        return bar if args or kwargs.get("iterable") is not None else _Bar(bar, self)

    def denoised(self) -> None:
        """What has run once the steps are done: denoiser and text encoders, not yet a VAE."""
        try:
            self._check([r for r in self.roots if r.state.timestep_index is not None or "text_encoder" in r.state.name])
            self._tell(self.images)
        except NeuralEraserError:
            self.failed()
            self.free()  # the pipeline will not come to it
            raise

    def failed(self) -> None:
        self._tell(0)

    def end(self) -> None:
        self.free()  # first, so that offloaded models leave the device whatever follows
        try:
            self._check(self.roots)
            if not self.told:
                self._tell(self.images)
        finally:
            self.images = None
            for root in self.roots:
                root.state.forget()

    def _check(self, roots: list[_Root]) -> None:
        for root in roots:
            root.state.check_visited()
            root.state.check_finite()

    def _tell(self, images: int | None) -> None:
        self.told = True
        for edits in self.hung:
            if edits.after:
                edits.after(images)

    def restore(self, pipe: Any) -> None:
        for name in _SHADOWED:
            if getattr(vars(pipe).get(name), "__self__", None) is self:
                del vars(pipe)[name]
                vars(pipe).update({key: own for key, own in self.own.items() if key == name})


class _Bar:
    """A progress bar whose `with` tells the watch how it ended."""

    def __init__(self, bar: Any, watch: _Watch) -> None:
        self.bar, self.watch = bar, watch

    def __enter__(self) -> Any:
        return self.bar.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> Any:
        answer = self.bar.__exit__(kind, error, trace)
        if kind is None:
            self.watch.denoised()
        else:
            self.watch.failed()
        return answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.bar, name)


_SHADOWED = ("progress_bar", "maybe_free_model_hooks", "prepare_latents")


def _watch(pipe: Any) -> _Watch:
    watch = getattr(vars(pipe).get("maybe_free_model_hooks"), "__self__", None)
    if not isinstance(watch, _Watch):
        watch = _Watch(pipe)
        vars(pipe).update(progress_bar=watch.begin, maybe_free_model_hooks=watch.end)
        if watch.prepare is not None:
            vars(pipe)["prepare_latents"] = watch.prepared
    return watch
