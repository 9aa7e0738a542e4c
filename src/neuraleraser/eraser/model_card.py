"""The model card of an eraser, from its header alone: what was measured, with what settings, and the limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from neuraleraser.io.cards import eval_results, header_rows, make_card, plain, table

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

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


def model_card(header: Mapping[str, Any], repo_id: str = "owner/name") -> ModelCard:
    """Return a card whose `str` is Markdown with front matter. `header` is an eraser's, `repo_id` where it lies.

    A header may be a stranger's: its values appear as quoted text, never as markup. Its `measured` maps a metric to
    a number or to {"value", "n", "low", "high"}, which the Hub shows, too; where it has none, the card says so.
    """
    name, kind = plain(header["concept"]), plain(header.get("kind") or "concept")
    base = header.get("base", header.get("model"))
    where = f" of {plain(base)}" if base else ""
    measured = header.get("measured")
    measured = measured if isinstance(measured, Mapping) else {}
    parts = [
        f"# Eraser: {name}",
        f"Takes the {kind} {name} out of the images{where}, with "
        "NeuralEraser. Images in which none of its features fires are the "
        "base model's, bit for bit.",
        "## Use",
        "```python\nfrom neuraleraser import load_eraser, set_erasers\n\n"
        f"name = load_eraser(pipe, {repo_id!r})  # pipe: a diffusers pipeline\n"
        "set_erasers(pipe, name, 1.0)  # 0 changes nothing, 1 is as fitted, up to 2\n```",
        "## What was measured",
        _measured(measured),
        "## Settings",
        table(("setting", "value"), _settings(header)),
        "## Limits",
        _LIMITS,
    ]
    return make_card(
        parts,
        repo_id=repo_id,
        base=base,
        task="text-to-image",
        tags=["concept-erasure"],
        results=eval_results(measured),
    )


def _measured(measured: Mapping[str, Any]) -> str:
    if not measured:
        return (
            "Nothing: this file carries no measurement. `neuraleraser evaluate` measures it on prompts and seeds that "
            "it was not made with."
        )
    rows = []
    for metric, m in measured.items():
        if isinstance(m, Mapping):
            ends = [m.get("low"), m.get("high")]
            interval = " to ".join(plain(e) for e in ends) if None not in ends else ""
            rows.append((metric, m.get("value", ""), interval, m.get("n", "")))
        else:
            rows.append((metric, m, "", ""))
    return table(("metric", "value", "95 % interval", "images"), rows)


def _settings(header: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return all else that the header says."""
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
    shown = ("concept", "kind", "base", "model", "measured", "made_for", "gate", "corrections")
    return rows + header_rows(header, shown)


def _correction(correction: Mapping[str, Any]) -> str:
    also = correction.get("also")
    first = f"{correction.get('kind')} at {correction.get('site')}"
    return ", ".join([first, *(map(str, also) if isinstance(also, list) else ())])
