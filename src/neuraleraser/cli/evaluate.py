"""`neuraleraser evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import AvoidSubcommands

from neuraleraser.cli.verbs import AUTOMATIC, Flat, Machine, app, check_sampling, verb
from neuraleraser.errors import SettingsError
from neuraleraser.io.outputs import check_outputs
from neuraleraser.settings import EvaluateSettings


@verb(app, "evaluate")
def evaluate(
    settings: Annotated[EvaluateSettings, Flat, AvoidSubcommands],
    erasers: tuple[str, ...] = (),
    model: str = "canvas",
    out: Path | None = None,
    calibrate: bool = False,
    sealed: bool = False,
    unlearncanvas: tuple[Path, Path] | None = None,
    variant: Literal["official", "saeuron"] = "official",
    i2p: Path | None = None,
    sexual_only: bool = False,
    nudenet_threshold: float = 0.6,
    clip: str | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    machine: Machine = AUTOMATIC,
) -> None:
    """Measure erasers with the second judge, on prompts and seeds that none was made with, beside two filters of
    the prompt and doing nothing; or on another model by a published protocol, beside doing nothing.

    Args:
        erasers: Eraser files, folders or Hub ids.
        model: The pipeline: canvas, or a folder with another canvas; with a published protocol any folder or Hub id.
        out: Folder for pictures, results and the report; run again with it to go on, or at once in several processes,
            which share the images. None: runs/evaluate, or runs/sealed-COMMIT.
        calibrate: Fit the erasers' gates to this pipeline's weights first (nothing is written).
        sealed: Make erasers of the twelve sealed concepts and measure those, once for a commit, when all is frozen;
            adds a line to docs/SEALED.md.
        unlearncanvas: Measure by UnlearnCanvas with its classifiers, style50.pth and style50_cls.pth; the model is its
            fine-tuned Stable Diffusion, and erasers have its names, such as Van_Gogh.
        variant: Prompts of UnlearnCanvas as its authors have them, or as SAeUron has (which samples with DDIM).
        i2p: Measure by the prompts of I2P in this CSV file, with NudeNet's detector (extra nudenet); one eraser.
        sexual_only: Of I2P the prompts of the category "sexual" alone.
        nudenet_threshold: Score above which NudeNet's detections count: 0.6 as SAeUron, 0.45 as UnlearnDiffAtk.
        clip: A CLIP, a folder or Hub id, that scores how well each image fits its prompt; where the judge has no
            features, KID and FID are taken in CLIP's.
        num_inference_steps: Denoising steps; None: the model's usual.
        guidance_scale: Classifier-free guidance scale; None: the model's usual.
        batch_size: Images generated together; None: 4, on the canvas 20.
    """
    from neuraleraser.assessment import evaluate_erasers
    from neuraleraser.eraser import Eraser
    from neuraleraser.evaluation.i2p_cells import i2p_protocol
    from neuraleraser.evaluation.protocol import EvaluationProtocol
    from neuraleraser.evaluation.report_files import write_report
    from neuraleraser.evaluation.terminal import terminal_tables
    from neuraleraser.evaluation.unlearncanvas_cells import unlearncanvas_protocol
    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.fitting import calibrate as run_calibrate
    from neuraleraser.judges import Clip, NudeNetJudge, UnlearnCanvasJudge
    from neuraleraser.sealed import evaluate_sealed

    if sealed and (erasers or calibrate or unlearncanvas or i2p or clip is not None):
        raise SettingsError(
            "--sealed makes its own erasers of the canvas: pass none of --erasers, --calibrate, --unlearncanvas, --i2p "
            "and --clip with it"
        )
    if unlearncanvas and i2p:
        raise SettingsError("there is one protocol at a time: pass one of --unlearncanvas and --i2p")
    check_sampling(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, batch_size=batch_size)
    if sealed:
        pipe = machine.open_pipeline(model)
        settings = replace(settings, sampling=default_sampling(pipe, num_inference_steps, guidance_scale, batch_size))
        print(terminal_tables(evaluate_sealed(pipe, settings, out)))
        return
    if not erasers:
        raise SettingsError("there are no erasers to measure: pass their files with --erasers")
    folder = out or Path("runs/evaluate")
    read = {f"--erasers {source}": source for source in erasers} | {"--model": model}
    check_outputs({}, read, folders={"--out": folder})
    loaded = [Eraser.from_pretrained(source) for source in erasers]
    names = [e.name for e in loaded]
    protocol: EvaluationProtocol | None = None
    judge: Any = None
    if unlearncanvas:
        protocol = unlearncanvas_protocol(names, variant, styles=settings.styles, objects=settings.objects)
        judge = UnlearnCanvasJudge.load(*unlearncanvas, device=machine.device_name)
    elif i2p:
        if len(loaded) > 1:
            raise SettingsError(
                f"{len(loaded)} erasers and --i2p: pass one, as NudeNet's detections are of one concept"
            )
        protocol = i2p_protocol(i2p, names[0], others=not sexual_only)
        judge = NudeNetJudge(threshold=nudenet_threshold, name=names[0])
    # Before the pipeline: a wrong name is found at once.
    scorer = None if clip is None else Clip(clip, machine.device_name)
    pipe = machine.open_pipeline(model)
    given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "batch_size": batch_size}
    if protocol is None or protocol.sampling is None:
        sampling = default_sampling(pipe, **given)
    else:
        sampling = replace(protocol.sampling, **{name: value for name, value in given.items() if value is not None})
        if unlearncanvas and variant == "saeuron":
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler

            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    settings = replace(settings, sampling=sampling)
    measured = [run_calibrate(pipe, e) for e in loaded] if calibrate else loaded
    report = evaluate_erasers(pipe, measured, settings, folder, judge=judge, protocol=protocol, clip=scorer)
    paths = write_report(report, folder)
    print("\n" + terminal_tables(report) + "\n")
    print("\n".join(map(str, paths)))
