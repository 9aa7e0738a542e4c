"""What a judge says, and what it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuraleraser.errors import DataError


@dataclass(frozen=True)
class Judgement:
    """What a judge saw in N images, float32.

    `p_style` [N, styles] sums to 1 over the styles; `p_object` [N, objects] has each object by itself;
    `artefact` [N] is the distance to the nearest kind of real image, None from a judge that measures none.
    """

    p_style: NDArray[np.float32]
    p_object: NDArray[np.float32]
    artefact: NDArray[np.float32] | None


def check(images: Any, size: int | None = None) -> None:
    """Raise DataError unless `images` is uint8 [N, size, size, 3]; of any height and width where `size` is None."""
    shape = f"[N, {size}, {size}, 3]" if size else "[N, H, W, 3]"
    wanted = f"pass a uint8 array {shape}"
    if not isinstance(images, np.ndarray):
        raise DataError(f"the judge was given a {type(images).__name__}: {wanted}")
    if images.dtype != np.uint8:
        raise DataError(f"the judge was given {images.dtype} {list(images.shape)}: {wanted} with values 0-255")
    shaped = images.ndim == 4 and images.shape[3] == 3
    if not shaped or 0 in images.shape[1:3] or (size and images.shape[1:3] != (size, size)):
        raise DataError(f"the judge was given uint8 of shape {list(images.shape)}: {wanted}")
