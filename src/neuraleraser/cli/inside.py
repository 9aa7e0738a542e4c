"""The verbs that look inside a pipeline: its sites, profiles of concepts, SAEs of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tyro.conf import Positional

from neuraleraser.cli.prompts import read_prompts
from neuraleraser.cli.verbs import app, table, verb
from neuraleraser.errors import ConceptError, SettingsError
from neuraleraser.io.names import printable
from neuraleraser.settings import Sampling, check_whole


@verb(app, "sites")
def sites(model: Positional[str] = "canvas", /) -> None:
    """List where a pipeline's activations can be read and edited: blocks, cross-attentions, text encoders.

    Args:
        model: The pipeline: canvas, a folder, or a Hub id.
    """
    from neuraleraser import sampling
    from neuraleraser.families.defaults import recommended_sites
    from neuraleraser.families.opening import open_pipeline
    from neuraleraser.sites import (
        Site,
        candidate_sites,
        cross_attention_sites,
        record,
        text_encoder_sites,
        text_streams,
    )

    pipe = open_pipeline(model)
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
    rows = [("site", "what", "positions", "width", "blocks after it", "known good")]
    for site, what in found.items():
        positions, width = shapes[site]
        # text encoders run before all blocks, a cross-attention inside its own
        at = max((i for i, block in enumerate(blocks) if f"{site.path}.".startswith(f"{block.path}.")), default=-1)
        good = known.get(site.path, "") if what in ("block", "cross-attention") else ""
        name = site.path if site.stream == "image" else f"{site.path}:{'input' if site.tap == 'input' else 'text'}"
        rows.append((name, what, str(positions), str(width), str(len(blocks) - 1 - at), good))
    print(table(rows))


@verb(app, "profile")
def profile(
    phrases: Positional[tuple[str, ...]],
    /,
    sae: str,
    site: str | None = None,
    model: str = "canvas",
    num_images: int = 20,
    top: int = 8,
    out: Path = Path("profile.safetensors"),
) -> None:
    """Say which features of an SAE carry concepts: statistics by timestep, and the features that tell best.

    Args:
        phrases: Concepts, such as "Van Gogh style" "cat"; each is compared with the others and with itself taken out.
        sae: The SAE: a file, a folder or a Hub id.
        site: Where the SAE reads; None: what its file says.
        model: The pipeline: canvas, a folder, or a Hub id.
        num_images: Images drawn of each concept, and as many without it.
        top: Features listed for each concept.
        out: The profile's file.
    """
    import torch

    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.families.naming import concept_of
    from neuraleraser.families.opening import open_pipeline
    from neuraleraser.fitting.trajectories import conditional, pooled_features
    from neuraleraser.io import artifact
    from neuraleraser.io.outputs import check_outputs, save_or_keep
    from neuraleraser.sae import SAE, scores
    from neuraleraser.sites import Site

    if not phrases:
        raise ConceptError("no concept was named: pass phrases such as 'Van Gogh style' cat")
    check_whole("num_images", num_images, 1, 1000)
    check_whole("top", top, 1, 1000)
    check_outputs({"--out": out}, {"--sae": sae, "--model": model})
    loaded = SAE.from_pretrained(sae)
    where = site or loaded.header.get("site")
    if not where:
        raise SettingsError(f"{sae} does not say which site it reads: pass --site")
    pipe = open_pipeline(model)
    asked = [concept_of(pipe, phrase) for phrase in phrases]
    prompts, labels = [], []
    for concept in asked:
        pairs = [concept.pairs[i * len(concept.pairs) // num_images] for i in range(num_images)]
        prompts += [p.positive for p in pairs] + [p.negative for p in pairs]
        labels += [concept.name] * num_images + [f"no {concept.name}"] * num_images
    seeds = [i % (2 * num_images) % num_images for i in range(len(prompts))]  # a pair shares its noise
    pooled, _ = pooled_features(pipe, loaded, Site.parse(where), prompts, seeds, default_sampling(pipe))
    stats = scores.profile(conditional(pooled)[:, :, 0], pooled.times, labels)
    tensors = {"mean": stats.mean, "spread": stats.spread, "times": stats.times}
    header = {"names": list(stats.names), "site": str(where), "model": model}
    save_or_keep(out, lambda path: artifact.save(path, "profile", tensors, header))
    for concept in asked:
        score = scores.margin_score(stats, concept.name).mean(0)
        share = scores.saeuron_score(stats, concept.name).mean(0)
        rows = [("feature", "gap to the worst neighbour", "SAeUron's share score", "")]
        for k in torch.topk(score, min(top, len(score))).indices.tolist():
            rows.append((str(k), f"{score[k]:.2f}", f"{share[k]:.4f}", ""))
        print(f"{concept.name}\n{table(rows)}\n")
    print(out)


@verb(app, "reference")
def reference(
    sae: Positional[Path],
    site: Positional[str],
    /,
    model: str,
    prompts: Path,
    out: Path = Path("runs/imported"),
) -> None:
    """Make a reference from another library's SAE, for `erase --reference` and `profile --sae OUT/sae.safetensors`.

    Args:
        sae: Folder or weights file of SAeUron, sdxl-unbox, SAELens, sparsify, dictionary_learning or OpenAI.
        site: The site that it reads, such as unet.up_blocks.1.attentions.1 or unet.mid_block.attentions.0:update.
        model: The pipeline: canvas, a folder, or a Hub id.
        prompts: Text file of prompts of many things, one a line, after a tab what it shows, by commas: thresholds are
            calibrated on their images. What shows a concept is no background for it.
        out: The reference's folder.
    """
    from neuraleraser.families.opening import open_pipeline
    from neuraleraser.fitting import import_reference
    from neuraleraser.io.outputs import check_outputs, save_or_keep
    from neuraleraser.sites import Site

    at = Site.parse(site)
    made = {f"--out: {name}": out / name for name in ("sae.safetensors", "background.safetensors")}
    check_outputs(made, {"the SAE": sae, "--prompts": prompts, "--model": model}, folders={"--out": out})
    lines = read_prompts(prompts)
    texts, labels = [prompt for prompt, _ in lines], [names for _, names in lines]
    known = import_reference(open_pipeline(model), sae, at, texts, labels)
    save_or_keep(out, known.save)
    seen = known.sae.header.get("calibration")
    share = seen.get("disagreement") if isinstance(seen, dict) else None
    differs = f"; calibrated thresholds disagree with it on {share:.1%} of firings" if isinstance(share, float) else ""
    print(f"{out}: {known.sae.n_features} features of {printable(known.sae.header.get('format'))} at {at}{differs}")
