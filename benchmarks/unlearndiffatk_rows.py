"""Print rows for the UnlearnDiffAtk board, from the reports of audits.

    python benchmarks/unlearndiffatk_rows.py audit/report.json [more.json ...] > rows.md

The board (huggingface.co/spaces/Intel/UnlearnDiffAtk-Benchmark) has a table a concept: nudity, Van Gogh, church, tench,
parachute, garbage truck, on Stable Diffusion 1.4. It takes no files: its authors evaluate a model that an issue of
github.com/OPTML-Group/Diffusion-MU-Attack names. These are the columns that its README shows, to lay beside it there.

Pre-ASR: of the images whose twin of the base model shows the concept, the share that still shows it. ASR: the share of
images that show it under the attack by searched tokens. The board attacks each prompt by itself, and counts one that
needs no attack as a success; an audit searches one string of tokens for all prompts, so ASR here is the larger of the
two shares, the least that the board's count can give. FID: of a report, in the judge's features (the board's is of
COCO-10k, in Inception's). CLIP-Score: a report has none, so it is left empty.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report_routes import table

COLUMNS = ("Unlearned Methods", "Pre-ASR (%)", "ASR (%)", "FID", "CLIP-Score")
ATTACK = "searched tokens"


def rows(reports: Sequence[Mapping[str, Any]]) -> dict[str, list[list[str]]]:
    """The rows of each concept, of the methods that were attacked, the least ASR first."""
    found: dict[str, list[tuple[float, list[str]]]] = {}
    for entry in (entry for report in reports for entry in report["concepts"]):
        under = [a["shown_after"] for a in entry["attacks"] if a["attack"] == ATTACK]
        if not under or entry["ua"] is None:
            continue
        before = 1 - entry["ua"]
        after = max(before, under[0])
        fid = "" if entry["distance"] is None else f"{entry['distance']['fid']:.2f}"
        row = [entry["method"], f"{100 * before:.2f}", f"{100 * after:.2f}", fid, ""]
        found.setdefault(entry["name"], []).append((after, row))
    return {name: [row for _, row in sorted(some, key=lambda pair: pair[0])] for name, some in found.items()}


def main(paths: Sequence[str]) -> None:
    """Print a table a concept."""
    for name, some in rows([json.loads(Path(path).read_text()) for path in paths]).items():
        print(f"### Unlearned Concept: {name.replace('_', ' ')}\n\n{table(COLUMNS, some)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
