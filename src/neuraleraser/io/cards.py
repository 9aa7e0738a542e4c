"""Model cards: metadata by the Hub's own client, and text in which a stranger's values are never markup."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from neuraleraser.io.hub import HUB_ID

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

_MAX_VALUE_CHARACTERS = 300  # characters of one value
_METRIC = re.compile(r"\w[\w.-]{0,59}", re.ASCII)
_MAX_METRIC = 1e9


def make_card(
    parts: Sequence[str],
    *,
    repo_id: str,
    base: Any = None,
    task: str | None = None,
    tags: Sequence[str] = (),
    results: Sequence[EvalResult] = (),
) -> ModelCard:
    """Return a card of Markdown `parts`, with metadata that the Hub reads.

    base: a header's word for the model that it is for, which is metadata where it is a Hub id. task: as the Hub names
    tasks. results: figures that the Hub shows.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="neuraleraser",
        pipeline_tag=task,
        base_model=base if isinstance(base, str) and HUB_ID.fullmatch(base) else None,
        tags=["neuraleraser", "sparse-autoencoder", *tags],
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=list(results) or None,
    )
    body = "\n\n".join(part.strip("\n") for part in parts)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def eval_results(measured: Mapping[str, Any]) -> list[EvalResult]:
    """Return the figures of {metric: number or {"value": number}} that have plain names and finite values."""
    from huggingface_hub import EvalResult

    values = {metric: m.get("value") if isinstance(m, Mapping) else m for metric, m in measured.items()}
    return [
        EvalResult("text-to-image", "prompts", "prompts and seeds of `neuraleraser evaluate`", metric, value)
        for metric, value in values.items()
        if _METRIC.fullmatch(metric)
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and -_MAX_METRIC <= value <= _MAX_METRIC
    ]


def header_rows(header: Mapping[str, Any], without: Iterable[str] = ()) -> list[tuple[str, Any]]:
    """Return the fields of a header, one level deep, but for some."""
    rows: list[tuple[str, Any]] = []
    for key, value in header.items():
        if key in without:
            continue
        if isinstance(value, Mapping):
            rows += [(f"{key}: {inner}", v) for inner, v in value.items()]
        else:
            rows.append((key, value))
    return rows


def table(head: tuple[str, ...], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ("---",) * len(head), *[[plain(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(value: Any) -> str:
    """Return a value as one line of plain text: no character of it is markup."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    text = text if len(text) <= _MAX_VALUE_CHARACTERS else text[: _MAX_VALUE_CHARACTERS - 3] + "..."
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|~#!$]|_(?!\w)|(?<!\w)_)", r"\\\1", text)
