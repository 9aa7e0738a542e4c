"""Batches from activations that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from neuraleraser.errors import DataError, SettingsError


def labelled_batches(
    bank: Tensor, labels: Tensor, maps: int, seed: int = 0
) -> Callable[[int], Iterator[tuple[Tensor, Tensor]]]:
    """The endless stream of (x [maps * P, d], labels [maps, C]) for labelled training, from the maps `bank` [N, P, d]
    of P positions each and what they show, `labels` [N, C] of 0 and 1; as a function of the step to start at.

    Batches are drawn as by `pool_batches`, but by whole maps, whose vectors stay together. Raises as it does.
    """
    if bank.ndim != 3 or 0 in bank.shape or labels.ndim != 2 or len(labels) != len(bank):
        raise DataError(
            f"the bank has shape {tuple(bank.shape)}, its labels {tuple(labels.shape)}: pass maps [N, P, d] and "
            "labels [N, C], with P = 1 for single vectors"
        )
    indices = pool_batches(torch.arange(len(bank))[:, None], maps, seed)

    def stream(step: int) -> Iterator[tuple[Tensor, Tensor]]:
        for at in indices(step):
            yield bank[at[:, 0].to(bank.device)].flatten(0, 1), labels[at[:, 0].to(labels.device)]

    return stream


def pool_batches(bank: Tensor, batch: int, seed: int = 0) -> Callable[[int], Iterator[Tensor]]:
    """The endless stream of batches [batch, d] from `bank` [N, d], as a function of the step to start at.

    Every epoch is a new permutation of single vectors, a pure function of (seed, epoch), of which N // batch
    whole batches are used: whole maps as batches would be strongly correlated. Raises DataError for a bank
    that is not [N, d] or is empty, SettingsError for a batch that is larger than the bank.
    """
    if bank.ndim != 2 or bank.shape[0] == 0:
        raise DataError(f"the bank has shape {tuple(bank.shape)}: pass activations [N, d] with N > 0")
    if not 1 <= batch <= bank.shape[0]:
        raise SettingsError(f"batch is {batch}: pass 1 to {bank.shape[0]}, the vectors in the bank")
    per_epoch = bank.shape[0] // batch

    def stream(step: int) -> Iterator[Tensor]:
        epoch, first = divmod(step, per_epoch)
        while True:
            g = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            order = torch.randperm(bank.shape[0], generator=g).to(bank.device)
            for i in range(first, per_epoch):
                yield bank[order[i * batch : (i + 1) * batch]]
            epoch, first = epoch + 1, 0

    return stream
