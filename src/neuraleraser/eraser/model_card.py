"""The model card of an eraser, from its header alone: what was measured, with what settings, and the limits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from neuraleraser.eraser.hub import HUB_ID

_LONG = 300  # characters of one value

_LIMITS = """\
- It fits the pipeline that it was made with. On another one it is refused where a site is missing or has another
  width; on other weights of the same shape it runs, and nobody has measured what it does there.
- It acts where its features fire. An image of the concept in which they do not fire keeps the concept, and an image
  without the concept in which they do fire is changed.
- Its gate reads what the image takes out of the prompt, and its corrections change the prompt. A start image, an
  inverted latent or an embedding that was learned through it brings the concept back.
- It was made from the prompts that its file lists. Other words, other languages and prompts searched for on purpose may
  get round it; none of that is measured unless a figure above says so.
- It changes activations while images are drawn and leaves the weights as they are: who holds the weights can take it
  off.
- Caches that skip blocks are refused. A LoRA may be loaded beside it; one that is fused into the weights changes the
  activations that it reads.
"""


def model_card(header: Mapping[str, Any], repo: str = "owner/name") -> str:
    """Markdown with front matter. `header` is an eraser's, `repo` where it can be loaded from.

    A header may be a stranger's: its values appear as quoted text, never as markup. Its `measured` maps a metric to
    a number or to {"value", "n", "low", "high"}; where it has none, the card says so.
    """
    name, kind = _line(header["concept"]), _line(header.get("kind") or "concept")
    base = header.get("base", header.get("model"))
    where = f" of {_line(base)}" if base else ""
    parts = [
        _front(base),
        f"# Eraser: {name}",
        f"Takes the {kind} {name} out of the images{where}, with "
        "NeuralEraser. Images in which none of its features fires are the "
        "base model's, bit for bit.",
        "## Use",
        "```python\nfrom neuraleraser import load_eraser, set_erasers\n\n"
        f"name = load_eraser(pipe, {repo!r})  # pipe: a diffusers pipeline\n"
        "set_erasers(pipe, name, 1.0)  # 0 changes nothing, 1 is as fitted, up to 2\n```",
        "## What was measured",
        _measured(header.get("measured")),
        "## Settings",
        _table(("setting", "value"), _settings(header)),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _front(base: Any) -> str:
    lines = ["---", "library_name: neuraleraser", "pipeline_tag: text-to-image"]
    if isinstance(base, str) and HUB_ID.fullmatch(base):  # anything else could be read as more front matter
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join([*lines, "tags:", "- neuraleraser", "- concept-erasure", "- sparse-autoencoder", "---"])


def _measured(measured: Any) -> str:
    if not isinstance(measured, Mapping) or not measured:
        return (
            "Nothing: this file carries no measurement. `neuraleraser evaluate` measures it on prompts and seeds that "
            "it was not made with."
        )
    rows = []
    for metric, m in measured.items():
        if isinstance(m, Mapping):
            ends = [m.get("low"), m.get("high")]
            interval = " to ".join(_line(e) for e in ends) if None not in ends else ""
            rows.append((metric, m.get("value", ""), interval, m.get("n", "")))
        else:
            rows.append((metric, m, "", ""))
    return _table(("metric", "value", "95 % interval", "images"), rows)


def _settings(header: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """All else that the header says, one level deep."""
    rows: list[tuple[str, Any]] = []
    made = header.get("made_for")
    if isinstance(made, Mapping):
        rows.append(("made for", made.get("class")))
    gate = header.get("gate")
    if isinstance(gate, Mapping):
        rows.append(("gate", gate.get("site")))
    corrections = header.get("corrections")
    if isinstance(corrections, list):
        rows += [("correction", _correction(c)) for c in corrections if isinstance(c, Mapping)]
    for key, value in header.items():
        if key in ("concept", "kind", "base", "model", "measured", "made_for", "gate", "corrections"):
            continue
        if isinstance(value, Mapping):
            rows += [(f"{key}: {inner}", v) for inner, v in value.items()]
        else:
            rows.append((key, value))
    return rows


def _correction(correction: Mapping[str, Any]) -> str:
    also = correction.get("also")
    first = f"{correction.get('kind')} at {correction.get('site')}"
    return ", ".join([first, *(map(str, also) if isinstance(also, list) else ())])


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, ("---",) * len(head), *[[_line(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(value: Any) -> str:
    """A value as one line of plain text: no character of it is markup."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text if len(text) <= _LONG else text[: _LONG - 3] + "..."
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#!$]|_(?!\w)|(?<!\w)_)", r"\\\1", text)
