"""References: an SAE at a site, and how its features fire on prompts of everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from neuraleraser.activations import CONDITIONAL, ActivationBatch, collect
from neuraleraser.eraser import Provenance
from neuraleraser.errors import DataError, FileError, SettingsError, SiteError
from neuraleraser.families import family_of
from neuraleraser.families.defaults import default_sampling
from neuraleraser.fitting.trajectories import pooled_features
from neuraleraser.io import tensor_file
from neuraleraser.io.cards import header_rows, make_card, plain, table
from neuraleraser.io.hub import HubFile
from neuraleraser.io.names import name_error, printable, prompt_error
from neuraleraser.sae import SAE, TrainSettings, labelled_batches, measure_sae, train
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site
from neuraleraser.vocabulary import PHRASINGS, SEEN, Vocabulary, labelled_prompts

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

FEATURES_PER_ROW = 96
"""Features of a row that are kept on disk; weaker ones are zero to any gate. Few rows have more that fire."""
MAX_FEATURES = 2**15
"""Features that the background's 16-bit numbers can tell apart."""
MAX_UNPACKED = 2**31
"""Numbers that a background unpacks to, at most: 4 GB. Zeros are not in the file, so its own size is no bound."""
UNCONDITIONAL_SHARE = 5
"""One in so many images gives its unconditional rows, too."""
TIMESTEP_STRIDE = 2
"""Of the sampler's timesteps the background keeps one in two: neighbours say nearly the same."""


@dataclass(frozen=True)
class Reference(HubFile):
    """An SAE at the gate's site, and how its features fire on prompts of everything else.

    A row is one guidance branch of one image.

    Attributes:
        sae: The SAE.
        site: The site that it reads.
        pooled: How its features fire, [M, T, shares, n].
        times: Timesteps [T], descending, a subset of the sampler's.
        prompts: Prompts [M] of the rows.
        labels: Names of what each row [M] shows; none if that is not known.
        provenance: Data that it was made with.

    Examples:
        >>> reference.save_pretrained("reference")
        >>> reference = Reference.from_pretrained("reference")  # a folder, or a Hub id
        >>> reference.sae, str(reference.site)
        (SAE(n=256, d=128), 'unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2:output:image')
    """

    NOUN: ClassVar = "reference"
    FILES: ClassVar = ("sae.safetensors", "background.safetensors")

    sae: SAE
    site: Site
    pooled: Tensor
    times: Tensor
    prompts: Sequence[str]
    labels: Sequence[frozenset[str]]
    provenance: Provenance

    def save(self, folder: Path) -> None:
        """Write `sae.safetensors` and `background.safetensors` (the strongest features of each row, in 8 bits).

        Args:
            folder: The folder.

        Raises:
            DataError: There are more features than 16 bits can number.
            FileError: The disk refuses.
        """
        if self.pooled.shape[-1] > MAX_FEATURES:
            raise DataError(f"{self.pooled.shape[-1]} features: a background holds at most {MAX_FEATURES}")
        self.sae.save(folder / "sae.safetensors", {"site": str(self.site)})
        values, index = self.pooled.float().topk(min(FEATURES_PER_ROW, self.pooled.shape[-1]), -1)
        scale = values.amax().clamp(min=1e-12) / 255
        # Square roots: small activations keep their precision.
        coded = (values / (255 * scale)).sqrt().mul(255).round().to(torch.uint8)
        tensor_file.save(
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
                "prompts": list(self.prompts),
                "labels": [sorted(shown) for shown in self.labels],
                "provenance": self.provenance.as_json(),
            },
        )

    @classmethod
    def load(cls, folder: Path) -> Reference:
        """Read what `save` wrote.

        Args:
            folder: The folder.

        Returns:
            The reference.

        Raises:
            FileError: There is no reference, or it is not sound.
        """
        sae = SAE.load(folder / "sae.safetensors")
        tensors, header = tensor_file.load(folder / "background.safetensors", "background")
        error = _background_error(tensors, header, sae.n_features)
        if error:
            raise FileError(f"{folder} holds no complete reference ({error}): make it again")
        values = (tensors["values"].float() / 255).square() * (255 * tensors["scale"])
        pooled = torch.zeros(*values.shape[:-1], sae.n_features, dtype=torch.float16)
        pooled.scatter_(-1, tensors["index"].long(), values.half())
        labels = [frozenset(shown) for shown in header["labels"]]
        provenance = Provenance.parse(header["provenance"])
        return cls(sae, Site.parse(header["site"]), pooled, tensors["times"], header["prompts"], labels, provenance)

    def generate_model_card(self, repo_id: str) -> ModelCard:
        """Return the card that `push_to_hub` uploads with it.

        Args:
            repo_id: "owner/name" of its repository.

        Returns:
            The card.
        """
        header = self.sae.header
        model = header.get("model")
        where = f" of {plain(model)}" if model else ""
        parts = [
            f"# Reference: {self.sae.n_features} features of {plain(str(self.site))}",
            f"An SAE of that site{where}, and how its features fire on {len(set(self.prompts))} prompts: what "
            "NeuralEraser makes erasers with.",
            "## Use",
            "```python\nimport neuraleraser\n\n"
            f'eraser = neuraleraser.erase(pipe, "Van Gogh style", reference={repo_id!r})\n```',
            "## Settings",
            table(("setting", "value"), header_rows(header, ("model", "site"))),
        ]
        return make_card(parts, repo_id=repo_id, base=model)


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
    for field, fits in (("prompts", _is_prompt), ("labels", _are_names)):
        entries = header.get(field)
        if not isinstance(entries, list) or len(entries) != len(values) or not all(map(fits, entries)):
            return f"field {field} has not one entry for each of {len(values)} rows"
    try:
        Site.parse(header["site"])
        Provenance.parse(header["provenance"])
    except (AttributeError, KeyError, OverflowError, SiteError, TypeError, ValueError) as e:
        return f"field site or provenance is missing or malformed ({printable(e)})"
    return None


def _is_prompt(text: Any) -> bool:
    return isinstance(text, str) and prompt_error(text) is None


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and len(names) <= 64 and all(name_error(name) is None for name in names)


def shipped_reference(pipe: Any) -> Reference:
    """Read the reference that ships for the pipeline's family.

    Raises SettingsError where none does, FileError where it is damaged.
    """
    folder = family_of(pipe).reference
    if folder is None:
        raise SettingsError(
            f"no reference ships for this {type(pipe).__name__}, only for the canvas: pass `reference`, as "
            "make_reference or import_reference makes it"
        )
    return Reference.load(folder)


def train_reference(
    pipe: Any, vocabulary: Vocabulary, site: Site, folder: Path, images: int = 500, n: int = 256, k: int = 12
) -> Reference:
    """Train an SAE from 400 of the pipeline's own images, half of them of two objects, with a feature for each style
    and object of a vocabulary; draw the background of `images` more. Minutes on two cores.

    Raises SettingsError for more images than there are selection seeds.
    """
    if not 0 < images <= 500:
        raise SettingsError(f"images is {images}: pass 1 to 500 (their seeds are 500 to 999)")
    sampling = replace(default_sampling(pipe), batch_size=40)
    names = [*vocabulary.objects, *vocabulary.styles]
    shown = labelled_prompts(vocabulary, 400, 1, two=0.5)
    prompts, seeds = [prompt for prompt, _ in shown], range(100, 500)
    labels = torch.tensor([[float(name in of) for name in names] for _, of in shown])
    maps, of = labelled_maps(pipe, prompts, seeds, labels, site, sampling)
    settings = TrainSettings(n_features=n, k=k, steps=1200, fisher_features=True, init_vectors=2**17)
    sae = train(labelled_batches(maps, of, 64), settings)
    sae.header["labels"] = names
    sae.header["measures"] = measure_sae(sae, maps.flatten(0, 1)[:50_000])
    seen = tuple(PHRASINGS[SEEN])
    learnt_from = Provenance(((seeds[0], seeds[-1]),), tuple(prompts), seen, tuple(names))
    background = labelled_prompts(vocabulary, images, 2)
    known = reference_from_sae(pipe, sae, site, background, sampling, 500, learnt_from)
    known.save(folder)
    return known


def labelled_maps(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], labels: Tensor, site: Site, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """Return activations at `site` by whole maps, with what each shows.

    x [N, P, d] float32, labels [N, C] from labels [prompts, C]. One in four maps of the conditional branch at random,
    one in thirty of the unconditional, which shows nothing.
    """
    g = torch.Generator().manual_seed(0)
    maps: list[Tensor] = []
    of: list[Tensor] = []

    def on(seen: ActivationBatch) -> None:
        conditional = seen.branch == CONDITIONAL
        kept = torch.rand(len(seen.images), generator=g) < (1 / 4 if conditional else 1 / 30)
        maps.append(seen.x[kept.to(seen.x.device)].float().cpu())
        of.append(labels[seen.images.start : seen.images.stop][kept] * conditional)

    collect(pipe, prompts, seeds, [site], on, sampling)
    return torch.cat(maps), torch.cat(of)


def reference_from_sae(
    pipe: Any,
    sae: SAE,
    site: Site,
    background: Sequence[tuple[str, frozenset[str]]],
    sampling: Sampling,
    seed: int = 500,
    learnt_from: Provenance | None = None,
) -> Reference:
    """Draw the background's prompts (selection seeds from `seed` on) and keep how the SAE's features fire.

    background: prompts, each with the names of what it shows. learnt_from: what the SAE was made with, and the
    phrasings and labels of the background; None: the background alone.
    """
    prompts = [prompt for prompt, _ in background]
    pooled, _ = pooled_features(pipe, sae, site, prompts, [seed + i for i in range(len(prompts))], sampling)
    kept = torch.arange(0, len(pooled.times), TIMESTEP_STRIDE)
    values = pooled.values[:, kept]
    # Unconditional rows have no text to tell them apart: a few are enough.
    rows = [values[:, :, -1]] + [values[::UNCONDITIONAL_SHARE, :, b] for b in range(values.shape[2] - 1)]
    shown = [row for part in (background, *[background[::UNCONDITIONAL_SHARE]] * (len(rows) - 1)) for row in part]
    before = learnt_from or Provenance((), ())
    provenance = replace(
        before,
        seeds=(*before.seeds, (seed, seed + len(prompts) - 1)),
        prompts=tuple(dict.fromkeys((*before.prompts, *prompts))),
        labels=tuple(dict.fromkeys((*before.labels, *(name for _, of in background for name in sorted(of))))),
    )
    labels = [of for _, of in shown]
    return Reference(sae, site, torch.cat(rows), pooled.times[kept], [p for p, _ in shown], labels, provenance)
