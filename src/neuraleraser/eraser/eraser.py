"""The eraser: a value, and a file of kilobytes, with the checks that a stranger's file must pass."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from neuraleraser.eraser.corrections import CORRECTION_KINDS, Correction
from neuraleraser.eraser.corrections.correction import sites_of
from neuraleraser.eraser.gate import MAX_WINDOW, Gate
from neuraleraser.eraser.guided import Guided
from neuraleraser.eraser.header import LAYOUT_FIELDS, EraserHeader
from neuraleraser.eraser.model_card import model_card
from neuraleraser.eraser.part import Part
from neuraleraser.eraser.sight import sight_rows
from neuraleraser.errors import DataError, FileError, SiteError
from neuraleraser.io import tensor_file
from neuraleraser.io.fields import is_whole
from neuraleraser.io.hub import HubFile
from neuraleraser.io.names import printable
from neuraleraser.sites import PROMPT_ROUTES, Site

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


@dataclass(frozen=True)
class Eraser(HubFile):
    """Gates and corrections of one concept, with all that is needed to apply them; a file of kilobytes.

    `gate` reads the prompt and lets `corrections` act on it. `image_gate` sees the picture, by whatever route the
    concept got there, and lets `guided` act on the prediction.

    Examples:
        >>> eraser.save("van-gogh.safetensors")
        >>> eraser = Eraser.load("van-gogh.safetensors")  # of a folder or the Hub: Eraser.from_pretrained
        >>> eraser.name, eraser.routes
        ('Van_Gogh', ('named', 'paraphrased'))
    """

    NOUN: ClassVar = "eraser"
    FILES: ClassVar = ("eraser.safetensors",)

    gate: Gate
    """Where it looks, and when it acts."""
    corrections: tuple[Correction, ...]
    """What is added while the gate is open."""
    header: EraserHeader
    """What a reader wants to know: concept, base model, how it was made and what was measured."""
    image_gate: Gate | None = None
    """Gate that sees the picture; None: the eraser acts on the prompt alone."""
    guided: Guided | None = None
    """What is added to the prediction while `image_gate` is open."""

    @property
    def name(self) -> str:
        """The concept's name."""
        return self.header.concept

    @property
    def routes(self) -> tuple[str, ...]:
        """Routes that its gate sees (`sites.ROUTES`); of a file that does not say, the prompt alone."""
        return self.header.routes

    @property
    def content_hash(self) -> str:
        """SHA-256 of everything that acts: erasers are added in its order, whatever order they are given in."""
        h = hashlib.sha256(json.dumps(self._layout()).encode())
        for name, tensor in sorted(self._tensors().items()):
            h.update(f"{name} {list(tensor.shape)}".encode())
            h.update(tensor.detach().cpu().double().numpy().tobytes())
        return h.hexdigest()

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites that it reads or changes."""
        gates = [part.gate.site for part in self.parts]
        return *gates, *(site for c in self.corrections for site in sites_of(c))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The prompt's part and, where there is one, the picture's."""
        prompt = Part(self.name, self.gate, self.corrections)
        return (prompt,) if self.image_gate is None else (prompt, Part(self.name, self.image_gate, (), self.guided))

    def _layout(self) -> dict[str, Any]:
        """Return what acts beside the tensors, as JSON."""
        picture = {}
        if self.image_gate is not None and self.guided is not None:
            picture["image_gate"] = {
                "site": str(self.image_gate.site),
                "share": self.image_gate.share,
                "window": self.image_gate.window,
            }
            picture["guided"] = {"weight": self.guided.weight, "prompts": list(self.guided.prompts)}
        gate = {"site": str(self.gate.site), "share": self.gate.share, "text_tokens": self.gate.text_tokens}
        flags = {name: True for name in ("picture", "holds") if getattr(self.gate, name)}
        return {
            "gate": gate | flags,
            **picture,
            "corrections": [
                {"kind": c.KIND, "site": str(c.site)} | ({"also": [str(s) for s in c.also]} if c.also else {})
                for c in self.corrections
            ],
        }

    def _tensors(self) -> dict[str, Tensor]:
        out = {f"gate/{name}": x for name, x in self.gate.tensors().items()}
        for i, c in enumerate(self.corrections):
            out |= {f"correction{i}/{name}": x for name, x in c.tensors().items()}
        if self.image_gate is not None and self.guided is not None:
            out |= {f"image_gate/{name}": x for name, x in self.image_gate.tensors().items()}
            out |= {f"guided/{name}": x for name, x in self.guided.tensors().items()}
        return out

    def save(self, path: str | Path) -> None:
        """Write one safetensors file.

        Matrices are in half precision; the gate's thresholds and bounds are exact.

        Args:
            path: The file.

        Raises:
            DataError: `load` would refuse the eraser.
        """
        problem = self.validation_error()
        if problem:
            raise DataError(f"the eraser of {self.name!r} was not written ({problem}): make it again")
        tensors = {name: x.half() if _is_matrix(name, x) else x for name, x in self._tensors().items()}
        tensor_file.save(path, "eraser", tensors, self.header.as_json() | self._layout())

    @classmethod
    def load(cls, path: str | Path) -> Eraser:
        """Read an eraser from a file.

        Args:
            path: The file.

        Returns:
            The eraser.

        Raises:
            FileError: The file is no eraser, or its parts do not fit.
        """
        tensors, header = tensor_file.load(path, "eraser")
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor.float() if tensor.is_floating_point() else tensor
        try:
            gate = _read_gate("gate", header["gate"], parts)
            image_gate, guided = None, None
            if "image_gate" in parts:
                image_gate = _read_gate("image_gate", header["image_gate"], parts, picture=True)
                weight, (without, shown) = float(header["guided"]["weight"]), header["guided"]["prompts"]
                guided = Guided.from_tensors(weight, (str(without), str(shown)), parts.pop("guided"))
            corrections = []
            for i, entry in enumerate(header["corrections"]):
                kind = CORRECTION_KINDS[entry["kind"]]
                found = parts.pop(f"correction{i}")
                if problem := _spec_error(found, kind.AXES):
                    raise ValueError(f"correction{i}/{problem}")
                also = tuple(Site.parse(text) for text in entry.get("also", ()))
                corrections.append(kind.from_tensors(Site.parse(entry["site"]), found, also))
            if parts:
                raise ValueError(next(iter(parts)))
        except (ArithmeticError, AttributeError, KeyError, SiteError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise FileError(f"{path} is no complete eraser ({printable(what)}): make it again") from error
        try:
            about = EraserHeader.parse({k: v for k, v in header.items() if k not in LAYOUT_FIELDS})
        except ValueError as error:
            raise FileError(
                f"{path} is an eraser with a malformed header ({printable(error, 300)}): make it again"
            ) from error
        eraser = cls(gate, tuple(corrections), about, image_gate, guided)
        problem = eraser.validation_error()
        if problem:
            raise FileError(
                f"{path} is an eraser whose parts do not fit together ({printable(problem, 300)}): make it again"
            )
        return eraser

    def generate_model_card(self, repo_id: str) -> ModelCard:
        """Return the card that `push_to_hub` uploads with it: `model_card` of its header.

        Args:
            repo_id: "owner/name" of its repository.

        Returns:
            The card.
        """
        rows = sight_rows(self.parts, self.header)
        rows += [("correction", f"{c.KIND} at {', '.join(map(str, sites_of(c)))}") for c in self.corrections]
        return model_card(self.header, repo_id, rows)

    def validation_error(self) -> str | None:
        """Return what keeps this eraser from being applied, or None: `load` and `attach` refuse one that has any."""
        if error := self.header.validation_error():
            return error
        g, sites = self.gate, [s for c in self.corrections for s in sites_of(c)]
        if not sites or len(set(sites)) < len(sites):
            return f"corrections at {[str(s) for s in sites]}, expected one or more, each at a site of its own"
        strange = [s for s in sites if s.path.split(".")[0] != g.site.path.split(".")[0]]
        if strange:
            return f"a correction at {strange[0]}, in another component than the gate's {g.site}"
        if problem := gate_error(g):
            return f"gate/{problem}"
        pictures = [route for route in self.header.routes if route not in PROMPT_ROUTES]
        if pictures and not any(part.gate.picture for part in self.parts):
            return f"its header says that it sees {pictures[0]}, and it has no gate that reads the picture"
        if (self.image_gate is None) != (self.guided is None):
            return "an image gate and a guided correction come together"
        if self.image_gate is not None and self.guided is not None:
            if problem := gate_error(self.image_gate):
                return f"image_gate/{problem}"
            if self.image_gate.site.path.split(".")[0] != g.site.path.split(".")[0]:
                return f"an image gate at {self.image_gate.site}, in another component than the gate's {g.site}"
            if problem := self.guided.validation_error():
                return f"guided: {problem}"
        for i, c in enumerate(self.corrections):
            if problem := _spec_error(c.tensors(), c.AXES) or _value_error(c.tensors()) or c.validation_error():
                return f"correction{i}/{problem}"
        if any(c.site == g.site and c.width != g.width for c in self.corrections):
            return f"a gate and a correction of different widths at {g.site}"
        return None


def gate_error(g: Gate) -> str | None:
    """Return what keeps a gate from being used, or None."""
    if problem := _spec_error(g.tensors(), Gate.AXES) or _value_error(g.tensors()):
        return problem
    if not bool((g.threshold >= 0).all()):
        return "threshold is negative"
    if not (0 < g.share <= 1 and bool((g.low >= 0).all()) and bool((g.high > g.low).all())):
        return "its share is outside 0 to 1, or its bounds are not 0 <= low < high"
    for name, flag in (("picture", g.picture), ("holds", g.holds)):
        if not isinstance(flag, bool):
            return f"{name} is {printable(flag)}, expected true or false"
    if g.picture and g.holds:
        return "it reads pictures, and holds: only what a prompt decided can stand"
    if g.text_tokens is not None and g.text_tokens < 1:
        return f"it is for texts of {g.text_tokens} tokens, expected at least 1"
    if not 1 <= g.window <= MAX_WINDOW or g.window % 2 == 0 or g.rows.shape[1] % g.window**2:
        return (
            f"windows of {g.window} x {g.window} and rows of {g.rows.shape[1]}, expected an odd number up to "
            f"{MAX_WINDOW} whose square divides the rows"
        )
    if not bool((g.weight > 0).any()):
        return "no weight is above 0, so it can never act"
    return None


def _is_matrix(name: str, x: Tensor) -> bool:
    """Return True for a tensor that is kept in half precision."""
    part, _, rest = name.partition("/")
    if part in ("gate", "image_gate"):
        return rest == "rows"
    return rest != "times" and x.is_floating_point()


def _read_gate(name: str, said: Mapping[str, Any], parts: dict[str, dict[str, Tensor]], picture: bool = False) -> Gate:
    """Return a gate from its tensors, which are taken out of `parts`, and from what the header says of it.

    Raises KeyError, TypeError, ValueError or SiteError for what is no gate.
    """
    found = parts.pop(name)
    if problem := _spec_error(found, Gate.AXES):
        raise ValueError(f"{name}/{problem}")
    tokens, window = said.get("text_tokens"), said.get("window", 1)
    if not is_whole(window):
        raise ValueError(f"{name}: window is {window!r}, expected a whole number")
    return Gate(
        Site.parse(said["site"]),
        share=float(said["share"]),
        text_tokens=None if tokens is None else int(tokens),
        picture=picture or said.get("picture", False),
        window=window,
        holds=said.get("holds", False),
        **found,
    )


def _spec_error(tensors: Mapping[str, Tensor], axes: Mapping[str, str]) -> str | None:
    """Return the first tensor that does not have the axes of `axes`, and why; None if all do."""
    size: dict[str, int] = {}
    for name in sorted(tensors.keys() ^ axes.keys()):
        return f"{name} is {'missing' if name in axes else 'unknown'}"
    for name, letters in axes.items():
        x = tensors[name]
        fits = x.ndim == len(letters) and all(
            size.setdefault(a, n) == n > 0 for a, n in zip(letters, x.shape, strict=True)
        )
        if not fits or x.is_floating_point() == (name == "features"):
            return f"{name} is {x.dtype} {list(x.shape)} beside {size}"
    return None


def _value_error(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the first tensor whose values cannot be used, and why; None if all can."""
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            return f"{name} holds NaN or infinity"
    ascending = "times" not in tensors or bool((tensors["times"].diff() > 0).all())
    return None if ascending else "times do not ascend"
