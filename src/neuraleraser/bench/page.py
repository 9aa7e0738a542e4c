"""report.html: one file that needs nothing else. Pictures are inside, no script runs, nothing is loaded."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from neuraleraser.bench.files import write_bytes
from neuraleraser.bench.measure import Measure
from neuraleraser.bench.pictures import GAIN, difference, png
from neuraleraser.bench.report import (
    METRICS,
    ConceptSection,
    FeaturePanel,
    Number,
    Pair,
    Report,
    size_text,
    value_of,
)

HEADS = {
    "ua": (
        "Erased",
        "Of the images whose twin from the base model (same prompt and seed) shows the concept, the "
        "share that no longer does. Doing nothing scores 0.",
    ),
    "ira": (
        "Same domain",
        "Accuracy over the other concepts of the same domain (styles for a style, objects for an "
        "object), divided by the base model's on the same images.",
    ),
    "cra": ("Other domain", "The same over the other domain."),
    "kept": (
        "Kept",
        "Accuracy of the other domain on the concept's own images, divided by the base model's: the cat "
        "that was drawn in the erased style is still a cat.",
    ),
    "bystander": (
        "Bystander",
        "In prompts with two objects, one of them erased: accuracy of the one that stays, divided by the base model's.",
    ),
    "artefact_rate": (
        "Artefacts",
        "Share of images farther from every real class than 99 % of real renders.",
    ),
    "unchanged_share": (
        "Unchanged",
        "Share of images without the concept that are the base model's image, bit for bit.",
    ),
}
INTRO = (
    "Each concept below was taken out of an image model. A few of the model's own features tell where it is "
    "about to be drawn; there, and only there, what the model reads of the prompt is changed. Every picture after "
    "erasure stands beside the one that the untouched model draws for the same prompt and seed, and the figures "
    "come from comparing many such twins."
)
TIMES, TO = "\u00d7", "\u2013"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def save_html(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the page atomically.

    Raises:
        DataError: as `Report.to_dict` does, so that no page shows what report.json would refuse.
        FileError: the system refuses the file.
    """
    report.to_dict()
    write_bytes(path, page(report).encode())


def page(report: Report) -> str:
    """The whole HTML document."""
    style = resources.files(__package__ or "neuraleraser.bench").joinpath("page.css").read_text(encoding="utf-8")
    sections = "".join(_section(section, number) for number, section in enumerate(report.concepts))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(report.title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>{escape(report.title)}</h1>
<p class="lead">{escape(report.intro or INTRO)}</p>
</header>
{_overview(report)}
{sections}
<section id="run">
<h2>This run</h2>
<div class="two">{_table("Settings", report.settings)}{_table("Versions", report.versions)}</div>
</section>
</main>
</body>
</html>
"""


def _overview(report: Report) -> str:
    tiles = [
        *(
            (f"Base model, {label}", report.base.get(name))
            for name, label in (
                ("style_accuracy", "style as asked"),
                ("object_accuracy", "object as asked"),
                ("artefact_rate", "artefacts"),
            )
        ),
        *(
            (f"Judge, {label}", report.judge.get(name))
            for name, label in (
                ("style_accuracy", "styles of real renders"),
                ("object_accuracy", "objects of real renders"),
            )
        ),
    ]
    facts = "".join(f"<div><dt>{escape(label)}</dt><dd>{_figure(figure)}</dd></div>" for label, figure in tiles)
    heads = "".join(
        f'<th scope="col" title="{escape(text)}">{escape(head)}<small>{name}</small></th>'
        for name, (head, text) in HEADS.items()
    )
    rows = "".join(_row(section, number) for number, section in enumerate(report.concepts))
    meaning = "".join(
        f"<div><dt>{escape(head)} <code>{name}</code></dt><dd>{escape(text)}</dd></div>"
        for name, (head, text) in HEADS.items()
    )
    return f"""<section id="figures">
<h2>Figures</h2>
<dl class="facts">{facts}</dl>
<div class="scroll" tabindex="0" role="region" aria-label="Table of figures">
<table class="figures">
<thead><tr><th scope="col">Concept</th>{heads}<th scope="col">Made in<small>seconds</small></th>
<th scope="col">Size<small>file</small></th><th scope="col">Cost<small>an image</small></th></tr></thead>
<tbody>{rows}</tbody>
</table>
</div>
<p class="note">Fractions of 1 with 95 % bootstrap intervals over images; the small line shows each on a scale
from 0 to 1. An interval without width means that all images agreed: with n images, the true share may still
be off by about 3/n. Cost is sampling time as a multiple of plain sampling.</p>
<details><summary>What the columns mean</summary><dl class="meaning">{meaning}</dl></details>
</section>"""


def _row(section: ConceptSection, number: int) -> str:
    cells = "".join(f"<td>{_figure(section.metrics.get(name), line=True)}</td>" for name in METRICS)
    seconds, size, overhead = (value_of(section.metrics.get(name)) for name in ("make_seconds", "bytes", "overhead"))
    ua = section.metrics.get("ua")
    count = f", n = {ua.n}" if isinstance(ua, Measure) else ""
    under = escape(section.kind if section.method == "eraser" else f"{section.kind}, {section.method}")
    return (
        f'<tr><th scope="row"><a href="#concept-{number}">{_name(section)}</a>'
        f"<small>{under}{count}</small></th>{cells}"
        f"<td>{_text(None if seconds is None else f'{seconds:.0f} s')}</td>"
        f"<td>{_text(None if size is None else size_text(size))}</td>"
        f"<td>{_text(None if overhead is None else f'{TIMES}{overhead:.2f}')}</td></tr>"
    )


def _section(section: ConceptSection, number: int) -> str:
    parts = []
    own, base = (section.metrics.get(name) for name in ("artefact_rate_own", "artefact_rate_own_base"))
    if own is not None and base is not None:
        parts.append(
            '<p class="note">Artefacts where the prompt asks for the concept: '
            f"{_figure(own)}; in the base model's images of those prompts: {_figure(base)}.</p>"
        )
    if section.pairs:
        figures = "".join(map(_pair, section.pairs))
        parts.append(f'<h3>Before and after</h3><div class="pairs">{figures}</div>')
    if section.others:
        same = sum(pair.identical for pair in section.others)
        figures = "".join(map(_other, section.others))
        parts.append(
            f'<h3>Other images</h3><p class="note">The same eraser, prompts without the concept: {same} of '
            f"{len(section.others)} shown here are the base model's image, bit for bit.</p>"
            f'<div class="others">{figures}</div>'
        )
    if section.features:
        parts.append(f'<h3>Features used</h3><div class="features">{"".join(map(_feature, section.features))}</div>')
    if section.became:
        parts.append(f"<h3>What it became</h3>{_became(section.became)}")
    method = "" if section.method == "eraser" else f'<span class="chip">{escape(section.method)}</span>'
    return f"""<section id="concept-{number}">
<h2>{_name(section)} <span class="chip">{escape(section.kind)}</span>{method}</h2>
{"".join(parts)}
</section>
"""


def _pair(pair: Pair) -> str:
    shown = f"{pair.prompt}, seed {pair.seed}"
    gap = "no difference" if pair.identical else f"difference {TIMES}{GAIN}"
    images = (
        ("before", pair.before, f"Before erasure: {shown}"),
        ("after", pair.after, f"After erasure: {shown}"),
        (gap, difference(pair), f"Difference of the two: {shown}"),
    )
    cells = "".join(f"<div>{_img(image, alt)}<span>{escape(label)}</span></div>" for label, image, alt in images)
    return f'<figure class="pair"><div class="trio">{cells}</div>{_caption(pair)}</figure>'


def _other(pair: Pair) -> str:
    cells = "".join(
        f"<div>{_img(image, f'{when} erasure: {pair.prompt}, seed {pair.seed}')}</div>"
        for when, image in (("Before", pair.before), ("After", pair.after))
    )
    tag = '<span class="tag">same bits</span>' if pair.identical else '<span class="tag changed">changed</span>'
    return f'<figure class="other"><div class="duo">{cells}</div>{_caption(pair, tag)}</figure>'


def _caption(pair: Pair, tag: str = "") -> str:
    under = f'<span class="under"><span class="seed">seed {pair.seed}</span>{tag}</span>'
    return f"<figcaption>{escape(pair.prompt)} {under}</figcaption>"


def _feature(panel: FeaturePanel) -> str:
    images = "".join(
        f"<figure>{_img(image, f'Where {panel.label} fires: {caption}')}"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
        for caption, image in panel.heatmaps
    )
    note = f"<p>{escape(panel.note)}</p>" if panel.note else ""
    head = f"<h4>{escape(panel.label)}</h4>{note}"
    return f'<article class="feature">{head}<div class="strip">{images}</div></article>'


def _became(shares: Sequence[tuple[str, Measure | float]]) -> str:
    bars = "".join(
        f'<li><span class="what">{escape(label.replace("_", " "))}</span>'
        f'<span class="bar" aria-hidden="true">{_bar(value_of(share) or 0.0)}</span>'
        f'<span class="share">{_figure(share)}</span></li>'
        for label, share in shares
    )
    return f'<ol class="became">{bars}</ol>'


def _bar(share: float) -> str:
    return f'<i style="width:{_percent(share):.1f}%"></i>'


def _figure(figure: Number, *, line: bool = False) -> str:
    """A number with its interval; with `line`, a small drawing of both on a scale from 0 to 1 below."""
    value = value_of(figure)
    if value is None:
        return _text(None)
    text = f"<b>{value:.2f}</b>"
    if not isinstance(figure, Measure):
        return text
    text += f' <span class="ci">({figure.low:.2f}{TO}{figure.high:.2f})</span>'
    if line:
        low, high, dot = map(_percent, (figure.low, figure.high, value))
        text += (
            f'<svg viewBox="0 0 100 10" aria-hidden="true"><path class="track" d="M0 5H100"/>'
            f'<path class="range" d="M{low:.1f} 5H{high:.1f}"/><circle cx="{dot:.1f}" cy="5" r="2.8"/></svg>'
        )
    return text


def _percent(value: float) -> float:
    """Where `value` lies on a drawn scale from 0 to 1, in per cent; what lies outside stands at its end."""
    return 100 * min(max(value, 0.0), 1.0)


def _text(text: str | None) -> str:
    return escape(text) if text is not None else '<span class="none" title="does not apply">&ndash;</span>'


def _name(section: ConceptSection) -> str:
    return escape(section.name.replace("_", " "))


def _table(title: str, values: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key))}</th><td>{escape(_said(value))}</td></tr>'
        for key, value in values.items()
    )
    return f'<div><h3>{title}</h3><table class="plain"><tbody>{rows}</tbody></table></div>' if rows else ""


def _said(value: Any) -> str:
    """A setting as one line of text."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
        return ", ".join(map(str, value))
    return json.dumps(value, default=str)


def _img(image: np.ndarray, alt: str) -> str:
    data = base64.b64encode(png(image)).decode()
    height, width = image.shape[:2]
    return f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" alt="{escape(alt)}">'
