"""Names that strangers choose: bounded, fit to print in one line, made into file names that stay in their folder."""

from __future__ import annotations

import hashlib
import unicodedata

MAX_NAME = 100
"""Characters of a name, at most."""
MAX_PROMPT = 2000
"""Characters of a prompt, at most; text encoders read a few hundred words."""
_MAX_BYTES = 120  # of a file's stem: file systems take 255, and an ending and a mark of a file being written are added
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
"""Names that Windows gives to devices, whatever ending follows."""


def name_error(name: object) -> str | None:
    """Say why `name` cannot name a concept or an eraser: not text, blank, too long, or not printable; None if it can.

    Printable is as `str.isprintable` has it: no control characters, escapes, line ends, marks that turn the writing
    direction, or halves of surrogate pairs.
    """
    if not isinstance(name, str):
        return f"a name is text, not {type(name).__name__}"
    if not name.strip():
        return "a name is not blank"
    if len(name) > MAX_NAME:
        return f"a name has at most {MAX_NAME} characters, and this one {len(name)}"
    if not name.isprintable():
        return f"the name {printable(name)!r} has control characters or others that cannot be printed"
    return None


def prompt_error(prompt: str) -> str | None:
    """Say why `prompt` cannot be drawn: too long, or with control characters (blanks and line ends apart) or halves of
    surrogate pairs, which no tokenizer reads; None if it can."""
    if len(prompt) > MAX_PROMPT:
        return f"the prompt {printable(prompt, 40)!r} has {len(prompt)} characters, more than {MAX_PROMPT}"
    if any(unicodedata.category(c) in ("Cc", "Cs") and not c.isspace() for c in prompt):
        return f"the prompt {printable(prompt)!r} has control characters or others that are no text"
    return None


def printable(text: object, most: int = 100) -> str:
    """Return `text` in one line that a terminal shows as it is: blanks joined, other characters that cannot be printed
    as "?", cut at `most` characters."""
    raw = str(text)
    line = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in raw[: 4 * most])
    line = " ".join(line.split())
    return line if len(line) <= most and len(raw) <= 4 * most else line[: most - 3] + "..."


def file_name(name: str) -> str:
    """Return the stem of a file (or the name of a folder) for something named `name`.

    Letters, digits, "-", "_", "." and inner blanks stay, so "Van_Gogh" is "Van_Gogh"; everything else becomes "-". A
    name that is changed so, starts with a dot, is long, or is a device's on Windows, gets eight digits of its hash: two
    names never share a file, on file systems that tell capitals apart.
    """
    plain = unicodedata.normalize("NFC", name)
    stem = "".join(c if c.isalnum() or c in "-_. " else "-" for c in plain).strip(" .")
    stem = stem.encode()[:_MAX_BYTES].decode(errors="ignore").strip(" .")
    if stem and stem == name and stem.split(".")[0].strip().lower() not in _RESERVED:
        return stem
    digits = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{stem}-{digits}" if stem else digits
