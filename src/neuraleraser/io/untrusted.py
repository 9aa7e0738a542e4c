"""Strangers' files as plain data: bounded, checked, refused in one sentence that names the file and the field.

Nothing in them is executed: JSON is parsed, pickles load through `weights_only`, arrays without pickles. No file
may unpack to much more than it is, and no tensor may claim more numbers than its file holds.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuraleraser.errors import FileError
from neuraleraser.io.names import printable
from neuraleraser.io.reading import MAX_JSON, check_regular, parse_json, read_bytes

_RETRY_HINT = "fetch it again, or pass its format by name"
MAX_EXPANSION, _SLACK = 4, 2**24
"""Weights hardly compress: an archive that unpacks to more than four times its size (and 16 MB) is not one of them."""
MAX_BYTES = 2**35
"""Bytes of an archive, at most: 32 GB, eight times the SAE of 131,072 features on 4,096 dimensions in float32."""


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`, of at most 16 MB, as `reading.parse_json` reads JSON. Raises FileError."""
    try:
        value = parse_json(read_bytes(path, MAX_JSON))
    except ValueError as error:
        raise FileError(f"{path} is not sound JSON ({printable(error)}): {_RETRY_HINT}") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} holds {type(value).__name__}, not a JSON object: {_RETRY_HINT}")
    return value


def read_pickle(path: Path, again: str = _RETRY_HINT) -> Any:
    """Read what `torch.save` wrote to `path`: tensors, numbers, text, lists and dicts; anything else is refused.

    `again`: advice about a file that is no archive.
    """
    _check_archive(path, again)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged pickle can fail in any way
        raise FileError(f"{path} is refused ({type(e).__name__}): it must hold only tensors and plain values") from e


def read_state(path: Path) -> dict[str, Any]:
    """The state dict that `torch.save` wrote to `path`."""
    state = read_pickle(path)
    if not isinstance(state, dict):
        raise FileError(f"{path} holds {type(state).__name__}, not a state dict: {_RETRY_HINT}")
    return state


def read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays of an npz file, as tensors."""
    _check_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as f:
                    major, _ = np.lib.format.read_magic(f)
                    header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
                    shape, _, dtype = header(f)
                if math.prod(shape) * dtype.itemsize > info.file_size:
                    raise FileError(
                        f"{path} claims shape {shape} for {printable(info.filename)} and holds less: {_RETRY_HINT}"
                    )
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except FileError:
        raise
    except Exception as e:  # a damaged archive can fail in any way
        raise FileError(f"{path} is not a whole npz file of plain arrays ({type(e).__name__}): {_RETRY_HINT}") from e


def get_tensor(tensors: Mapping[str, Any], name: str, shape: tuple[int | None, ...], path: Path) -> Tensor:
    """Tensor `name` in float64, once it is a dense, finite float tensor of `shape` (None: any size but 0)."""
    x = tensors.get(name)
    if not isinstance(x, Tensor):
        held = [key for key, value in tensors.items() if isinstance(value, Tensor)]
        raise FileError(f"{path} has no tensor {name!r} (it has {printable(', '.join(map(str, held)))}): {_RETRY_HINT}")
    sound = x.layout == torch.strided and x.device.type == "cpu" and x.is_floating_point() and x.element_size() > 1
    if not sound or x.numel() * x.element_size() > x.untyped_storage().nbytes():
        raise FileError(f"{path} has a tensor {name!r} that is no whole dense float tensor ({x.dtype}): {_RETRY_HINT}")
    fits = x.ndim == len(shape) and all(a == b or (b is None and a > 0) for a, b in zip(x.shape, shape, strict=True))
    if not fits:
        wanted = tuple("any" if size is None else size for size in shape)
        raise FileError(f"{path} has tensor {name!r} of shape {tuple(x.shape)}: expected {wanted}")
    if not bool(torch.isfinite(x).all()):
        raise FileError(f"{path} holds NaN or infinity in tensor {name!r}: {_RETRY_HINT}")
    return x.detach().double()


def get_int(config: Mapping[str, Any], name: str, most: int, path: Path) -> int:
    """The whole number `name` of a configuration, from 1 to `most`."""
    value = config.get(name)
    if type(value) is not int or not 1 <= value <= most:
        raise FileError(f"{path} has {name} = {printable(repr(value))}: expected a whole number from 1 to {most}")
    return value


def expect_equal(config: Mapping[str, Any], name: str, is_: int, path: Path) -> None:
    """Refuse a configuration whose `name`, where it is given, is not what the tensors say."""
    if config.get(name) not in (None, is_):
        raise FileError(f"{path} has {name} = {printable(repr(config[name]))}, but the tensors beside it have {is_}")


def get_bool(config: Mapping[str, Any], name: str, default: bool, path: Path) -> bool:
    """The switch `name` of a configuration."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise FileError(f"{path} has {name} = {printable(repr(value))}: expected true or false")
    return value


def unsupported(path: Path, name: str, value: Any, why: str) -> FileError:
    """The refusal of a file that is sound and says something that an SAE of ours cannot be."""
    return FileError(f"{path} has {name} = {printable(repr(value))}: {why}")


def _check_archive(path: Path, again: str = _RETRY_HINT) -> None:
    """Refuse what is no zip archive (torch has written those since 1.6) or unpacks to far more than it is."""
    held = check_regular(path)
    if held > MAX_BYTES:
        raise FileError(
            f"{path} has {held:,} bytes, over the bound of {MAX_BYTES:,} for a dictionary: pass another file"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
    except Exception as e:  # a damaged archive can fail in any way
        raise FileError(f"{path} is not a whole archive of tensors ({type(e).__name__}): {again}") from e
    if unpacked > MAX_EXPANSION * held + _SLACK:
        raise FileError(f"{path} would unpack from {held} to {unpacked} bytes: that is no file of weights")
