"""Distance of a picture from every kind of real render, which tells artefacts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from neuraleraser.errors import DataError

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Artefact:
    """Mahalanobis distance to the nearest kind of real render (Lee et al. 2018, arXiv 1807.03888).

    A kind is a style with objects or without. One covariance for all kinds, as in that paper, fails here: some
    spread so widely that anything hides in it. So each has its own, shrunk a little towards the common one.
    """

    centre: Tensor
    scale: Tensor
    """[D]: features are standardised with these."""
    basis: Tensor
    """[M, K]: main directions of the first M features, a net's; how far those lie off them is one direction more."""
    means: Tensor
    factors: Tensor
    """[kinds, E], [kinds, E, E], E = K + 1 + D - M: centres, and factors of the inverse covariances."""

    def project(self, f: Tensor) -> Tensor:
        """[N, D] -> [N, E]."""
        f = (f - self.centre) / self.scale
        inner, bands = f[:, : len(self.basis)], f[:, len(self.basis) :]
        z = inner @ self.basis
        residual = (inner - z @ self.basis.T).square().mean(1, keepdim=True)
        return torch.cat([z, torch.log(residual + 1e-4), bands], 1)

    def __call__(self, f: Tensor) -> Tensor:
        """[N, D] -> distances [N]."""
        z = self.project(f)
        apart = [((z - m) @ factor).norm(dim=1) for m, factor in zip(self.means, self.factors, strict=True)]
        return torch.stack(apart).amin(0)


FREQUENCY_BANDS = 43


def image_features(x: Tensor, maps: list[Tensor]) -> Tensor:
    """Means and log spreads of a net's maps at every depth, then `FREQUENCY_BANDS` of the picture itself: [B, D].

    The bands (brightness and two colours in four octaves: mean log, log mean, log root mean square) are there
    because a net that was taught to see past noise hardly feels it; the spread of all pixels comes last, with
    a floor so low that a flat picture is unlike the smoothest real one.
    """
    found = []
    for m in maps:
        m = m.flatten(2)
        found += [m.mean(2), torch.log(m.std(2) + 0.1)]
    mix = x.new_tensor([[1 / 3, 1 / 3, 1 / 3], [0.5, -0.5, 0], [0.25, 0.25, -0.5]])
    y = torch.einsum("kc,bchw->bkhw", mix, x)
    for _ in range(4):
        low = F.avg_pool2d(y, 2)
        up = F.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        band = (y - up).flatten(2).abs()
        found += [torch.log(band + 0.004).mean(2), torch.log(band.mean(2) + 0.004)]
        found += [torch.log(band.square().mean(2).sqrt() + 0.004)]
        y = low
    found += [y.mean((2, 3)), torch.log(y.std((2, 3)) + 0.004)]
    spread = x.var((2, 3)).mean(1, keepdim=True).sqrt()
    return torch.cat([*found, torch.log(spread + 0.001)], 1)


def fit_artefact(f: Tensor, kind: Tensor, size: int = 48, bands: int = FREQUENCY_BANDS) -> Artefact:
    """Fit to features [N, D] of real pictures, the last `bands` of them kept whole, and their kind [N], 0 and up.

    Raises DataError if a kind has fewer than two pictures.
    """
    count, few = torch.bincount(kind).min(0)
    if count < 2:
        raise DataError(f"{int(count)} real pictures of kind {int(few)}, at least 2 are needed: pass more")
    centre, scale = round_half(f.mean(0)), round_half(f.std(0) + 1e-3)
    inner = ((f - centre) / scale)[:, : f.shape[1] - bands]
    basis = round_half(torch.linalg.eigh(inner.T @ inner / len(f))[1][:, -size:])
    none = torch.zeros(0)
    z = Artefact(centre, scale, basis, none, none).project(f)
    means = round_half(torch.stack([z[kind == i].mean(0) for i in range(int(kind.max()) + 1)]))
    apart = (z - means[kind]).double()
    common = apart.T @ apart / len(apart)
    factors = []
    for i in range(len(means)):
        own = apart[kind == i]
        covariance = (own.T @ own + 10 * common) / (len(own) + 10) + 1e-3 * torch.eye(len(common))
        factors.append(torch.linalg.inv(torch.linalg.cholesky(covariance)).T)
    return Artefact(centre, scale, basis, means, round_half(torch.stack(factors).float()))


def round_half(x: Tensor) -> Tensor:
    """To the nearest fp16 and back: judges are calibrated as they are shipped."""
    return x.half().float()


def damage_images(images: Images, seed: int = 0) -> dict[str, Images]:
    """Pictures that should pass for real (clean, blurred) and that should not (noisy, flat), by name."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2)
    small = F.interpolate(x, scale_factor=0.75, mode="bilinear", antialias=True, align_corners=False)
    blurred = F.interpolate(small, size=x.shape[-2:], mode="bilinear", align_corners=False).permute(0, 2, 3, 1)

    def noisy(sigma: float) -> Images:
        return np.clip(images + rng.normal(0, 255 * sigma, images.shape) + 0.5, 0, 255).astype(np.uint8)

    grey = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None, None], (256, *images.shape[1:]))
    return {
        "clean": images,
        "blurred": (blurred + 0.5).clamp(0, 255).numpy().astype(np.uint8),
        "noise_0.15": noisy(0.15),
        "noise_0.25": noisy(0.25),
        "grey": grey,
    }
