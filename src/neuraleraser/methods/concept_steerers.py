"""Concept Steerers, Kim and Ghadiyaram, arXiv 2501.19066.

Published (paper, and kim-dahye/steerers at 1d7f761): a k-sparse autoencoder (k 32, 4 features for each number) reads
the residual stream of the text encoder behind one layer, the tenth of twelve, at every token, padding included. The
concept's text, a list of its words, is encoded; with z_p all features of its token p that are above 0, not the k
largest alone, each token x_p of a prompt becomes

    x_p + strength sum_i z_pi d_i,

with decoder rows d_i and no bias. So a token of the prompt takes what stands in its place in the concept's text. The
code gives -0.5 for nudity, and moves the negative prompt by the same the other way.

Ours: of several phrases the mean of z_p, where the code has one text with commas. `every_feature=False` takes the
features that fire. k falls with the width, as published at 768; our TopK loss, and steps for a small model's prompts,
not 400 million tokens. The negative prompt is known by the call of `encode_prompt`, not by counting the hook's calls.
SDXL's two encoders are one site in the code, and here one is chosen.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuraleraser.eraser import Provenance
from neuraleraser.errors import SettingsError
from neuraleraser.evaluation.method import MadeWith
from neuraleraser.fitting.unlabelled_sae import sae_provenance
from neuraleraser.methods.untraced import Untraced
from neuraleraser.methods.weights import weights_digest
from neuraleraser.sae import SAE, TrainSettings, pool_batches, train
from neuraleraser.settings import check_number
from neuraleraser.sites import EditContext, Site, edit, record, text_encoder_sites

_PROMPTS_AT_ONCE = 64
_BATCH = 2048
"""Token vectors in a step of training."""
_STEPS = 1000
_PER_NUMBER = 4
"""Features for each number of an activation."""


@dataclass(frozen=True, eq=False)
class ConceptSteerers(Untraced):
    """Concept Steerers: features of the concept's text are taken from every prompt, in the text encoder.

    Every image changes. For pipelines whose `encode_prompt` runs the text encoder, of a text of fixed length.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        site: Layer of the text encoder.
        vectors: Decoded features of the concept's text, one for each token [tokens, d].
        strength: Factor of the vectors, -100 to 100; below 0 erases.
        negative: The negative prompt moves the other way.
        phrases: Texts of the concept.
        learned_from: Data that the SAE was made with.

    Raises:
        SettingsError: The strength is out of range.

    Examples:
        >>> few = TrainSettings(n_features=64, k=8, steps=5, init_vectors=256, architecture="topk")
        >>> text_sae = ConceptSteerers.train_sae(pipe, ["a cat", "a dog", "in mosaic style"], settings=few)
        >>> method = ConceptSteerers.fit(pipe, "Van_Gogh", "style", ["in Van Gogh style"], text_sae)
        >>> with method.applied(pipe):
        ...     erased = generate(pipe, prompts, [0, 1], quick)
        >>> np.array_equal(erased, images)
        False
    """

    concept: str
    kind: str
    site: Site
    vectors: Tensor
    strength: float = -0.5
    negative: bool = True
    phrases: tuple[str, ...] = ()
    learned_from: Provenance = field(default_factory=Provenance)
    name: str = "concept-steerers"

    def __post_init__(self) -> None:
        check_number("strength", self.strength, -100, 100)

    @property
    def key(self) -> str:
        """Digest of the vectors, their site, the strength and what it moves."""
        return (
            f"{weights_digest({str(self.site): self.vectors})}-{self.strength!r}-{'both' if self.negative else 'one'}"
        )

    @property
    def made_with(self) -> MadeWith:
        """Its phrases, and the data of its SAE."""
        sae = self.learned_from
        return MadeWith(
            seeds=sae.seeds,
            prompts=self.phrases + sae.prompts,
            prompt_digests=frozenset(sae.prompt_digests),
            phrasings=sae.phrasings,
            labels=sae.labels,
            unknown=f"its SAE was trained elsewhere ({sae.sae}), on data that is not known" if sae.sae else "",
        )

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[None]:
        """Add the vectors to what the text encoder makes of each prompt.

        Args:
            pipe: The diffusers pipeline.

        Returns:
            A context; it yields None: the method acts everywhere.

        Raises:
            SettingsError: The pipeline has no `encode_prompt`, or its texts have another length.
            SiteError: The pipeline does not have the site.
        """
        asked = _Asked()

        def steer(x: Tensor, context: EditContext[None]) -> Tensor:
            if x.shape[1:] != self.vectors.shape:
                raise SettingsError(
                    f"a text is {x.shape[1]} tokens of {x.shape[2]} numbers at {self.site}, and the steering vectors "
                    f"of {self.concept!r} are {list(self.vectors.shape)}: fit them on this pipeline"
                )
            sign = asked.sign() if self.negative else float(asked.sign() > 0)
            return (sign * self.strength * self.vectors).to(x).expand_as(x)

        with _watched_prompts(pipe, asked), edit(pipe, {self.site: steer}):
            yield

    @staticmethod
    def train_sae(
        pipe: Any,
        prompts: Sequence[str],
        site: Site | None = None,
        settings: TrainSettings | None = None,
        phrasings: tuple[int, ...] = (),
    ) -> SAE:
        """Train a k-sparse autoencoder on all tokens of prompts, in the text encoder. One is good for every concept.

        Args:
            pipe: The diffusers pipeline; it is not changed.
            prompts: Prompts of all kinds.
            site: Layer of a text encoder; None: of the first one's layers that at 5/6 of its depth.
            settings: Settings of the training; None: 4 features for each number, of which at least 8 fire.
            phrasings: Numbers of the canvas's phrasings that the prompts use.

        Returns:
            The SAE, whose header names its site and its data.

        Raises:
            SettingsError: There are no prompts, or the pipeline has no text encoder.
        """
        if not prompts:
            raise SettingsError("there are no prompts to train an SAE on: pass some hundreds, of all kinds")
        site = site or _published_layer(pipe)
        x = _token_activations(pipe, site, list(dict.fromkeys(prompts))).flatten(0, 1)
        width = x.shape[1]
        settings = settings or TrainSettings(
            _PER_NUMBER * width, max(8, width // 24), _STEPS, architecture="topk", log_every=100
        )
        sae = train(pool_batches(x, min(_BATCH, len(x)), settings.seed), settings)
        made = Provenance(prompts=tuple(dict.fromkeys(prompts)), phrasings=phrasings)
        sae.header |= {"site": str(site), "provenance": made.in_short().as_json()}
        return sae

    @classmethod
    def fit(
        cls,
        pipe: Any,
        concept: str,
        kind: str,
        phrases: Sequence[str],
        sae: SAE,
        strength: float = -0.5,
        *,
        every_feature: bool = True,
        negative: bool = True,
    ) -> ConceptSteerers:
        """Make the vectors of a concept from its phrases.

        Args:
            pipe: The diffusers pipeline; it is not changed.
            concept: Name of the concept.
            kind: "style" or "object".
            phrases: Texts of the concept.
            sae: SAE of a text encoder's layer, as `train_sae` makes it.
            strength: Factor of the vectors.
            every_feature: All features above 0 count, as published; otherwise those above their thresholds.
            negative: The negative prompt moves the other way, as published.

        Returns:
            The method.

        Raises:
            SettingsError: There are no phrases, or the SAE does not name its site or has another width.
        """
        if not phrases:
            raise SettingsError(f"there are no phrases of {concept!r}: pass at least one")
        if "site" not in sae.header:
            raise SettingsError("the SAE does not name its site: make it with ConceptSteerers.train_sae")
        site = Site.parse(sae.header["site"])
        x = _token_activations(pipe, site, phrases)
        if x.shape[2] != sae.d_in:
            raise SettingsError(
                f"{site} is {x.shape[2]} wide, and the SAE takes {sae.d_in}: train one on this pipeline"
            )
        placed = [w.detach().float().cpu() for w in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold)]
        w_enc, b_enc, w_dec, b_dec, threshold = placed
        pre = torch.nn.functional.linear(x - b_dec, w_enc, b_enc)
        z = torch.where(pre > (0 if every_feature else threshold), pre, 0.0)
        return cls(
            concept, kind, site, z.mean(0) @ w_dec, strength, negative, tuple(phrases), sae_provenance(sae).in_short()
        )


@dataclass
class _Asked:
    """Text that an encoder is given: outside of `encode_prompt`, and first in it, the prompt; then the negative one."""

    passes: int = 0
    inside: bool = False

    def sign(self) -> float:
        """Return 1 for the prompt, -1 for the negative prompt, at a pass of the encoder."""
        if not self.inside:
            return 1.0
        self.passes += 1
        return 1.0 if self.passes == 1 else -1.0


@contextmanager
def _watched_prompts(pipe: Any, asked: _Asked) -> Iterator[None]:
    """Context manager: `asked` knows of the calls of this one pipeline object's `encode_prompt`."""
    if not hasattr(pipe, "encode_prompt"):
        raise SettingsError(f"{type(pipe).__name__} has no encode_prompt, which tells a prompt from a negative one")
    encode, before = pipe.encode_prompt, vars(pipe).get("encode_prompt")
    signature = inspect.signature(encode)

    @functools.wraps(encode)  # which keeps the signature, so that others can stand before it
    def watched(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        asked.inside, asked.passes = True, int(given.get("prompt") is None or given.get("prompt_embeds") is not None)
        try:
            return encode(*args, **kwargs)
        finally:
            asked.inside = False

    vars(pipe)["encode_prompt"] = watched
    try:
        yield
    finally:
        if before is None:
            del vars(pipe)["encode_prompt"]
        else:
            vars(pipe)["encode_prompt"] = before


def _published_layer(pipe: Any) -> Site:
    """Return the layer at 5/6 of the first text encoder's depth: the tenth of twelve."""
    sites = text_encoder_sites(pipe)
    if not sites:
        raise SettingsError(f"{type(pipe).__name__} has no text encoder whose layers are known: pass a site")
    first = [site for site in sites if site.path.split(".")[0] == sites[0].path.split(".")[0]]
    return first[max(0, len(first) * 5 // 6 - 1)]


@torch.no_grad()
def _token_activations(pipe: Any, site: Site, texts: Sequence[str]) -> Tensor:
    """Return the activations of each text at a layer of the text encoder, float32 [N, tokens, d] on the CPU."""
    encode: Callable[..., Any] = pipe.encode_prompt
    taken = inspect.signature(encode).parameters
    fixed = {"device": pipe.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    fixed |= {"prompt_2": None, "prompt_3": None}
    fixed = {name: value for name, value in fixed.items() if name in taken}
    found: list[Tensor] = []
    with record(pipe, [site], lambda _, x, context: found.append(x.detach().float().cpu().clone())):
        for first in range(0, len(texts), _PROMPTS_AT_ONCE):
            encode(prompt=list(texts[first : first + _PROMPTS_AT_ONCE]), **fixed)
    return torch.cat(found)
