"""Concept Removal Guidance (CRG), Choi, Oh, Choi, Seo and Kim, ICML 2026, arXiv 2606.29801.

Published, here from its abstract and a public re-implementation (the authors' code is not public): with n, u and c the
denoiser's noise predictions for the concept's prompt, the empty prompt and the image's own prompt, the concept's
presence at step k is

    b_k = |c - u|^2 - |c - n|^2,
    presence_k = K / 2 b_k + sum of kappa_j b_j over earlier steps j,  kappa_j = beta_j / (2 alpha_j (1 - abar_j)),

and c becomes c - lambda omega (n - u), where omega = (presence_k - tau) / (K |n - u|^2), or 0 where presence_k is at
most tau. That is the least change of c that brings the presence down to tau, taken lambda times; the paper's lambda is
2, and it names no tau for all tasks.

Ours: K is 1. The change is made in the conditional prediction, on which classifier-free guidance then acts. kappa is
written by the signal-to-noise ratios r and r' of a step and the next, (r' / r - 1) (1 + r) / (1 + r') / 2, which is the
same for noise schedules with alpha and beta, and is defined for flow matching, too; other predictions than of noise are
compared by the noise that they imply.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from neuraleraser.methods.conditional import GuidanceMethod, Update, method_key, per_image, squared_norm
from neuraleraser.settings import check_number
from neuraleraser.sites import NoiseLevel


@dataclass(frozen=True)
class ConceptRemovalGuidance(GuidanceMethod):
    """Concept Removal Guidance: moves away from a prompt as far as the predictions show its concept.

    It needs no training, and one more forward of two rows an image in each step. Where the prompt is empty, c = u and
    nothing is present by its measure: with a threshold of 0 or more it does not act on a start image alone.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        prompt: Prompt that shows the concept and nothing else.
        strength: lambda, 0 to 100; the paper's is 2.
        threshold: tau, the presence that is allowed.

    Raises:
        SettingsError: The strength or the threshold is out of range.

    Examples:
        >>> method = ConceptRemovalGuidance("Van_Gogh", "style", "in Van Gogh style")
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    concept: str
    kind: str
    prompt: str
    strength: float = 2.0
    threshold: float = 0.0
    name: str = "crg"
    made_with: None = None

    def __post_init__(self) -> None:
        check_number("strength", self.strength, 0, 100)
        check_number("threshold", self.threshold, -1e9, 1e9)

    @property
    def key(self) -> str:
        """Digest of the prompt and the numbers."""
        return method_key(self.prompt, self.strength, self.threshold)

    def _update(self, guidance: float) -> Update:
        return _Presence(self.strength, self.threshold)


@dataclass
class _Presence:
    """Update of one drawing. earlier: the sum over earlier steps [images]. last: b and noise level of the last one."""

    strength: float
    threshold: float
    earlier: Tensor | None = None
    last: tuple[Tensor, NoiseLevel] | None = None

    def __call__(self, conditional: Tensor, without: Tensor, shown: Tensor, level: NoiseLevel) -> Tensor:
        direction = shown - without
        b = level.slope**2 * (squared_norm(conditional - without) - squared_norm(conditional - shown))
        if self.earlier is None or self.last is None:
            self.earlier = torch.zeros_like(b)
        else:
            before, then = self.last
            self.earlier = self.earlier + evidence_weight(then, level) * before
        self.last = b, level
        excess = b / 2 + self.earlier - self.threshold
        size = level.slope**2 * squared_norm(direction)
        acts = (excess > 0) & (size > 0)
        omega = torch.where(acts, excess / size.where(size > 0, 1), 0)
        return per_image(-self.strength * omega, conditional) * direction


def evidence_weight(at: NoiseLevel, then: NoiseLevel) -> float:
    """Return kappa of the step from one noise level to the next, 0 where the step goes no way."""
    r, s = at.signal_to_noise, then.signal_to_noise
    return max(s / r - 1, 0) * (1 + r) / (1 + s) / 2 if r > 0 else 0.0
