"""Dynamic Negative Guidance (DNG), Koulischer, Deleu, Raya, Demeester and Ambrogioni, ICLR 2025, arXiv 2410.14398.

Published (paper, and FelixKoulischer/Dynamic-Negative-Guidance at 99db32d6, which removes a class from a model without
prompts): with u the model's prediction of the noise and n that of a model of the concept alone, u becomes

    u - lambda p / (1 - p) (n - u),

where p is the probability that the image shows the concept, from the prior on updated in each step by what the sampler
did: with mu_n and mu_u the means of the reverse step from x to x' by n and by u, and sigma^2 its variance,

    log p += (tau (|x' - mu_u|^2 - |x' - mu_n|^2) + delta) / (2 sigma^2),

held in [1e-6, 0.99]. For Stable Diffusion the paper is reported to take a prior of 0.01, tau 0.2 or 0.3, delta 0.002 to
0.004 and lambda 12 to 27.

Ours: n and u are the predictions for the concept's prompt and the empty one, and the same term is added to the
prediction c for the image's own prompt, on which classifier-free guidance then acts:
c' = c - lambda p / (1 - p) (n - u). (The paper is reported to take c for u in text-to-image. But n - c does not hold a
concept that the prompt names, and guidance by it took no style away on the canvas.) The sampler's own noise, whose
share in the update is 0 on average, is left out: x' is the mean that the guided prediction g = u + w (c' - u) asks for,
w being the scale of guidance, so that samplers without noise are served as well. Then the update is, by the
signal-to-noise ratios r and r' of x and x',

    log p += tau (r' / r - 1) (|g - u|^2 - |g - n|^2) / 2 + delta / (2 sigma^2),

also for flow matching; other predictions than of noise are compared by the noise that they imply. A negative prompt
counts as an empty one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from neuraleraser.methods.conditional import GuidanceMethod, Update, method_key, per_image, squared_norm
from neuraleraser.settings import check_number
from neuraleraser.sites import NoiseLevel

SMALLEST, LARGEST = 1e-6, 0.99
"""Bounds of the probability, as published."""


@dataclass(frozen=True)
class DynamicNegativeGuidance(GuidanceMethod):
    """Dynamic Negative Guidance: moves away from a prompt, the more the likelier its concept is.

    It needs no training, and one more forward of two rows an image in each step. Every image changes, if often little.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        prompt: Prompt that shows the concept and nothing else.
        strength: lambda, 0 to 1000.
        prior: Probability of the concept before the first step, above 0 and below 1.
        temperature: tau, the weight of what a step tells.
        offset: delta, the lift of the probability in each step; in squared units of latents.

    Raises:
        SettingsError: A number is out of range.

    Examples:
        >>> method = DynamicNegativeGuidance("Van_Gogh", "style", "in Van Gogh style")
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    concept: str
    kind: str
    prompt: str
    strength: float = 40.0
    prior: float = 0.01
    temperature: float = 0.2
    offset: float = 0.0
    name: str = "dng"
    made_with: None = None

    def __post_init__(self) -> None:
        check_number("strength", self.strength, 0, 1000)
        check_number("prior", self.prior, SMALLEST, LARGEST)
        check_number("temperature", self.temperature, 0, 1000)
        check_number("offset", self.offset, 0, 1e6)

    @property
    def key(self) -> str:
        """Digest of the prompt and the numbers."""
        return method_key(self.prompt, self.strength, self.prior, self.temperature, self.offset)

    def _update(self, guidance: float) -> Update:
        return _Posterior(self, guidance)


@dataclass
class _Posterior:
    """Update of one drawing. log_p: [images]. last: evidence for the concept in the last step, and its noise level."""

    settings: DynamicNegativeGuidance
    guidance: float
    log_p: Tensor | None = None
    last: tuple[Tensor, NoiseLevel] | None = None

    def __call__(self, conditional: Tensor, without: Tensor, shown: Tensor, level: NoiseLevel) -> Tensor:
        s = self.settings
        if self.log_p is None or self.last is None:
            first = squared_norm(conditional)  # for its shape, dtype and device
            self.log_p = torch.full_like(first, math.log(s.prior))
        else:
            evidence, then = self.last
            gain, variance = reverse_step(then, level)
            lift = s.offset / (2 * variance) if variance > 0 else 0.0
            log_p = self.log_p + s.temperature * gain / 2 * evidence + lift
            self.log_p = log_p.clamp(math.log(SMALLEST), math.log(LARGEST))
        p = self.log_p.exp()
        change = per_image(-s.strength * p / (1 - p), conditional) * (shown - without)
        drawn = without + self.guidance * (conditional + change - without)
        self.last = level.slope**2 * (squared_norm(drawn - without) - squared_norm(drawn - shown)), level
        return change


def reverse_step(at: NoiseLevel, then: NoiseLevel) -> tuple[float, float]:
    """Return r' / r - 1 and sigma^2 of the step from one noise level to the next, 0 where the step goes no way.

    sigma^2 is the variance of the reverse step, of latents whose clean and noisy shares have squares that add up to 1.
    """
    r, s = at.signal_to_noise, then.signal_to_noise
    if s <= r:
        return 0.0, 0.0
    kept = r / (1 + r) * (1 + s) / s  # alpha
    return (s / r - 1 if r > 0 else 0.0), (1 + r) / (1 + s) * (1 - kept)
