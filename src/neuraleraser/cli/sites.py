"""`neuraleraser sites`."""

from __future__ import annotations

from typing import Any

from tyro.conf import Positional

from neuraleraser.cli.verbs import AUTOMATIC, Machine, app, verb
from neuraleraser.io.tables import text_table
from neuraleraser.settings import Sampling


@verb(app, "sites")
def sites(model: Positional[str] = "canvas", /, machine: Machine = AUTOMATIC) -> None:
    """List where a pipeline's activations can be read and edited: blocks, cross-attentions, text encoders.

    Args:
        model: The pipeline: canvas, a folder, or a Hub id.
    """
    from neuraleraser import sampling
    from neuraleraser.families.defaults import recommended_sites
    from neuraleraser.sites import (
        Site,
        candidate_sites,
        cross_attention_sites,
        record,
        text_encoder_sites,
        text_streams,
    )

    pipe = machine.open_pipeline(model)
    blocks = candidate_sites(pipe)
    found = (
        dict.fromkeys(blocks, "block")
        | dict.fromkeys(text_streams(pipe), "block, text stream")
        | dict.fromkeys((Site(b.path, "input", "text") for b in blocks), "block, prompt read")
        | dict.fromkeys(cross_attention_sites(pipe), "cross-attention")
        | dict.fromkeys(text_encoder_sites(pipe), "text encoder")
    )
    known = {r.site.path: f"{r.site.tap}; {r.carries}: {r.source}" for r in recommended_sites(pipe)}
    shapes: dict[Any, tuple[int, int]] = {}
    with record(pipe, found, lambda site, x, call: shapes.update({site: (x.shape[1], x.shape[2])})):
        sampling.generate(pipe, ["a picture"], [0], Sampling(num_inference_steps=1, guidance_scale=1.0, batch_size=1))
    head = ("site", "what", "positions", "width", "blocks after it", "known good")
    rows: list[tuple[str, ...]] = []
    for site, what in found.items():
        positions, width = shapes[site]
        # text encoders run before all blocks, a cross-attention inside its own
        at = max((i for i, block in enumerate(blocks) if f"{site.path}.".startswith(f"{block.path}.")), default=-1)
        good = known.get(site.path, "") if what in ("block", "cross-attention") else ""
        name = site.path if site.stream == "image" else f"{site.path}:{'input' if site.tap == 'input' else 'text'}"
        rows.append((name, what, str(positions), str(width), str(len(blocks) - 1 - at), good))
    print(text_table(rows, head, left=(0, 1, -1)))
