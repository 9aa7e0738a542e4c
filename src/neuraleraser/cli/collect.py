"""`neuraleraser collect`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from neuraleraser.cli.verbs import AUTOMATIC, Machine, app, check_sampling, verb
from neuraleraser.errors import SettingsError
from neuraleraser.io.outputs import check_outputs
from neuraleraser.prompts import read_prompts
from neuraleraser.sae.architectures import ARCHITECTURES
from neuraleraser.settings import StreamSettings

if TYPE_CHECKING:
    ArchitectureName = str
else:
    ArchitectureName = Literal[tuple(ARCHITECTURES)]  # choices that the help shows


@verb(app, "collect")
def collect(
    sites: Positional[tuple[str, ...]],
    /,
    model: str = "canvas",
    prompts: Path | None = None,
    num_images: int = 300,
    vectors_per_image: int = 256,
    buffer_chunks: int = 16,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    out: Path = Path("activations"),
    machine: Machine = AUTOMATIC,
) -> None:
    """Generate images and record a random sample of their activations, mixed, to train SAEs on. Run again to go on.

    Args:
        sites: Sites such as unet.mid_block.attentions.0 (`neuraleraser sites` lists them).
        model: The pipeline: canvas, a folder, or a Hub id.
        prompts: Text file, a prompt per line, each with an optional tab and comma-separated names of what it shows;
            None: captions of the canvas.
        num_images: How many images to generate; the prompts are repeated if they are fewer.
        vectors_per_image: Activation vectors kept of each image and site, over all steps and positions.
        buffer_chunks: How many batches of images are mixed at a time, in memory.
        seed: Decides the images' noise, which vectors are kept, and their order.
        num_inference_steps: Denoising steps; None: the model's usual.
        guidance_scale: Classifier-free guidance scale; None: the model's usual.
        batch_size: Images generated together; None: 4, on the canvas 20.
        out: Folder for the shards, one per batch of images.
    """
    from tqdm import tqdm

    from neuraleraser.activations import activation_stream, stream_data, write_shards
    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.prompts import default_prompts, label_prompts
    from neuraleraser.sites import Site

    where = [Site.parse(text) for text in sites]
    if not where or num_images < 1:
        raise SettingsError(f"{len(where)} sites, {num_images} images: pass at least one of each")
    settings = StreamSettings(1, vectors_per_image, num_images, buffer_chunks, reuse=1, stream_seed=seed)
    check_sampling(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, batch_size=batch_size)
    check_outputs({}, folders={"--out": out})
    lines = read_prompts(prompts) if prompts else None
    pipe = machine.open_pipeline(model)
    sampling = default_sampling(pipe, num_inference_steps, guidance_scale, batch_size)
    settings = replace(settings, sampling=sampling)
    given = label_prompts(lines) if lines else default_prompts(pipe, num_images)
    data = stream_data(model, given.texts, settings) | {"sites": [str(s) for s in where], "labels": list(given.names)}
    pool = activation_stream(pipe, given.texts, where, settings, given.labels)
    count = -(-num_images // sampling.batch_size)
    with tqdm(total=count, desc="activations", unit="shard") as bar:

        def on_shard(number: int) -> None:
            bar.update(number + 1 - bar.n)

        shards = write_shards(pool, out, count, data, on_shard)
    print(f"{out}: {shards.count} shards of {shards.rows} vectors at each of {len(where)} sites")
