"""A plain negative prompt: guidance leads from the concept's prompt instead of from the empty one.

With c, u and n the predictions for the image's prompt, the empty one and the concept's, and guidance of scale w, the
image is guided by n + w (c - n) in place of u + w (c - u).

Ours: the change is made in the conditional prediction, c - (1 - 1 / w) (n - u), on which guidance then acts, which is
the same; so a negative prompt that the caller gives stays. Without guidance there is none, and nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from neuraleraser.methods.conditional import GuidanceMethod, Update, method_key
from neuraleraser.sites import NoiseLevel


@dataclass(frozen=True)
class NegativePrompt(GuidanceMethod):
    """A negative prompt: what anyone would try first, where guidance is above 1. Every image changes.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        prompt: Prompt that shows the concept and nothing else.

    Examples:
        >>> method = NegativePrompt("Van_Gogh", "style", "in Van Gogh style")
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    concept: str
    kind: str
    prompt: str
    name: str = "negative-prompt"
    made_with: None = None

    @property
    def key(self) -> str:
        """Digest of the prompt."""
        return method_key(self.prompt)

    def _update(self, guidance: float) -> Update:
        return _from_the_concept(guidance)


def _from_the_concept(guidance: float) -> Update:
    share = max(0.0, 1 - 1 / guidance) if guidance > 0 else 0.0

    def update(conditional: Tensor, without: Tensor, shown: Tensor, level: NoiseLevel) -> Tensor:
        return -share * (shown - without)

    return update
