"""A stream of activations on disk: its blocks, one file each, already mixed over images, positions and timesteps.

A folder holds `shard-000000.safetensors`, ... and `index.safetensors`, which has no tensors but says in its header
what the stream is, how many shards it has, and the size and SHA-256 of each that is written. A shard is whole or
absent, and the index is renamed into place after each: recording that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuraleraser.errors import FileError, SettingsError
from neuraleraser.io import tensor_file
from neuraleraser.io.names import printable
from neuraleraser.sae.mixing_buffer import ActivationRows, MixingBuffer, Stopped, generator_for

INDEX = "index.safetensors"
_KIND, _SHARD, _LABELS = "activations", "activations-shard", "/labels"
_HINT = "delete it and run `neuraleraser collect` again with the same options, which makes what is missing"


@dataclass(frozen=True)
class Shards:
    """A recorded stream: each source's rows, `rows` a shard; `data` says what was recorded.

    Examples:
        >>> shards = write_shards(activation_stream(pipe, prompts, [site], short), "shards", 2, {"model": "canvas"})
        >>> batches = Shards.open("shards").batches(64)(0)  # from step 0 on
        >>> next(batches)[str(site)].shape
        torch.Size([64, 128])
    """

    folder: Path
    data: Mapping[str, Any]
    count: int
    rows: int
    group_size: int
    sources: tuple[str, ...]
    files: tuple[tuple[int, str], ...]  # of each, the file's bytes and its tensors' SHA-256

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Shards:
        """Read the index of a folder.

        Args:
            folder: The folder.

        Returns:
            The shards.

        Raises:
            FileError: The folder is damaged, or lacks shards.
        """
        found = cls._read_index(Path(folder))
        if len(found.files) < found.count:
            raise FileError(
                f"{folder} holds {len(found.files)} of {found.count} shards: run `neuraleraser collect` again with the "
                "same options, which makes the others"
            )
        return found

    @classmethod
    def _read_index(cls, folder: Path) -> Shards:
        """Read the index of a folder. Raises FileError where a field is wrong."""
        path = folder / INDEX
        _, header = tensor_file.load(path, _KIND)
        try:
            numbers = {name: _positive_whole(name, header[name]) for name in ("count", "rows", "group_size")}
            sources = tuple(header["sources"])
            files = tuple((_positive_whole("bytes", size), str(digest)) for size, digest in header["shards"])
            if not isinstance(header["data"], dict) or not all(isinstance(name, str) for name in sources):
                raise ValueError("data is no object, or sources are no names")
            labels = header["data"].get("labels", [])
            if not isinstance(labels, list) or not all(isinstance(name, str) for name in labels):
                raise ValueError("labels are no names")
            if not sources or len(files) > numbers["count"]:
                raise ValueError(f"{len(sources)} sources, {len(files)} shards of {numbers['count']}")
        except (KeyError, TypeError, ValueError) as e:
            raise FileError(f"{path} is no whole index (field {printable(e)}): {_HINT}") from e
        return cls(folder, header["data"], **numbers, sources=sources, files=files)

    @property
    def digest(self) -> str:
        """One hash of all shards: what a training run was made with."""
        return hashlib.sha256("".join(digest for _, digest in self.files).encode()).hexdigest()

    def batches(
        self,
        batch: int,
        seed: int = 0,
        *,
        buffer_chunks: int = 1,
        prefetch: int = 1,
        device: torch.device | str | None = None,
    ) -> MixingBuffer:
        """Return the stream of batches, as `activation_stream` gives it.

        Shards come in random order, then all again in another. A thread reads the next shard, and checks it, while
        batches are used.

        Args:
            batch: Vectors in a batch.
            seed: Decides the order.
            buffer_chunks: Shards that are mixed at a time, in memory.
            prefetch: Shards that the thread reads ahead; 0: no thread.
            device: Device of the batches; None: the CPU.

        Returns:
            The stream.
        """
        if batch % self.group_size:
            raise SettingsError(
                f"batch is {batch}: pass a multiple of the {self.group_size} vectors that stay together"
            )

        def chunk(number: int, stopped: Stopped) -> Mapping[str, ActivationRows]:
            epoch, shard = divmod(number, self.count)
            return self.load(int(torch.randperm(self.count, generator=generator_for(seed, "shards", epoch))[shard]))

        rows = batch // self.group_size
        return MixingBuffer(
            chunk, self.rows, rows, buffer_chunks=buffer_chunks, seed=seed, prefetch=prefetch, device=device
        )

    def load(self, number: int) -> dict[str, ActivationRows]:
        """Read the rows of a shard.

        Args:
            number: Number of the shard, from 0.

        Returns:
            The rows of each source.

        Raises:
            FileError: It is not the one that was written; the message names file and field.
        """
        path, (size, digest) = shard_path(self.folder, number), self.files[number]
        if not path.is_file():
            raise FileError(f"{path} does not exist: run `neuraleraser collect` again with the same options")
        if (found := path.stat().st_size) != size:
            raise FileError(
                f"{path} is truncated or another file: it has {found} bytes, field bytes says {size}: {_HINT}"
            )
        tensors, _ = tensor_file.load(path, _SHARD)
        if (own := _sha256(tensors)) != digest:
            twins = [i for i, (_, other) in enumerate(self.files) if other == own]
            what = f"is shard {twins[0]} under another name" if twins else "was altered"
            raise FileError(f"{path} {what}: its SHA-256 is {own[:12]}, field sha256 says {digest[:12]}: {_HINT}")
        out: dict[str, ActivationRows] = {}
        for source in self.sources:
            rows = tuple(tensors[name] for name in (source, source + _LABELS) if name in tensors)
            if not rows or any(len(x) != self.rows for x in rows):
                raise FileError(f"{path} holds no {self.rows} rows of tensor {source!r}: {_HINT}")
            out[source] = rows
        return out


def write_shards(
    pool: MixingBuffer,
    folder: str | os.PathLike[str],
    count: int,
    data: Mapping[str, Any],
    on_shard: Callable[[int], None] | None = None,
) -> Shards:
    """Record the first blocks of a pool as shards, those that are not there yet.

    Args:
        pool: The stream.
        folder: Folder of the shards.
        count: Blocks to record.
        data: Facts about the stream, as JSON.
        on_shard: Called as `on_shard(number)` for each shard.

    Returns:
        The shards.

    Raises:
        SettingsError: The folder holds another stream.
        FileError: The index is damaged, or the disk is full.

    Examples:
        >>> stream = activation_stream(pipe, prompts, [site], short)
        >>> shards = write_shards(stream, "shards", 2, {"model": "canvas"})
        >>> shards.count, shards.rows
        (2, 64)
    """
    folder, files = Path(folder), list[tuple[int, str]]()
    data = json.loads(json.dumps(dict(data)))  # as it is read back
    if (folder / INDEX).exists():
        old = Shards._read_index(folder)
        pairs = [("count", old.count, count)] + [(k, old.data.get(k), data.get(k)) for k in {**old.data, **data}]
        other = [f"{name} = {was!r}, not {now!r}" for name, was, now in pairs if was != now]
        if other:
            raise SettingsError(f"{folder} holds a stream of {'; '.join(other)}: pass those, or another folder")
        files = list(old.files)
    stream: Iterator[dict[str, ActivationRows]] | None = None
    next_block = 0
    try:
        for number in range(count):
            path = shard_path(folder, number)
            if number < len(files) and path.is_file() and path.stat().st_size == files[number][0]:
                continue
            if stream is None or next_block != number:
                if stream is not None:
                    stream.close()  # type: ignore[attr-defined]
                stream, next_block = pool.blocks(number), number
            block, next_block = next(stream), next_block + 1
            tensors = {}
            for source, rows in block.items():
                tensors |= dict(zip((source, source + _LABELS), rows, strict=False))
            tensor_file.save(path, _SHARD, tensors, {"number": number})
            files[number : number + 1] = [(path.stat().st_size, _sha256(tensors))]
            first = next(iter(block.values()))[0]
            header = {
                "data": data,
                "count": count,
                "rows": len(first),
                "group_size": first.shape[1] if first.ndim == 3 else 1,
                "sources": list(block),
                "shards": files,
            }
            tensor_file.save(folder / INDEX, _KIND, {}, header)
            if on_shard:
                on_shard(number)
    finally:
        if stream is not None:
            stream.close()  # type: ignore[attr-defined]
    return Shards.open(folder)


def shard_path(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / f"shard-{number:06d}.safetensors"


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes and values, not of the file, whose header has its fields in any order."""
    found = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        found.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        found.update(x.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _positive_whole(name: str, value: Any) -> int:
    """Return `value` as it is. Raises ValueError unless it is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**40:
        raise ValueError(f"{name} is {value!r}")
    return value
