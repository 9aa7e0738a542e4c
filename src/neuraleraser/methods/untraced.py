"""Methods that cannot tell where they act: what they share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Untraced:
    """Method that cannot tell where it acts, so that every image is drawn with it."""

    def watched(self, pipe: Any) -> AbstractContextManager[None]:
        """Note nothing: it cannot tell where it would act.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields None.
        """
        return nullcontext(None)
