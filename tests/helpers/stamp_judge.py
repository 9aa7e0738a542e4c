"""A judge that reads stamped pixels, and how images get them: what the prompt says, and whether they were changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import CLIPTextModel

from helpers import pipelines
from neuraleraser.canvas import words
from neuraleraser.judges import Judgement
from neuraleraser.sampling import Images, generate

STYLES = ("Seed_Images", "Van_Gogh", "Mosaic")
OBJECTS = ("Cats", "Dogs", "Horses")


class StampJudge:
    """Sees what the first pixels say; where the rest is not what it first saw for a prompt and seed, nothing of the
    concepts (so that an edit counts as an erasure), and an artefact.

    Its thresholds are not 0.5: what is there has 0.4, above a threshold of 0.3, what is not has 0.2.
    """

    styles, objects = STYLES, OBJECTS
    artefact_threshold: float | None = 10.0
    figures = {"style": 0.99, "object": 0.98}  # noqa: RUF012

    def __init__(self, stop_at: int = -1) -> None:
        self.thresholds = dict.fromkeys((*STYLES, *OBJECTS), 0.3)
        self.first: dict[bytes, bytes] = {}
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, images: Images, /) -> Judgement:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        p_style, p_object = (np.full((len(images), 3), 0.2, np.float32) for _ in range(2))
        artefact = np.ones(len(images), np.float32)
        for i, image in enumerate(images):
            flat = image.reshape(-1)
            same = self.first.setdefault(flat[:16].tobytes(), flat[16:].tobytes()) == flat[16:].tobytes()
            p_style[i, flat[0] if same else 0] = 0.4
            p_object[i, np.flatnonzero(flat[1:4])] = 0.4
            artefact[i] = 1 if same else 20
        return Judgement(p_style, p_object, artefact)


class ByteJudge(StampJudge):
    """Sees something of everything, by an image's own bytes."""

    def __call__(self, images: Images, /) -> Judgement:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        seen = (images.reshape(len(images), -1)[:, :6] / 255).astype(np.float32)
        return Judgement(seen[:, :3], seen[:, 3:], seen[:, 0])


def stamp(prompt: str, seed: int, image: np.ndarray) -> np.ndarray:
    def named(name: str) -> bool:
        return any(phrase in prompt for phrase in words.VOCABULARY.phrases_of(name))

    marks = [next((i for i, s in enumerate(STYLES) if i and named(s)), 0), *(int(named(o)) for o in OBJECTS)]
    marks += [ord(c) % 256 for c in prompt[:4].ljust(4)] + list(seed.to_bytes(8, "little"))
    out = image.copy()
    out.reshape(-1)[:16] = marks
    return out


def stamping(pipe: Any, prompts: Any, seeds: Any, s: Any, **more: Any) -> Images:
    """`generate`, stamped."""
    images = generate(pipe, prompts, seeds, s, **more)
    return np.stack([stamp(p, seed, x) for p, seed, x in zip(prompts, seeds, images, strict=True)])


def reader() -> Any:
    """The tiny Stable Diffusion with a text encoder that reads whole prompts."""
    pipe = pipelines.stable_diffusion()
    torch.manual_seed(1)
    parts: Any = {
        **pipe.components,
        "tokenizer": pipelines.tokenizer(64),
        "text_encoder": CLIPTextModel(pipelines.clip_text(max_position_embeddings=64)).eval(),
    }
    made = type(pipe)(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made
