"""Print the tables of docs/RESULTS.md on all methods and attacks from their raw outputs.

python benchmarks/report_official.py

Shares are pooled over the concepts of a kind, with Wilson's 95 % intervals; ratios (ira, cra, kept) are means over the
concepts. A method's worst route is the one on which the most of its images show the concept, of those of the base that
do: held-out phrasings, fragments, start images, half drawn anew, inverted latents.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from canvas_routes import wilson
from report_routes import table

RESULTS = Path(__file__).parent / "results"
ORDER = ("none", "oracle", "string-filter-all", "string-filter-seen", "neuraleraser")
Entry = dict[str, Any]


def pooled(entries: Sequence[Entry], name: str) -> tuple[float, int] | None:
    """A share over all images of some entries, and their number."""
    some = [(e[name], e["ns"][name]) for e in entries if e.get(name) is not None]
    n = sum(count for _, count in some)
    return (sum(value * count for value, count in some) / n, n) if n else None


def routed(entries: Sequence[Entry], group: str) -> tuple[float, int] | None:
    """Share of images on a route that show the concept, and their number."""
    some = [(r["shown_after"], r["ns"]["shown_after"]) for e in entries for r in _routes(e, group)]
    n = sum(count for _, count in some)
    return (sum(value * count for value, count in some) / n, n) if n else None


def _routes(entry: Entry, group: str) -> list[Entry]:
    found = [r for r in entry.get("route_figures", []) if r["group"] == group]
    whole = [r for r in found if not r.get("strength")]
    return [r for r in whole or found if r.get("shown_after") is not None]


def text(found: tuple[float, int] | None, interval: bool = False) -> str:
    """A share as the tables have it."""
    if found is None:
        return ""
    value, n = found
    low, high = wilson(round(value * n), n)
    return f"{value:.2f} ({low:.2f}-{high:.2f})" if interval else f"{value:.2f}"


def mean(entries: Sequence[Entry], name: str) -> str:
    """A mean of ratios."""
    some = [e[name] for e in entries if e.get(name) is not None]
    return f"{sum(some) / len(some):.3f}" if some else ""


def official(whole: dict[str, Any], kind: str) -> str:
    """The two tables of one kind, a line a method: prompts that name the concept, and other routes."""
    entries = [e for e in whole["concepts"] if e["kind"] == kind]
    names = list(dict.fromkeys(e["method"] for e in entries))
    names.sort(key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    named, beyond = [], []
    for name in names:
        own = [e for e in entries if e["method"] == name]
        seconds = [e["make_seconds"] for e in own if e.get("make_seconds") is not None]
        label = f"**{name}**" if name == "neuraleraser" else name
        named.append(
            [
                *(label, str(len(own)), text(pooled(own, "ua"), True)),
                *(mean(own, key) for key in ("ira", "cra", "kept")),
                text(pooled(own, "artefact_rate_target"), True),
                *(text(pooled(own, key)) for key in ("artefact_rate", "unchanged_share")),
                mean([e.get("distance") or {} for e in own], "fid"),
                f"{sum(seconds) / len(seconds):.0f}" if seconds else "",
            ]
        )
        beyond.append(
            [
                *(label, str(len(own))),
                *(text(pooled(own, key), True) for key in ("ua_held_out", "ua_fragments")),
                *(text(routed(own, group), True) for group in ("image-to-image, empty", "inverted latents")),
            ]
        )
    heads = ["method", "concepts", "ua", "ira", "cra", "kept", "artefacts, own", "artefacts, all", "unchanged", "FID"]
    routes = ["held-out phrasings: ua", "fragments: ua", "start images: shows", "inverted latents: shows"]
    return table([*heads, "seconds"], named) + "\n\n" + table(["method", "concepts", *routes], beyond)


def attacks(rows: Sequence[Entry]) -> str:
    """The table of attacks: a line an attack and concept."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    cells: dict[tuple[str, str], dict[str, Entry]] = {}
    for row in rows:
        cells.setdefault((row["attack"], row["concept"]), {})[row["method"]] = row
    lines = []
    for (attack, concept), by in cells.items():
        some = next(iter(by.values()))
        shares = [f"{by[n]['after']:.2f} / {by[n]['sound']:.2f}" if n in by else "" for n in names]
        lines.append([attack, concept.replace("_", " "), str(some["n"]), f"{some['control']:.2f}", *shares])
    before = [
        next((f"{r['before']:.2f}" for r in rows if (r["method"], r["concept"]) == (n, c)), "")
        for c in dict.fromkeys(row["concept"] for row in rows)
        for n in names
    ]
    size = len(names)
    for i, concept in enumerate(dict.fromkeys(row["concept"] for row in rows)):
        lines.insert(i, ["no attack, named", concept.replace("_", " "), "20", "", *before[i * size : (i + 1) * size]])
    return table(["attack", "concept", "n", "control", *names], lines)


def main() -> None:
    """Print."""
    whole = json.loads((RESULTS / "canvas-official.json").read_text())
    for kind in ("style", "object"):
        print(official(whole, kind), "\n")
    path = RESULTS / "canvas-attacks.json"
    if path.exists():
        print(attacks(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
