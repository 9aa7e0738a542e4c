"""What is known of a pipeline before a concept is named: made once per pipeline and site, then shared by all."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neuraleraser.activations import CONDITIONAL, Seen, collect
from neuraleraser.canvas import words
from neuraleraser.canvas.pipeline import WEIGHTS
from neuraleraser.errors import DataError, FileError, SettingsError, SiteError
from neuraleraser.fit.states import pooled_features
from neuraleraser.io import artifact
from neuraleraser.io.names import MAX_NAME, printable
from neuraleraser.sae import SAE, TrainSettings, labelled_batches, measure, train
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site

KEPT = 96
"""Features of a row that are kept on disk; weaker ones are zero to any gate. Few rows have more that fire."""
MAX_FEATURES = 2**15
"""Features that the background's 16-bit numbers can tell apart."""
MAX_UNPACKED = 2**31
"""Numbers that a background unpacks to, at most: 4 GB. Zeros are not in the file, so its own size is no bound."""
UNCONDITIONAL_SHARE = 5
"""One in so many images gives its unconditional rows, too."""
EVERY = 2
"""Of the sampler's timesteps the background keeps one in two: neighbours say nearly the same."""


@dataclass(frozen=True)
class Dictionary:
    """An SAE at the gate's site, and how its features fire on prompts of everything else.

    pooled [M, T, shares, n] (a row is an image's guidance branch), times [T] descending, a subset of the
    sampler's; objects and styles [M] name what each row's prompt shows ("Cats+Trees" for two objects, "" for none).
    """

    sae: SAE
    site: Site
    pooled: Tensor
    times: Tensor
    objects: Sequence[str]
    styles: Sequence[str]

    def save(self, folder: Path) -> None:
        """Write `sae.safetensors` and `background.safetensors` (the strongest features of each row, in 8 bits).

        Raises DataError for more features than 16 bits can number, FileError when the disk refuses.
        """
        if self.pooled.shape[-1] > MAX_FEATURES:
            raise DataError(f"{self.pooled.shape[-1]} features: a background holds at most {MAX_FEATURES}")
        self.sae.save(folder / "sae.safetensors", {"site": str(self.site)})
        values, index = self.pooled.float().topk(min(KEPT, self.pooled.shape[-1]), -1)
        scale = values.amax().clamp(min=1e-12) / 255
        # Square roots: small activations keep their precision.
        coded = (values / (255 * scale)).sqrt().mul(255).round().to(torch.uint8)
        artifact.save(
            folder / "background.safetensors",
            "background",
            {
                "values": coded,
                "index": index.to(torch.int16),
                "times": self.times.float(),
                "scale": scale.reshape(1),
            },
            {
                "site": str(self.site),
                "n": self.pooled.shape[-1],
                "objects": list(self.objects),
                "styles": list(self.styles),
            },
        )

    @classmethod
    def load(cls, folder: Path) -> Dictionary:
        """Read what `save` wrote. Raises FileError."""
        sae = SAE.load(folder / "sae.safetensors")
        tensors, header = artifact.load(folder / "background.safetensors", "background")
        error = _background_error(tensors, header, sae.n)
        if error:
            raise FileError(f"{folder} holds no complete dictionary ({error}): make it again")
        values = (tensors["values"].float() / 255).square() * (255 * tensors["scale"])
        pooled = torch.zeros(*values.shape[:-1], sae.n, dtype=torch.float16)
        pooled.scatter_(-1, tensors["index"].long(), values.half())
        return cls(sae, Site.parse(header["site"]), pooled, tensors["times"], header["objects"], header["styles"])


def _background_error(tensors: Mapping[str, Tensor], header: Mapping[str, Any], n: int) -> str | None:
    """Say what keeps a background from being one of an SAE of `n` features, or None."""
    kinds = {"values": torch.uint8, "index": torch.int16, "times": torch.float32, "scale": torch.float32}
    found = {name: x.dtype for name, x in tensors.items()}
    if found != kinds:
        return f"its tensors are {printable(found, 200)}, expected {kinds}"
    values, index, times, scale = (tensors[name] for name in kinds)
    if values.ndim != 4 or 0 in values.shape or index.shape != values.shape or values.shape[-1] > n:
        return f"values {tuple(values.shape)} and index {tuple(index.shape)} do not fit {n} features"
    if times.shape != values.shape[1:2] or scale.shape != (1,) or not bool((times.diff() < 0).all()):
        return f"times {tuple(times.shape)} and scale {tuple(scale.shape)} do not fit, or times do not descend"
    # Half precision holds what is unpacked.
    if not 0 < 255 * float(scale) <= torch.finfo(torch.float16).max:
        return f"scale is {float(scale):g}"
    unpacked = values[..., 0].numel() * n
    if n > MAX_FEATURES or unpacked > MAX_UNPACKED:
        return f"it unpacks to {unpacked:,} numbers of {n} features, at most {MAX_UNPACKED:,} of {MAX_FEATURES}"
    if not bool(((index >= 0) & (index < n)).all()):
        return f"index names a feature that is none of {n}"
    if header.get("n") != n:
        return f"field n is {printable(header.get('n'))}, the SAE has {n} features"
    for field in ("objects", "styles"):
        names = header.get(field)
        if not isinstance(names, list) or len(names) != len(values) or not all(map(_is_label, names)):
            return f"field {field} is not a name for each of {len(values)} rows"
    try:
        Site.parse(header["site"])
    except (AttributeError, KeyError, SiteError) as e:
        return f"field site is missing or malformed ({printable(e)})"
    return None


def _is_label(name: Any) -> bool:
    """True for what can be several names joined by "+", or none."""
    return isinstance(name, str) and len(name) <= 8 * MAX_NAME and name.isprintable()


CANVAS = WEIGHTS / "dictionary"
CANVAS_GATE = Site("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2")


def load_dictionary(folder: Path = CANVAS) -> Dictionary:
    """The canvas's dictionary, or another. Raises FileError."""
    return Dictionary.load(folder)


def make_canvas_dictionary(
    pipe: Any, folder: Path = CANVAS, images: int = 500, n: int = 256, k: int = 12
) -> Dictionary:
    """Train the canvas's SAE from 400 of its own images, half of them of two objects, with a feature for each style
    and object; draw the background of `images` more. Minutes on two cores. Raises SettingsError for more images
    than there are selection seeds."""
    if not 0 < images <= 500:
        raise SettingsError(f"images is {images}: pass 1 to 500 (their seeds are 500 to 999)")
    sampling = Sampling(batch=40)
    names = [*words.OBJECTS, *words.STYLES]
    shown = canvas_background(400, 1, two=0.5)
    labels = torch.tensor(
        [[float(name in (style, *objects.split("+"))) for name in names] for _, objects, style in shown]
    )
    maps, of = labelled_maps(pipe, [p for p, _, _ in shown], range(100, 500), labels, CANVAS_GATE, sampling)
    settings = TrainSettings(n=n, k=k, steps=1200, discriminant=True, init_vectors=2**17)
    sae = train(labelled_batches(maps, of, 64), settings)
    sae.header["labels"] = names
    sae.header["measures"] = measure(sae, maps.flatten(0, 1)[:50_000])
    known = make_dictionary(pipe, sae, CANVAS_GATE, canvas_background(images, 2), sampling, 500)
    known.save(folder)
    return known


def labelled_maps(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], labels: Tensor, site: Site, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Activations at `site` by whole maps, with what each shows: (x [N, P, d] float32, labels [N, C]) from labels
    [prompts, C]. One in four maps of the conditional branch at random, one in thirty of the unconditional, which
    shows nothing."""
    g = torch.Generator().manual_seed(0)
    maps: list[Tensor] = []
    of: list[Tensor] = []

    def on(seen: Seen) -> None:
        told = seen.branch == CONDITIONAL
        kept = torch.rand(len(seen.images), generator=g) < (1 / 4 if told else 1 / 30)
        maps.append(seen.x[kept.to(seen.x.device)].float().cpu())
        of.append(labels[seen.images.start : seen.images.stop][kept] * told)

    collect(pipe, prompts, seeds, [site], on, sampling)
    return torch.cat(maps), torch.cat(of)


def canvas_background(count: int, seed: int, two: float = 0.19) -> list[tuple[str, str, str]]:
    """Prompts of the canvas with what they show: (prompt, objects joined by "+", style), seen phrasings only; 6 % of
    them show no object, and a share `two` shows two."""
    rng = random.Random(seed)
    out = []
    for i in range(count):
        style = words.STYLES[i % len(words.STYLES)]
        r = rng.random()
        names = rng.sample(words.OBJECTS, 0 if r < 0.06 else 2 if r < 0.06 + two else 1)
        p = rng.randrange(2)
        out.append((words.prompt(names, style, p), "+".join(names), style))
    return out


def make_dictionary(
    pipe: Any,
    sae: SAE,
    site: Site,
    background: Sequence[tuple[str, str, str]],
    sampling: Sampling,
    seed: int = 500,
) -> Dictionary:
    """Draw the background prompts (selection seeds from `seed` on) and keep how the SAE's features fire."""
    prompts = [p for p, _, _ in background]
    pooled, _ = pooled_features(pipe, sae, site, prompts, [seed + i for i in range(len(prompts))], sampling)
    kept = torch.arange(0, len(pooled.times), EVERY)
    values = pooled.values[:, kept]
    # Unconditional rows have no text to tell them apart: a few are enough.
    rows = [values[:, :, -1]] + [values[::UNCONDITIONAL_SHARE, :, b] for b in range(values.shape[2] - 1)]
    shown = [background, *[background[::UNCONDITIONAL_SHARE]] * (len(rows) - 1)]
    labels = [(o, s) for part in shown for _, o, s in part]
    return Dictionary(sae, site, torch.cat(rows), pooled.times[kept], [o for o, _ in labels], [s for _, s in labels])
