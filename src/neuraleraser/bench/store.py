"""What a measurement has on disk, after every batch: images, verdicts, and which eraser fired where.

run.json                              what this folder is a run of
images/base/{style}/{objects}/{seed}.png, images/{concept}/...   base twins, and what was drawn again
verdicts/base.parquet, verdicts/{concept}.parquet
fired.jsonl                           one line a base image: the erasers that watched, and their timesteps
erasers/{concept}.safetensors         what was measured
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from neuraleraser.bench.cells import Cell
from neuraleraser.bench.files import write_bytes
from neuraleraser.bench.pictures import png
from neuraleraser.bench.verdicts import Verdict, Verdicts
from neuraleraser.eraser import Eraser
from neuraleraser.errors import FileError, SettingsError
from neuraleraser.sampling import Images
from neuraleraser.settings import EvaluateSettings
from neuraleraser.sites import denoiser

CellKey = tuple[str, int, str]


class Store:
    """The folder of one measurement."""

    def __init__(self, folder: Path, styles: Sequence[str], objects: Sequence[str]) -> None:
        self.folder, self._styles, self._objects = folder, tuple(styles), tuple(objects)
        self._tables: dict[str, Verdicts] = {}
        self._fired: dict[CellKey, dict[str, Any]] = {}

    def claim(self, pipe: Any, settings: EvaluateSettings, erasers: Sequence[Eraser]) -> list[Eraser]:
        """Begin here, or go on here; returns the erasers as their files hold them, which is what is measured.

        What an eraser drew is dropped if the eraser has changed.

        Raises SettingsError if the folder holds a run of other settings, model or judge; FileError if it
        cannot be written or its record is damaged.
        """
        path = self.folder / "run.json"
        now = {
            "settings": json.loads(json.dumps(asdict(settings))),
            "model": _fingerprint(pipe),
            "classes": [list(self._styles), list(self._objects)],
        }
        erased: dict[str, str] = {}
        if path.exists():
            try:
                before = json.loads(path.read_text())
                erased = dict(before.pop("erasers"))
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise FileError(f"{path} is damaged ({error}): delete the folder and measure again") from error
            differ = [name for name in now if before.get(name) != now[name]]
            if differ:
                raise SettingsError(
                    f"{self.folder} holds a measurement with other {' and '.join(differ)}: "
                    "pass another folder, or delete this one"
                )
        kept = []
        for e in erasers:
            e.save(self.eraser_path(e))
            kept.append(Eraser.load(self.eraser_path(e)))
            if erased.get(e.name, kept[-1].content_hash) != kept[-1].content_hash:
                self._verdicts_path(e.name).unlink(missing_ok=True)
                shutil.rmtree(self.folder / "images" / e.name, ignore_errors=True)
        erased |= {e.name: e.content_hash for e in kept}
        write_bytes(path, (json.dumps({**now, "erasers": erased}, indent=1) + "\n").encode())
        self._read_fired()
        return kept

    def eraser_path(self, eraser: Eraser) -> Path:
        """Where the measured eraser itself is kept."""
        return self.folder / "erasers" / f"{eraser.name}.safetensors"

    # --- verdicts

    def table(self, name: str) -> Verdicts:
        """The verdicts of `name`: "base", or a concept."""
        if name not in self._tables:
            path = self._verdicts_path(name)
            self._tables[name] = Verdicts.load(path) if path.exists() else Verdicts.of(self._styles, self._objects)
        return self._tables[name]

    def add(self, name: str, rows: Sequence[Verdict]) -> None:
        """Append rows, on disk too."""
        self._tables[name] = self.table(name).append(rows)
        self._tables[name].save(self._verdicts_path(name))

    def done(self, name: str) -> set[CellKey]:
        """The cells of `name` that have both a verdict and a picture."""
        keys = [(key.prompt, key.seed, key.prompt_group) for key in self.table(name).keys()]
        table = self.table(name)
        there = [
            self._image_path(name, table.cell_style[i], table.cell_objects[i], int(table.seed[i])).exists()
            for i in range(len(table))
        ]
        if not all(there):  # someone removed pictures: draw those again
            self._tables[name] = table.where(np.array(there, dtype=bool))
        return {key for key, here in zip(keys, there, strict=True) if here}

    def _verdicts_path(self, name: str) -> Path:
        return self.folder / "verdicts" / f"{name}.parquet"

    # --- pictures

    def put_images(self, name: str, cells: Sequence[Cell], images: Images) -> None:
        """Keep the images of `cells` as PNG files."""
        for cell, image in zip(cells, images, strict=True):
            write_bytes(self._image_path(name, cell.style, cell.objects, cell.seed), png(image))

    def image(self, name: str, cell: Cell) -> np.ndarray:
        """uint8 [H, W, 3]. Raises FileError."""
        from PIL import Image

        path = self._image_path(name, cell.style, cell.objects, cell.seed)
        try:
            with Image.open(path) as picture:
                return np.asarray(picture.convert("RGB"))
        except OSError as error:
            raise FileError(f"the picture {path} cannot be read ({error}): delete it and run again") from error

    def drawn_again(self, name: str, cell: Cell) -> bool:
        """Whether the cell was drawn with the eraser of `name` acting."""
        return self._image_path(name, cell.style, cell.objects, cell.seed).exists()

    def _image_path(self, name: str, style: str, objects: Sequence[str], seed: int) -> Path:
        return self.folder / "images" / name / style / ("+".join(objects) or "none") / f"{seed}.png"

    # --- what fired

    def note_fired(
        self, cells: Sequence[Cell], erasers: Sequence[Eraser], fired: Sequence[dict[str, list[float]]]
    ) -> None:
        """Record for each cell's base image which erasers watched it, and at which timesteps each gate opened."""
        watched = {e.name: e.content_hash for e in erasers}
        lines = []
        for cell, times in zip(cells, fired, strict=True):
            entry = {"cell": cell.key, "watched": watched, "fired": {n: sorted(set(t)) for n, t in times.items()}}
            self._fired[cell.key] = entry
            lines.append(json.dumps(entry) + "\n")
        with open(self.folder / "fired.jsonl", "a", encoding="utf-8") as file:
            file.writelines(lines)

    def may_have_fired(self, cell: Cell, eraser: Eraser) -> bool:
        """Whether the eraser's gate opened in the cell's base image; True too where it was not watching."""
        entry = self._fired.get(cell.key)
        if entry is None or entry["watched"].get(eraser.name) != eraser.content_hash:
            return True
        return eraser.name in entry["fired"]

    def _read_fired(self) -> None:
        path = self.folder / "fired.jsonl"
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                prompt, seed, group = entry["cell"]
                known = {"watched": dict(entry["watched"]), "fired": dict(entry["fired"])}
                self._fired[str(prompt), int(seed), str(group)] = known
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # a line cut short by a kill: its images count as not watched
        if text and not text.endswith("\n"):
            with open(path, "a", encoding="utf-8") as file:
                file.write("\n")


def _fingerprint(pipe: Any) -> str:
    """A number of the denoiser's weights and the sampler's settings."""
    schedule = sorted((k, str(v)) for k, v in pipe.scheduler.config.items() if not k.startswith("_"))
    code = zlib.crc32(repr(schedule).encode())
    for name, value in sorted(denoiser(pipe).state_dict().items()):
        code = zlib.crc32(value.detach().float().cpu().numpy().tobytes(), zlib.crc32(name.encode(), code))
    return f"{type(pipe).__name__} {code:08x}"
