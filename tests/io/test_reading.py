"""Reading strangers' files: regular ones only, of a bounded size; JSON of one meaning."""

from __future__ import annotations

import os
import socket
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.erasers import make_eraser
from helpers.tensor_files import saved
from neuraleraser.concepts import Concept
from neuraleraser.eraser import Eraser
from neuraleraser.errors import ConceptError, FileError, NeuralEraserError
from neuraleraser.io import reading, tensor_file, untrusted
from neuraleraser.sae import SAE, formats


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def folder(path: Path) -> None:
    path.mkdir()


READERS: dict[str, Callable[[Path], Any]] = {
    "eraser": Eraser.load,
    "sae": SAE.load,
    "foreign": tensor_file.load_foreign,
    "json": untrusted.read_json,
    "pickle": untrusted.read_pickle,
    "npz": untrusted.read_npz,
    "openai": lambda path: formats.read(path, "openai"),
    "sparsify": lambda path: formats.read(path, "sparsify"),
    "concept": Concept.from_json,
    "bytes": lambda path: reading.read_bytes(path, 100),
}


@pytest.mark.parametrize("make", [pipe, device, listening, folder])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_without_waiting(
    make: Callable[[Path], None], reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("x")
    make(path)
    started = time.monotonic()
    with pytest.raises((FileError, ConceptError)) as caught:
        READERS[reader](path)
    assert time.monotonic() - started < 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["no", "no/such/file", "x" * 5000, "nul\0inside"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_not_there_is_refused(name: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((FileError, ConceptError)) as caught:
        READERS[reader](Path(name))
    assert "\n" not in str(caught.value)


def sparse(path: Path, size: int) -> None:
    """A file of a few kB on the disk that says it holds `size` bytes of one tensor."""
    table = b'{"__metadata__":{"kind":"eraser","version":"1","header":"{}"},"x":{"dtype":"U8","shape":[%d],' % size
    table += b'"data_offsets":[0,%d]}}' % size
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(table)) + table)
        file.truncate(8 + len(table) + size)


@contextmanager
def nothing_is_mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def mapped(*_: Any, **__: Any) -> None:
        raise AssertionError("the file was mapped")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_file, "safe_open", mapped)
        yield


@pytest.mark.parametrize(("kind", "size"), [("eraser", 6 * 2**30), ("eraser", 2**26), ("sae", 2**40), ("x", 2**40)])
def test_a_file_that_claims_more_than_its_kind_may_hold(
    kind: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sparse(tmp_path / "x", size)
    assert os.stat(tmp_path / "x").st_blocks * 512 < 2**16
    with (
        nothing_is_mapped(monkeypatch),
        pytest.raises(FileError, match=r"over the bound of [\d,]+ for a file of its kind"),
    ):
        tensor_file.load(tmp_path / "x", kind)


def test_a_foreign_file_and_an_archive_are_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sparse(tmp_path / "x", 2**40)
    with nothing_is_mapped(monkeypatch), pytest.raises(FileError, match="over the bound"):
        tensor_file.load_foreign(tmp_path / "x")
    for read in (untrusted.read_pickle, untrusted.read_npz):
        with pytest.raises(FileError, match="over the bound"):
            read(tmp_path / "x")


def test_an_archive_that_unpacks_to_far_more_than_it_is(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "x", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(2**26))
    for read in (untrusted.read_pickle, untrusted.read_npz):
        with pytest.raises(FileError, match="would unpack"):
            read(tmp_path / "x")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_file_that_memory_does_not_hold(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = saved(tmp_path)

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(torch.Tensor, "clone", full)
    with pytest.raises(FileError, match="does not fit into memory"):
        tensor_file.load(path, "eraser")


def test_what_could_not_be_read_for_its_size_is_not_written(tmp_path: Path):
    big = torch.zeros(2**26 // 4 + 1)
    with pytest.raises(NeuralEraserError, match="at most"):
        tensor_file.save(tmp_path / "x", "eraser", {"x": big}, {})
    tensor_file.save(tmp_path / "x", "sae", {"x": big}, {})
    assert tensor_file.load(tmp_path / "x", "sae")[0]["x"].shape == big.shape


def test_the_largest_eraser_that_fit_makes_is_within_the_bound():
    largest = 3 * 10 * 2 * (2 * 4096 * 32 + 4096)  # corrections, time bins, bytes of float16, down + up + bias
    assert 2 * largest < tensor_file.MAX_BYTES["eraser"] < 2**28
    assert make_eraser().corrections


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}',
        '{"b": [{"a": 1, "a": 1}]}',
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        "[" * 100_000,
        '{"a":' * 50_000,
        "9" * 5000,
        "",
        "{",
        "nul",
        b"\xff\xfe\x00",
    ],
)
def test_json_without_one_meaning(text: str | bytes):
    with pytest.raises(ValueError):
        reading.parse_json(text)


def test_json_with_one_meaning():
    assert reading.parse_json('{"a": [1, 2.5, "x", null, true], "b": {"a": 1}}') == {
        "a": [1, 2.5, "x", None, True],
        "b": {"a": 1},
    }
