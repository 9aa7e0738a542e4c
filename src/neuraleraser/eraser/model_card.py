"""The model card of an eraser, from its header alone: what was measured, with what settings, and the limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from neuraleraser.eraser.header import EraserHeader
from neuraleraser.eraser.sight import routes_text
from neuraleraser.io.cards import eval_results, header_rows, make_card, plain, table

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

_SHOWN_FIELDS = ("concept", "kind", "base", "measured", "made_for")
_LIMITS = """\
- It fits the pipeline that it was made with. On another one it is refused where a site is missing or has another
  width; on other weights of the same shape it runs, and nobody has measured what it does there.
- It acts where its features fire. An image of the concept in which they do not fire keeps the concept, and an image
  without the concept in which they do fire is changed.
- {routes}
- It was made from the prompts that its file lists. Other words, other languages and prompts searched for on purpose may
  get round it; none of that is measured unless a figure above says so.
- It changes activations while images are generated and leaves the weights as they are: who holds the weights can
  take it off.
- Caches that skip blocks are refused. A LoRA may be loaded beside it; one that is fused into the weights changes the
  activations that it reads.
"""


def model_card(
    header: EraserHeader, repo_id: str = "owner/name", settings: Sequence[tuple[str, str]] = ()
) -> ModelCard:
    """Return an eraser's model card.

    The header may be a stranger's: its values appear as quoted text, never as markup. The Hub also shows what it has
    `measured`; if nothing was measured, the card says so.

    Args:
        header: The eraser's header.
        repo_id: "owner/name" of its repository.
        settings: Names and values to list before those in the header.

    Returns:
        A card whose `str` is Markdown with front matter.

    Examples:
        >>> print(model_card(eraser.header, "owner/van-gogh"))
        ---
        ...
        # Eraser: Van_Gogh
        ...
    """
    name, kind = plain(header.concept), plain(header.kind or "concept")
    where = f" of {plain(header.base)}" if header.base else ""
    made = [("made for", header.made_for.model_class)] if header.made_for else []
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
        _measured(header.measured),
        "## Settings",
        table(("setting", "value"), [*made, *settings, *header_rows(header.as_json(), _SHOWN_FIELDS)]),
        "## Limits",
        _LIMITS.format(routes=routes_text(header)),
    ]
    return make_card(
        parts,
        repo_id=repo_id,
        base=header.base,
        task="text-to-image",
        tags=["concept-erasure"],
        results=eval_results(header.measured),
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
