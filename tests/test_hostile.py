"""Hostile files: each is refused in one sentence or right; none crashes, hangs, swells or writes elsewhere.

A case is (kind, number); `run("eraser", 17, ...)` makes the same file again. `make test` takes the first of each kind.
"""

from __future__ import annotations

import math
import os
import random
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import pipelines
from helpers.erasers import make_eraser
from helpers.hostile import MUTATIONS
from neuraleraser.concepts import Concept
from neuraleraser.eraser import CORRECTION_KINDS, Calibration, Eraser, attach, model_card
from neuraleraser.eraser.provenance import Provenance
from neuraleraser.errors import DataError, NeuralEraserError
from neuraleraser.fitting.reference import Reference
from neuraleraser.io.atomic import write_bytes
from neuraleraser.io.names import file_name, prompt_error
from neuraleraser.sae import SAE, formats
from neuraleraser.sampling import generate
from neuraleraser.settings import FitSettings, Sampling
from neuraleraser.sites import Site, made_for

CASES = {"eraser": 8000, "sae": 4000, "reference": 3000, "concept": 3000, "foreign": 2000}
QUICK = 80
SECONDS = 10
SWELL = 500  # MB that the process may grow by
D, N = 8, 12


class Hang(BaseException):
    """No `except Exception` takes this one."""


@contextmanager
def guard(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"over {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


_watched: list[Path] = []
_strays: list[str] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    """Note what Python writes, makes, moves or removes outside the watched folder."""
    if not _watched:
        return
    if event == "open":
        flags = args[2] if isinstance(args[2], int) else 0
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return
        paths = args[:1]
    elif event in ("os.rename", "os.link", "os.symlink"):
        paths = args[:2]
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
        paths = args[:1]
    else:
        return
    for path in paths:
        if isinstance(path, (str, bytes, os.PathLike)):
            real = Path(os.path.abspath(os.fsdecode(path)))
            if _watched[0] not in (real, *real.parents) and not str(real).startswith(("/dev/", "/proc/")):
                _strays.append(f"{event} {real}")


sys.addaudithook(_audit)


def sae(n: int = N, d: int = D) -> SAE:
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    header = {"site": "unet.mid_block:output:image", "labels": ["Cats"], "settings": {"k": 3}, "format": "x"}
    return SAE(rows.clone(), torch.zeros(n), rows, torch.zeros(d), torch.full((n,), 0.1), header)


class Bench:
    """Whole files of each kind in a folder, and what it means that one of them is right."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "a" / "b" / "work"
        self.folder.mkdir(parents=True)
        self.pipe = pipelines.stable_diffusion()
        self.sampling = Sampling(num_inference_steps=1, batch_size=1)
        self.whole: dict[str, dict[str, bytes]] = {}
        for kind in CASES:
            make = root / f"whole-{kind}"
            getattr(self, f"make_{kind}")(make)
            self.whole[kind] = {
                str(p.relative_to(make)): p.read_bytes() for p in sorted(make.rglob("*")) if p.is_file()
            }
        self.outside = self.listing()
        self.before = generate(self.pipe, ["a"], [0], self.sampling)

    def listing(self) -> set[str]:
        return {str(p) for p in self.root.rglob("*") if self.folder not in p.parents}

    # Whole files

    def make_eraser(self, folder: Path) -> None:
        for kind in sorted(CORRECTION_KINDS):
            e = make_eraser(kind=kind)
            made = made_for(self.pipe, e.sites)
            header = replace(
                e.header,
                made_for=made,
                base="canvas",
                prompts=("a cat",),
                open_share=0.9,
                settings=FitSettings(),
                sampling=self.sampling,
                separation=(0.5, 1.0),
                reference=Provenance(((500, 999),), ("a dog",), (0, 1), ("Cats",)),
                measured={"ua": {"value": 1.0, "low": 0.8, "high": 1.0, "n": 20}},
                calibrated=Calibration(4, (0.5, 1.0), 1.0),
            )
            replace(e, header=header).save(folder / f"{kind}.safetensors")

    def make_sae(self, folder: Path) -> None:
        sae().save(folder / "x.safetensors")

    def make_reference(self, folder: Path) -> None:
        pooled = torch.rand(4, 3, 2, N).relu() * (torch.rand(4, 3, 2, N) > 0.5)
        times = torch.tensor([900.0, 500.0, 100.0])
        labels = [frozenset(names) for names in (["Cats"], ["Cats", "Trees"], [], ["Dogs"])]
        prompts = ["a cat", "a cat and a tree", "a scene", "a dog"]
        made_with = Provenance(((0, 3),), tuple(prompts), (0, 1), ("Cats", "Dogs", "Trees"))
        Reference(sae(), Site("unet.mid_block"), pooled, times, prompts, labels, made_with).save(folder)

    def make_concept(self, folder: Path) -> None:
        text = '{"name": "Cats", "kind": "object", "pairs": [["a cat", "a scene"], ["the cat", "the scene"]], '
        write_bytes(folder / "x.json", (text + '"context_pairs": [["a cat and a dog", "a dog"]]}').encode())

    def make_foreign(self, folder: Path) -> None:
        self.x = torch.randn(200, D, generator=torch.Generator().manual_seed(1))
        for name in ("saelens", "dictionary_learning", "sparsify", "saeuron", "sdxl-unbox"):
            formats.write(sae(), folder / name, name)

    # What is right

    def check_eraser(self, path: Path, r: random.Random) -> None:
        e = Eraser.load(path)
        assert e.validation_error() is None and e.name.isprintable()
        assert all(bool(torch.isfinite(x).all()) for x in e._tensors().values() if x.is_floating_point())
        assert all(c.isprintable() or c == "\n" for c in str(model_card(e.header)))
        out = self.folder / f"{file_name(e.name)}.safetensors"
        try:
            e.save(out)
        except DataError as error:
            assert "NaN or infinity" in str(error)  # beyond half precision
        else:
            again = Eraser.load(out)
            again.save(out)
            assert Eraser.load(out).content_hash == again.content_hash
        with attach(self.pipe, e):
            if r.random() < 0.05:
                generate(self.pipe, ["a"], [0], self.sampling)

    def check_sae(self, path: Path, r: random.Random) -> None:
        self.right(SAE.load(path), path)

    def right(self, found: SAE, path: Path) -> None:
        assert all(bool(torch.isfinite(p).all()) for p in found.parameters()) and bool((found.threshold >= 0).all())
        assert found.encode(torch.zeros(2, found.d_in)).shape == (2, found.n_features)
        found.save(path.with_name("again.safetensors"))
        again = SAE.load(path.with_name("again.safetensors"))
        assert again.header == found.header and torch.equal(again.W_enc, found.W_enc)

    def check_reference(self, path: Path, r: random.Random) -> None:
        found = Reference.load(path.parent)
        rows, times, _, n = found.pooled.shape
        assert (
            n == found.sae.n_features and len(found.times) == times and len(found.prompts) == len(found.labels) == rows
        )
        assert bool(torch.isfinite(found.pooled).all()) and bool((found.pooled >= 0).all())
        assert all(prompt_error(prompt) is None for prompt in found.prompts)
        assert all(name.isprintable() for name in frozenset().union(*found.labels))
        found.save(path.parent / "again")
        again = Reference.load(path.parent / "again")
        assert torch.allclose(
            again.pooled.float(), found.pooled.float(), rtol=0.02, atol=0.01 * float(found.pooled.max())
        )

    def check_concept(self, path: Path, r: random.Random) -> None:
        found = Concept.from_json(path)
        assert Concept(found.name, found.kind, found.pairs, found.context_pairs) == found and found.name.isprintable()
        for pair in (*found.pairs, *found.context_pairs):
            assert pair.positive.encode() and pair.negative.encode() is not None
        write_bytes(self.folder / f"{file_name(found.name)}.txt", b"x")

    def check_foreign(self, path: Path, r: random.Random) -> None:
        self.right(formats.read(path.parent, calibrate=self.x), path)


def run(kind: str, number: int, bench: Bench) -> bool:
    """One case; whether the file was taken."""
    r = random.Random(f"{kind} {number}")
    whole = bench.whole[kind]
    chosen = r.choice(list(whole))
    paths = [p for p in whole if Path(p).parent == Path(chosen).parent] if kind != "eraser" else [chosen]
    place = bench.folder / kind
    for name in paths:
        data = MUTATIONS[Path(name).suffix](r, whole[name]) if name == chosen else whole[name]
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    check: Callable[[Path, random.Random], None] = getattr(bench, f"check_{kind}")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            with guard(SECONDS):
                check(place / chosen, r)
        except NeuralEraserError as error:
            text = str(error)
            assert text.isprintable() and len(text) < 700 + 3 * len(str(bench.folder)), text
            return False
    for w in warned:
        assert "was made for other weights" in str(w.message) and "nan" not in str(w.message), w
    return True


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("hostile"))


def hostile(kind: str, numbers: range, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> float:
    """The share of the files that were taken."""
    monkeypatch.chdir(bench.folder)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    taken = 0
    _watched[:], _strays[:] = [bench.folder], []
    try:
        for number in numbers:
            try:
                taken += run(kind, number, bench)
            except BaseException as error:
                raise AssertionError(f"{kind} {number}: {type(error).__name__}: {str(error)[:500]}") from error
    finally:
        _watched.clear()
    assert not _strays and bench.listing() == bench.outside
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown) / 1024 < SWELL
    assert (generate(bench.pipe, ["a"], [0], bench.sampling) == bench.before).all()  # nothing is left in the pipeline
    return taken / len(numbers)


@pytest.mark.parametrize("kind", CASES)
def test_hostile_files(kind: str, bench: Bench, monkeypatch: pytest.MonkeyPatch):
    share = hostile(kind, range(QUICK), bench, monkeypatch)
    assert 0 < share < 0.9  # some of both, or the mutations are too wild or too tame


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_thousands_of_hostile_files(kind: str, bench: Bench, monkeypatch: pytest.MonkeyPatch):
    hostile(kind, range(QUICK, CASES[kind]), bench, monkeypatch)


@pytest.mark.parametrize("kind", CASES)
def test_whole_files_are_taken(kind: str, bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "MUTATIONS", dict.fromkeys(MUTATIONS, lambda r, data: data))
    assert hostile(kind, range(10), bench, monkeypatch) == 1


@pytest.mark.parametrize("fault", ["crash", "hang", "stray", "paragraph"])
def test_a_fault_is_seen(fault: str, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def faulty(path: Path, r: random.Random) -> None:
        if fault == "crash":
            raise KeyError("x")
        if fault == "hang":
            while True:
                math.sqrt(2)
        if fault == "stray":
            (tmp_path / "x").write_text("x")
        else:
            raise DataError("one\ntwo")

    monkeypatch.setattr(bench, "check_sae", faulty)
    monkeypatch.setitem(globals(), "SECONDS", 1)
    with pytest.raises(AssertionError):
        hostile("sae", range(1), bench, monkeypatch)


def test_there_are_twenty_thousand():
    assert sum(CASES.values()) == 20_000
