"""`neuraleraser evaluate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

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
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    batch_size: int | None = None,
    machine: Machine = AUTOMATIC,
) -> None:
    """Measure erasers with the second judge, on prompts and seeds that none was made with, beside two filters of
    the prompt and doing nothing.

    Args:
        erasers: Eraser files, folders or Hub ids.
        model: The pipeline: canvas, or a folder with another canvas.
        out: Folder for pictures, results and the report; run again with it to go on. None: runs/evaluate, or
            runs/sealed-COMMIT.
        calibrate: Fit the erasers' gates to this pipeline's weights first (nothing is written).
        sealed: Make erasers of the twelve sealed concepts and measure those, once for a commit, when all is frozen;
            adds a line to docs/SEALED.md.
        num_inference_steps: Denoising steps; None: the model's usual.
        guidance_scale: Classifier-free guidance scale; None: the model's usual.
        batch_size: Images generated together; None: 4, on the canvas 20.
    """
    from neuraleraser.assessment import evaluate_erasers
    from neuraleraser.eraser import Eraser
    from neuraleraser.evaluation.report_files import write_report
    from neuraleraser.evaluation.terminal import terminal_tables
    from neuraleraser.families.defaults import default_sampling
    from neuraleraser.fitting import calibrate as run_calibrate
    from neuraleraser.sealed import evaluate_sealed

    if sealed and (erasers or calibrate):
        raise SettingsError("--sealed makes its own erasers: pass neither --erasers nor --calibrate with it")
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
    pipe = machine.open_pipeline(model)
    settings = replace(settings, sampling=default_sampling(pipe, num_inference_steps, guidance_scale, batch_size))
    report = evaluate_erasers(pipe, [run_calibrate(pipe, e) for e in loaded] if calibrate else loaded, settings, folder)
    paths = write_report(report, folder)
    print("\n" + terminal_tables(report) + "\n")
    print("\n".join(map(str, paths)))
