"""How each library trains a BatchTopK or TopK SAE on a given stream, driven as its own documentation drives it.

`sae_training.py` and `sae_training_whole.py` run one entry of `TRAINERS` per process. An entry takes a `Job` and gives
back what the trained SAE makes of vectors: x [B, d] -> (x_hat [B, d], fired [B, n] bool), with k * B pairs or k per
row, as in its training. Before the first step it hands `Job.watch` a function that gives the same of the SAE as it
then is.

Every library keeps its own defaults (loss, optimiser, initialisation, and the learning rate but for `Job.rate`) with
one exception: a warm-up whose default is longer than the run is cut to a tenth of it. "best" is the fastest mode that
keeps the model: bfloat16 autocast.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor

Codes = Callable[[Tensor], tuple[Tensor, Tensor]]
Snapshot = Callable[[], Codes]


@dataclass(frozen=True)
class Job:
    """One training run: `stream(step)` gives batches [batch, d] from that step on, without end."""

    d: int
    n: int
    k: int
    batch: int
    steps: int
    device: str
    stream: Callable[[int], Iterator[Tensor]]
    rate: float = 1.0
    """Factor of the library's own learning rate."""
    watch: Callable[[Snapshot], None] = lambda snapshot: None

    def batches(self) -> Iterator[Tensor]:
        """As many batches as there are steps."""
        return (x for x, _ in zip(self.stream(0), range(self.steps), strict=False))

    def autocast(self, best: bool) -> Any:
        """bfloat16 where the library is in its best mode."""
        return torch.autocast(torch.device(self.device).type, torch.bfloat16) if best else nullcontext()


def neuraleraser(job: Job, best: bool) -> Codes:
    """Ours: bfloat16 products are the default, so "best" is the default and the other mode is float32."""
    from neuraleraser.sae import TrainSettings, train, training

    settings = TrainSettings(n_features=job.n, k=job.k, steps=job.steps, bf16=best)
    if job.rate != 1:  # of the rate that the longest part of a run has by default
        rate = job.rate * settings.lr_at(job.steps // 2, job.d)
        settings = replace(settings, learning_rate=rate)
    states: list[Any] = []
    step = training.train_step

    def noted(state: Any, *rest: Any) -> Any:
        states[:] = [state]
        return step(state, *rest)

    def codes_of(w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor, scale: float) -> Codes:
        def codes(x: Tensor) -> tuple[Tensor, Tensor]:
            pre = torch.nn.functional.linear(x * scale - b_dec, w_enc, b_enc).relu()
            # Training's own selection, as for the others, so that L0 is equal: after training features fire alone.
            cut = pre.flatten().topk(job.k * len(x), sorted=False).values.min()
            z = torch.where(pre >= cut, pre, 0.0)
            return (z @ w_dec + b_dec) / scale, z > 0

        return codes

    training.train_step = noted

    def so_far() -> Codes:
        w = states[0].weights
        return codes_of(w.W_enc, w.b_enc, w.W_dec, w.b_dec, states[0].scale)

    job.watch(so_far)
    try:
        sae = train(job.stream, settings)
    finally:
        training.train_step = step
    return codes_of(sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, 1.0)


def sparsify(job: Job, best: bool) -> Codes:
    """eai-sparsify's TopK with its default optimiser: the body of `Trainer.fit`, which wants a language model."""
    if job.device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    schedulefree = importlib.import_module("schedulefree")
    lib = importlib.import_module("sparsify")
    sign = importlib.import_module("sparsify.sign_sgd")
    torch.manual_seed(0)
    sae = lib.SparseCoder(job.d, lib.SparseCoderConfig(num_latents=job.n, k=job.k), job.device)
    lr = job.rate * 5e-3 / (job.n / 2**14) ** 0.5
    optimiser = schedulefree.ScheduleFreeWrapper(sign.SignSGD(sae.parameters(), lr=lr), momentum=0.95)

    def averaged() -> Codes:
        """Of the averaged weights, which are what it keeps."""
        optimiser.eval()
        kept = deepcopy(sae)
        optimiser.train()
        kept.set_decoder_norm_to_unit_norm()

        def codes(x: Tensor) -> tuple[Tensor, Tensor]:
            out = kept(x)
            z = torch.zeros(len(x), job.n, device=x.device).scatter(1, out.latent_indices, out.latent_acts)
            return out.sae_out, z > 0

        return codes

    optimiser.train()
    job.watch(averaged)
    since = torch.zeros(job.n, dtype=torch.long, device=job.device)
    for i, x in enumerate(job.batches()):
        if i == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        with job.autocast(best):
            out = sae(x)
        did_fire = torch.zeros(job.n, dtype=torch.bool, device=job.device)
        did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())  # its trainer's log
        out.fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        since += len(x)
        since[did_fire] = 0
    return averaged()


def sae_lens(job: Job, best: bool) -> Codes:
    """SAELens' BatchTopK by its own SAETrainer."""
    with stubs("wandb", "opentelemetry", "babe", "nltk", "plotly", "plotly_express", "dotenv"):
        lens = importlib.import_module("sae_lens")
        config = importlib.import_module("sae_lens.config")
        trainer = importlib.import_module("sae_lens.training.sae_trainer")
    torch.manual_seed(0)
    sae = lens.BatchTopKTrainingSAE(
        lens.BatchTopKTrainingSAEConfig(d_in=job.d, d_sae=job.n, k=job.k, device=job.device)
    )
    settings = config.SAETrainerConfig(
        total_training_samples=job.steps * job.batch,
        train_batch_size_samples=job.batch,
        lr=3e-4 * job.rate,
        lr_end=3e-5,  # of schedules that are not the default; it has to be set
        device=job.device,
        autocast=best,
    )

    def codes(x: Tensor) -> tuple[Tensor, Tensor]:
        z, _ = sae.encode_with_hidden_pre(x)
        return sae.decode(z), z > 0

    job.watch(lambda: codes)
    trainer.SAETrainer(settings, sae, job.stream(0)).fit()
    sae.train()
    return codes


def dictionary_learning(job: Job, best: bool) -> Codes:
    """dictionary_learning's BatchTopKTrainer, in the loop of its `trainSAE`."""
    with stubs("nnsight", "circuitsvis", "umap", "wandb"):
        lib = importlib.import_module("dictionary_learning.trainers.batch_top_k")
    trainer = lib.BatchTopKTrainer(
        steps=job.steps,
        activation_dim=job.d,
        dict_size=job.n,
        k=job.k,
        layer=0,
        lm_name="none",
        warmup_steps=min(1000, job.steps // 10),
        seed=0,
        device=job.device,
        lr=None if job.rate == 1 else job.rate * 2e-4 / (job.n / 2**14) ** 0.5,
    )
    ae = trainer.ae

    def codes(x: Tensor) -> tuple[Tensor, Tensor]:
        z = ae.encode(x, use_threshold=False)
        return ae.decode(z), z > 0

    job.watch(lambda: codes)
    for step, x in enumerate(job.batches()):
        with job.autocast(best):
            trainer.update(step, x)
    return codes


def overcomplete(job: Job, best: bool) -> Codes:
    """overcomplete's TopKSAE by its own train_sae, with the optimiser of its documentation; "best" without its log."""
    with stubs("torchvision", "timm", "cv2", "matplotlib", "skimage", "sklearn"):
        lib = importlib.import_module("overcomplete.sae")
    torch.manual_seed(0)
    sae = lib.TopKSAE(job.d, nb_concepts=job.n, top_k=job.k, device=job.device)

    def criterion(x: Tensor, x_hat: Tensor, pre: Tensor, z: Tensor, reference: Tensor) -> Tensor:
        return (x - x_hat).square().mean()

    def codes(x: Tensor) -> tuple[Tensor, Tensor]:
        _, z, x_hat = sae(x)
        return x_hat, z > 0

    job.watch(lambda: codes)
    optimiser = torch.optim.Adam(sae.parameters(), lr=5e-4 * job.rate)
    with job.autocast(best):
        lib.train_sae(
            sae,
            job.batches(),
            criterion,
            optimiser,
            nb_epochs=1,
            monitoring=0 if best else 1,
            device=job.device,
        )
    return codes


class stubs:
    """While a library is imported, modules it names but does not need for training stand in, where they are absent."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """A module of which every attribute exists, for the names that nothing else found."""
        if name.split(".")[0] in self.names:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)  # pyright: ignore[reportArgumentType]
        return None

    def create_module(self, spec: Any) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__spec__, module.__path__ = spec, []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass

    def __enter__(self) -> None:
        sys.meta_path.append(self)  # pyright: ignore[reportArgumentType]

    def __exit__(self, *_: object) -> None:
        sys.meta_path.remove(self)  # pyright: ignore[reportArgumentType]


TRAINERS: dict[str, tuple[str, Callable[[Job, bool], Codes]]] = {
    "neuraleraser": ("neuraleraser", neuraleraser),
    "sparsify": ("eai-sparsify", sparsify),
    "sae_lens": ("sae-lens", sae_lens),
    "dictionary_learning": ("dictionary-learning", dictionary_learning),
    "overcomplete": ("overcomplete", overcomplete),
}
"""Entry: the package's name, and how it trains."""
