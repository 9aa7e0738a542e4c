"""Batches from activations that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from neuraleraser.errors import DataError, SettingsError


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
