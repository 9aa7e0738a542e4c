"""Drawing: from cells and methods to pictures and rows on disk, resumable and killable at any moment.

The base set is generated once, while the methods that can tell where they would act watch. Up to the moment at which
such a method acts its image is the base's, so only images in which it would act are drawn again. That shortcut is
checked, not trusted: a fixed sample of base images is generated with nothing attached, and of every method a sample of
images in which it would not act is generated with it applied; all are compared bit for bit with their base twins.

Each batch is one call of the pipeline in a context of its own, in which images count from 0. Of several processes that
draw into one folder each takes the batches that no other has claimed, and ends a stage when all of them are there.
"""

from __future__ import annotations

import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from neuraleraser.attacks import inverted_latents, learned_word, random_denoiser
from neuraleraser.errors import SettingsError, UnseenRouteWarning
from neuraleraser.evaluation.base_check import check_readable
from neuraleraser.evaluation.embeddings import learned_once
from neuraleraser.evaluation.method import ActionTrace, Method
from neuraleraser.evaluation.protocol import INVERTED_CONTROL, Cell, EvaluationProtocol, StartImage
from neuraleraser.evaluation.results import BASE, UNHOOKED, Results, Row, concat, identity
from neuraleraser.evaluation.run_folder import Place, RunFolder
from neuraleraser.families.defaults import evaluation_sampling
from neuraleraser.families.opening import image_to_image, inpainting, native_side
from neuraleraser.judges import Judge
from neuraleraser.sampling import Images, check_pictures, check_strength, generate
from neuraleraser.settings import EvaluateSettings, Sampling
from neuraleraser.sites.routes import INPAINTING, INVERTED_LATENTS, LEARNED_EMBEDDINGS


def draw(
    pipe: Any,
    methods: Sequence[Method],
    protocol: EvaluationProtocol,
    settings: EvaluateSettings,
    judge: Judge,
    run: RunFolder,
) -> Results:
    """Draw and judge everything that is not in `run` yet; returns all rows of this protocol and these methods.

    Raises SettingsError if the judge cannot read the base's images, before any method is drawn.
    """
    sampling, folder = evaluation_sampling(pipe, settings), run.folder / "embeddings"
    artist = _Artist(pipe, protocol, sampling, judge, folder, settings.embedding_steps)
    cells = protocol.all_cells()
    _draw_base(artist, methods, cells, run)
    check_readable(_rows_of_cells(run.results(BASE), cells), (m.kind for m in methods))
    _draw_unhooked(artist, cells, settings.unhooked_checks, run)
    for m in methods:
        _draw_method(artist, m, protocol.cells[m.concept], settings.idle_checks, run)
    places = [(BASE, "", cells), (UNHOOKED, "", cells)]
    places += [(m.name, m.concept, protocol.cells[m.concept]) for m in methods]
    return concat([_rows_of_cells(run.results(method, concept), part) for method, concept, part in places])


def _rows_of_cells(results: Results, cells: Sequence[Cell]) -> Results:
    """Return the rows whose cells are among these."""
    keys = {c.key for c in cells}
    return results.where(np.array([key[2:] in keys for key in results.keys()], dtype=bool))


@dataclass(frozen=True)
class _Batch:
    """A batch of cells with their images, and which of them each method acted on."""

    cells: Sequence[Cell]
    images: Images
    acted: Sequence[frozenset[int] | None]
    """Images in which the method of each context acted or would have; None if it cannot tell."""
    seconds: float
    """of an image"""


class _Call(NamedTuple):
    """Way to draw a cell with a start image, or with a word that was learned."""

    route: str
    strength: float
    control: bool = False
    """True of latents that are inverted and drawn by a denoiser of random weights, which no method watches."""
    learned: str = ""
    """Concept whose embeddings stand in the prompts; "" if none do."""


@dataclass(frozen=True)
class _Artist:
    """Draws cells in batches, those with a start image by another pipeline of the same modules."""

    pipe: Any
    protocol: EvaluationProtocol
    sampling: Sampling
    judge: Judge
    embeddings_folder: Path
    embedding_steps: int

    def draw_missing(
        self,
        cells: Sequence[Cell],
        contexts: Sequence[Callable[[Any], AbstractContextManager[ActionTrace | None]]],
        label: str,
        run: RunFolder,
        place: Place,
        keep: Callable[[_Batch], None],
    ) -> None:
        """Draw the cells that have no row at a place of `run` yet, batch by batch, each inside all of `contexts`, and
        hand each batch to `keep`, which adds the rows.

        Batches that other processes have claimed come last, when these are done with them, or ended without.
        """
        parts: dict[_Call | None, list[Cell]] = {}
        for cell in sorted(cells, key=lambda c: (c.route == LEARNED_EMBEDDINGS, c.start is not None)):
            parts.setdefault(self._call(cell), []).append(cell)
        missing, size = {c.key for c in cells} - run.done(*place), self.sampling.batch_size
        batches = [(call, part[i : i + size]) for call, part in parts.items() for i in range(0, len(part), size)]
        left = [(call, batch) for call, batch in batches if any(c.key in missing for c in batch)]
        # An error now, if one cannot be made, and not after all the others are drawn.
        pipes = {call: self._pipe(call, batch[0]) for call, batch in dict(left).items()}
        with tqdm(total=len(cells), initial=len(cells) - len(missing), desc=label, unit="img") as bar:
            for wait in (False, True):
                later = []
                for call, batch in left:
                    with run.claimed(*place, batch, wait=wait) as todo:
                        if todo is None:
                            later.append((call, batch))
                            continue
                        if todo:
                            keep(self._draw(pipes[call], call, todo, contexts))
                    bar.update(sum(c.key in missing for c in batch))
                left = later

    def _call(self, cell: Cell) -> _Call | None:
        """Return how the cell is drawn; None: from noise and its prompt alone."""
        if cell.route == LEARNED_EMBEDDINGS:
            return _Call(cell.route, 0.0, learned=cell.learned)
        if cell.start is None:
            return None
        if cell.route == INVERTED_LATENTS:
            return _Call(cell.route, 1.0, cell.group == INVERTED_CONTROL)
        given = cell.start.strength
        return _Call(cell.route, self.sampling.strength if given is None else given)

    def _pipe(self, call: _Call | None, cell: Cell) -> Any:
        """Return the pipeline that draws the cells of a call, of which this is one."""
        if call is None:
            return self.pipe
        if call.route == LEARNED_EMBEDDINGS:
            self._embeddings(call.learned)
            return self.pipe
        check_strength(replace(self.sampling, strength=call.strength))
        pictures = self._pictures([cell])
        if call.route == INVERTED_LATENTS:
            inverted_latents(self.pipe, pictures[:0], self.sampling)
            return random_denoiser(self.pipe) if call.control else self.pipe
        return inpainting(self.pipe) if call.route == INPAINTING else image_to_image(self.pipe)

    def _draw(self, using: Any, call: _Call | None, cells: Sequence[Cell], contexts: Sequence[Any]) -> _Batch:
        """Generate the images of some cells, all of one call, inside these contexts."""
        sampling, more = self.sampling, {}
        if call is not None and call.route == INVERTED_LATENTS:
            more["latents"] = inverted_latents(using, self._pictures(cells), sampling)
        elif call is not None and call.route != LEARNED_EMBEDDINGS:
            sampling, more["image"] = replace(sampling, strength=call.strength), self._pictures(cells)
            if call.route == INPAINTING:
                more["mask_image"] = _masks(_starts(cells), more["image"].shape[1])
        with ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", UnseenRouteWarning)  # measured here on purpose
            if call is not None and call.route == LEARNED_EMBEDDINGS:
                stack.enter_context(learned_word(using, self._embeddings(call.learned)))
            traces: list[ActionTrace | None] = [None] * len(contexts)
            if call is None or not call.control:
                traces = [stack.enter_context(context(using)) for context in contexts]
            clock = time.monotonic()
            images = generate(using, [c.prompt for c in cells], [c.seed for c in cells], sampling, **more)
            seconds = (time.monotonic() - clock) / len(cells)
            acted = [None if trace is None else frozenset(trace.fired) for trace in traces]
        return _Batch(cells, images, acted, seconds)

    def _pictures(self, cells: Sequence[Cell]) -> Images:
        """Return the pictures that these cells start from."""
        if self.protocol.start_images is None:
            raise SettingsError(
                f"cells of the route {cells[0].route!r} need start_images: give the protocol that function"
            )
        size = native_side(self.pipe)
        pictures = self.protocol.start_images(_starts(cells), size)
        check_pictures("start images of the protocol", pictures)
        return pictures

    def _embeddings(self, concept: str) -> Tensor:
        """Return the embeddings that stand for a concept, learned now if the run has none yet."""
        lessons = self.protocol.lessons.get(concept)
        if not lessons or not self.embedding_steps:
            raise SettingsError(
                f"cells of the route {LEARNED_EMBEDDINGS!r} need embeddings of {concept!r}: give the protocol lessons "
                "for it, and the settings embedding_steps above 0"
            )
        pictures = partial(self._pictures, lessons)
        return learned_once(self.embeddings_folder, self.pipe, concept, lessons, pictures, self.embedding_steps)

    def rows(self, batch: _Batch, **columns: Sequence[Any]) -> list[Row]:
        """Judge a batch; `columns` hold one value an image."""
        seen = self.judge(batch.images)
        return [
            Row(
                prompt=c.prompt,
                seed=c.seed,
                group=c.group,
                route=c.route,
                cell_style=c.style,
                cell_objects=c.objects,
                p_style=np.asarray(seen.p_style[i], np.float32),
                p_object=np.asarray(seen.p_object[i], np.float32),
                artefact=None if seen.artefact is None else float(seen.artefact[i]),
                start=() if c.start is None else c.start.shows,
                strength=0.0 if (call := self._call(c)) is None else call.strength,
                seconds=batch.seconds,
                **{name: values[i] for name, values in columns.items()},
            )
            for i, c in enumerate(batch.cells)
        ]


def _draw_base(artist: _Artist, methods: Sequence[Method], cells: Sequence[Cell], run: RunFolder) -> None:
    """Generate the base images that are missing, while the methods watch."""
    names, contexts = [_identity_of(m) for m in methods], [m.watched for m in methods]

    def keep(batch: _Batch) -> None:
        run.put_images(BASE, "", batch.cells, batch.images)
        n = len(batch.cells)
        can_tell = [(name, acted) for name, acted in zip(names, batch.acted, strict=True) if acted is not None]
        watched = [[name for name, _ in can_tell]] * n
        fired = [[name for name, acted in can_tell if i in acted] for i in range(n)]
        run.append(artist.rows(batch, method=[BASE] * n, watched=watched, fired=fired))

    artist.draw_missing(cells, contexts, "base", run, (BASE, ""), keep)


def _draw_unhooked(artist: _Artist, cells: Sequence[Cell], count: int, run: RunFolder) -> None:
    """Generate `count` of the base images once more with nothing attached, and compare."""

    def keep(batch: _Batch) -> None:
        run.put_images(UNHOOKED, "", batch.cells, batch.images)
        n, same = len(batch.cells), _equal_to_base(batch, run)
        run.append(artist.rows(batch, method=[UNHOOKED] * n, compared=[True] * n, identical=same))

    sample = _sample_cells(cells, count, UNHOOKED)
    artist.draw_missing(sample, [], "base, unhooked", run, (UNHOOKED, ""), keep)


def _draw_method(artist: _Artist, m: Method, cells: Sequence[Cell], checks: int, run: RunFolder) -> None:
    """Generate the images in which a method may act, and `checks` of those in which it says that it does not."""
    name, base = _identity_of(m), run.results(BASE)
    watched, fired = (base.lists_name(column, [name] * len(base)) for column in ("watched", "fired"))
    idle_keys = {key[2:] for key, here in zip(base.keys(), watched & ~fired, strict=True) if here}
    idle = [c for c in cells if c.key in idle_keys]
    needed = [c for c in cells if c.key not in idle_keys]
    # The last batch would be padded anyway: it is filled up with images that the method says it leaves alone.
    size = artist.sampling.batch_size
    plain = [c for c in idle if _is_plain(c)]
    there = sum(map(_is_plain, needed))
    filled = -(-(there + checks) // size) * size
    needed += _sample_cells(plain, filled - there, name)
    keep = partial(_keep_batch, artist, m, run)
    artist.draw_missing(needed, [m.applied], f"{m.name}, {m.concept}", run, (m.name, m.concept), keep)
    _copy_idle(m, cells, run)


def _keep_batch(artist: _Artist, m: Method, run: RunFolder, batch: _Batch) -> None:
    """Keep the images and rows of a batch that was drawn with a method applied, in the last of its contexts."""
    run.put_images(m.name, m.concept, batch.cells, batch.images)
    n, acted, name = len(batch.cells), batch.acted[-1], _identity_of(m)
    own = {"method": [m.name] * n, "concept": [m.concept] * n, "kind": [m.kind] * n, "method_key": [m.key] * n}
    noted = {
        "watched": [[] if acted is None else [name]] * n,
        "fired": [[name] if acted and i in acted else [] for i in range(n)],
    }
    run.append(artist.rows(batch, **own, **noted, compared=[True] * n, identical=_equal_to_base(batch, run)))


def draw_attacked(
    pipe: Any,
    cells: Sequence[Cell],
    put: Callable[[Any], AbstractContextManager[None]],
    m: Method | None,
    sampling: Sampling,
    judge: Judge,
    run: RunFolder,
) -> None:
    """Draw and judge the cells of an attack that are not in `run` yet, inside `put`, which puts in what it found: with
    a method applied, or with none on the base model, which comes first."""
    artist = _Artist(pipe, EvaluationProtocol({}), sampling, judge, run.folder, 0)

    def keep_base(batch: _Batch) -> None:
        run.put_images(BASE, "", batch.cells, batch.images)
        run.append(artist.rows(batch, method=[BASE] * len(batch.cells)))

    place = (BASE, "") if m is None else (m.name, m.concept)
    keep = keep_base if m is None else partial(_keep_batch, artist, m, run)
    contexts = [put] if m is None else [put, m.applied]
    artist.draw_missing(cells, contexts, f"{cells[0].group}, {place[0]}", run, place, keep)


def _copy_idle(m: Method, cells: Sequence[Cell], run: RunFolder) -> None:
    """Add the rows of images that were not drawn with the method: their base twins'."""
    done, base = run.done(m.name, m.concept), run.results(BASE)
    missing = {c.key for c in cells} - done
    rows = base.where(np.array([key[2:] in missing for key in base.keys()], dtype=bool))
    own = {"method": m.name, "concept": m.concept, "kind": m.kind, "method_key": m.key}
    run.append(
        rows.with_columns(**own, watched=[_identity_of(m)], fired=[], compared=False, identical=True, seconds=0.0)
    )


def _equal_to_base(batch: _Batch, run: RunFolder) -> list[bool]:
    """Tell for each image of the batch whether it has the bits of the base image."""
    return [np.array_equal(x, run.image(BASE, "", c)) for c, x in zip(batch.cells, batch.images, strict=True)]


def _is_plain(cell: Cell) -> bool:
    """Tell whether a cell is drawn from noise and its prompt alone."""
    return cell.start is None and cell.route != LEARNED_EMBEDDINGS


def _starts(cells: Sequence[Cell]) -> list[StartImage]:
    return [c.start for c in cells if c.start is not None]


def _masks(starts: Sequence[StartImage], size: int) -> NDArray[np.bool_]:
    """Return masks of the halves that are drawn anew: bool [N, size, size]."""
    left = np.broadcast_to(np.arange(size) < size // 2, (size, size))
    return np.stack([left if start.half == "left" else ~left for start in starts])


def _identity_of(m: Method) -> str:
    """Return what `watched` and `fired` call a method."""
    return identity(m.name, m.concept, m.key)


def _sample_cells(cells: Sequence[Cell], count: int, salt: str) -> list[Cell]:
    """Return `count` of the cells, at random but always the same, whichever others there are."""
    return sorted(cells, key=lambda c: zlib.crc32(repr((salt, c.key)).encode()))[: max(count, 0)]
