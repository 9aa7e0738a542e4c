"""The canvas's two judges: what they are, how they are trained, calibrated and kept.

A judge sees one 64 px picture and gives 25 style logits (one style holds) and 20 object logits (each object is
there or not; "none" is what remains when no object is over its threshold). The two have different
architectures, so that what is chosen with one can be measured with the other. The second also measures how far
a picture lies from every kind of real render (`Artefact`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from neuraleraser import artifact
from neuraleraser.canvas.words import OBJECTS, STYLES
from neuraleraser.errors import FileError

if TYPE_CHECKING:
    from neuraleraser.canvas.data import Renders

Which = Literal["first", "second"]
SIZE = 64
WEIGHTS = Path(__file__).parent / "weights"
Images = NDArray[np.uint8]


class Plain(nn.Module):
    """`first`: convolutions and pooling, no skips; heads on the global maximum and mean."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 64, 128, 128)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3 if i else 5, 1 if i else 2, 1 if i else 2, bias=False)
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False))
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.style = nn.Linear(2 * widths[-1], len(STYLES))
        self.objects = nn.Linear(2 * widths[-1], len(OBJECTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """[B, 3, 64, 64] in -1..1 -> style logits [B, 25], object logits [B, 20], maps after each layer."""
        maps = []
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            maps.append(x)
            if i in (0, 2):
                x = F.max_pool2d(x, 2)
        h = torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)
        return self.style(h), self.objects(h), maps


class Block(nn.Module):
    """Two 3 x 3 convolutions, each after norm and ReLU, and a skip (He et al. 2016, 'Identity mappings')."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if self.stride == 2 else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        if self.skip is not None:
            x = self.skip(F.avg_pool2d(h, 2))
        return x + self.conv2(F.relu(self.norm2(self.conv1(h))))


class ResNet(nn.Module):
    """`second`: a small pre-activation ResNet, heads on the global average."""

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 48, 48, 96, 96, 160)
        self.stem = nn.Conv2d(3, widths[0], 3, 2, 1, bias=False)
        self.blocks = nn.ModuleList(Block(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.style = nn.Linear(widths[-1], len(STYLES))
        self.objects = nn.Linear(widths[-1], len(OBJECTS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """[B, 3, 64, 64] in -1..1 -> style logits [B, 25], object logits [B, 20], maps after each block."""
        x = self.stem(x)
        maps = [x]
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        h = F.relu(self.norm(x)).mean((2, 3))
        return self.style(h), self.objects(h), maps


def build_judge(which: Which) -> Plain | ResNet:
    """An untrained judge."""
    return Plain() if which == "first" else ResNet()


def pixels(images: Images) -> Tensor:
    """uint8 [B, 64, 64, 3] -> float32 [B, 3, 64, 64] in -1..1, channels last."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """What an autoencoder may do to a picture [B, 3, S, S] without changing what it shows.

    Shifts up to 3 px, blur of sigma 0-0.8 px, brightness and contrast by 5 %, noise of sigma 0-0.03 of 0..1.
    """
    n, size = len(x), x.shape[-1]

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((n, 1, 1, 1), generator=generator)

    shift = torch.randint(0, 7, (n, 2), generator=generator).tolist()
    padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
    x = torch.stack([p[:, i : i + size, j : j + size] for p, (i, j) in zip(padded, shift, strict=True)])
    x = x.contiguous(memory_format=torch.channels_last)
    near = torch.exp(-0.5 / draw(0.05, 0.8).square())
    far = near**4
    whole = 1 + 2 * near + 2 * far
    for dims in ((2, 2, 0, 0), (0, 0, 2, 2)):
        p = F.pad(x, dims, mode="replicate")
        rows = dims[0] == 0
        a, b, c, d, e = (p.narrow(2 if rows else 3, k, size) for k in range(5))
        x = (c + near * (b + d) + far * (a + e)) / whole
    x = x * draw(0.95, 1.05) + draw(-0.1, 0.1)
    return x + 2 * draw(0, 0.03) * torch.randn(x.shape, generator=generator)


def presence(renders: Renders, index: NDArray[np.integer] | slice) -> Tensor:
    """float32 [B, 20]: 1 where the object is in the picture."""
    pairs = torch.from_numpy(renders.objects[index].astype(np.int64))
    return torch.zeros(len(pairs), len(OBJECTS) + 1).scatter_(1, pairs % (len(OBJECTS) + 1), 1)[:, :-1]


def judge_loss(net: nn.Module, x: Tensor, style: Tensor, present: Tensor) -> Tensor:
    """Cross entropy of the style plus the objects' summed binary cross entropies, both smoothed a little."""
    style_logits, object_logits, _ = net(x)
    soft = present * 0.98 + 0.005
    objects = F.binary_cross_entropy_with_logits(object_logits.float(), soft, reduction="none").sum(1).mean()
    return F.cross_entropy(style_logits.float(), style, label_smoothing=0.02) + objects


def train_judge(
    which: Which,
    renders: Renders,
    checkpoint: Path,
    steps: int = 6000,
    batch: int = 64,
    peak: float = 3e-3,
    seed: int = 0,
    compile: bool = False,
) -> nn.Module:
    """Train a judge on `renders`; goes on from `checkpoint` if it is there. Returned in evaluation mode."""
    # Here and not above: judging needs neither diffusers nor the renderer's dependencies, training does.
    from tqdm import tqdm

    from neuraleraser.canvas.train import Trainee, batches

    torch.manual_seed(seed)
    net = build_judge(which).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    run = Trainee(net, checkpoint, peak, steps, ema=0.998)
    loss_of = torch.compile(judge_loss) if compile else judge_loss
    stream = batches(len(renders.images), batch, run.step, seed)
    with tqdm(total=steps, initial=run.step, desc=f"{which} judge", mininterval=5) as bar:
        while run.step < steps:
            index = next(stream)
            generator = torch.Generator().manual_seed(seed * 5_000_011 + run.step)
            x = augment(pixels(renders.images[index]), generator)
            style = torch.from_numpy(renders.style[index].astype(np.int64))
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(net, x, style, presence(renders, index))
            loss.backward()
            run.update()
            bar.update()
            if run.step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    run.use_average()
    settle(net, renders, seed)
    return net.eval()


@torch.no_grad()
def settle(net: nn.Module, renders: Renders, seed: int) -> None:
    """Measure the norms' means and variances anew for the averaged weights, on 4096 augmented renders.

    Training never reads them, so that they need no place in its checkpoints.
    """
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over what follows
    net.train()
    generator = torch.Generator().manual_seed(seed)
    for i in range(0, min(len(renders.images), 4096), 128):
        net(augment(pixels(renders.images[i : i + 128]), generator))
    net.eval()
