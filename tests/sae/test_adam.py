"""Adam: torch's own, without its compiler."""

from __future__ import annotations

import subprocess
import sys

import torch

from neuraleraser.sae.adam import EPSILON, Adam

TRAINING = """
import sys, torch
from neuraleraser.sae.train_settings import TrainSettings
from neuraleraser.sae.training import train
x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
train(lambda first: iter(lambda: (x, None), 0), TrainSettings(n_features=16, k=2, steps=2))
print("torch._dynamo" in sys.modules)
"""


def test_steps_are_those_of_torch() -> None:
    g = torch.Generator().manual_seed(0)
    ours = [torch.randn(5, 3, generator=g), torch.randn(4, generator=g)]
    theirs = [p.clone().requires_grad_() for p in ours]
    adam, torchs = Adam(ours), torch.optim.Adam(theirs, lr=0.0, eps=EPSILON, fused=True)
    for lr in (0.1, 0.1, 0.02):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=g)
            q.grad = p.grad.clone()
        adam.step(lr)
        torchs.param_groups[0]["lr"] = lr
        torchs.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p.detach(), q.detach())
        assert adam.state[p].keys() == torchs.state[q].keys()
        assert all(torch.equal(x, torchs.state[q][name]) for name, x in adam.state[p].items())


def test_training_does_not_import_the_compiler() -> None:
    """A second of processor time that a small SAE would not get back."""
    done = subprocess.run([sys.executable, "-c", TRAINING], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
