"""Files as a hostile stranger would make them: each a mutation, decided by a seed, of one that is whole."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

HUGE = 10**400
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 1.5, -1e308, 1e308, 5e-324, 2**31, 2**63, -(2**63), 2**64, HUGE, "", " ", "x",
    "nan", "Cats", "../../../x", "/etc/passwd", "..\\..\\x", "a/b", "CON", "\x00", "a\nb", "\x1b[31mred",
    "\u202eabc", "\ud800", "\u2028", "x" * 101, "x" * 5000, "é" * 90, "unet", "unet.__class__", "unet.forward",
    "scheduler", "device",
    "text_encoder.encoder", "unet.mid_block:steal:image", "unet.mid_block", "nothing.at.all", "unet.up_blocks.1",
    "style", "object", "learnt", "scale", "replace", [], {}, [[]], [None], {"": {}}, [1, 2, 3, 4],
    ["a", "b"], [["a", "b"]], list(range(2000)), {"a": 1}, {"concept": "x"},
]  # fmt: skip
DTYPES = [
    "BOOL",
    "U8",
    "I8",
    "I16",
    "I32",
    "I64",
    "F16",
    "BF16",
    "F32",
    "F64",
    "F8_E4M3",
    "F4",
    "C64",
    "",
    "f32",
    "X" * 99,
]
SIZES = [0, 1, 2, 3, 4, 5, 8, 16, 64, 2**16, 2**31, 2**32, 2**62, 2**63, 2**64, -1, HUGE, 1.5, "2", None, [2]]
NUMBERS = {
    "e": [0x7C00, 0xFC00, 0x7E00, 0x7BFF, 0x0001, 0x8000, 0xBC00],  # float16: infinities, NaN, largest, least, -0, -1
    "f": [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 0x00000001, 0x80000000, 0xBF800000],
}
RAW_JSON = [
    '{"a":1,"a":2}',
    "NaN",
    "-Infinity",
    "1e999",
    "[" * 2000 + "]" * 2000,
    '{"a":' * 900 + "1" + "}" * 900,
    "9" * 5000,
]


def any_value(r: random.Random) -> Any:
    return copy.deepcopy(r.choice(VALUES))  # it may be changed in its turn


def bytes_of(r: random.Random, data: bytes) -> bytes:
    """Flip bits, cut, double, overwrite, insert: anywhere, and most of all near the start."""
    out = bytearray(data)
    for _ in range(r.choice([1, 1, 1, 2, 5, 30])):
        at = r.randrange(max(1, len(out) if r.random() < 0.5 else min(len(out), 400)))
        what = r.randrange(6)
        if what == 0 and out:
            out[at % len(out)] ^= 1 << r.randrange(8)
        elif what == 1:
            del out[at:]
        elif what == 2:
            out[at : at + r.randrange(1, 9)] = r.randbytes(r.randrange(1, 9))
        elif what == 3:
            out[at:at] = r.randbytes(r.randrange(1, 40))
        elif what == 4:
            out += out[at : at + 64]
        else:
            out[:8] = struct.pack(
                "<Q", r.choice([0, 1, len(out), max(0, len(out) - 8), 2**24, 2**24 + 1, 2**62, 2**64 - 1])
            )
    return bytes(out)


def json_of(r: random.Random, value: Any) -> Any:
    """A value with one to three of its parts replaced, taken out, put in or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(r.choice([1, 1, 1, 2, 3])):
        holder: Any = {"": value}
        key: Any = ""
        while isinstance(holder[key], (dict, list)) and holder[key] and r.random() < 0.8:
            holder = holder[key]
            key = r.choice(list(holder)) if isinstance(holder, dict) else r.randrange(len(holder))
        what = r.random()
        if what < 0.6:
            holder[key] = any_value(r)
        elif what < 0.75 and not (holder is value or key == ""):
            del holder[key]
        elif what < 0.9 and isinstance(holder[key], dict):
            holder[key][r.choice(["concept", "kind", "x", "", "made_for", "also", "__class__"])] = any_value(r)
        elif isinstance(holder[key], list):
            holder[key] = holder[key] * 2
        value = holder[""] if "" in holder and key == "" and isinstance(holder, dict) else value
    return value


def text_of(r: random.Random, value: Any) -> str:
    """JSON text of a value, now and then with text in it that is no JSON, or JSON of two meanings."""
    text = json.dumps(value)
    if r.random() < 0.2 and ": " in text:
        parts = text.split(": ")
        at = r.randrange(1, len(parts))
        end = next((i for i, c in enumerate(parts[at]) if c in ",}]"), len(parts[at]))
        parts[at] = r.choice(RAW_JSON) + parts[at][end:]
        text = ": ".join(parts)
    if r.random() < 0.1 and text.startswith("{") and len(text) > 2:  # the same key again
        key = text[1:].split(":", 1)[0]
        text = f"{{{key}: {json.dumps(any_value(r))}, {text[1:]}"
    return text


def safetensors_of(r: random.Random, data: bytes) -> bytes:
    """A file of ours or another library's: bytes, its table, its metadata, its header, or its numbers are changed."""
    kind = r.random()
    if kind < 0.3:
        return bytes_of(r, data)
    size = struct.unpack("<Q", data[:8])[0]
    table, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    names = [name for name in table if name != "__metadata__"]
    metadata = table.get("__metadata__", {})
    if kind < 0.6 and "header" in metadata:
        metadata["header"] = text_of(r, json_of(r, json.loads(metadata["header"])))
    elif kind < 0.65:
        table["__metadata__"] = json_of(r, metadata)
    elif kind < 0.85 and names:
        entry = table[r.choice(names)]
        what = r.randrange(5)
        if what == 0:
            entry["dtype"] = r.choice(DTYPES)
        elif what == 1:
            entry["shape"] = [r.choice(SIZES) for _ in range(r.choice([0, 1, 2, 3, 9, 500]))]
        elif what == 2:
            entry["data_offsets"] = [r.choice([*SIZES, len(body)]), r.choice([*SIZES, len(body)])]
        elif what == 3:  # another's name, another's bytes, or none
            other = r.choice(names)
            table[r.choice([other, "edit0/up", "gate/x", "W_enc", "../x", "\x1b", ""])] = table.pop(r.choice(names))
            table[other] = table.get(other, entry)
        else:
            axes = [n for n in entry["shape"] if n]
            r.shuffle(axes)
            entry["shape"] = axes + [1] * r.randrange(2)
    elif body and names:
        entry = table[r.choice(names)]
        first, last = entry["data_offsets"]
        width = 2 if entry["dtype"] in ("F16", "BF16", "I16") else 4
        for _ in range(r.choice([1, 1, 5, 100])):
            if last - first >= width:
                at = first + width * r.randrange((last - first) // width)
                bits = r.choice(NUMBERS["e" if width == 2 else "f"])
                body[at : at + width] = struct.pack("<H" if width == 2 else "<I", bits)
    text = text_of(r, table) if r.random() < 0.1 else json.dumps(table)
    return struct.pack("<Q", len(text.encode(errors="surrogatepass"))) + text.encode(errors="surrogatepass") + body


def config_of(r: random.Random, data: bytes) -> bytes:
    """A JSON file."""
    if r.random() < 0.3:
        return bytes_of(r, data)
    return text_of(r, json_of(r, json.loads(data))).encode(errors="surrogatepass")


MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    ".safetensors": safetensors_of,
    ".json": config_of,
    ".pth": bytes_of,
    ".pt": bytes_of,
}
