"""Certificates: what an evaluation found, with a hash of every image, so that a stranger can check it.

A certificate is JSON: {"content", "sha256", "signature", "public_key"}. sha256 is of the content in its one written
form (keys sorted, no blanks, UTF-8); the signature is Ed25519's (RFC 8032) of those bytes, base64, or null.

The content has what was measured (settings, model's fingerprint, judge, and a digest of each method), the figures, and
a row for each image that was drawn: method, concept, group, seed, prompt, and the SHA-256 of its shape and pixels.
Every figure with an interval is there, computed from the rows anew, but for KID and CLIP scores, which are as the
report states them; FID has no interval.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from neuraleraser.errors import DataError, FileError, SettingsError
from neuraleraser.evaluation.certificate_form import figure_key, is_whole, places_of
from neuraleraser.evaluation.comparison import estimates_of, is_in_pictures
from neuraleraser.evaluation.draw import draw
from neuraleraser.evaluation.evaluate import default_judge, default_protocol
from neuraleraser.evaluation.intervals import Estimate
from neuraleraser.evaluation.measure import Figures, measure
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.protocol import Cell, EvaluationProtocol
from neuraleraser.evaluation.results import BASE, Results, concat
from neuraleraser.evaluation.run_folder import RunFolder, deciding, open_run
from neuraleraser.families import family_of
from neuraleraser.io.atomic import write_bytes
from neuraleraser.io.names import printable
from neuraleraser.io.reading import parse_json, read_bytes
from neuraleraser.io.signatures import is_signature, read_public_key, sign
from neuraleraser.judges import Judge, JudgeSpec
from neuraleraser.settings import EvaluateSettings, Sampling

FORMAT = 2
_OF_THE_CHECKS = ("unchanged_compared", "idle_identical")
"""Figures of images that a method left alone and that were drawn all the same: other ones each time."""
_FEATURES = ("features", "clip", "clip_digest")
"""Of a report's judge: in which features KID is, and the CLIP of its scores."""
MAX_CERTIFICATE_BYTES = 256 * 2**20
"""Bytes of a certificate, at most."""


@dataclass(frozen=True)
class Redrawn:
    """Rows of a certificate that were drawn again.

    Attributes:
        drawn: Rows that were drawn again.
        different: Those whose images have other bits, in words.
        outside: Figures of these rows whose intervals do not meet the certificate's, in words.

    Examples:
        >>> from neuraleraser.evaluation.certificate import Redrawn
        >>> Redrawn(20, different=(), outside=()).drawn
        20
    """

    drawn: int
    different: tuple[str, ...]
    outside: tuple[str, ...]


def certify(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], key: str | os.PathLike[str] | None = None
) -> None:
    """Write the certificate of an evaluation that is finished.

    Args:
        folder: The evaluation's folder.
        out: The certificate.
        key: A private Ed25519 key in PEM, without a password; None: it is not signed.

    Raises:
        FileError: The folder is no finished evaluation, lacks a picture, or the key is none.
        MissingDependencyError: There is a key, and the package `cryptography` is not installed.

    Examples:
        >>> methods = [DoNothing("Mosaic", "style")]
        >>> written = write_report(evaluate(pipe, methods, brief, "run"), Path("run"))
        >>> certify("run", "certificate.json")
        >>> read_certificate("certificate.json")["certificate"]
        2
    """
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    content = {"certificate": FORMAT, "made": made, **_content(Path(folder))}
    if not is_whole(content):
        raise FileError(f"{folder}/report.json states what no evaluation finds: let it end, or run it again")
    data = _canonical(content)
    signature, public = (None, None) if key is None else sign(data, key)
    digest = hashlib.sha256(data).hexdigest()
    whole = {"content": content, "sha256": digest, "signature": signature, "public_key": public}
    write_bytes(out, (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode())


def read_certificate(path: str | os.PathLike[str], public_key: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return a certificate's content, once its hash and its signature are checked.

    Args:
        path: The certificate.
        public_key: Whose it must be: a public Ed25519 key in PEM; None: a signature is checked by the key that the
            certificate brings, which says that nothing was changed since, and not who made it.

    Returns:
        The content.

    Raises:
        FileError: It is no certificate, was altered, is signed by another key, or is not signed and should be.
        MissingDependencyError: It is signed, and the package `cryptography` is not installed.

    Examples:
        >>> methods = [DoNothing("Mosaic", "style")]
        >>> written = write_report(evaluate(pipe, methods, brief, "run"), Path("run"))
        >>> certify("run", "certificate.json")
        >>> sorted(read_certificate("certificate.json"))
        ['certificate', 'features', 'figures', 'made', 'rows', 'run', 'versions']
    """
    whole = _json_of(Path(path), MAX_CERTIFICATE_BYTES)
    content = whole.get("content")
    known = whole.keys() == {"content", "sha256", "signature", "public_key"}
    if not known or not isinstance(content, dict) or content.get("certificate") != FORMAT:
        raise FileError(f"{path} is no certificate of format {FORMAT}: pass one that `certify` of this version wrote")
    if not is_whole(content):
        raise FileError(f"{path} lacks what a certificate holds, or holds it in another form: ask for it anew")
    data = _canonical(content)
    if whole.get("sha256") != hashlib.sha256(data).hexdigest():
        raise FileError(f"{path} was altered: its content does not have the hash that it states; ask for it anew")
    signature, brought = whole.get("signature"), whole.get("public_key")
    wanted = None if public_key is None else read_public_key(public_key)
    if signature is None:
        if wanted is not None:
            raise FileError(f"{path} is not signed: ask for one that is, or leave the public key out")
        return content
    if wanted is not None and wanted != brought:
        raise FileError(f"{path} is signed with another key than {public_key}: it is not theirs")
    if not is_signature(signature, data, brought):
        raise FileError(f"{path} was altered: its signature is not of this content; ask for it anew")
    return content


def compare_folder(content: Mapping[str, Any], folder: str | os.PathLike[str]) -> list[str]:
    """Return what differs between a certificate and the evaluation's folder: what was run, images, and figures, those
    too that only one of the two has.

    Args:
        content: A certificate's content.
        folder: The evaluation's folder.

    Returns:
        What differs, in words; nothing if all agrees.

    Raises:
        FileError: The folder holds no such evaluation, or lacks a picture.

    Examples:
        >>> methods = [DoNothing("Mosaic", "style")]
        >>> written = write_report(evaluate(pipe, methods, brief, "run"), Path("run"))
        >>> certify("run", "certificate.json")
        >>> compare_folder(read_certificate("certificate.json"), "run")
        []
    """
    here = _content(Path(folder))
    differ = [name for name in ("versions", "features") if content[name] != here[name]]
    stated, found = content["run"], here["run"]
    parts = [name for name in {**stated, **found} if deciding(name, stated) != deciding(name, found)]
    differ = [f"{name} of the run" for name in (*parts, *differ)]
    rows, own = ({tuple(row[:5]): row[5] for row in part["rows"]} for part in (content, here))
    differ += [_row_text(row) for row in {**rows, **own} if rows.get(row) != own.get(row)]
    figures, found = ({figure_key(f): f for f in part["figures"]} for part in (content, here))
    differ += [f"figure {', '.join(key)}" for key in {**figures, **found} if figures.get(key) != found.get(key)]
    return differ


def redraw(
    content: Mapping[str, Any],
    pipe: Any,
    methods: Sequence[Method],
    folder: str | os.PathLike[str],
    *,
    share: float = 0.05,
    seed: int | None = None,
    judge: Judge | None = None,
    protocol: EvaluationProtocol | None = None,
) -> Redrawn:
    """Draw a random share of a certificate's rows again, and compare.

    On a machine of the same kind, with as many threads, images have the same bits. Elsewhere they differ a little, and
    figures have to agree within their intervals.

    Args:
        content: A certificate's content.
        pipe: The diffusers pipeline.
        methods: The methods that the certificate is of.
        folder: An empty folder, for the images.
        share: Share of each method's rows, above 0 and up to 1; at least one row of each.
        seed: Of the choice; None: a random one.
        judge: The judge; None: that of the pipeline's family.
        protocol: The images that were generated; None: those of the family's vocabulary, by the settings.

    Returns:
        What was drawn, and what differs.

    Raises:
        SettingsError: The share is out of range, or the pipeline, the judge or the methods are not the certificate's.

    Examples:
        >>> methods = [DoNothing("Mosaic", "style")]
        >>> written = write_report(evaluate(pipe, methods, brief, "run"), Path("run"))
        >>> certify("run", "certificate.json")
        >>> redraw(read_certificate("certificate.json"), pipe, methods, "again", share=0.5, seed=0).different
        ()
    """
    if not 0 < share <= 1:
        raise SettingsError(f"the share is {share}: pass a number above 0 and up to 1")
    settings, judge = _settings_of(content["run"]), judge or default_judge(pipe)
    settings = replace(settings, unhooked_checks=0, idle_checks=0)
    concepts = list(dict.fromkeys(m.concept for m in methods))
    protocol = protocol or default_protocol(family_of(pipe), concepts, settings)
    stated = {tuple(row[:5]): str(row[5]) for row in content["rows"]}
    rng = random.Random(seed)
    chosen: dict[str, list[Cell]] = {}
    for m in methods:
        if content["run"]["methods"].get(m.name, {}).get(m.concept) != m.key:
            raise SettingsError(f"the certificate is not of this {m.name!r} of {m.concept!r}: pass the one it is of")
        cells = protocol.cells[m.concept]
        own = [c for c in cells if (m.name, m.concept, c.group, c.seed, c.prompt) in stated]
        own = own or [c for c in cells if (BASE, "", c.group, c.seed, c.prompt) in stated]
        chosen.setdefault(m.concept, []).extend(rng.sample(own, min(len(own), max(1, round(share * len(own))))))
    some = {concept: list(dict.fromkeys(cells)) for concept, cells in chosen.items()}
    small = replace(protocol, cells=some, base_only=())
    run = open_run(Path(folder), pipe, methods, small, settings, JudgeSpec.of(judge))
    for name in ("model", "judge"):
        if _json_of(run.folder / "run.json")[name] != content["run"][name]:
            raise SettingsError(f"the certificate is of another {name}: pass the one that it is of")
    results = draw(pipe, methods, small, settings, judge, run)
    places = dict.fromkeys(zip(results.method.tolist(), results.concept.tolist(), strict=True))
    drawn = [row for place in places for row in _rows(run, place, run.results(*place)) if tuple(row[:5]) in stated]
    different = tuple(_row_text(row[:5]) for row in drawn if stated[tuple(row[:5])] != row[5])
    return Redrawn(len(drawn), different, _outside(content["figures"], measure(results)))


def _content(folder: Path) -> dict[str, Any]:
    """Return what the certificate of a finished evaluation holds. Raises FileError for another folder."""
    record, report = (_json_of(folder / name) for name in ("run.json", "report.json"))
    versions, run = report.get("versions"), RunFolder(folder, _judge_of(record), read_only=True)
    tables = {place: run.results(*place) for place in places_of(record)}
    if lacking := [place for place, table in tables.items() if not len(table)]:
        raise FileError(f"{folder} has no rows of {', '.join(lacking[0]).rstrip(', ')}: let the evaluation end first")
    figures = _figures(measure(concat(list(tables.values()))))
    stated = [_stated(*key, m) for key, m in estimates_of(folder / "report.json", report).items()]
    of_rows = [f for f in stated if not is_in_pictures(f["figure"])]
    found, written = ({figure_key(f): (f["n"], f["value"]) for f in some} for some in (figures, of_rows))
    if not isinstance(versions, dict) or found != written:
        raise FileError(
            f"{folder}/report.json has other figures than its rows: let the evaluation end, or run it again"
        )
    rows = [row for place, table in tables.items() for row in _rows(run, place, table)]
    figures += [f for f in stated if is_in_pictures(f["figure"])]  # as the report states them
    judge = report.get("judge")
    features = {name: judge[name] for name in _FEATURES if name in judge} if isinstance(judge, dict) else {}
    return {"run": record, "versions": versions, "features": features, "figures": figures, "rows": rows}


def _outside(stated: Sequence[Mapping[str, Any]], found: Figures) -> tuple[str, ...]:
    """Return figures whose intervals do not meet, or that the certificate does not have, in words."""
    known = {figure_key(f): f for f in stated}
    differ = []
    for b in _figures(found):
        a, name = known.get(figure_key(b)), ", ".join(figure_key(b))
        if a is None and b["figure"] not in _OF_THE_CHECKS:
            differ.append(f"{name}: not in the certificate, here {b['value']:.2f}")
        elif a is not None and (a["high"] < b["low"] or b["high"] < a["low"]):
            differ.append(f"{name}: {a['value']:.2f}, here {b['value']:.2f}")
    return tuple(differ)


def _figures(figures: Figures) -> list[dict[str, Any]]:
    """Return every figure that rows give, with its interval, as plain data."""
    found = []
    for e in figures.erasures:
        named: dict[str, Any] = dict(e.figures)
        for r in e.route_figures:
            named |= {f"{r.group} {r.strength:.1f}: {name}": m for name, m in r.figures.items()}
        for a in e.attacks:
            named |= {f"{a.group}: {name}": m for name, m in a.figures.items()}
        named |= {f"still_right_{d.name}": d.still_right for d in e.damage}
        named |= {"lookalike_gap": e.lookalikes.gap} if e.lookalikes else {}
        found += [_stated(e.concept, e.method, name, m) for name, m in named.items() if isinstance(m, Estimate)]
    return found


def _stated(concept: str, method: str, name: str, m: Estimate) -> dict[str, Any]:
    numbers = {"value": round(m.value, 6), "low": round(m.low, 6), "high": round(m.high, 6), "n": m.n}
    return {"concept": concept, "method": method, "figure": name} | numbers


def _rows(run: RunFolder, place: tuple[str, str], table: Results) -> Iterator[list[Any]]:
    """Return a row for each image of a method and concept that was drawn."""
    drawn = table.compared | (table.method == BASE)
    for i in np.flatnonzero(drawn).tolist():
        group, seed, prompt = str(table.group[i]), int(table.seed[i]), str(table.prompt[i])
        cell = Cell(prompt, seed, str(table.cell_style[i]), tuple(table.cell_objects[i]), group)
        image = run.image(*place, cell)
        digest = hashlib.sha256(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()).hexdigest()
        yield [*place, group, seed, prompt, digest]


def _row_text(row: Sequence[Any]) -> str:
    method, concept, group, seed, prompt = row
    return printable(f"{method}{f' of {concept}' if concept else ''}, {group}, {prompt!r}, seed {seed}", 300)


def _judge_of(record: Mapping[str, Any]) -> JudgeSpec:
    """Return the judge of a run. Raises FileError for another record."""
    try:
        judge = record["judge"]
        limit = judge["artefact_threshold"]
        return JudgeSpec(tuple(judge["styles"]), tuple(judge["objects"]), dict(judge["thresholds"]), limit)
    except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
        raise FileError(f"the record of the run is damaged ({error!r}): evaluate again") from error


def _settings_of(record: Mapping[str, Any]) -> EvaluateSettings:
    try:
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in record["settings"].items()}
        given["sampling"] = Sampling(**given["sampling"])
        return EvaluateSettings(**given)
    except (TypeError, KeyError, AttributeError, SettingsError) as error:
        raise FileError(f"the certificate has settings of another version ({error!r}): make it anew") from error


def _json_of(path: Path, most: int = 64 * 2**20) -> dict[str, Any]:
    try:
        data = parse_json(read_bytes(path, most))
    except ValueError as error:
        raise FileError(f"{path} is no JSON ({error}): pass another, or make it anew") from error
    if not isinstance(data, dict):
        raise FileError(f"{path} holds no JSON object: pass another, or make it anew")
    return data


def _canonical(content: Mapping[str, Any]) -> bytes:
    """Return the one written form. Raises FileError for text that is no Unicode."""
    try:
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise FileError(f"the certificate has text that is no Unicode ({error.reason}): ask for it anew") from error
