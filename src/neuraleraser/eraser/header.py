"""The header of an eraser: what a reader wants to know of it, checked field by field where a file says it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from neuraleraser.concepts import CONCEPT_KINDS
from neuraleraser.eraser.provenance import Provenance, is_span
from neuraleraser.errors import SettingsError
from neuraleraser.io.fields import are_numbers, are_prompts, is_line, is_number, is_whole
from neuraleraser.io.names import name_error, printable
from neuraleraser.settings import MAX_COUNT, FitSettings, SAeUronSettings, Sampling
from neuraleraser.sites import PROMPT_ROUTES, ROUTES, Fingerprint

_MAX_PROMPTS = 100_000
LAYOUT_FIELDS = ("gate", "corrections", "image_gate", "guided")
"""Fields of an eraser's file that the header does not hold."""


@dataclass(frozen=True)
class Calibration:
    """Record of what was seen when an eraser's gate was fitted to other weights.

    Examples:
        >>> seen = calibrate(pipe, eraser, num_pairs=2, sampling=quick).header.calibrated
        >>> len(seen.separation) == len(eraser.gate.times)
        True
    """

    prompts: int
    """Prompts that were drawn."""
    separation: tuple[float, ...]
    """Share of the rows with the concept that lie above all rows without, by time bin."""
    open_share: float
    """Share of the time bins where the gate can open."""


@dataclass(frozen=True)
class EraserHeader:
    """An eraser's metadata: what it erases, how it was made, what was measured. Nothing here changes an image.

    A field at its default is one that the file does not say.

    Examples:
        >>> header = eraser.header
        >>> header.concept, header.kind, header.base
        ('Van_Gogh', 'style', 'canvas')
        >>> EraserHeader.parse(header.as_json()) == header
        True
    """

    concept: str
    """Name of what it erases."""
    kind: str | None = None
    """ "style", "object" or "other"; None: not said."""
    routes: tuple[str, ...] = PROMPT_ROUTES
    """Routes that its gate sees (docs/explanation/laws.md, law 13)."""
    base: str = ""
    """Name of the pipeline that it was made for, which may be a Hub id."""
    time_scale: str = ""
    """Range of the timesteps of the gate and the corrections: "0-999" or "0-1"."""
    prompts: tuple[str, ...] = ()
    """Every prompt that it was made with: none may test it."""
    seeds: tuple[int, int] | None = None
    """First and last of the seeds that it was made with: none may test it."""
    settings: FitSettings | SAeUronSettings | None = None
    """Settings of its fit."""
    sampling: Sampling | None = None
    """Sampling that it was fitted for; images that were only measured for it took fewer steps."""
    separation: tuple[float, ...] = ()
    """Share of the rows with the concept above all rows without, by time bin, when its features were chosen."""
    tradeoff: tuple[tuple[float, float, float], ...] = ()
    """What other settings of `false_openings` would have given, in the prompts that its prompt gate was fitted to: the
    setting, the share of images with the concept that open the gate, the share of those without."""
    image_separation: tuple[float, ...] = ()
    """Share of the pictures with the concept at which the image gate opened, by level of noise, the noisiest first."""
    least_strength: float | None = None
    """Lowest strength of image-to-image at which the image gate no longer saw the concept in what came of its own
    pictures; 1: it saw it at each that was tried; None: not measured."""
    open_share: float | None = None
    """Share of the time bins where the gate can open."""
    text_left: float | None = None
    """Share of the squared distance between its prompts' texts with the concept and without that is left corrected."""
    seconds: float | None = None
    """Time that the fit took."""
    peak_bytes: int | None = None
    """Largest memory while it was fitted: on a GPU what torch allocated there, else the process's resident set."""
    method: str = ""
    """Method that made it: "saeuron"; "": the package's own."""
    made_for: Fingerprint | None = None
    """Fingerprint of the weights that it fits."""
    reference: Provenance | None = None
    """Data that its reference was made with: none may test it."""
    sae: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the prompt gate's SAE: the labels that its features were set with, if any; of another library's its
    format, its k, and how far calibrated thresholds differ from TopK."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Figures by metric, each a number or {"value", "low", "high", "n"}."""
    calibrated: Calibration | None = None
    """Record of the fit of its gate to other weights, if there was one."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its file that this version does not know: any JSON, kept as it is."""

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> EraserHeader:
        """Read a header from JSON.

        Args:
            data: The result of `as_json`, or what a stranger wrote.

        Returns:
            The header.

        Raises:
            ValueError: A field has no valid value; the message names both.
        """
        if error := name_error(data.get("concept")):
            raise ValueError(f"field concept: {error}")
        known: dict[str, Any] = {"concept": data["concept"]}
        for name, read in _FIELD_READERS.items():
            if name in data:
                try:
                    known[name] = read(data[name])
                except (SettingsError, ValueError) as error:
                    raise ValueError(f"field {name} is {printable(data[name])}: {printable(error)}") from error
        return cls(**known, more={name: value for name, value in data.items() if name not in known})

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON without the fields that say nothing; `parse` reads it."""
        usual = EraserHeader("")
        names = [f.name for f in dataclasses.fields(self) if f.name != "more"]
        said = [n for n in names if n in ("concept", "routes") or getattr(self, n) != getattr(usual, n)]
        return {name: _plain(getattr(self, name)) for name in said} | dict(self.more)

    def validation_error(self) -> str | None:
        """Return which field cannot be what it says, or None."""
        if taken := set(self.more) & {"concept", *_FIELD_READERS, *LAYOUT_FIELDS}:
            return f"field more has {min(taken)}, which has a place of its own"
        try:
            self.parse(self.as_json())
        except (AttributeError, TypeError, ValueError) as error:  # the first two of objects of other classes
            return str(error)
        return None


def _plain(value: Any) -> Any:
    """A field's value as JSON."""
    if isinstance(value, Fingerprint | Provenance):
        return value.as_json()
    if isinstance(value, Calibration | FitSettings | SAeUronSettings | Sampling):
        return {name: _plain(inner) for name, inner in vars(value).items()}
    return list(value) if isinstance(value, tuple) else value


def _expect(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"expected {what}")


def _line(value: Any) -> str:
    _expect(is_line(value), "one printable line of at most 300 characters")
    return value


def _kind(value: Any) -> str:
    _expect(value in CONCEPT_KINDS, f"one of {', '.join(CONCEPT_KINDS)}")
    return value


def _routes(value: Any) -> tuple[str, ...]:
    _expect(isinstance(value, list) and all(v in ROUTES for v in value), f"a list of some of {', '.join(ROUTES)}")
    return tuple(value)


def _prompts(value: Any) -> tuple[str, ...]:
    _expect(are_prompts(value) and len(value) <= _MAX_PROMPTS, f"a list of at most {_MAX_PROMPTS:,} prompts")
    return tuple(value)


def _seeds(value: Any) -> tuple[int, int]:
    _expect(is_span(value), "[first, last], from 0 up")
    return value[0], value[1]


def _numbers(value: Any) -> tuple[float, ...]:
    _expect(are_numbers(value), "a list of numbers")
    return tuple(value)


def _tradeoff(value: Any) -> tuple[tuple[float, float, float], ...]:
    _expect(isinstance(value, list | tuple) and len(value) <= MAX_COUNT, "a list of [setting, share, share]")
    for row in value:
        _expect(isinstance(row, list | tuple) and len(row) == 3, "a list of [setting, share, share]")
    return tuple((_share(a), _share(b), _share(c)) for a, b, c in value)


def _share(value: Any) -> float:
    _expect(is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
    return value


def _seconds(value: Any) -> float:
    _expect(is_number(value) and value >= 0, "a number from 0 up")
    return value


def _bytes(value: Any) -> int:
    _expect(is_whole(value) and 0 <= value < 2**63, "a number of bytes")
    return value


def _object(value: Any) -> Mapping[str, Any]:
    _expect(isinstance(value, Mapping), "an object")
    return value


def _settings(*classes: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a reader of settings of the first class that has all the fields."""

    def read(value: Any) -> Any:
        every = [{name: p.default for name, p in inspect.signature(cls).parameters.items()} for cls in classes]
        known = [k for k, usual in enumerate(every) if isinstance(value, Mapping) and value.keys() <= usual.keys()]
        _expect(bool(known), f"an object of {' or of '.join(', '.join(usual) for usual in every)}")
        for name, given in value.items():  # numbers are checked by the class
            if isinstance(every[known[0]][name], bool) != isinstance(given, bool):
                raise ValueError(f"expected another {name} than {given}")
        return classes[known[0]](**value)

    return read


def _calibration(value: Any) -> Calibration:
    names = [f.name for f in dataclasses.fields(Calibration)]
    _expect(isinstance(value, Mapping) and value.keys() == set(names), f"an object of {', '.join(names)}")
    _expect(is_whole(value["prompts"]) and 0 <= value["prompts"] <= MAX_COUNT, "a number of prompts")
    return Calibration(value["prompts"], _numbers(value["separation"]), _share(value["open_share"]))


_FIELD_READERS: dict[str, Callable[[Any], Any]] = {
    "kind": _kind,
    "routes": _routes,
    "base": _line,
    "time_scale": _line,
    "prompts": _prompts,
    "seeds": _seeds,
    "settings": _settings(FitSettings, SAeUronSettings),
    "sampling": _settings(Sampling),
    "separation": _numbers,
    "tradeoff": _tradeoff,
    "image_separation": _numbers,
    "least_strength": _share,
    "open_share": _share,
    "text_left": _share,
    "seconds": _seconds,
    "peak_bytes": _bytes,
    "method": _line,
    "made_for": Fingerprint.parse,
    "reference": Provenance.parse,
    "sae": _object,
    "measured": _object,
    "calibrated": _calibration,
}
"""Readers of the fields, each from JSON; they raise ValueError or SettingsError for what cannot be."""
