"""`neuraleraser train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from tyro.conf import AvoidSubcommands, Positional

from neuraleraser.cli.verbs import AUTOMATIC, Flat, Machine, app, check_sampling, verb
from neuraleraser.errors import SettingsError
from neuraleraser.io.names import file_name
from neuraleraser.io.outputs import check_outputs
from neuraleraser.prompts import read_prompts
from neuraleraser.sae.train_settings import StepLog, TrainSettings
from neuraleraser.settings import StreamSettings


@verb(app, "train")
def train(
    sites: Positional[tuple[str, ...]],
    /,
    stream: Annotated[StreamSettings, Flat, AvoidSubcommands],
    settings: Annotated[TrainSettings, Flat] = TrainSettings(2048, 16, 1500, checkpoint_every=200),  # noqa: B008  (frozen)
    also_n_features: tuple[int, ...] = (),
    model: str = "canvas",
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    activations: Path | None = None,
    prompts: Path | None = None,
    out: Path | None = None,
    tensorboard: Path | None = None,
    machine: Machine = AUTOMATIC,
) -> None:
    """Train sparse autoencoders while the pipeline generates: of each site, one of each width. Run again to go on.

    Args:
        sites: Sites such as unet.mid_block.attentions.0; all are trained from the same images.
        also_n_features: Further widths: an SAE of each, from the same images.
        model: The pipeline to generate with: canvas, a folder, or a Hub id.
        num_inference_steps: Denoising steps; None: the model's usual.
        guidance_scale: Classifier-free guidance scale; None: the model's usual.
        batch_size: Images generated together; None: 4, on the canvas 20.
        activations: A folder from `collect`, to train on instead of drawing.
        prompts: Text file, a prompt per line, each with an optional tab and comma-separated names of what it shows;
            None: captions of the canvas.
        out: The SAE's file (.safetensors), with its log (.jsonl) beside it, or a folder for one or several; None:
            sae.safetensors, or the folder saes.
        tensorboard: Folder for TensorBoard's files, if TensorBoard is installed.
    """
    from tqdm import tqdm

    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.fitting.train_saes import checkpoint_of, drawn_data, recorded_data, train_saes
    from neuraleraser.prompts import label_prompts
    from neuraleraser.sae import TrainingLog
    from neuraleraser.sites import Site

    where = [Site.parse(text) for text in dict.fromkeys(sites)]
    if not where:
        raise SettingsError("no site was named: pass one or more, such as unet.mid_block.attentions.0")
    settings = replace(settings, log_every=min(settings.log_every, max(1, settings.steps // 20)))
    widths = dict.fromkeys((settings.n_features, *also_n_features))
    chosen = [(site, replace(settings, n_features=n)) for site in where for n in widths]
    wanted = dict(zip(_paths([(site, s.n_features) for site, s in chosen], out), chosen, strict=True))
    written = {f"--out: {p.name}": p for path in wanted for p in (path, _log(path), checkpoint_of(path))}
    read = {"--activations": activations, "--prompts": prompts, "--model": model}
    check_outputs(written, read, folders={"--tensorboard": tensorboard})
    check_sampling(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, batch_size=batch_size)
    lines = read_prompts(prompts) if prompts else None
    logs = {path: TrainingLog(_log(path), tensorboard and tensorboard / path.stem) for path in wanted}
    if activations:
        data = recorded_data(activations, where, stream, settings.labelled)
    else:
        pipe = machine.open_pipeline(model)
        stream = replace(stream, sampling=default_sampling(pipe, num_inference_steps, guidance_scale, batch_size))
        given = label_prompts(lines) if lines else None
        data = drawn_data(pipe, model, where, stream, given, settings.labelled)
    unexplained: dict[Path, str] = {}

    with tqdm(total=settings.steps, desc="SAE", unit="step") as bar:

        def on_chunk(number: int) -> None:
            if not unexplained:
                size = data.batches.buffer_chunks
                bar.set_postfix_str(f"filling the buffer, {min(number, size)} of {size}")

        def on_step(path: Path, log: StepLog) -> None:
            if not unexplained:  # what an earlier run did took this one no time
                bar.initial = bar.n = max(0, log.step - settings.log_every)
            logs[path](log)
            unexplained[path] = f"{log.fvu:.3f}"
            bar.update(log.step - bar.n)
            bar.set_postfix(unexplained=" ".join(unexplained.values()), dead=f"{log.dead:.1%}")

        data.batches.on_chunk = on_chunk
        measures = train_saes(data, wanted, model, on_step)
    for log in logs.values():
        log.close()
    for path, figures in measures.items():
        explained, l0, dead = (figures[key] for key in ("explained_variance", "l0", "dead_share"))
        print(
            f"{path}: {wanted[path][1].n_features} features, {l0:.1f} fire for a vector, {dead:.1%} never; "
            f"{explained:.1%} of the variance explained"
        )


def _paths(wanted: Sequence[tuple[object, int]], out: Path | None) -> list[Path]:
    """Return the paths of the SAEs, of each site and width: in a folder, or a file if there is one of them."""
    out = out or Path("sae.safetensors" if len(wanted) == 1 else "saes")
    if out.suffix == ".safetensors":
        if len(wanted) > 1:
            raise SettingsError(f"{len(wanted)} SAEs do not fit into one file {out}: pass a folder with --out")
        return [out]
    short = {site: file_name(str(site).removesuffix(":output:image").replace(":", "-")) for site, _ in wanted}
    return [out / f"{short[site]}-{n}.safetensors" for site, n in wanted]


def _log(path: Path) -> Path:
    return path.with_suffix(".jsonl")
