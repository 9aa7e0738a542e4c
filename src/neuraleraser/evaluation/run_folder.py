"""The folder of one evaluation: everything is on disk after each batch, so that a killed run goes on where it was.

Several processes may evaluate in one folder: each batch is drawn by the one that claims it.

run.json                                              settings, model, judge, methods' keys, protocol, budget of attacks
images/base/{style}/{objects}/{seed}.png              base twins; of a file's prompts {seed}-{digits of the prompt}.png
images/{method}/{concept}/{style}/{objects}/...       images drawn with a method applied
results/method=.../concept=.../part-00000.parquet     one row per image, one part per batch
embeddings/{concept}.safetensors                      what prompts of learned embeddings hold, if there are any
attacks/{method}/{concept}, {attack}.safetensors      what attacks found, if there were any
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch

from neuraleraser.errors import FileError, SettingsError
from neuraleraser.evaluation.figures import png
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.protocol import PROMPTS, Cell, EvaluationProtocol
from neuraleraser.evaluation.results import BASE, Results, Row, concat, load_part, part_folder
from neuraleraser.io.atomic import write_bytes
from neuraleraser.io.digests import weights_digest
from neuraleraser.io.locks import claimed, locked
from neuraleraser.io.reading import read_bytes
from neuraleraser.judges import JudgeSpec
from neuraleraser.sampling import Images
from neuraleraser.settings import EvaluateSettings

_MAX_PICTURE_BYTES = 64 * 2**20
_ATTACKS = "attacks"
"""Name in the record of the budget of attacks."""
_FREE = ("timings", "timed_images")
"""Settings that a run may go on with others of."""
CellKey = tuple[str, int, str]
Place = tuple[str, str]
"""(method, concept); the concept of the base is ""."""


class RunFolder:
    """The folder of one evaluation, opened with `open_run`.

    read_only: what is damaged or gone is an error, and not removed to be drawn again.
    """

    def __init__(self, folder: Path, judge: JudgeSpec, *, read_only: bool = False) -> None:
        self.folder, self.judge, self.read_only = folder, judge, read_only
        self._tables: dict[Place, dict[Path, Results]] = {}

    # --- results

    def results(self, method: str, concept: str = "") -> Results:
        """Return all rows of a method and concept, by seed, in whatever order they were drawn. Parts that are damaged
        are removed with a warning, and rows whose picture is gone are dropped, so that both are drawn again."""
        found = concat([Results.of(self.judge), *self._loaded((method, concept))])
        order = sorted((key.seed, key.prompt, key.group, i) for i, key in enumerate(found.keys()))
        return found.where(np.array([i for *_, i in order], dtype=np.int64))

    def append(self, rows: Sequence[Row] | Results) -> None:
        """Add rows of one method and concept, on disk as one more part; the others are not touched. Rows that another
        process added meanwhile are left out.

        Raises SettingsError if another process has begun to measure another method of that name and concept.
        """
        table = rows if isinstance(rows, Results) else Results.of(self.judge, rows)
        if not len(table):
            return
        place = table.keys()[0][:2]
        with _locked(self.folder):
            self._check_key(place, str(table.table["method_key"][0].as_py()))
            there = self.done(*place)
            table = table.where(np.array([key[2:] not in there for key in table.keys()], dtype=bool))
            if not len(table):
                return
            last = self._parts(place)[-1:]
            number = int(last[0].stem.removeprefix("part-")) + 1 if last else 0
            self._tables[place][table.save_part(self.folder / "results", number)] = table

    def done(self, method: str, concept: str = "") -> set[CellKey]:
        """Return the cells of a method and concept that have a row."""
        keys = (key for part in self._loaded((method, concept)) for key in part.keys())
        return {(key.prompt, key.seed, key.group) for key in keys}

    @contextmanager
    def claimed(self, method: str, concept: str, cells: Sequence[Cell], *, wait: bool) -> Iterator[list[Cell] | None]:
        """Context manager: yield those of a batch of cells that have no row yet, which no other process draws now.

        Where another has claimed this batch, wait for it; or yield None. Processes that cut a method's cells into
        other batches may draw an image twice, and one row of it is kept.
        """
        digest = zlib.crc32(repr([c.key for c in cells]).encode())
        path = part_folder(self.folder / "results", method, concept) / f".{digest:08x}.claim"
        with claimed(path, wait=wait) as mine:
            done = self.done(method, concept) if mine else set[CellKey]()
            yield [c for c in cells if c.key not in done] if mine else None

    def forget(self, method: str, concept: str) -> None:
        """Remove all rows and pictures of a method and concept."""
        shutil.rmtree(part_folder(self.folder / "results", method, concept), ignore_errors=True)
        shutil.rmtree(self._image_folder(method, concept), ignore_errors=True)
        self._tables.pop((method, concept), None)

    def _check_key(self, place: Place, key: str) -> None:
        """Raise SettingsError if the record states another key of a method and concept than `key`."""
        stated = _read_record(self.folder).get("methods", {}).get(place[0], {}).get(place[1], key)
        if stated != key:
            raise SettingsError(
                f"another process has begun to measure another {place[0]!r} of {place[1]!r} in {self.folder}: pass "
                "another folder to one of them"
            )

    def _loaded(self, place: Place) -> list[Results]:
        """Return the parts of a place, each read once; other processes add some."""
        known = self._tables.setdefault(place, {})
        for path in self._parts(place):
            part = None if path in known else self._read_part(path, place)
            if part is not None and len(part):
                known[path] = part
        return list(known.values())

    def _parts(self, place: Place) -> list[Path]:
        return sorted(part_folder(self.folder / "results", *place).glob("part-*.parquet"))

    def _read_part(self, path: Path, place: Place) -> Results | None:
        """Read a part; None where it is damaged or lacks images, which are then generated again."""
        try:
            part = load_part(path, self.judge, *place)
        except FileError as error:
            if self.read_only:
                raise
            warnings.warn(f"{error}; its images are generated again", stacklevel=2)
            path.unlink(missing_ok=True)
            return None
        drawn = part.compared | (part.method == BASE)
        there = np.array(
            [not drawn[i] or self._image_path(*place, _cell_of(part, i)).exists() for i in range(len(part))],
            dtype=bool,
        )
        if there.all():
            return part
        if self.read_only:
            raise FileError(
                f"{self.folder} lacks {int((~there).sum())} pictures that {path.name} tells of: look for them"
            )
        part = part.where(there)  # someone removed pictures
        path.unlink(missing_ok=True)
        if len(part):
            part.save_part(self.folder / "results", int(path.stem.removeprefix("part-")))
        return part

    # --- pictures

    def put_images(self, method: str, concept: str, cells: Sequence[Cell], images: Images) -> None:
        """Keep the images of `cells` as PNG files."""
        for cell, image in zip(cells, images, strict=True):
            write_bytes(self._image_path(method, concept, cell), png(image))

    def image(self, method: str, concept: str, cell: Cell) -> np.ndarray:
        """Return uint8 [H, W, 3], of the base where the method's was not drawn. Raises FileError."""
        from PIL import Image

        path = self._image_path(method, concept, cell)
        if not path.exists():
            path = self._image_path(BASE, "", cell)
        data = read_bytes(path, _MAX_PICTURE_BYTES)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data), formats=("PNG",)) as picture:
                    return np.asarray(picture.convert("RGB"))
        except Exception as error:  # whatever a decoder raises on a damaged file
            raise FileError(f"the picture {path} cannot be read ({error}): delete it and evaluate again") from error

    def _image_folder(self, method: str, concept: str) -> Path:
        folder = self.folder / "images" / quote(method, safe="")
        return folder / quote(concept, safe="") if concept else folder

    def _image_path(self, method: str, concept: str, cell: Cell) -> Path:
        shown = (cell.style or "none", "+".join(cell.objects) or "none")
        # Prompts of a file ask for the same thing, some of them with the same seed.
        own = f"-{zlib.crc32(cell.prompt.encode()):08x}" if cell.group == PROMPTS else ""
        folder = self._image_folder(method, concept).joinpath(*(quote(name, safe="+ ") for name in shown))
        return folder / f"{cell.seed}{own}.png"


def _cell_of(part: Results, i: int) -> Cell:
    """Return the cell of a row, without its start image."""
    return Cell(part.prompt[i], int(part.seed[i]), part.cell_style[i], part.cell_objects[i], part.group[i])


def open_run(
    folder: Path,
    pipe: Any,
    methods: Sequence[Method],
    protocol: EvaluationProtocol,
    settings: EvaluateSettings,
    judge: JudgeSpec,
) -> RunFolder:
    """Begin an evaluation in `folder`, or go on with it. Drawings of a method that has changed since are dropped.

    Raises SettingsError if the folder holds a run of other settings, model, judge or published protocol; FileError if
    it cannot be written or its record is damaged.
    """
    now = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "model": _fingerprint(pipe),
        "judge": json.loads(json.dumps(asdict(judge))),
        **({"protocol": protocol.name} if protocol.name else {}),
    }
    run = RunFolder(folder, judge)
    with _locked(folder):
        before = _read_record(folder)
        keys = {method: dict(concepts) for method, concepts in before.pop("methods", {}).items()}
        names = [*now, *(before.keys() - now.keys() - {_ATTACKS})] if before else []
        if differ := [name for name in names if deciding(name, before) != deciding(name, now)]:
            raise SettingsError(
                f"{folder} holds an evaluation with other {' and '.join(differ)}: pass another folder, or delete it"
            )
        for m in methods:
            if keys.get(m.name, {}).get(m.concept, m.key) != m.key:
                run.forget(m.name, m.concept)
            keys.setdefault(m.name, {})[m.concept] = m.key
        kept = {name: value for name, value in before.items() if name == _ATTACKS}
        _write_record(folder, {**now, **kept, "methods": keys})
    return run


def deciding(name: str, record: Mapping[str, Any]) -> Any:
    """Return a part of a record, None where it has none; of its settings those that some image depends on."""
    part = record.get(name)
    if name != "settings" or not isinstance(part, dict):
        return part
    return {setting: value for setting, value in part.items() if setting not in _FREE}


def check_attacks(folder: Path, budget: Mapping[str, int] | None) -> None:
    """Raise SettingsError if a folder holds attacks of another budget (None: no attacks), FileError if its record is
    damaged."""
    stated = _read_record(folder).get(_ATTACKS)
    if stated is not None and stated != budget:
        raise SettingsError(
            f"{folder} holds attacks of {stated}, and {budget or 'none'} are asked for: pass the same, another folder, "
            "or delete it"
        )


def state_attacks(folder: Path, budget: Mapping[str, int]) -> None:
    """Add the budget of attacks to the record of a run, whose certificate then states it. Raises as `check_attacks`."""
    with _locked(folder):
        check_attacks(folder, budget)
        _write_record(folder, {**_read_record(folder), _ATTACKS: dict(budget)})


def _locked(folder: Path) -> AbstractContextManager[bool]:
    """Return a context in which no other process changes a folder's record or numbers a part."""
    return locked(folder / ".lock")


def _read_record(folder: Path) -> dict[str, Any]:
    """Return the record of a run, empty where there is none. Raises FileError for a damaged one."""
    path = folder / "run.json"
    if not path.exists():
        return {}
    try:
        record = dict(json.loads(path.read_text()))
        methods = {str(method): dict(concepts) for method, concepts in dict(record["methods"]).items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise FileError(f"{path} is damaged ({error}): delete the folder and evaluate again") from error
    return {**record, "methods": methods}


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    write_bytes(folder / "run.json", (json.dumps(record, indent=1) + "\n").encode())


def _fingerprint(pipe: Any) -> str:
    """Return a digest of the weights of all parts of a pipeline, in their own number format, and of the sampler's
    settings."""
    schedule = sorted((k, str(v)) for k, v in pipe.scheduler.config.items() if not k.startswith("_"))
    digest = hashlib.sha256(repr(schedule).encode())
    for part, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            digest.update(f"{part} {weights_digest(_state_of(module))}".encode())
    return f"{type(pipe).__name__} {digest.hexdigest()[:32]}"


def _state_of(module: torch.nn.Module) -> Mapping[str, Any]:
    """Return a module's state dict, with the weights that offloading keeps elsewhere."""
    state = module.state_dict()
    if not any(isinstance(value, torch.Tensor) and value.is_meta for value in state.values()):
        return state
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return get_state_dict_offloaded_model(module)
