"""The canvas: the embedded model, whose whole world is known.

Nothing else imports its room; and all of it but the words is imported when it is used, as every pipeline asks for its
family.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from neuraleraser.canvas import words
from neuraleraser.families.family import Family, RecommendedSite
from neuraleraser.io.dependencies import import_optional
from neuraleraser.judges import Judge
from neuraleraser.precision import fast_dtype
from neuraleraser.settings import Sampling
from neuraleraser.site import Site

REFERENCE = Path(words.__file__).parent / "weights" / "reference"
GATE = Site("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2")


def matches(pipe: Any) -> bool:
    """Return True if `pipe` has the canvas's small vocabulary, so that its concepts, cells and judges fit."""
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or len(tokenizer) > 5000:
        return False
    v = words.VOCABULARY
    names = (*v.objects, *(style for style in v.styles if style != v.plain))
    known = {word for name in names for word in v.phrases_of(name)[0].split()}
    return all(len(tokenizer.tokenize(word)) == 1 for word in known)


def load(dtype: torch.dtype | None) -> Any:
    """Open the canvas that ships; `dtype` None is bfloat16 where the CPU has it, and float32 elsewhere."""
    from neuraleraser.canvas.pipeline import load_pipeline

    return load_pipeline(dtype=dtype or fast_dtype())


def second_judge() -> Judge:
    """Open the judge that no eraser has seen and that measures artefacts."""
    from neuraleraser.canvas.canvas_judge import CanvasJudge

    return CanvasJudge.load("second")


def render(objects: Sequence[str], style: str, seed: int, size: int) -> NDArray[np.uint8]:
    """Render objects in a style: uint8 [size, size, 3]. Raises MissingDependencyError without OpenCV."""
    renderer = import_optional("neuraleraser.canvas.render", "rendering", "evaluate")
    return renderer.render(renderer.Content(tuple(objects), style), seed, size)


CANVAS = Family(
    name="canvas",
    matches=matches,
    sites=(RecommendedSite(GATE, "any", "styles and objects", "docs/explanation/sites.md"),),
    image_site=Site("unet.up_blocks.2.attentions.0"),
    sampling=Sampling(),
    vocabulary=words.VOCABULARY,
    judge=second_judge,
    render=render,
    reference=REFERENCE,
    load=load,
)
