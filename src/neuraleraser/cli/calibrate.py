"""`neuraleraser calibrate`."""

from __future__ import annotations

import os
from pathlib import Path

from tyro.conf import Positional

from neuraleraser.cli.verbs import AUTOMATIC, Machine, app, verb


@verb(app, "calibrate")
def calibrate(
    eraser: Positional[str],
    /,
    model: str,
    concept: str | None = None,
    neighbours: tuple[str, ...] = (),
    num_pairs: int = 8,
    out: Path | None = None,
    machine: Machine = AUTOMATIC,
) -> None:
    """Fit an eraser's gate to other weights of the same architecture, from a few prompts.

    Args:
        eraser: The eraser: a file, a folder or a Hub id.
        model: The pipeline: canvas, a folder, or a Hub id.
        concept: What it erases, as a phrase or a JSON file of prompts; None: the name in its file.
        neighbours: Phrases of what it could be mistaken for; none named: on the canvas all others of the kind.
        num_pairs: Prompts with the concept, and as many without.
        out: The new file; None: the old one's name with "-calibrated", beside it or, of a folder or Hub id, here.
    """
    from neuraleraser.eraser import Eraser
    from neuraleraser.fitting import calibrate as run
    from neuraleraser.io.hub import parse_hub_id
    from neuraleraser.io.outputs import check_outputs, save_or_keep
    from neuraleraser.settings import check_whole

    check_whole("num_pairs", num_pairs, 2, 500)
    source = Path(eraser)
    if os.path.isfile(eraser):
        path = out or source.with_name(f"{source.stem}-calibrated{source.suffix}")
    else:
        asked = None if os.path.isdir(eraser) else parse_hub_id(eraser)
        path = out or Path(f"{Path(asked[0]).name if asked else source.name}-calibrated.safetensors")
    check_outputs({"--out": path}, {"the eraser": eraser, "--concept": concept, "--model": model})
    loaded = Eraser.from_pretrained(eraser)
    fitted = run(machine.open_pipeline(model), loaded, concept, neighbours, num_pairs=num_pairs)
    save_or_keep(path, fitted.save)
    seen = fitted.header.calibrated
    assert seen is not None, "calibrate says what it saw"
    apart = sum(seen.separation) / len(seen.separation)
    print(
        f"{path}: fitted with {seen.prompts} prompts; its gate can open at {seen.open_share:.0%} of its "
        f"timesteps, where {apart:.0%} of the images with the concept stand out"
    )
