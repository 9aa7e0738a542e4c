"""`neuraleraser reference`."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from neuraleraser.cli.verbs import AUTOMATIC, Machine, app, verb
from neuraleraser.io.names import printable
from neuraleraser.prompts import read_prompts


@verb(app, "reference")
def reference(
    sae: Positional[Path],
    site: Positional[str],
    /,
    model: str,
    prompts: Path,
    out: Path = Path("runs/imported"),
    machine: Machine = AUTOMATIC,
) -> None:
    """Make a reference from another library's SAE, for `erase --reference` and `profile --sae OUT/sae.safetensors`.

    Args:
        sae: Folder or weights file of SAeUron, sdxl-unbox, SAELens, sparsify, dictionary_learning or OpenAI.
        site: The site that it reads, such as unet.up_blocks.1.attentions.1 or unet.mid_block.attentions.0:update.
        model: The pipeline: canvas, a folder, or a Hub id.
        prompts: Text file of prompts of many things, one per line, each with an optional tab and comma-separated names
            of what it shows: thresholds are calibrated on their images. What shows a concept is no background for it.
        out: The reference's folder.
    """
    from neuraleraser.fitting import import_reference
    from neuraleraser.io.outputs import check_outputs, save_or_keep
    from neuraleraser.sites import Site

    at = Site.parse(site)
    made = {f"--out: {name}": out / name for name in ("sae.safetensors", "background.safetensors")}
    check_outputs(made, {"the SAE": sae, "--prompts": prompts, "--model": model}, folders={"--out": out})
    lines = read_prompts(prompts)
    texts, labels = [prompt for prompt, _ in lines], [names for _, names in lines]
    known = import_reference(machine.open_pipeline(model), sae, at, texts, labels)
    save_or_keep(out, known.save)
    seen = known.sae.header.get("calibration")
    share = seen.get("disagreement") if isinstance(seen, dict) else None
    differs = f"; calibrated thresholds disagree with it on {share:.1%} of firings" if isinstance(share, float) else ""
    print(f"{out}: {known.sae.n_features} features of {printable(known.sae.header.get('format'))} at {at}{differs}")
