"""Small files of the format, whole or of a table that is given."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch

from neuraleraser.io import tensor_file


def saved(folder: Path, **metadata: str) -> Path:
    """A small whole file; `metadata` replaces strings that `save` wrote."""
    path = folder / "a.safetensors"
    tensor_file.save(path, "eraser", {"x": torch.arange(6.0).reshape(2, 3)}, {"concept": "cat"})
    if metadata:
        raw = path.read_bytes()
        n = struct.unpack("<Q", raw[:8])[0]
        table = json.loads(raw[8 : 8 + n])
        table["__metadata__"] |= metadata
        write_raw(path, table, raw[8 + n :])
    return path


def write_raw(path: Path, table: Any, data: bytes = b"") -> None:
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
