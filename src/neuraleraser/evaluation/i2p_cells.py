"""Cells of I2P (arXiv 2211.05105): prompts of real users, many of which models answer with what nobody asked for.

The file is the user's: `i2p_benchmark.csv` of the data set's authors, or the copy that ESD's repository calls
`unsafe-prompts4703.csv`, whose columns of seeds and guidance have other names. Nothing here downloads one.

Published: 4703 prompts, 931 of them of the category "sexual". Tables of nudity count what NudeNet detects in the images
of all 4703 with scores of 0.6 and more (SAeUron, arXiv 2501.18052, table 2); UnlearnDiffAtk takes 0.45. Steps, guidance
and resolution differ from paper to paper: those here are the defaults of the script that ESD published with its copy,
`eval-scripts/generate-images.py`; SAeUron's are not published.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

from neuraleraser.errors import FileError, SettingsError
from neuraleraser.evaluation.protocol import PROMPTS, Cell, EvaluationProtocol
from neuraleraser.io.names import name_error, printable, prompt_error
from neuraleraser.io.reading import read_bytes
from neuraleraser.settings import MAX_SEED, Sampling

I2P_SAMPLING = Sampling(num_inference_steps=100, guidance_scale=7.5, batch_size=4, height=512, width=512)
"""512 x 512 px, 100 steps, guidance 7.5 for every prompt (ESD's `generate-images.py`). The batch is ours."""
SEXUAL = "sexual"
"""Category of I2P whose prompts tables of nudity are about."""
MAX_BYTES = 2**26
"""Bytes of a file of prompts, at most; the published ones have 1.4 million."""
_SEEDS = ("sd_seed", "evaluation_seed")
_COLUMNS = f"prompt, categories and {_SEEDS[0]} (or {_SEEDS[1]})"
_NOTES = (
    "one guidance scale and one size for all prompts, as ESD's script has it; those in the file are not read",
    "many prompts show nothing of the concept in the base model's images either: read counts before and after together",
)


def i2p_protocol(
    path: str | Path, concept: str = "nudity", *, category: str = SEXUAL, others: bool = True
) -> EvaluationProtocol:
    """Return the prompts of an I2P file with their seeds, to be drawn at the resolution and steps of ESD's script.

    Pass it to `evaluate` with `NudeNetJudge(name=concept)` (threshold 0.6 as SAeUron, 0.45 as UnlearnDiffAtk) and a
    method of the kind "object" whose concept has that name. The report then has the detections of each class and of all
    before and after (`ErasureReport.detections`), and `ua` over the images that show any.

    Args:
        path: The CSV file: columns prompt, categories, and sd_seed or evaluation_seed; others are not read.
        concept: What the erased concept is called.
        category: Category whose prompts ask for the concept, as the file spells it.
        others: Draw the prompts of other categories, too, as published tables do; False: those of `category` alone.

    Returns:
        The protocol, with `sampling` 512 x 512 px, 100 steps, guidance 7.5. A prompt that stands there twice with one
        seed is one image, and is drawn and counted once.

    Raises:
        FileError: The file cannot be read, is no CSV in UTF-8, lacks a column, or a line has no usable prompt or seed.
        SettingsError: No prompt is of the category, or the concept's name cannot be used.

    Examples:
        >>> lines = ["prompt,categories,sd_seed", '"a statue, marble","sexual, shocking",42', "a storm,shocking,7"]
        >>> _ = Path("i2p.csv").write_text("\\n".join(lines))
        >>> [(cell.prompt, cell.seed, cell.asks_for("nudity")) for cell in i2p_protocol("i2p.csv").cells["nudity"]]
        [('a statue, marble', 42, True), ('a storm', 7, False)]
    """
    if error := name_error(concept):
        raise SettingsError(f"{error}: pass the concept's name, such as 'nudity'")
    data = _bytes_of(path)
    cells: dict[tuple[str, int], Cell] = {}
    repeated = 0
    known: set[str] = set()
    for prompt, seed, categories in _lines(path, data):
        known |= categories
        asks = category in categories
        if not (asks or others):
            continue
        before = cells.get((prompt, seed))
        repeated += before is not None
        if before is None or asks:
            cells[prompt, seed] = Cell(prompt, seed, "", (concept,) if asks else (), PROMPTS)
    if category not in known:
        raise SettingsError(
            f"no prompt of {printable(path)} is of the category {printable(category)!r}: it has "
            f"{printable(', '.join(sorted(known)), 300)}"
        )
    notes = _NOTES
    if repeated:
        notes = (f"{repeated} lines of the file repeat a prompt with its seed: drawn and counted once", *notes)
    which = "all categories" if others else f"the category {category}"
    digest = hashlib.sha256(data).hexdigest()[:8]
    name = f"I2P, {len(cells)} prompts of {which} ({printable(Path(path).name, 60)}, SHA-256 {digest}...)"
    return EvaluationProtocol({concept: list(cells.values())}, name=name, sampling=I2P_SAMPLING, notes=notes)


def _bytes_of(path: str | Path) -> bytes:
    try:
        return read_bytes(path, MAX_BYTES)
    except FileError as error:
        raise FileError(f"the prompts of I2P cannot be read ({error}): pass the CSV file with {_COLUMNS}") from error


def _lines(path: str | Path, data: bytes) -> list[tuple[str, int, set[str]]]:
    """Return prompt, seed and categories of each line of a file. Raises FileError."""
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        columns = reader.fieldnames or ()
        lines = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileError(
            f"{printable(path)} is no CSV file in UTF-8 ({printable(error)}): pass the file of I2P with {_COLUMNS}"
        ) from error
    seeds = next((name for name in _SEEDS if name in columns), "")
    lacking = [name for name in ("prompt", "categories") if name not in columns] + ["a seed"] * (not seeds)
    if lacking or not lines:
        what = f"has no {' and no '.join(lacking)}" if lacking else "holds no prompts"
        found = printable(", ".join(columns), 200) or "none"
        raise FileError(f"{printable(path)} {what} (its columns: {found}): pass the file of I2P with {_COLUMNS}")
    return [_line(path, number, line, seeds) for number, line in enumerate(lines, 1)]


def _line(path: str | Path, number: int, line: Mapping[str, str | None], seeds: str) -> tuple[str, int, set[str]]:
    prompt, categories, seed = (line.get(name) for name in ("prompt", "categories", seeds))
    where = f"prompt {number} of {printable(path)}"
    if prompt is None or categories is None or seed is None:
        raise FileError(f"{where} lacks columns: pass the file of I2P with {_COLUMNS}")
    if error := prompt_error(prompt):
        raise FileError(f"{where} cannot be used, as {error}: change it")
    if not (seed.isascii() and seed.isdigit() and len(seed) <= 20 and int(seed) <= MAX_SEED):
        raise FileError(f"{where} has the seed {printable(seed, 40)!r}: write a whole number from 0 to {MAX_SEED}")
    return prompt, int(seed), {name.strip() for name in categories.split(",") if name.strip()}
