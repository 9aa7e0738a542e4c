"""Traces of one attachment: one for all who run its modules, or one for each pipeline that does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from neuraleraser.eraser.trace import Trace
from neuraleraser.sites.threads import WeakReference


class Traces(Protocol):
    """Traces by pipeline."""

    @property
    def heat(self) -> bool:
        """True if evidence is wanted by position."""
        ...

    def of(self, pipeline: Any) -> Trace:
        """Return the trace of what a pipeline draws; None stands for loops outside any."""
        ...


class OneTrace:
    """One trace of everything that the modules draw."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    @property
    def heat(self) -> bool:
        """True if evidence is wanted by position."""
        return self.trace.heat

    def of(self, pipeline: Any) -> Trace:
        """Return the one trace."""
        return self.trace


class TraceByPipeline:
    """A trace for each pipeline; what is drawn outside any is in that of the first.

    make: makes an empty trace.
    """

    def __init__(self, first: Any, make: Callable[[], Trace]) -> None:
        self.make = make
        self.traces: list[tuple[WeakReference, Trace]] = [(WeakReference(first), make())]

    @property
    def heat(self) -> bool:
        """True if anyone wants evidence by position."""
        return any(trace.heat for _, trace in self.traces)

    def of(self, pipeline: Any) -> Trace:
        """Return the trace of a pipeline, made when it is first asked for."""
        if pipeline is None:
            return self.traces[0][1]
        for holder, trace in self.traces:
            if holder.get() is pipeline:
                return trace
        alive = [(holder, trace) for holder, trace in self.traces[1:] if holder.get() is not None]
        trace = self.make()
        self.traces = [self.traces[0], *alive, (WeakReference(pipeline), trace)]
        return trace

    def continue_from(self, other: TraceByPipeline) -> None:
        """Go on with the images of `other`'s traces."""
        for holder, trace in other.traces:
            pipeline = holder.get()
            if pipeline is not None:
                self.of(pipeline).continue_from(trace)
