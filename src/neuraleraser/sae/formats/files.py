"""Strangers' files as plain data: bounded, checked, refused in one sentence that names the file and the field.

Nothing in them is executed: JSON is parsed, pickles load through `weights_only`, arrays without pickles. No file
may unpack to much more than it is, and no tensor may claim more numbers than its file holds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neuraleraser.artifact import MAX_HEADER
from neuraleraser.errors import DataError, FileError

_AGAIN = "fetch it again, or pass its format by name"
# Weights hardly compress, so an archive that unpacks to more than this is not one of weights.
_SWELL, _SLACK = 4, 2**24


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, of at most 16 MB, without NaN or infinity."""
    try:
        if path.stat().st_size > MAX_HEADER:
            raise FileError(f"{path} is over {MAX_HEADER >> 20} MB: that is no configuration file")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as e:
        raise FileError(f"{path} could not be read ({e.strerror}): check the path, and fetch the whole folder") from e
    except (ValueError, RecursionError) as e:
        raise FileError(f"{path} is not sound JSON ({type(e).__name__}): {_AGAIN}") from e
    if not isinstance(value, dict):
        raise FileError(f"{path} holds {type(value).__name__}, not a JSON object: {_AGAIN}")
    return value


def read_pickle(path: Path, again: str = _AGAIN) -> Any:
    """What `torch.save` wrote to `path`: tensors, numbers, text, lists and dicts; anything else is refused.

    `again`: what to do about a file that is no archive.
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
        raise FileError(f"{path} holds {type(state).__name__}, not a state dict: {_AGAIN}")
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
                    raise FileError(f"{path} claims shape {shape} for {_short(info.filename)} and holds less: {_AGAIN}")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except FileError:
        raise
    except Exception as e:  # a damaged archive can fail in any way
        raise FileError(f"{path} is not a whole npz file of plain arrays ({type(e).__name__}): {_AGAIN}") from e


def take(tensors: Mapping[str, Any], name: str, shape: tuple[int | None, ...], path: Path) -> Tensor:
    """Tensor `name` in float64, once it is a dense, finite float tensor of `shape` (None: any size but 0)."""
    x = tensors.get(name)
    if not isinstance(x, Tensor):
        held = [key for key, value in tensors.items() if isinstance(value, Tensor)]
        raise FileError(f"{path} has no tensor {name!r} (it has {_short(', '.join(map(str, held)))}): {_AGAIN}")
    sound = x.layout == torch.strided and x.device.type == "cpu" and x.is_floating_point() and x.element_size() > 1
    if not sound or x.numel() * x.element_size() > x.untyped_storage().nbytes():
        raise FileError(f"{path} has a tensor {name!r} that is no whole dense float tensor ({x.dtype}): {_AGAIN}")
    fits = x.ndim == len(shape) and all(a == b or (b is None and a > 0) for a, b in zip(x.shape, shape, strict=True))
    if not fits:
        wanted = tuple("any" if size is None else size for size in shape)
        raise FileError(f"{path} has tensor {name!r} of shape {tuple(x.shape)}: expected {wanted}")
    if not bool(torch.isfinite(x).all()):
        raise FileError(f"{path} holds NaN or infinity in tensor {name!r}: {_AGAIN}")
    return x.detach().double()


def size(config: Mapping[str, Any], name: str, most: int, path: Path) -> int:
    """The whole number `name` of a configuration, from 1 to `most`."""
    value = config.get(name)
    if type(value) is not int or not 1 <= value <= most:
        raise FileError(f"{path} has {name} = {_short(repr(value))}: expected a whole number from 1 to {most}")
    return value


def agree(config: Mapping[str, Any], name: str, is_: int, path: Path) -> None:
    """Refuse a configuration whose `name`, where it is given, is not what the tensors say."""
    if config.get(name) not in (None, is_):
        raise FileError(f"{path} has {name} = {_short(repr(config[name]))}, but the tensors beside it have {is_}")


def flag(config: Mapping[str, Any], name: str, default: bool, path: Path) -> bool:
    """The switch `name` of a configuration."""
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise FileError(f"{path} has {name} = {_short(repr(value))}: expected true or false")
    return value


def unsupported(path: Path, name: str, value: Any, why: str) -> FileError:
    """The refusal of a file that is sound and says something that an SAE of ours cannot be."""
    return FileError(f"{path} has {name} = {_short(repr(value))}: {why}")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write `value` to `path`, in one piece or not at all."""
    try:
        text = json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise DataError(f"the header for {path} is not JSON ({e}): pass text, finite numbers, lists") from e
    if len(text) > MAX_HEADER:
        raise DataError(f"{path} would be over {MAX_HEADER >> 20} MB of JSON: shorten the SAE's header")
    with _aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_pickle(path: Path, value: Any) -> None:
    """Write `value`, as `read_pickle` reads it, to `path`, in one piece or not at all."""
    with _aside(path) as aside:
        torch.save(value, aside)


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except (OSError, RuntimeError) as e:  # RuntimeError: torch's own writer
        raise FileError(f"{path} could not be written ({_short(str(e))}): check the path and space") from e
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _check_archive(path: Path, again: str = _AGAIN) -> None:
    """Refuse what is no zip archive (torch has written those since 1.6) or unpacks to far more than it is."""
    try:
        held = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
    except FileNotFoundError as e:
        raise FileError(f"{path} does not exist: check the path") from e
    except OSError as e:
        raise FileError(f"{path} could not be read ({e.strerror}): check the path and permissions") from e
    except Exception as e:
        raise FileError(f"{path} is not a whole archive of tensors ({type(e).__name__}): {again}") from e
    if unpacked > _SWELL * held + _SLACK:
        raise FileError(f"{path} would unpack from {held} to {unpacked} bytes: that is no file of weights")


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _short(text: str) -> str:
    """A stranger's text, in one line of bounded length."""
    line = "".join(c if c.isprintable() else "?" for c in text[:101])
    return line if len(line) <= 100 else line[:97] + "..."
