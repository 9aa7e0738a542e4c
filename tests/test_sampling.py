"""Sampling: an image is its prompt and its seed, in whatever company it is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from PIL import Image

from helpers import pipelines
from helpers.canvas_models import tiny_vae
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.families.opening import image_to_image, inpainting
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import Sampling

# numpy 2 says so of torch tensors, from inside diffusers' Euler schedulers.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

START = np.zeros((2, 16, 16, 3), np.uint8)
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS, SEEDS = ["a", "b c", "d", "e", "f g h"], [3, 1, 4, 1, 5]


def noise(seed: int) -> torch.Tensor:
    """The latents that the tiny pipeline starts from."""
    return torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipelines.stable_diffusion()


@pytest.fixture(params=["deterministic", "ancestral", "image to image", "latents"])
def drawn(pipe: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A function like `generate`: also with a scheduler that draws noise at every step, and from start images."""
    before = pipe.scheduler
    if request.param == "ancestral":
        pipe.scheduler = EulerAncestralDiscreteScheduler(steps_offset=1)
    if request.param == "image to image":
        other = image_to_image(pipe)
        start = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)

        def draw(prompts: list[str], seeds: list[int], s: Sampling) -> Images:
            image = np.stack([start[PROMPTS.index(p)] for p in prompts])
            return generate(other, prompts, seeds, s, image=image)

        yield draw
    elif request.param == "latents":

        def draw_from(prompts: list[str], seeds: list[int], s: Sampling) -> Images:
            return generate(pipe, prompts, [0] * len(seeds), s, latents=torch.stack([noise(seed) for seed in seeds]))

        yield draw_from
    else:
        yield lambda prompts, seeds, s: generate(pipe, prompts, seeds, s)
    pipe.scheduler = before


def test_order_neighbours_and_padding_do_not_matter(drawn: Any) -> None:
    s = Sampling(num_inference_steps=3, batch_size=3)
    whole = drawn(PROMPTS, SEEDS, s)
    assert whole.shape == (5, 16, 16, 3) and whole.dtype == np.uint8 and whole.std() > 0
    assert (drawn(PROMPTS[::-1], SEEDS[::-1], s)[::-1] == whole).all()
    assert (drawn(PROMPTS[2:4], SEEDS[2:4], s) == whole[2:4]).all()  # padded by one
    assert (drawn([PROMPTS[1]] * 4, [SEEDS[1]] * 4, s) == whole[1]).all()
    assert (drawn([PROMPTS[0]], [99], s)[0] != whole[0]).any()


def test_latents_stand_in_for_the_seed(pipe: Any) -> None:
    """The seed's own noise, given, makes the seed's own images; other latents make others."""
    s = Sampling(num_inference_steps=2, batch_size=3)
    own = torch.stack([noise(seed) for seed in SEEDS])
    plain = generate(pipe, PROMPTS, SEEDS, s)
    assert (generate(pipe, PROMPTS, [9] * 5, s, latents=own) == plain).all()
    swapped = (generate(pipe, PROMPTS, SEEDS, s, latents=own.flip(0)) != plain).any(axis=(1, 2, 3))
    assert swapped.tolist() == [True, False, False, False, True]  # as SEEDS turned round
    tall = Sampling(num_inference_steps=1, batch_size=1, height=8, width=24)
    assert generate(pipe, ["a"], [0], tall, latents=torch.zeros(1, 4, 4, 12)).shape == (1, 8, 24, 3)


def test_latents_take_the_denoiser_s_precision() -> None:
    pipe = pipelines.stable_diffusion().to(torch.bfloat16)
    s = Sampling(num_inference_steps=1, batch_size=2)
    assert generate(pipe, ["a", "b"], [1, 2], s, latents=NOISE).std() > 0


def test_across_batch_shapes_images_agree_closely(drawn: Any) -> None:
    one = drawn(PROMPTS, SEEDS, Sampling(num_inference_steps=3, batch_size=5))
    for s in (
        Sampling(num_inference_steps=3, batch_size=1),
        Sampling(num_inference_steps=3, batch_size=3, pad_last_batch=False),
        Sampling(num_inference_steps=3, batch_size=64, pad_last_batch=False),
    ):
        assert np.abs(drawn(PROMPTS, SEEDS, s).astype(int) - one).max() <= 1


def test_inpainting_draws_what_the_mask_shows_and_keeps_the_rest(pipe: Any) -> None:
    """The final latents of another prompt and seed differ within the mask alone."""
    latents: list[torch.Tensor] = []

    def keep(_: Any, step: int, time: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents.append(state["latents"])
        return {}

    start = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    mask = np.zeros((2, 16, 16), dtype=bool)
    mask[0, :, :8] = mask[1, :, 8:] = True
    s = Sampling(num_inference_steps=2, batch_size=2, strength=1.0)
    for prompts, seeds in ((["a", "b c"], [1, 2]), (["f", "g h"], [1, 2])):
        generate(inpainting(pipe), prompts, seeds, s, image=start, mask_image=mask, callback_on_step_end=keep)
    same = (latents[1] == latents[3]).all(1)  # [2, height, width]
    middle = same.shape[-1] // 2
    assert not same[0, :, :middle].any() and same[0, :, middle:].all()
    assert same[1, :, :middle].all() and not same[1, :, middle:].any()


def test_latents_of_any_width_can_be_inpainted() -> None:
    """As the canvas's, of 8 channels, which diffusers refuses; afterwards the UNet says what it is."""
    pipe = pipelines.stable_diffusion(in_channels=8, out_channels=8)
    pipe.register_modules(vae=tiny_vae().eval())
    mask = np.zeros((1, 16, 16), dtype=bool)
    mask[:, :, :8] = True
    s = Sampling(num_inference_steps=1, batch_size=1, strength=1.0)
    assert generate(inpainting(pipe), ["a"], [1], s, image=START[:1], mask_image=mask).shape[0] == 1
    assert pipe.unet.config["in_channels"] == 8


def test_global_random_state_is_left_alone(pipe: Any) -> None:
    before = torch.random.get_rng_state()
    generate(pipe, PROMPTS, SEEDS, Sampling(num_inference_steps=1, batch_size=2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches_are_announced_and_handed_over(pipe: Any) -> None:
    events: list[Any] = []
    sizes: list[int] = []

    def on_step(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        sizes.append(len(given["latents"]))
        return {}

    out = generate(
        pipe,
        PROMPTS,
        SEEDS,
        Sampling(num_inference_steps=1, batch_size=3),
        on_batch_start=lambda first, real: events.append((first, real)),
        on_batch_end=lambda indices, images: events.append((list(indices), images)),
        callback_on_step_end=on_step,
    )
    assert sizes == [3, 3]  # filled up
    assert events[0] == (0, 3) and events[2] == (3, 2)
    assert events[1][0] == [0, 1, 2] and events[3][0] == [3, 4]
    assert (np.concatenate([events[1][1], events[3][1]]) == out).all()


@pytest.mark.parametrize(("prompts", "pad", "size"), [(2, True, 4), (2, False, 2), (5, False, 3), (8, False, 4)])
def test_padding_is_to_the_batch_or_to_equal_ones(pipe: Any, prompts: int, pad: bool, size: int) -> None:
    rows: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda m, args, output: rows.append(len(args[0])))
    s = Sampling(num_inference_steps=1, guidance_scale=1.0, batch_size=4, pad_last_batch=pad)
    assert len(generate(pipe, ["a"] * prompts, range(prompts), s)) == prompts
    handle.remove()
    assert set(rows) == {size}


def test_guidance_and_size(pipe: Any) -> None:
    rows: list[int] = []
    handle = pipe.unet.register_forward_hook(lambda m, args, output: rows.append(len(args[0])))
    shape = generate(
        pipe, ["a"], [0], Sampling(num_inference_steps=1, guidance_scale=1.0, batch_size=2, height=8, width=24)
    ).shape
    generate(pipe, ["a"], [0], Sampling(num_inference_steps=1, guidance_scale=3.0, batch_size=2))
    handle.remove()
    assert rows == [2, 4] and shape == (1, 8, 24, 3)


def test_nothing_to_draw(pipe: Any) -> None:
    assert generate(pipe, [], []).shape == (0, 0, 0, 3)


def test_no_gradients_are_kept_and_none_are_forbidden_afterwards(pipe: Any) -> None:
    seen: list[bool] = []
    handle = pipe.unet.register_forward_hook(lambda m, args, output: seen.append(torch.is_grad_enabled()))
    generate(pipe, ["a"], [0], Sampling(num_inference_steps=1, batch_size=1))
    handle.remove()
    assert seen == [False] and torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"seeds": [1]}, "2 prompts, 1 seeds"),
        ({"latents": NOISE[:1]}, "2 prompts, 2 seeds, 1 latents"),
        ({"latents": NOISE[:, :, :4]}, r"latents of an image are \[4, 4, 8\]: pass \[4, 8, 8\] each"),
        ({"latents": NOISE, "image": START}, "pass one of `image` and `latents`"),
        ({"seeds": [1, -1]}, "seed is -1"),
        ({"seeds": [1, 2**63]}, "seed is 9223372036854775808"),
        ({"seeds": [1, 1.5]}, "seed is 1.5"),
        ({"prompts": ["a", "\ud800"]}, "is no text"),
        ({"prompts": "ab"}, "prompts is the text 'ab': pass a list"),
        ({"prompts": ["a", b"b"]}, "is no text"),
        (
            {"sampling": Sampling(num_inference_steps=1, height=12, width=16)},
            "refuses these settings: `height` and `width` have to be divisible",
        ),
    ],
)
def test_settings_that_do_not_fit(pipe: Any, given: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        generate(**{"pipe": pipe, "prompts": ["a", "b"], "seeds": [1, 2], **given})


MASK = np.ones((2, 16, 16), dtype=bool)


@pytest.mark.parametrize(
    ("form", "given", "word"),
    [
        (image_to_image, {"image": np.zeros((3, 16, 16, 3), np.uint8)}, "3 start images"),
        (image_to_image, {"image": START, "sampling": Sampling(strength=0.3, num_inference_steps=3)}, "less than one"),
        (image_to_image, {}, r"Img2ImgPipeline needs `image`, and it is None"),
        (
            image_to_image,
            {"image": START, "mask_image": MASK},
            r"no `mask_image`: pass AutoPipelineForInpainting",
        ),
        (inpainting, {"image": START}, r"InpaintPipeline needs `mask_image`"),
        (inpainting, {"mask_image": MASK}, r"needs `image`"),
        (inpainting, {"image": START, "mask_image": MASK[:1]}, "2 start images, 1 masks"),
        (lambda pipe: pipe, {"image": START}, r"takes no `image`: pass AutoPipelineForImage2Image\.from_pipe"),
    ],
)
def test_start_images_that_do_not_fit(pipe: Any, form: Any, given: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        generate(form(pipe), **{"prompts": ["a", "b"], "seeds": [1, 2], **given})


NOTHING = MASK & False
BETWEEN = NOTHING.copy()
BETWEEN[:, 1, 1] = True  # latents are made of pixels with even numbers
BAD_PICTURES: dict[str, tuple[Any, str]] = {
    "floats": (START / 255, r"are float64 \[2, 16, 16, 3\]: pass one array, uint8 \[N, height, width, 3\]"),
    "NaN": (np.full(START.shape, np.nan, np.float32), "are float32"),
    "grey": (START[..., 0], r"are uint8 \[2, 16, 16\]"),
    "with alpha": (np.zeros((2, 16, 16, 4), np.uint8), r"are uint8 \[2, 16, 16, 4\]"),
    "channels first": (np.zeros((2, 3, 16, 16), np.uint8), r"are uint8 \[2, 3, 16, 16\]"),
    "PIL": ([Image.new("RGB", (16, 16))] * 2, r"are of type list: .*np\.stack\("),
    "a tensor": (torch.from_numpy(START), "are of type Tensor"),
    "a number": (3, "are of type int"),
    "no pixels": (START[:, :0], "are 0 x 16 px"),
    "odd sides": (START[:, :15], "are 15 x 16 px: pass sides that are multiples of 2"),
}
BAD_MASKS: dict[str, tuple[Any, str]] = {
    "bytes": (MASK.astype(np.uint8), r"are uint8 \[2, 16, 16\]: pass one array, bool \[N, 16, 16\]"),
    "NaN": (np.full(MASK.shape, np.nan), "are float64"),
    "another size": (MASK[:, :8], r"are bool \[2, 8, 16\]"),
    "with channels": (MASK[:, None], r"are bool \[2, 1, 16, 16\]"),
    "a list": (list(MASK), "are of type list"),
    "a number": (3, "are of type int"),
    "nothing": (np.stack([MASK[0], NOTHING[0]]), r"masks of images \[1\] are empty"),
    "no latent": (BETWEEN, r"masks of images \[0, 1\] are empty, or too small for latents of 2 x 2 px"),
}


@pytest.mark.parametrize(("image", "word"), BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_what_is_no_start_image(pipe: Any, image: Any, word: str) -> None:
    began: list[int] = []
    with pytest.raises(DataError, match=f"the start images {word}"):
        generate(image_to_image(pipe), ["a", "b"], [1, 2], image=image, on_batch_start=lambda *at: began.extend(at))
    assert not began


@pytest.mark.parametrize(("mask", "word"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_what_is_no_mask(pipe: Any, mask: Any, word: str) -> None:
    with pytest.raises(DataError, match=f"the .*{word}"):
        generate(inpainting(pipe), ["a", "b"], [1, 2], image=START, mask_image=mask)


def test_a_mask_of_everything_draws_everything_anew_in_the_size_of_the_start_image(pipe: Any) -> None:
    s = Sampling(num_inference_steps=2, batch_size=2, strength=1.0)
    start = np.random.default_rng(0).integers(0, 256, (2, 8, 24, 3), np.uint8)
    pair = [
        generate(inpainting(pipe), ["a", "b"], [1, 2], s, image=image, mask_image=np.ones((2, 8, 24), bool))
        for image in (start, 255 - start)
    ]
    assert pair[0].shape == start.shape and np.array_equal(pair[0], pair[1])  # nothing of the start image is left


def test_an_error_leaves_nothing_behind() -> None:
    """The next call has the bits of before, and the UNet says what it is, whichever batch fails."""
    pipe = pipelines.stable_diffusion(in_channels=8, out_channels=8)
    pipe.register_modules(vae=tiny_vae().eval())
    painter, s = inpainting(pipe), Sampling(num_inference_steps=2, batch_size=1)
    start = np.random.default_rng(0).integers(0, 256, START.shape, np.uint8)

    def draw(**more: Any) -> Images:
        return generate(painter, ["a", "b"], [1, 2], s, image=start, mask_image=MASK, **more)

    def fail(*_: Any) -> dict[str, torch.Tensor]:
        raise KeyboardInterrupt

    before = draw()
    with pytest.raises(DataError):
        generate(painter, ["a", "b"], [1, 2], s, image=start, mask_image=NOTHING)
    with pytest.raises(KeyboardInterrupt):
        draw(callback_on_step_end=fail)
    assert pipe.unet.config["in_channels"] == 8
    assert np.array_equal(draw(), before)


def test_latents_of_nan_are_refused(pipe: Any) -> None:
    with pytest.raises(DataError, match="the latents have NaN or infinity"):
        generate(pipe, ["a", "b"], [1, 2], latents=NOISE.clone().fill_(float("nan")))


def test_an_image_of_nan_is_no_image() -> None:
    pipe = pipelines.stable_diffusion()
    pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(DataError, match=r"NaN or infinity in an image of \['a'\]"):
        generate(pipe, ["a"], [0], Sampling(num_inference_steps=1, batch_size=2))
