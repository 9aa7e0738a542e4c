"""Measuring methods from end to end: draw, measure, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuraleraser.eraser import check_nothing_acts
from neuraleraser.errors import ConceptError, SettingsError
from neuraleraser.evaluation.detections import detection_counts
from neuraleraser.evaluation.draw import draw
from neuraleraser.evaluation.feature_distances import distances
from neuraleraser.evaluation.measure import Finding, measure
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.protocol import EvaluationProtocol
from neuraleraser.evaluation.report import Report, report
from neuraleraser.evaluation.run_folder import open_run
from neuraleraser.evaluation.split import check_split
from neuraleraser.evaluation.vocabulary_cells import check_open, vocabulary_protocol
from neuraleraser.families import Family, family_of
from neuraleraser.families.defaults import evaluation_sampling
from neuraleraser.io.dependencies import import_optional
from neuraleraser.judges import CountingJudge, FeatureJudge, Judge, JudgeSpec
from neuraleraser.settings import EvaluateSettings, Sampling


def evaluate(
    pipe: Any,
    methods: Sequence[Method],
    settings: EvaluateSettings | None = None,
    folder: str | Path = "runs/evaluate",
    *,
    judge: Judge | None = None,
    protocol: EvaluationProtocol | None = None,
    sealed: bool = False,
) -> Report:
    """Measure erasure methods one at a time on a pipeline, keeping images and results in a folder.

    Called again with the same settings, it goes on where it was stopped. Controls are methods like any other, and none
    is added here: pass `DoNothing(...)` and those of `string_filters(...)`, too. (`neuraleraser evaluate` adds them.)
    The defaults are thousands of images, an hour or more on two CPU cores; a progress bar shows it on stderr.

    Args:
        pipe: The diffusers pipeline.
        methods: The methods to measure.
        settings: Numbers of images, and how they are generated; None: the defaults, or as the protocol was published.
        folder: Folder of the images and results.
        judge: Judge of the images; None: that of the pipeline's family. Figures that it cannot give (of artefacts, of a
            domain that it does not know) are left out, and a note of the report says so.
        protocol: Images to generate; None: the cells of the vocabulary of the pipeline's family.
        sealed: Open the vocabulary's sealed concepts. Only `evaluate --sealed` passes it, which keeps the record that
            law 12 (docs/explanation/laws.md) asks for.

    Returns:
        The report.

    Raises:
        SplitError: A method was made with what it would be tested with, or erases a sealed concept.
        ConceptError: The judge does not know a concept, or the protocol has no cells for it.
        SettingsError: An eraser acts on the pipeline, a method is there twice, the folder is of another run, or the
            pipeline has no judge or vocabulary and none is passed; or the judge is right in less than half of the base
            model's images, so that it reads another model.

    Examples:
        >>> methods = [EraserMethod(eraser), DoNothing("Van_Gogh", "style")]
        >>> report = evaluate(pipe, methods, brief, "run")
        >>> report.of("none", "Van_Gogh").figures["ua"].value  # of the concept's images, the share that lost it
        0.0
    """
    check_nothing_acts(pipe, "measuring")
    _check_shape(methods)
    s = settings or EvaluateSettings()
    published = protocol.sampling if protocol else None
    s = replace(s, sampling=evaluation_sampling(pipe, s, published))  # what the folder's record says
    family = family_of(pipe)
    vocabulary = protocol.vocabulary if protocol else family.vocabulary
    if vocabulary and not sealed:
        check_open(vocabulary, (m.concept for m in methods))
    judge = judge or default_judge(pipe)
    spec = JudgeSpec.of(judge)
    _check_methods(methods, spec)
    concepts = list(dict.fromkeys(m.concept for m in methods))
    protocol = protocol or default_protocol(family, concepts, s, sealed=sealed)
    if protocol.name and family.vocabulary and not sealed:  # the canvas has names of the benchmark's
        check_open(family.vocabulary, (name for c in protocol.all_cells() for name in (c.style, *c.objects)))
    if lacking := [name for name in concepts if not protocol.cells.get(name)]:
        raise ConceptError(f"the protocol has no cells for {', '.join(lacking)}: pass one that has")
    notes = [note for m in methods for note in check_split(m, protocol)]
    notes += [*_deviations(protocol, s.sampling), *protocol.notes, *_left_out(spec)]
    import_optional("pyarrow", "a measurement, whose results are Parquet files,", "evaluate")
    if isinstance(judge, FeatureJudge):  # an error now, and not after all is drawn
        import_optional("torchmetrics.image.fid", "a distance in a judge's features", "evaluate")
    run = open_run(Path(folder), pipe, methods, protocol, s, spec)
    results = draw(pipe, methods, protocol, s, judge, run)
    figures = measure(results)
    findings = [*figures.findings, *(Finding("note", text) for text in dict.fromkeys(notes))]  # errors come first
    apart = distances(figures.erasures, run, protocol, judge) if isinstance(judge, FeatureJudge) else {}
    counts = detection_counts(figures.erasures, run, protocol, judge) if isinstance(judge, CountingJudge) else {}
    return report(replace(figures, findings=findings), results, run, protocol, judge, s, pipe, apart, counts)


def default_judge(pipe: Any) -> Judge:
    """Return the judge of the pipeline's family, which no eraser has seen and which measures artefacts.

    Raises SettingsError where there is none.
    """
    family = family_of(pipe)
    if family.judge is None:
        raise SettingsError(
            f"no judge is known for this {type(pipe).__name__}, only for the canvas: from Python pass `judge` and "
            "`protocol` to `evaluate` (docs/how-to/evaluate-own-model.md)"
        )
    return family.judge()


def default_protocol(
    family: Family, concepts: Sequence[str], settings: EvaluateSettings, *, sealed: bool = False
) -> EvaluationProtocol:
    """Return the cells of the family's vocabulary. Raises SettingsError where that is not known."""
    if family.vocabulary is None:
        raise SettingsError("the world of this pipeline is not known: pass a protocol with cells of your own")
    return vocabulary_protocol(family.vocabulary, concepts, settings, sealed=sealed, render=family.render)


def _deviations(protocol: EvaluationProtocol, sampling: Sampling | None) -> list[str]:
    """Return a sentence where images are generated otherwise than a published protocol says; the batch is free."""
    if protocol.sampling is None or sampling is None:
        return []
    names = ("num_inference_steps", "guidance_scale", "height", "width")
    given = {name: (getattr(sampling, name), getattr(protocol.sampling, name)) for name in names}
    differ = [f"{name} {mine:g} instead of {theirs:g}" for name, (mine, theirs) in given.items() if mine != theirs]
    return (
        [f"{protocol.name or 'the protocol'} is sampled otherwise than it was published: {', '.join(differ)}"]
        if differ
        else []
    )


def _left_out(judge: JudgeSpec) -> list[str]:
    """Return a sentence on the figures that a judge cannot give."""
    lacking = [f"no {kind}" for kind in ("style", "object") if not judge.classes(kind)]
    lacking += ["no artefacts"] if judge.artefact_threshold is None else []
    return [f"the judge knows {' and '.join(lacking)}, so figures of them are left out"] if lacking else []


def _check_shape(methods: Sequence[Method]) -> None:
    """Raise SettingsError for what is no `Method`, such as an eraser that nothing is wrapped around."""
    for m in methods:
        lacking = [name for name in ("name", "concept", "kind", "key", "made_with", "applied") if not hasattr(m, name)]
        if lacking:
            raise SettingsError(
                f"{type(m).__name__} was passed as a method, and has no {lacking[0]!r}: EraserMethod(eraser) makes "
                "a method of an eraser"
            )


def _check_methods(methods: Sequence[Method], judge: JudgeSpec) -> None:
    """Raise SettingsError or ConceptError for methods that cannot be measured together, or by this judge."""
    if not methods:
        raise SettingsError("there are no methods to measure: pass at least one")
    places = [(m.name, m.concept) for m in methods]
    if twice := sorted({place for place in places if places.count(place) > 1}):
        name, concept = twice[0]
        raise SettingsError(
            f"two of the methods are {name!r} of {concept!r}: measure them one after the other, in two folders"
        )
    for m in methods:
        if m.kind not in ("style", "object") or m.concept not in judge.classes(m.kind):
            raise ConceptError(
                f"{m.name!r} of {m.concept!r} (kind {m.kind!r}) cannot be measured: the judge knows the styles "
                f"{list(judge.styles)} and the objects {list(judge.objects)}; make the method of one of them, with the "
                "judge's name and kind"
            )
