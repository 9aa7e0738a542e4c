"""`neuraleraser evaluate`: erasers beside the controls that every table needs, with costs and what gates see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuraleraser.eraser import Eraser
from neuraleraser.eraser.sight import routes_text
from neuraleraser.evaluation.evaluate import default_protocol, evaluate
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.protocol import MAIN_GROUPS, EvaluationProtocol
from neuraleraser.evaluation.report import ErasureReport, Report
from neuraleraser.evaluation.timing import overhead
from neuraleraser.families import family_of
from neuraleraser.families.defaults import evaluation_sampling
from neuraleraser.io.names import file_name
from neuraleraser.judges import ImageTextModel, Judge
from neuraleraser.methods import DoNothing, EraserMethod, string_filters
from neuraleraser.methods.gate_panels import gate_panels
from neuraleraser.settings import EvaluateSettings
from neuraleraser.vocabulary import Vocabulary


def evaluate_erasers(
    pipe: Any,
    erasers: Sequence[Eraser],
    settings: EvaluateSettings | None = None,
    folder: str | Path = "runs/evaluate",
    *,
    judge: Judge | None = None,
    protocol: EvaluationProtocol | None = None,
    sealed: bool = False,
    clip: ImageTextModel | None = None,
) -> Report:
    """Measure `erasers` on `pipe`, each beside its controls; add what they cost and what their gates see.

    `judge` and `protocol` are those of the pipeline's family unless given; filters of words are controls where the
    protocol's vocabulary is known. `clip` scores images by their prompts.
    `folder`/erasers then holds them with their figures in the header, where a model card finds them. Called again with
    the same settings it goes on where it was stopped; costs are timed anew. Raises as `evaluate` does.
    """
    s, folder = settings or EvaluateSettings(), Path(folder)
    s = replace(s, sampling=evaluation_sampling(pipe, s, protocol.sampling if protocol else None))
    methods = [EraserMethod(e) for e in erasers]
    family = family_of(pipe)
    vocabulary = protocol.vocabulary if protocol else family.vocabulary
    every = [method for m in methods for method in (m, *controls(m, vocabulary))]
    report = evaluate(pipe, every, s, folder, judge=judge, protocol=protocol, sealed=sealed, clip=clip)
    cells = (protocol or default_protocol(family, [m.concept for m in methods], s, sealed=sealed)).cells
    for m in methods:
        own = cells[m.concept]
        path = folder / "erasers" / f"{file_name(m.concept)}.safetensors"
        m.eraser.save(path)
        costs = {"bytes": float(path.stat().st_size)} | overhead(pipe, m, own, s)
        if (seconds := m.eraser.header.seconds) is not None:
            costs["make_seconds"] = float(seconds)
        if (peak := m.eraser.header.peak_bytes) is not None:
            costs["make_peak_bytes"] = float(peak)
        target = [c for c in own if c.group in MAIN_GROUPS and c.asks_for(m.concept)]
        panels = gate_panels(pipe, m.eraser, target, evaluation_sampling(pipe, s))
        report = report.with_details(m.name, m.concept, costs, panels, routes_text(m.eraser.header))
        with_measurement(m.eraser, report.of(m.name, m.concept)).save(path)
    return report


def controls(method: Method, vocabulary: Vocabulary | None) -> list[Method]:
    """Return the controls of a method: two string filters, where the vocabulary has the concept, and doing nothing."""
    known = vocabulary if vocabulary is not None and method.concept in vocabulary else None
    filters = string_filters(known, method.concept) if known is not None else []
    return [*filters, DoNothing(method.concept, method.kind)]


def with_measurement(eraser: Eraser, entry: ErasureReport) -> Eraser:
    """Return the eraser with its figures in the header, as model cards state them."""
    figures = {
        name: {"value": round(m.value, 4), "low": round(m.low, 4), "high": round(m.high, 4), "n": m.n}
        for name, m in entry.figures.items()
        if isinstance(m, Estimate)
    }
    return replace(eraser, header=replace(eraser.header, measured=figures))
