"""Unified Concept Editing (UCE), Gandikota, Orgad, Belinkov, Materzynska and Bau, WACV 2024, arXiv 2308.14761.

Published (paper, and rohitgandikota/unified-concept-editing, which takes the last token of a phrase): keys and values
of all cross-attentions are linear in the text, W t. With e the text of what is erased, g of what stands in its place
and p of what is preserved, the new weights are those that minimise

    erase_scale sum |W e - W0 g|^2 + preserve_scale sum |W p - W0 p|^2 + damping |W - W0|^2,

which is solved in closed form. The code's scales are 1, 1 and 0.5.

Ours: each pair of phrases is a prompt of its own; `tokens` says whether the last token of its words counts, as in the
code, or all tokens from there on, the text's end and padding, to which images attend as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neuraleraser.errors import SettingsError
from neuraleraser.methods.conditional import method_key
from neuraleraser.methods.untraced import Untraced
from neuraleraser.methods.weights import changed_weights
from neuraleraser.settings import check_number


@dataclass(frozen=True)
class UnifiedConceptEditing(Untraced):
    """Unified Concept Editing: new weights of keys and values, in closed form, in which a phrase reads as another.

    For pipelines whose UNet reads the text by cross-attention alone. Every image changes, if often little.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        pairs: Phrases that show the concept, each with what stands in its place.
        preserved: Phrases that are to read as before.
        tokens: "last": the last token of a phrase; "rest": that and all behind it.
        erase_scale: Weight of the pairs, above 0.
        preserve_scale: Weight of the preserved phrases.
        damping: Weight of the distance from the old weights, above 0.

    Raises:
        SettingsError: A number is out of range, or there are no pairs.

    Examples:
        >>> pairs = (("in Van Gogh style", "as a plain picture"),)
        >>> method = UnifiedConceptEditing("Van_Gogh", "style", pairs, preserved=("a cat", "a dog"))
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    concept: str
    kind: str
    pairs: tuple[tuple[str, str], ...]
    preserved: tuple[str, ...] = ()
    tokens: Literal["last", "rest"] = "last"
    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    damping: float = 0.5
    name: str = "uce"
    made_with: None = None

    def __post_init__(self) -> None:
        if not self.pairs:
            raise SettingsError(f"there is nothing to erase: pass pairs of a phrase of {self.concept!r} and another")
        check_number("erase_scale", self.erase_scale, 0, 1e6, above=True)
        check_number("preserve_scale", self.preserve_scale, 0, 1e6)
        check_number("damping", self.damping, 0, 1e6, above=True)

    @property
    def key(self) -> str:
        """Digest of the phrases and the numbers."""
        numbers = (self.tokens, self.erase_scale, self.preserve_scale, self.damping)
        return method_key(self.pairs, self.preserved, *numbers)

    def applied(self, pipe: Any) -> AbstractContextManager[None]:
        """Give the cross-attentions their new weights.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields None: the method acts everywhere.

        Raises:
            SettingsError: The pipeline has no UNet with cross-attention to one text encoder.
        """
        layers = text_projections(pipe)
        weights = self.weights(pipe, list(layers.values()))
        return changed_weights(pipe.unet, dict(zip((f"{name}.weight" for name in layers), weights, strict=True)))

    def weights(self, pipe: Any, layers: Sequence[nn.Linear]) -> list[Tensor]:
        """Return the new weights of the layers, which read the text.

        Args:
            pipe: The diffusers pipeline.
            layers: The layers.

        Returns:
            A weight [out, d] for each layer.
        """
        both = [_token_texts(pipe, pair, self.tokens) for pair in self.pairs]
        erased, instead = (torch.cat([texts[i] for texts in both]) for i in (0, 1))
        kept = [_token_texts(pipe, [phrase], self.tokens)[0] for phrase in self.preserved]
        kept = torch.cat(kept) if kept else erased[:0]
        found = []
        for layer in layers:
            old = layer.weight.detach().double().cpu()
            target = self.damping * old + self.erase_scale * (old @ instead.T) @ erased
            target = target + self.preserve_scale * (old @ kept.T) @ kept
            gram = self.damping * torch.eye(old.shape[1], dtype=old.dtype)
            gram = gram + self.erase_scale * erased.T @ erased + self.preserve_scale * kept.T @ kept
            found.append(torch.linalg.solve(gram, target.T).T.to(layer.weight).contiguous())
        return found


def text_projections(pipe: Any) -> dict[str, nn.Linear]:
    """Return the layers of a UNet that make keys and values of the text, by name.

    Raises SettingsError where there are none, or several text encoders.
    """
    unet = getattr(pipe, "unet", None)
    named = unet.named_modules() if isinstance(unet, nn.Module) else ()
    ends = (".attn2.to_k", ".attn2.to_v")
    layers = {name: m for name, m in named if name.endswith(ends) and isinstance(m, nn.Linear)}
    if not layers or "text_encoder_2" in pipe.components or pipe.text_encoder is None:
        raise SettingsError(
            f"{type(pipe).__name__} has no UNet that reads the text of one encoder by cross-attention: "
            "pass a Stable Diffusion 1 or 2 pipeline, or the canvas"
        )
    return layers


@torch.no_grad()
def _token_texts(pipe: Any, phrases: Sequence[str], tokens: str) -> list[Tensor]:
    """Return what the text encoder makes of the counted tokens of each phrase [tokens, d], as many of each."""
    size = pipe.tokenizer.model_max_length
    read = pipe.tokenizer(list(phrases), padding="max_length", max_length=size, truncation=True, return_tensors="pt")
    states = pipe.encode_prompt(list(phrases), pipe.unet.device, 1, False)[0].double().cpu()
    last = [max(0, int(mask.sum()) - 2) for mask in read.attention_mask]  # before the text's end
    count = 1 if tokens == "last" else states.shape[1] - max(last)
    return [x[at : at + count] for x, at in zip(states, last, strict=True)]
