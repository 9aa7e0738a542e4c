"""SAeUron (arXiv 2501.18052) as its public code applies it, errors included, to be measured beside the corrected form.

The corrected form is an ordinary eraser, made by `fit_saeuron`: `EraserMethod` takes it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuraleraser.eraser import Eraser
from neuraleraser.eraser.corrections import Scaling
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import MadeWith
from neuraleraser.methods.eraser_method import EraserMethod
from neuraleraser.methods.untraced import Untraced
from neuraleraser.sae import SAE
from neuraleraser.sites import EditContext, edit


@dataclass(frozen=True)
class SAeUronAsPublished(Untraced):
    """SAeUron with three faults of its public code (cywinski/SAeUron at 1a4302a), all else as the eraser has it.

    The error term has the wrong sign: each activation becomes x_hat' + (x_hat - x), where x_hat is the SAE's
    reconstruction and x_hat' that of the blocked features. Where nothing is blocked that is x - 2 (x - x_hat), so every
    image is changed. The timestep is a count of the hook's calls, so a context is good for one call of the pipeline,
    with as many steps as the statistics have; with fewer, features of other timesteps are blocked, and with more an
    error is raised. Features compete: at each position only the k largest fire, while they were trained by batch.

    Attributes:
        eraser: The eraser, as `fit_saeuron` makes it: features, means and multipliers by timestep.
        sae: The SAE that it was made with.

    Examples:
        >>> sae, settings = SAE.load("image-sae.safetensors"), SAeUronSettings(num_images=2)
        >>> near = ["mosaic style"]
        >>> eraser = fit_saeuron(pipe, concept, neighbours=near, sae=sae, settings=settings, sampling=quick)
        >>> method = SAeUronAsPublished(eraser, sae)
        >>> with method.applied(pipe):
        ...     changed = generate(pipe, prompts, [0, 1], quick)
        >>> (changed != images).any(axis=(1, 2, 3))  # without the concept, too
        array([ True,  True])
    """

    eraser: Eraser
    sae: SAE
    name: str = "saeuron-published"

    def __post_init__(self) -> None:
        kinds = [c.KIND for c in self.eraser.corrections]
        if kinds != [Scaling.KIND]:
            raise SettingsError(
                f"the eraser of {self.eraser.name!r} has corrections of kind {', '.join(kinds)}, expected one of kind "
                f"{Scaling.KIND}: make it with fit_saeuron"
            )
        if bool((self.eraser.gate.features >= self.sae.n_features).any()) or self._correction.width != self.sae.d_in:
            raise SettingsError(
                f"the SAE has {self.sae.n_features} features of width {self.sae.d_in}, and the eraser of "
                f"{self.eraser.name!r} was made with another: pass that one"
            )

    @property
    def _correction(self) -> Scaling:
        found = self.eraser.corrections[0]
        assert isinstance(found, Scaling)
        return found

    @property
    def concept(self) -> str:
        """The concept's name."""
        return self.eraser.name

    @property
    def kind(self) -> str:
        """ "style", "object" or "other"."""
        return EraserMethod(self.eraser).kind

    @property
    def key(self) -> str:
        """Digest of the eraser and the SAE."""
        weights = b"".join(x.detach().cpu().double().numpy().tobytes() for x in self.sae.parameters())
        return f"{self.eraser.content_hash[:16]}-{hashlib.sha256(weights).hexdigest()[:16]}"

    @property
    def made_with(self) -> MadeWith:
        """Data that the eraser and the SAE were made with.

        Raises:
            SplitError: The eraser's header does not say which seeds it was made with.
        """
        return EraserMethod(self.eraser).made_with

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[None]:
        """Erase, in one call of the pipeline.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields None, as every image is changed.

        Raises:
            SettingsError: The denoiser is called more often than there are timesteps in the statistics.
        """
        calls, table = 0, self._correction
        descending = range(len(table.times) - 1, -1, -1)

        def published(x: Tensor, context: EditContext[None]) -> Tensor:
            nonlocal calls
            if calls == len(descending):
                raise SettingsError(
                    f"SAeUron's code counts calls of the denoiser, and {self.name!r} has statistics of {calls}: apply "
                    "it anew for each call of the pipeline, with at most as many steps"
                )
            step, calls = descending[calls], calls + 1
            z = self.competing_features(x.float())
            recon, ablated = self._decode(z), self._decode(self._blocked(z, step))
            return (ablated + (recon - x)) - x  # the error term, recon - x, should be x - recon

        with edit(pipe, {table.site: published}):
            yield

    def competing_features(self, x: Tensor) -> Tensor:
        """Return the features of activations as SAeUron's code has them: the k largest of each position.

        Args:
            x: Activations, [..., d].

        Returns:
            z [..., n] >= 0.
        """
        w = {name: value.to(x) for name, value in self.sae.named_parameters()}
        pre = torch.nn.functional.linear(x - w["b_dec"], w["W_enc"], w["b_enc"]).relu()
        top = pre.topk(min(features_at_once(self.sae), pre.shape[-1]), -1)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    def _blocked(self, z: Tensor, step: int) -> Tensor:
        """Return the features with the chosen ones multiplied where they exceed their means."""
        features = self.eraser.gate.features.to(z.device)
        own = z[..., features]
        factor, threshold = (v[step].to(z) for v in (self._correction.factor, self._correction.threshold))
        return z.index_copy(-1, features, torch.where(own > threshold, factor * own, own))

    def _decode(self, z: Tensor) -> Tensor:
        return z @ self.sae.W_dec.to(z) + self.sae.b_dec.to(z)


def features_at_once(sae: SAE) -> int:
    """Return how many of an SAE's features fire at a position, on average at least. SettingsError where it does not
    say."""
    header = sae.header
    settings = header.get("settings")
    k = header.get("k") or (settings.get("k") if isinstance(settings, dict) else None)
    if not isinstance(k, int) or k < 1:
        raise SettingsError("the SAE does not say how many features fire at a position (k): pass one that does")
    return k
