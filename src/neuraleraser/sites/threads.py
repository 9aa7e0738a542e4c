"""State of one thread, in objects that are shared by threads, copied and pickled with the modules they hang in."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class PerThread(Generic[T]):
    """One value a thread, made by `make` when the thread first asks. A copy or a pickle starts without any."""

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make
        self.local = threading.local()

    def get(self) -> T:
        """Return this thread's value."""
        try:
            return self.local.value
        except AttributeError:
            self.local.value = self.make()
            return self.local.value

    def __deepcopy__(self, memo: dict[int, Any]) -> PerThread[T]:
        return PerThread(self.make)

    def __reduce__(self) -> tuple[Any, ...]:
        return PerThread, (self.make,)


class WeakReference:
    """A pipeline or a module, as long as someone else holds it.

    A module's hooks must not hold its pipeline: a copy of the module would copy all of it. In a copy of the pipeline
    this is the copy; in a copy of a module alone, and in a pickle, it is none.
    """

    def __init__(self, target: Any = None) -> None:
        self.reference = None if target is None else weakref.ref(target)

    def get(self) -> Any:
        """Return the target, or None."""
        return None if self.reference is None else self.reference()

    def __deepcopy__(self, memo: dict[int, Any]) -> WeakReference:
        return WeakReference(memo.get(id(self.get())))

    def __reduce__(self) -> tuple[Any, ...]:
        return WeakReference, ()
