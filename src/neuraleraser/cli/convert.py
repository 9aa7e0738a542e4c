"""`neuraleraser convert`."""

from __future__ import annotations

import os
from pathlib import Path

from tyro.conf import Positional

from neuraleraser.cli.verbs import app, verb
from neuraleraser.errors import SettingsError
from neuraleraser.io.outputs import check_outputs


@verb(app, "convert")
def convert(
    sae: Positional[str],
    out: Positional[Path],
    /,
    to: str = "saelens",
) -> None:
    """Write an SAE as another library has it, to look at it with that library's tools.

    Args:
        sae: The SAE: a file, a folder or a Hub id.
        out: The folder for the library's files; not the SAE's own.
        to: saelens, sparsify, saeuron, dictionary_learning, openai or sdxl-unbox.
    """
    from neuraleraser.sae import SAE, formats

    check_outputs({}, folders={"OUT": out})
    source = os.path.realpath(sae)
    if os.path.realpath(out) == (source if os.path.isdir(source) else os.path.dirname(source)):
        raise SettingsError(f"{out} is the SAE's own folder, where it could be replaced: pass another")
    if os.path.isdir(out) and os.listdir(out):
        raise SettingsError(f"the folder {out} is not empty, and files of two formats would be mixed: pass a new one")
    formats.write(SAE.from_pretrained(sae), out, to)
    print(out)
