"""The settings of SAE training, without torch, so that a command line can show them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from neuraleraser.errors import SettingsError
from neuraleraser.sae.architectures import ARCHITECTURES
from neuraleraser.settings import check_number, check_seed, check_whole


@dataclass(frozen=True)
class TrainSettings:
    """Settings that decide a training run, besides its data; saved with the SAE.

    Raises:
        SettingsError: A value is out of range.

    Examples:
        >>> from neuraleraser.sae import pool_batches, train
        >>> x = activation_matrix(pipe, prompts, [0, 1], [site], sampling=quick)[site]
        >>> settings = TrainSettings(n_features=64, k=4, steps=5, init_vectors=256, architecture="matryoshka")
        >>> train(pool_batches(x, 64), settings).header["settings"]["architecture"]
        'matryoshka'
    """

    n_features: int
    """Features of the SAE."""
    k: int
    """Features that fire for an activation vector: on average over a batch, with TopK for each."""
    steps: int
    """Batches to train on; the learning rate falls to zero over the last fifth of them."""
    learning_rate: float | None = None
    """Adam's learning rate, for data scaled to E||x||^2 = d; None: chosen from the number of
    features, width and steps (see `lr_at`)."""
    dead_after: int = 4096
    """A feature that has not fired for this many vectors is dead: its bias rises until it fires again. More than the
    run has: nothing is revived."""
    init_vectors: int = 2**15
    """Vectors from the start of the stream that set the data scale and the decoder bias."""
    architecture: str = "batchtopk"
    """One of `ARCHITECTURES`. batchtopk: the largest B*k pre-activations in a batch of B fire; topk: the k largest of
    each vector; jumprelu: all that exceed a threshold of their own, which is learnt; matryoshka: like batchtopk, and
    the first features alone have to reconstruct, too."""
    binding_weight: float = 0.0
    """Weight of the loss that binds feature c to label c, for a stream of (x, labels); a good start is 0.3, with
    matryoshka, whose first features have to carry what they detect."""
    fisher_features: bool = False
    """Feature c reads label c by Fisher's linear discriminant of the first vectors, and keeps that encoder row; for
    a stream of (x, labels)."""
    contrast_weight: float = 0.0
    """Weight of the loss that draws maps of the same labels together, for a stream of (x, labels); start at 0.01."""
    seed: int = 0
    """Decides the initial weights; the stream has its own seed."""
    bf16: bool = True
    """Large matrix products in bfloat16, where the processor has it (weights stay float32)."""
    log_every: int = 50
    """Log every N steps, by a call of `on_step`."""
    checkpoint_every: int = 1000
    """Write a checkpoint every N steps, if a checkpoint file is asked for."""

    def __post_init__(self) -> None:
        for name in ("n_features", "k", "init_vectors"):
            check_whole(name, getattr(self, name), 1, 2**24)
        for name in ("steps", "dead_after", "log_every", "checkpoint_every"):
            check_whole(name, getattr(self, name), 1, 2**40)
        if self.k > self.n_features:
            raise SettingsError(f"k is {self.k} but there are only n = {self.n_features} features: pass k <= n")
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, 0, 1e30, above=True)
        if self.architecture not in ARCHITECTURES:
            raise SettingsError(f"architecture is {self.architecture!r}: pass one of {', '.join(ARCHITECTURES)}")
        check_number("binding_weight", self.binding_weight, 0, 1e6)
        check_number("contrast_weight", self.contrast_weight, 0, 1e6)
        check_seed(self.seed)

    @property
    def labelled(self) -> bool:
        """True if the stream has to yield labels."""
        return self.fisher_features or self.binding_weight > 0 or self.contrast_weight > 0

    def lr_at(self, step: int, d: int) -> float:
        """Return the learning rate of a step: constant, then falling to zero over the last fifth of the steps.

        Adam moves each coordinate by up to lr, so it turns a row of norm 1 by up to lr * sqrt(d) radians per step. The
        default is 2e-4 * sqrt(2^14 / n), known from runs of 10^5 steps (Gao et al. 2024), but at least what lets a row
        turn by 45 radians over the run, and by no more than 0.045 per step (docs/LOG.md).

        Args:
            step: The step, 0 <= step < steps.
            d: Width of the activations.

        Returns:
            The learning rate.
        """
        lr = self.learning_rate
        if lr is None:
            turn = min(0.045, 45 / self.steps)
            lr = max(2e-4 * math.sqrt(2**14 / self.n_features), turn / math.sqrt(d))
        return lr * min(1.0, (self.steps - step) / (0.2 * self.steps))


@dataclass(frozen=True)
class StepLog:
    """Numbers that `on_step` is given: plain numbers of one training step, in units of the scaled data.

    Examples:
        >>> from neuraleraser.sae import pool_batches, train
        >>> x, logs = activation_matrix(pipe, prompts, [0, 1], [site], sampling=quick)[site], []
        >>> settings = TrainSettings(n_features=64, k=4, steps=5, init_vectors=256, log_every=5)
        >>> _ = train(pool_batches(x, 64), settings, on_step=logs.append)
        >>> logs[-1].step
        5
    """

    step: int
    """Steps done, so the last one is `settings.steps`."""
    vectors: int
    """Activation vectors in this step's batch."""
    fvu: float
    """Fraction of variance unexplained: mean ||x - x_hat||^2 over the variance of the first vectors."""
    l0: float
    """Features kept for a vector, on average."""
    dead: float
    """Share of features that are dead."""
    threshold: float
    """Moving average of the smallest kept activation: what a feature must exceed after training."""
    learning_rate: float
    """The learning rate of this step."""
    grad_norm: float
    """Norm of the whole gradient before it was clipped to 1."""
    bind: float = 0.0
    """The binding loss of labelled training, before its weight; log 2 where no feature tells its concept."""
    contrast: float = 0.0
    """The contrast loss of labelled training, before its weight."""
