"""Settings of the verbs; imports nothing heavy, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from neuraleraser.errors import SettingsError

SELECTION_SEEDS = range(0, 1000)
"""Seeds that erasers are made and defaults are chosen with."""
TEST_SEEDS = range(10_000, 200_000)
"""Seeds that erasers are tested with, and never made (docs/explanation/laws.md, law 12)."""
SEALED_SEEDS = range(300_000, 490_000)
"""Seeds that `evaluate --sealed` alone draws with."""
STREAM_SEEDS = range(2**31, 2**32)
"""Seeds that endless streams of images for training are generated with. Torch's generator on the CPU knows a seed by
its last 32 bits: from 2^32 on the first seeds, and with them the tests' noise, would come again."""

MAX_SEED = 2**63 - 1
"""The largest seed that torch's generators take on every device."""
MAX_COUNT = 10**6
"""The bound of counts that no other bound fits."""
MAX_ATTACK_IMAGES = 40
"""Images of an attack on a concept, at most: so many seeds are kept for each."""


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """Raise SettingsError unless `value` is a whole number (no bool) from `low` to `high`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or not low <= int(value) <= high:
        raise SettingsError(f"{name} is {_short(value)}: pass a whole number from {low:,} to {high:,}")


def check_number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """Raise SettingsError unless `value` is a finite number from `low` (with `above`: above it) to `high`."""
    known = isinstance(value, Real) and not isinstance(value, bool)
    number: Any = value if known else low - 1
    if not low <= number <= high or (above and number == low):  # NaN is in no range
        start = f"above {low:g} and up to" if above else f"from {low:g} to"
        raise SettingsError(f"{name} is {_short(value)}: pass a number {start} {high:g}")


def check_seed(seed: Any, name: str = "seed") -> None:
    """Raise SettingsError unless `seed` is a whole number from 0 to 2^63 - 1."""
    check_whole(name, seed, 0, MAX_SEED)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


@dataclass(frozen=True)
class Sampling:
    """Steps, guidance, size and batch of all images that are generated.

    The defaults here are the canvas's: `default_sampling(pipe)` gives those of any pipeline.

    Raises:
        SettingsError: A value is out of range, or of height and width only one is given.

    Examples:
        >>> generate(pipe, ["a dog"], [0], Sampling(num_inference_steps=2, guidance_scale=1, batch_size=1)).shape
        (1, 64, 64, 3)
    """

    num_inference_steps: int = 25
    """Denoising steps."""
    guidance_scale: float = 3.0
    """Classifier-free guidance scale; 1 generates without guidance."""
    batch_size: int = 20
    """Images generated together."""
    height: int = 0
    """Height in pixels (0: the pipeline's own)."""
    width: int = 0
    """Width in pixels (0: the pipeline's own)."""
    strength: float = 0.8
    """For image-to-image: how much of the way back to noise the start image is taken."""
    pad_last_batch: bool = True
    """Fill the last batch up, so that its images have the same bits in any company."""

    def __post_init__(self) -> None:
        check_whole("num_inference_steps", self.num_inference_steps, 1, 1000)  # timesteps of the schedules in use
        check_number("guidance_scale", self.guidance_scale, 0, 1000)
        check_whole("batch_size", self.batch_size, 1, 4096)
        check_whole("height", self.height, 0, 8192)
        check_whole("width", self.width, 0, 8192)
        check_number("strength", self.strength, 0, 1, above=True)
        if not isinstance(self.pad_last_batch, bool):
            raise SettingsError(f"pad_last_batch is {_short(self.pad_last_batch)}: pass True or False")
        if bool(self.height) != bool(self.width):  # of one alone, pipelines take no notice
            raise SettingsError(
                f"height is {self.height} and width {self.width}: pass both, or 0 for the pipeline's own"
            )


@dataclass(frozen=True)
class StreamSettings:
    """Settings of a stream: generating activations for training, mixing them, cutting them into batches.

    Raises:
        SettingsError: A value is out of range, or no multiple of `group_size` where it must be.

    Examples:
        >>> settings = replace(short, train_batch_size=32, group_size=16)  # 16 vectors share an image's labels
        >>> batches = activation_stream(pipe, prompts, [site], settings, torch.eye(2))(0)
        >>> x, labels = next(batches)[str(site)]
        >>> x.shape, labels.shape
        (torch.Size([32, 128]), torch.Size([2, 2]))
    """

    train_batch_size: int = 4096
    """Activation vectors in a training batch."""
    vectors_per_image: int = 256
    """Vectors kept of an image at each site, over all its steps, positions and guidance branches."""
    num_images: int = 0
    """Images to generate, which are used again and again, in a new order; 0: new ones all along."""
    buffer_chunks: int = 64
    """How many batches of images are mixed at a time, in memory; training starts with a quarter of them. With few
    images in memory an SAE overfits to them (docs/LOG.md)."""
    reuse: int = 16
    """How often a vector is used before it leaves memory: generating takes longer than training."""
    group_size: int = 1
    """Vectors of one image and step that stay together, for labels of whole images; 1: each goes alone."""
    stream_seed: int = 0
    """Decides the images' noise and all orders."""
    prefetch: int = 1
    """Batches of images that a thread generates during training; 0: generating and training take turns."""
    sampling: Sampling | None = None
    """How images are generated; None: as `default_sampling` says."""

    def __post_init__(self) -> None:
        for name in ("train_batch_size", "vectors_per_image", "buffer_chunks", "reuse", "group_size"):
            check_whole(name, getattr(self, name), 1, MAX_COUNT)
        check_whole("num_images", self.num_images, 0, MAX_COUNT)
        check_whole("prefetch", self.prefetch, 0, 1000)
        check_seed(self.stream_seed, "stream_seed")
        for name in ("train_batch_size", "vectors_per_image"):
            if getattr(self, name) % self.group_size:
                raise SettingsError(
                    f"{name} is {getattr(self, name)}: pass a multiple of group_size = {self.group_size}"
                )


@dataclass(frozen=True)
class InspectSettings:
    """On what an SAE is measured. Raises SettingsError for a value out of range."""

    prompts: Path | None = None
    """Text file, one prompt per line; None: captions of the canvas."""
    num_images: int = 20
    """Images to measure on, drawn in one batch."""
    vectors_per_image: int = 2048
    """Activation vectors of an image, over all its steps, positions and guidance branches."""
    num_timesteps: int = 6
    """Timesteps at which the denoising loss is measured."""
    seed: int = 200_000
    """Seed of the first image; the others follow. Erasers are made and tested with other seeds."""
    comparison_png: Path | None = None
    """PNG file for the images: as the model draws them (left), and with reconstructions (right)."""

    def __post_init__(self) -> None:
        check_whole("num_images", self.num_images, 1, 4096)
        check_whole("vectors_per_image", self.vectors_per_image, 1, MAX_COUNT)
        check_whole("num_timesteps", self.num_timesteps, 1, 1000)
        check_whole("seed", self.seed, 0, MAX_SEED - self.num_images)


@dataclass(frozen=True)
class FitSettings:
    """Settings of a fit, which makes an eraser from a concept.

    Raises:
        SettingsError: A value is out of range, or the fit would need more seeds than there are selection seeds.

    Examples:
        >>> small = FitSettings(num_pairs=2, num_context_pairs=0, num_pictures=0, rank=4, steps=2)
        >>> fit(pipe, concept, small, sampling=quick).header.settings.rank
        4
    """

    num_pairs: int = 24
    """Pairs of prompts whose images the prompt gate is chosen by."""
    num_context_pairs: int = 36
    """Prompts of something that stands beside the object in others ('a dog', for 'a cat and a dog'), to learn what is
    to be kept."""
    num_pictures: int = 800
    """Pictures of the concept that the image gate learns from, beside one and a half times as many of other things; of
    what is no style two and a half times as many, or, where pictures are rendered (the canvas), twice as many of the
    concept and three and a half times as many others. 0: no image gate, an eraser of prompts alone."""
    guided_weight: float = 5.0
    """Weight of the guided correction, which acts while the image gate is open; twice that of what is no style."""
    rank: int = 32
    """Rank of a correction."""
    steps: int = 80
    """Gradient steps of a correction whose closed form leaves more than a tenth of the distance between texts."""
    false_openings: float = 0.005
    """Damage that may be done: the share of images without the concept on which either gate may open. A larger one lets
    the gates open on weaker evidence; the header's `tradeoff` says what that brings."""
    seed: int = 0
    """First of the selection seeds (0 to 999) that images are generated with."""

    def __post_init__(self) -> None:
        check_whole("num_pairs", self.num_pairs, 1, len(SELECTION_SEEDS))
        check_whole("num_context_pairs", self.num_context_pairs, 0, len(SELECTION_SEEDS))
        check_whole("num_pictures", self.num_pictures, 0, MAX_COUNT)
        if 0 < self.num_pictures < 8:
            raise SettingsError(f"num_pictures is {self.num_pictures}: pass 8 or more, or 0 for no image gate")
        check_number("guided_weight", self.guided_weight, 0, 100, above=True)
        check_whole("rank", self.rank, 1, 256)
        check_whole("steps", self.steps, 0, MAX_COUNT)
        check_number("false_openings", self.false_openings, 0, 0.5)
        check_whole("seed", self.seed, 0, MAX_SEED)
        if self.seed + 2 * self.num_pairs + self.num_context_pairs > SELECTION_SEEDS.stop:
            raise SettingsError(
                f"seed is {self.seed}, and {self.num_pairs} pairs take two each and {self.num_context_pairs} context "
                f"pairs one: pass fewer or a lower seed, as tests are generated with seeds above "
                f"{SELECTION_SEEDS.stop - 1}"
            )


@dataclass(frozen=True)
class SAeUronSettings:
    """Settings of SAeUron (arXiv 2501.18052): the features that it blocks, and how hard.

    None stands for the published values: 1 feature and multiplier -1 for a style; 20 features and multiplier -20 for an
    object, the middle of a table that has values of its own for each (table 5).

    Raises:
        SettingsError: A value is out of range, or the fit would need more seeds than there are selection seeds.

    Examples:
        >>> settings = SAeUronSettings(num_features=3, num_images=2)
        >>> near, sae = ["mosaic style"], "image-sae.safetensors"
        >>> eraser = fit_saeuron(pipe, concept, neighbours=near, sae=sae, settings=settings, sampling=quick)
        >>> eraser.header.settings.multiplier
        -1.0
    """

    num_features: int | None = None
    """Features that are blocked at each timestep (tau in the paper)."""
    multiplier: float | None = None
    """Factor (gamma in the paper): a feature that fires becomes multiplier * mean * itself, with its mean over the
    concept's images at that timestep."""
    num_images: int = 20
    """Images of the concept that features are chosen on; of all others together at least as many, of each as many."""
    sae_images: int = 160
    """Images that an SAE made here learns from."""
    seed: int = 0
    """First of the selection seeds (0 to 999) that images are generated with."""

    def __post_init__(self) -> None:
        if self.num_features is not None:
            check_whole("num_features", self.num_features, 1, 2**24)
        if self.multiplier is not None:
            check_number("multiplier", self.multiplier, -1e6, 1e6)
        check_whole("num_images", self.num_images, 1, 200)
        check_whole("sae_images", self.sae_images, 1, MAX_COUNT)
        check_whole("seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True)
class EvaluateSettings:
    """Settings of an evaluation: the images that measure erasures.

    A round is one image of every cell of a group, each with its own seed.

    Raises:
        SettingsError: A value is out of range, or `sampling.pad_last_batch` is off.

    Examples:
        >>> settings = replace(brief, styles=("Mosaic",), objects=("Cats", "Dogs"))  # two images
        >>> report = evaluate(pipe, [DoNothing("Mosaic", "style")], settings, "mosaic")
        >>> report.base["style_accuracy"].n
        2
    """

    grid_rounds: int = 3
    """Rounds of every style with every object, sealed ones left out; generated once, shared by all methods."""
    target_rounds: int = 3
    """More rounds of the erased concept with everything of the other domain."""
    two_object_rounds: int = 3
    """Rounds of prompts that name an erased object beside each other one."""
    held_out_rounds: int = 3
    """Rounds of the erased concept in phrasings that no eraser is made with."""
    start_image_rounds: int = 3
    """Rounds that start from a render of the concept, at one of three strengths by turns: with a prompt that names it,
    one that does not, and none; every third with half of the picture drawn anew, and from its inverted latents, too.
    Three bring every strength."""
    fragment_prompts: int = 80
    """Prompts of one or two words of the concept's phrasings, never a whole one; at most as many as there are."""
    embedding_steps: int = 0
    """Steps in which embeddings of the concept are learned on the base model, to be drawn with every method; 0: none.
    On the canvas 300 take about four minutes of a core."""
    held_out_grid_rounds: int = 1
    """Rounds of the whole grid in held-out phrasings, by the base alone."""
    unhooked_checks: int = 40
    """Base images generated once more with nothing attached, and compared bit for bit."""
    idle_checks: int = 40
    """Images per method in which it said that it would not act, generated with it all the same and compared bit for
    bit; what the last batch would be padded with comes on top."""
    timings: int = 7
    """Rounds in which plain sampling and sampling with the eraser are timed against each other."""
    timed_images: int = 16
    """Images in a timed batch."""
    sampling: Sampling | None = None
    """How images are generated; None: as `default_sampling` says."""
    styles: tuple[str, ...] = ()
    """Only these styles; none named: all that are not sealed."""
    objects: tuple[str, ...] = ()
    """Only these objects; none named: all that are not sealed."""

    def __post_init__(self) -> None:
        for name in ("grid_rounds", "timings", "timed_images"):
            check_whole(name, getattr(self, name), 1, 1000)
        rounds = ("target_rounds", "two_object_rounds", "held_out_rounds", "start_image_rounds")
        counts = ("fragment_prompts", "embedding_steps", "held_out_grid_rounds", "unhooked_checks", "idle_checks")
        for name in (*rounds, *counts):
            check_whole(name, getattr(self, name), 0, 10_000)
        if self.sampling is not None and not self.sampling.pad_last_batch:
            raise SettingsError(
                "pad_last_batch is off: without padding an image's bits depend on its company, so there are no twins "
                "to compare with; leave it on"
            )


@dataclass(frozen=True)
class AttackBudget:
    """Amount of each attack of an audit: the same through the eraser and on the base model.

    Raises:
        SettingsError: A value is out of range.

    Examples:
        >>> AttackBudget(steps=150, images=20)
        AttackBudget(steps=150, images=20)
    """

    steps: int = 600
    """Gradient steps of each attack; 0: no attacks."""
    images: int = 40
    """Images that are drawn with what it found."""

    def __post_init__(self) -> None:
        check_whole("steps", self.steps, 0, 100_000)
        check_whole("images", self.images, 1, MAX_ATTACK_IMAGES)


@dataclass(frozen=True)
class DemoSettings:
    """Erase two concepts one at a time, from phrases, and measure it."""

    folder: Path = Path("demo")
    """Where report.html, report.json, contact.png and the erasers go."""
    phrases: tuple[str, ...] = ("Van Gogh style", "cat")
    """What to erase, in words."""
    model: str = "canvas"
    """The pipeline: 'canvas', or a folder with another canvas."""
    reference: str | None = None
    """Reference to fit with: a folder or a Hub id; None: the one that ships."""
    resume: bool = False
    """Go on where an interrupted demo stopped, instead of starting anew."""
    fit: FitSettings = field(default_factory=lambda: FitSettings(num_pictures=400))
    """How erasers are made: image gates from half as many pictures as elsewhere, to be done in minutes."""
    evaluate: EvaluateSettings = field(
        default_factory=lambda: EvaluateSettings(
            grid_rounds=1,
            target_rounds=2,
            two_object_rounds=1,
            held_out_rounds=1,
            start_image_rounds=0,
            fragment_prompts=10,
            held_out_grid_rounds=0,
            unhooked_checks=10,
            idle_checks=0,
            timings=2,  # once in either order
            timed_images=4,
            sampling=Sampling(batch_size=21),  # the target images of Van Gogh in one
            styles=("Seed_Images", "Artist_Sketch", "Cartoon", "Mosaic", "Neon_Lines", "Rust", "Winter"),
            objects=("Dogs", "Flowers", "Fishes", "Horses", "Towers", "Trees"),
        )
    )
    """Amount that is measured; what is erased is added to the styles and objects."""

    def __post_init__(self) -> None:
        if not self.phrases:
            raise SettingsError("there are no phrases: pass what to erase, such as 'Van Gogh style' cat")
