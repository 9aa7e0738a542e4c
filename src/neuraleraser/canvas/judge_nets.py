"""The two judges' networks, of different architecture, under 0.8 million parameters each."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuraleraser.canvas.words import OBJECTS, STYLES

Which = Literal["first", "second"]


class Plain(nn.Module):
    """`first`: convolutions and pooling, no skips; heads on the global maximum and mean."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 64, 128, 128)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3 if i else 5, 1 if i else 2, 1 if i else 2, bias=False)
            for i, (a, b) in enumerate(pairwise(widths))
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
        h = self.pool(x)
        return self.style(h), self.objects(h), maps

    def pool(self, x: Tensor) -> Tensor:
        """The last map -> what the heads read: [B, 256]."""
        return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)


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
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairwise(widths))
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
        h = self.pool(x)
        return self.style(h), self.objects(h), maps

    def pool(self, x: Tensor) -> Tensor:
        """The last map -> what the heads read: [B, 160]."""
        return F.relu(self.norm(x)).mean((2, 3))


def build_judge(which: Which) -> Plain | ResNet:
    """An untrained judge."""
    return Plain() if which == "first" else ResNet()
