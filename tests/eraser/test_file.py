"""Eraser files: there and back, and what a stranger may have put into one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers.erasers import FAMILIES, make_eraser
from neuraleraser.eraser import CORRECTION_KINDS, Eraser
from neuraleraser.errors import DataError, FileError, NeuralEraserError

Tensors = dict[str, Tensor]
Header = dict[str, Any]


@pytest.mark.parametrize("kind", sorted(CORRECTION_KINDS))
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back(family: str, kind: str, tmp_path: Path) -> None:
    one = make_eraser(family, kind, share=0.5, low=0.25, high=0.5)
    one.save(tmp_path / "one.safetensors")
    back = Eraser.load(tmp_path / "one.safetensors")
    assert back.header == one.header and back.name == "Cats" and back.gate.site == one.gate.site
    assert (tmp_path / "one.safetensors").stat().st_size < 20_000
    x, t = torch.randn(3, 6, one.gate.rows.shape[1]), torch.tensor([0.0, 0.5, 900.0])
    near = dataclasses.replace(one.gate, rows=one.gate.rows.half().float())  # all else of the gate is exact
    assert torch.equal(back.gate(x, t), near(x, t))
    a, b = one.corrections[0], back.corrections[0]
    assert (a.site, a.KIND) == (b.site, b.KIND)
    for name, value in a.tensors().items():
        assert torch.equal(b.tensors()[name], value if name == "times" else value.half().float())
    back.save(tmp_path / "two.safetensors")
    again = Eraser.load(tmp_path / "two.safetensors")
    assert again.content_hash == back.content_hash


def test_what_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    e = make_eraser()
    with pytest.raises(DataError, match="was not written"):
        Eraser(e.gate, (), e.header).save(tmp_path / "x.safetensors")
    huge = make_eraser()
    huge.corrections[0].tensors()["up"].fill_(1e6)  # beyond half precision
    with pytest.raises(DataError):
        huge.save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def parts(tmp_path: Path) -> Callable[..., tuple[Tensors, Header]]:
    def read(kind: str) -> tuple[Tensors, Header]:
        make_eraser(kind=kind).save(tmp_path / "good.safetensors")
        with safe_open(tmp_path / "good.safetensors", "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["header"])

    return read


def refused(folder: Path, tensors: Tensors, header: Any) -> str:
    """The message with which a file of these parts is refused: one sentence, in one line."""
    path = folder / "bad.safetensors"
    metadata = {"kind": "eraser", "version": "1", "header": json.dumps(header)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)
    with pytest.raises(FileError) as caught:
        Eraser.load(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500 and "bad.safetensors" in message
    return message


@pytest.mark.parametrize("kind", sorted(CORRECTION_KINDS))
def test_every_tensor_is_needed_and_has_its_shape(kind: str, parts: Any, tmp_path: Path) -> None:
    good, header = parts(kind)
    for name in good:
        less = {k: v for k, v in good.items() if k != name}
        refused(tmp_path, less, header)
        shapes = [good[name][:0], good[name].unsqueeze(0), torch.cat([good[name], good[name]]), good[name].flatten()[0]]
        for other in shapes:
            refused(tmp_path, {**good, name: other}, header)
        if good[name].ndim > 1 and name not in ("gate/rows",):  # another width, a smaller span
            refused(tmp_path, {**good, name: good[name][:, :-1]}, header)
        swapped = good[name].double().round().long() if good[name].is_floating_point() else good[name].float()
        refused(tmp_path, {**good, name: swapped}, header)
    refused(tmp_path, {**good, "correction1/up": torch.zeros(1)}, header)
    refused(tmp_path, {**good, "correction0/more": torch.zeros(1)}, header)
    refused(tmp_path, {**good, "gate/site": torch.zeros(1)}, header)
    refused(tmp_path, {**good, "stray": torch.zeros(1)}, header)


VALUES: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
    ("gate/times", "ascend", lambda x: x.flip(0)),
    ("correction0/times", "ascend", lambda x: x.flip(0)),
    ("correction0/times", "ascend", torch.zeros_like),
    ("gate/threshold", "negative", lambda x: x - 1),
    ("correction0/threshold", "negative", lambda x: x - 100),
    ("gate/weight", "never act", lambda x: -x),
    ("gate/low", "low < high", lambda x: x - 1),
    ("gate/high", "low < high", torch.zeros_like),
    ("gate/rows", "NaN", lambda x: x * float("nan")),
    ("gate/high", "NaN", lambda x: x * float("inf")),
    ("correction0/bias", "NaN", lambda x: x / 0),
]


@pytest.mark.parametrize(("name", "word", "change"), VALUES, ids=[f"{n} {w}" for n, w, _ in VALUES])
def test_values_that_cannot_be(name: str, word: str, change: Any, parts: Any, tmp_path: Path) -> None:
    good, header = parts("scaling")
    assert word in refused(tmp_path, {**good, name: change(good[name])}, header)


HEADERS: list[Callable[[Header], Any]] = [
    lambda h: {},
    lambda h: [],
    lambda h: {k: v for k, v in h.items() if k != "concept"},
    lambda h: h | {"concept": ["Cats"]},
    lambda h: {k: v for k, v in h.items() if k != "gate"},
    lambda h: h | {"gate": []},
    lambda h: h | {"gate": "unet"},
    lambda h: h | {"gate": {"site": "unet.mid_block"}},
    lambda h: h | {"gate": h["gate"] | {"site": 5}},
    lambda h: h | {"gate": h["gate"] | {"share": 0}},
    lambda h: h | {"gate": h["gate"] | {"share": 1.5}},
    lambda h: h | {"gate": h["gate"] | {"share": -1}},
    lambda h: h | {"gate": h["gate"] | {"share": "most"}},
    lambda h: h | {"gate": h["gate"] | {"share": "nan"}},
    lambda h: h | {"gate": h["gate"] | {"share": 10**400}},
    lambda h: h | {"gate": h["gate"] | {"share": None}},
    lambda h: h | {"gate": h["gate"] | {"picture": "yes"}},
    lambda h: h | {"corrections": []},
    lambda h: h | {"corrections": {}},
    lambda h: h | {"corrections": None},
    lambda h: h | {"corrections": "x"},
    lambda h: h | {"corrections": [None]},
    lambda h: h | {"corrections": [{"site": "unet.mid_block.attentions.0"}]},
    lambda h: h | {"corrections": h["corrections"] * 2},
    lambda h: h | {"corrections": [h["corrections"][0] | {"kind": "execute"}]},
    lambda h: h | {"corrections": [h["corrections"][0] | {"kind": "scaling"}]},
    lambda h: h | {"corrections": [h["corrections"][0] | {"kind": ["low_rank"]}]},
    lambda h: h | {"corrections": [h["corrections"][0] | {"also": 5}]},
    lambda h: h | {"corrections": [h["corrections"][0] | {"also": [5]}]},
    lambda h: h | {"corrections": [h["corrections"][0] | {"also": ["../x"]}]},
    lambda h: h | {"corrections": [h["corrections"][0] | {"also": [h["corrections"][0]["site"]]}]},
    lambda h: h | {"corrections": [h["corrections"][0] | {"also": ["text_encoder.layers.0"]}]},
]


@pytest.mark.parametrize("change", HEADERS, ids=[str(i) for i in range(len(HEADERS))])
def test_headers_that_cannot_be(change: Callable[[Header], Any], parts: Any, tmp_path: Path) -> None:
    good, header = parts("low_rank")
    refused(tmp_path, good, change(header))


SITES = [
    "",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "unet..mid_block",
    "unet.mid_block:steal:image",
    "unet.mid_block:output:image:more",
    "text_encoder.encoder.layers.0",  # a component other than the gate's
]


@pytest.mark.parametrize("site", SITES)
def test_sites_that_cannot_be(site: str, parts: Any, tmp_path: Path) -> None:
    good, header = parts("low_rank")
    refused(tmp_path, good, header | {"gate": header["gate"] | {"site": site}})
    refused(tmp_path, good, header | {"corrections": [header["corrections"][0] | {"site": site}]})


def test_scaling_is_not_repeated(parts: Any, tmp_path: Path) -> None:
    good, header = parts("scaling")
    corrections = [header["corrections"][0] | {"also": ["unet.up_blocks.1.attentions.0:input:text"]}]
    assert "at several sites, expected one" in refused(tmp_path, good, header | {"corrections": corrections})


def test_two_edits_at_one_site(parts: Any, tmp_path: Path) -> None:
    good, header = parts("low_rank")
    twice = good | {
        k.replace("correction0", "correction1"): v.clone() for k, v in good.items() if k.startswith("correction0")
    }
    assert "a site of its own" in refused(tmp_path, twice, header | {"corrections": header["corrections"] * 2})


@pytest.mark.parametrize("site", ["unet.__class__", "unet.forward", "unet.config", "scheduler", "unet.mid_block.x"])
def test_a_site_reaches_modules_only(site: str, parts: Any, tmp_path: Path) -> None:
    """A well-formed path that names no module is read, and refused when it is attached."""
    from helpers import pipelines
    from neuraleraser.eraser import attach

    good, header = parts("low_rank")
    header |= {"gate": header["gate"] | {"site": site}, "corrections": [header["corrections"][0] | {"site": site}]}
    metadata = {"kind": "eraser", "version": "1", "header": json.dumps(header)}
    save_file(good, tmp_path / "x.safetensors", metadata=metadata)
    with (
        pytest.raises(NeuralEraserError),
        attach(pipelines.stable_diffusion(), Eraser.load(tmp_path / "x.safetensors")),
    ):
        pass


@given(st.integers(0, 2**32), st.binary(min_size=1, max_size=8))
def test_damaged_bytes(tmp_path_factory: pytest.TempPathFactory, where: int, what: bytes) -> None:
    """Whatever is overwritten: an eraser or a FileError, nothing else."""
    folder = tmp_path_factory.mktemp("damaged")
    make_eraser().save(folder / "x.safetensors")
    data = bytearray((folder / "x.safetensors").read_bytes())
    at = where % len(data)
    data[at : at + len(what)] = what
    (folder / "x.safetensors").write_bytes(bytes(data))
    try:
        assert Eraser.load(folder / "x.safetensors").validation_error() is None
    except FileError:
        pass


def test_a_file_of_another_kind_and_no_file(tmp_path: Path) -> None:
    from neuraleraser.io import tensor_file

    tensor_file.save(tmp_path / "sae.safetensors", "sae", {"a": torch.zeros(1)}, {})
    with pytest.raises(FileError, match="kind"):
        Eraser.load(tmp_path / "sae.safetensors")
    with pytest.raises(FileError, match="does not exist"):
        Eraser.load(tmp_path / "none.safetensors")
