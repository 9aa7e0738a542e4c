"""The one file format: what is saved comes back; what is damaged or hostile is refused in one sentence."""

from __future__ import annotations

import math
import os
import resource
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers.tensor_files import saved, write_raw
from neuraleraser.errors import DataError, FileError
from neuraleraser.io import atomic, tensor_file

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [*FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
# One folder serves all examples of a property: each example overwrites the file of the one before.
one_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    seed = draw(st.integers(0, 2**31))
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 50).to(draw(st.sampled_from(DTYPES)))
    strided = draw(st.sampled_from(["as it is", "transposed", "expanded", "a parameter"]))
    if strided == "transposed" and x.ndim > 1:
        return x.transpose(0, 1)
    if strided == "expanded":
        return x.unsqueeze(0).expand(3, *x.shape)
    if strided == "a parameter" and x.is_floating_point():
        return torch.nn.Parameter(x)
    return x


finite = st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | finite | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
headers = st.dictionaries(st.text(max_size=8) | st.sampled_from(["kind", "version"]), values, max_size=4)
names = st.text(max_size=8)


def refused(path: Path, kind: str = "eraser") -> str:
    """The sentence with which `load` refuses, which names the file and is one short line."""
    with pytest.raises(FileError) as caught:
        tensor_file.load(path, kind)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 400 + len(str(path))
    return text


@one_folder
@given(st.dictionaries(names, tensors(), max_size=4), headers, st.text(max_size=8))
def test_what_is_saved_comes_back(tmp_path: Path, some: dict[str, Tensor], header: dict[str, Any], kind: str):
    path = tmp_path / "folder" / "a.safetensors"
    tensor_file.save(path, kind, some, header)
    again, header_again = tensor_file.load(path, kind)
    assert header_again == header
    assert again.keys() == some.keys()
    for name, x in some.items():
        assert (again[name].dtype, again[name].shape) == (x.dtype, x.shape)
        assert torch.equal(again[name], x)
        assert not again[name].requires_grad
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_tensors_that_share_memory_are_each_written(tmp_path: Path):
    x = torch.arange(6.0)
    tensor_file.save(tmp_path / "a", "sae", {"all": x, "same": x, "part": x[2:4]}, {})
    again, _ = tensor_file.load(tmp_path / "a", "sae")
    assert again["same"].tolist() == x.tolist()
    assert again["part"].tolist() == [2.0, 3.0]


def test_what_was_loaded_does_not_change_with_the_file(tmp_path: Path):
    path = saved(tmp_path)
    again, _ = tensor_file.load(path, "eraser")
    raw = path.read_bytes()
    path.write_bytes(raw[:-24] + bytes(24))
    assert again["x"].flatten().tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("stage", ["save_file", "os.replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException
):
    path = saved(tmp_path)
    old = path.read_bytes()

    def half(_: Any, aside: Path, *args: Any, **kwargs: Any) -> None:
        Path(aside).write_bytes(b"half")
        raise error

    def fail(*args: Any) -> None:
        raise error

    if stage == "save_file":
        monkeypatch.setattr(tensor_file, "save_file", half)
    else:
        monkeypatch.setattr(atomic.os, "replace", fail)
    with pytest.raises(FileError if isinstance(error, OSError) else KeyboardInterrupt):
        tensor_file.save(path, "eraser", {"x": torch.zeros(3)}, {})
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_disk_that_takes_no_more_leaves_the_old_file(tmp_path: Path):
    path = saved(tmp_path)
    old = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(FileError, match="could not be written"):
            tensor_file.save(path, "eraser", {"x": torch.zeros(100_000)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_what_a_killed_save_left_is_swept_away_by_the_next(tmp_path: Path):
    path = saved(tmp_path)
    old, young, other = (
        tmp_path / f".{name}.tmp" for name in ("a.safetensors.0", "a.safetensors.1", "b.safetensors.0")
    )
    for stray in (old, young, other):
        stray.write_bytes(b"half")
    for stray in (old, other):
        os.utime(stray, (0, 0))
    assert saved(tmp_path) == path
    assert {p.name for p in tmp_path.iterdir()} == {path.name, young.name, other.name}


def test_a_place_that_cannot_be_written_is_a_file_error(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="could not be written"):
        tensor_file.save(tmp_path / "file" / "a.safetensors", "eraser", {}, {})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_are_not_written(tmp_path: Path, bad: float, dtype: torch.dtype):
    x = torch.tensor([0.0, bad, 1.0]).to(dtype)
    with pytest.raises(DataError, match=r"tensor 'x' .* holds NaN or infinity"):
        tensor_file.save(tmp_path / "a", "eraser", {"x": x}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float, dtype: torch.dtype):
    with monkeypatch.context() as careless:
        careless.setattr(tensor_file, "_finite", lambda x: True)
        tensor_file.save(tmp_path / "a", "eraser", {"x": torch.tensor([0.0, bad, 1.0]).to(dtype)}, {})
    assert "holds NaN or infinity in tensor 'x'" in refused(tmp_path / "a")


@pytest.mark.parametrize(
    "header", [{"a": math.nan}, {"a": math.inf}, {"a": object()}, {"a": torch.zeros(1)}, {(1, 2): 3}]
)
def test_a_header_that_is_not_json_is_not_written(tmp_path: Path, header: dict[Any, Any]):
    with pytest.raises(DataError, match="is not JSON"):
        tensor_file.save(tmp_path / "a", "eraser", {}, header)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.float8_e4m3fn),
        torch.zeros(2, device="meta"),
        torch.zeros(2).to_sparse(),
        torch.zeros([1] * 9),
    ],
    ids=["complex", "float8", "meta", "sparse", "9-d"],
)
def test_a_tensor_that_could_not_be_read_is_not_written(tmp_path: Path, x: Tensor):
    with pytest.raises(DataError, match=r"tensor 'x' .* pass a dense"):
        tensor_file.save(tmp_path / "a", "eraser", {"x": x}, {})


def test_the_name_that_the_format_keeps_is_not_written(tmp_path: Path):
    with pytest.raises(DataError, match="__metadata__"):
        tensor_file.save(tmp_path / "a", "eraser", {"__metadata__": torch.zeros(1)}, {})


def test_a_header_over_the_bound_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tensor_file, "MAX_HEADER", 1000)
    with pytest.raises(DataError, match=r"header .* is over"):
        tensor_file.save(tmp_path / "a", "eraser", {}, {"a": "b" * 2000})
    assert not list(tmp_path.iterdir())


def test_a_missing_file(tmp_path: Path):
    assert "does not exist" in refused(tmp_path / "none.safetensors")


def test_a_folder(tmp_path: Path):
    assert "could not be read" in refused(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        refused(path)
    path.write_bytes(whole + b"more")
    refused(path)


@one_folder
@given(st.data())
def test_damage_anywhere_is_refused_or_harmless(tmp_path: Path, data: st.DataObject):
    path = saved(tmp_path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        tensor_file.load(path, "eraser")
    except FileError as e:
        assert "\n" not in str(e)


@one_folder
@given(st.binary(max_size=300))
def test_other_bytes_are_refused(tmp_path: Path, raw: bytes):
    (tmp_path / "a").write_bytes(raw)
    refused(tmp_path / "a")


def test_another_kind(tmp_path: Path):
    assert "is of kind 'eraser': pass a file of kind 'sae'" in refused(saved(tmp_path), "sae")


def test_a_safetensors_file_of_another_program(tmp_path: Path):
    write_raw(tmp_path / "a", {"__metadata__": {"format": "pt"}})
    assert "was not written by neuraleraser" in refused(tmp_path / "a")
    write_raw(tmp_path / "a", {})
    assert "was not written by neuraleraser" in refused(tmp_path / "a")


def test_a_newer_version(tmp_path: Path):
    newer = str(tensor_file.VERSION + 1)
    assert f"has format version {newer}" in refused(saved(tmp_path, version=newer))


@pytest.mark.parametrize("version", ["", "-1", "1.0", "one", "9" * 5000, "\N{SUPERSCRIPT TWO}"])
def test_a_version_that_is_no_version(tmp_path: Path, version: str):
    assert "which is not a number" in refused(saved(tmp_path, version=version))


@pytest.mark.parametrize(
    "header",
    ["", "{", "[" * 100_000, '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": ' + "9" * 5000 + "}"],
    ids=["empty", "cut", "deep", "nan", "infinity", "overflow", "long"],
)
def test_a_header_that_is_not_json(tmp_path: Path, header: str):
    assert "header that is not JSON" in refused(saved(tmp_path, header=header))


def test_a_header_that_is_no_object(tmp_path: Path):
    assert "not a JSON object" in refused(saved(tmp_path, header="[1, 2]"))


def test_a_claim_of_a_huge_header_is_refused_unread(tmp_path: Path):
    path = tmp_path / "a"
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", tensor_file.MAX_HEADER + 1))
        f.truncate(tensor_file.MAX_HEADER + 100)  # a sparse file: the claim itself would hold
    assert "over the bound of 16 MB" in refused(path)


@pytest.mark.parametrize(
    ("dtype", "shape", "data"),
    [
        ("F32", [2**40, 2**40], b"1234"),
        ("F32", [0, 2**63], b""),
        ("F32", [1] * 5000, b"1234"),
        ("F32", [2], b"1234"),
        ("F8_E4M3", [4], b"1234"),
        ("F4", [8], b"1234"),
        ("C64", [1], b"12345678"),
        ("X" * 10_000, [1], b"1234"),
    ],
    ids=["vast", "beyond 64 bits", "5000-d", "too short", "float8", "float4", "complex", "no type"],
)
def test_a_hostile_tensor_table(tmp_path: Path, dtype: str, shape: list[int], data: bytes):
    good = {"kind": "eraser", "version": "1", "header": "{}"}
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}
    write_raw(tmp_path / "a", {"__metadata__": good, "x": entry}, data)
    refused(tmp_path / "a")


def test_a_hostile_kind_is_printed_short_and_plain(tmp_path: Path):
    assert "\x1b" not in refused(saved(tmp_path, kind="\x1b[31m\n" * 1000))


def test_what_is_saved_twice_is_one_file(tmp_path: Path) -> None:
    """The order of the metadata is the library's, and changes from run to run."""
    header = {"a": 1, "ü": '\U0001f600 \\ " \n', "b": [1.5, None]}
    for i in range(12):
        tensor_file.save(tmp_path / str(i), "eraser", {"x": torch.arange(3.0), "y": torch.ones(2, 2)}, header)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(12)}) == 1
    assert tensor_file.load(tmp_path / "0", "eraser")[1] == header
