"""Embeddings that stand for a concept in prompts, learned once for a run and kept in its folder."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from neuraleraser.attacks import learn_embeddings
from neuraleraser.errors import FileError
from neuraleraser.evaluation.protocol import Cell
from neuraleraser.io import tensor_file
from neuraleraser.io.locks import claimed
from neuraleraser.io.names import file_name
from neuraleraser.sampling import Images

_KIND = "embeddings"


def learned_once(
    folder: Path, pipe: Any, concept: str, lessons: Sequence[Cell], pictures: Callable[[], Images], steps: int
) -> Tensor:
    """Return the embeddings of a concept [count, d]: those in `folder`, or else learned now and kept there.

    They are learned on the base model, so they are the same for every method. A file that is damaged, or of other
    lessons or steps, is made again. Raises as `learn_embeddings` does.
    """
    path = folder / f"{file_name(concept)}.safetensors"
    digest = hashlib.sha256(repr([(c.prompt, c.start) for c in lessons]).encode()).hexdigest()[:16]
    header = {"concept": concept, "lessons": digest, "steps": steps}
    with claimed(path.with_name(f".{path.name}.claim")):  # another process may be learning them
        if path.exists():
            try:
                tensors, found = tensor_file.load(path, _KIND)
                if found == header:
                    return tensors[_KIND]
            except FileError as error:
                warnings.warn(f"{error}; its embeddings are learned again", stacklevel=2)
        with tqdm(total=steps, desc=f"embeddings, {concept}", unit="step") as bar:

            def on_step(step: int, loss: float) -> None:
                bar.update()

            vectors = learn_embeddings(pipe, pictures(), [c.prompt for c in lessons], steps=steps, on_step=on_step)
        tensor_file.save(path, _KIND, {_KIND: vectors}, header)
    return vectors
