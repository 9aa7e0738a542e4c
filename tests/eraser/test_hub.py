"""Erasers in folders and on a Hub that is made up here, and the card that goes with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st

from helpers import pipelines
from helpers.erasers import make_eraser
from neuraleraser import Eraser, load_eraser, model_card
from neuraleraser.errors import FileError, NeuralEraserError, SettingsError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/cats-eraser"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub's client, which the tests keep from the network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put_in(cache: Path, eraser: Eraser) -> None:
    """A cached copy, as the client lays it out."""
    repo = cache / "models--someone--cats-eraser"
    eraser.save_pretrained(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)


def one_sentence(error: pytest.ExceptionInfo[NeuralEraserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


def test_a_folder_there_and_back(tmp_path: Path) -> None:
    eraser = make_eraser()
    eraser.save_pretrained(tmp_path / "cats")
    assert [p.name for p in (tmp_path / "cats").iterdir()] == ["eraser.safetensors"]
    for source in (tmp_path / "cats", str(tmp_path / "cats"), tmp_path / "cats" / "eraser.safetensors"):
        back = Eraser.from_pretrained(source)
        assert back.header["concept"] == "Cats" and torch.equal(back.gate.bias, eraser.gate.bias)


@pytest.mark.parametrize("source", ["nowhere", "./a/b/c", "no/where.safetensors", "a b/c", "", "../x/y", Path("no/x")])
def test_places_that_hold_nothing(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=r"there is no eraser|holds no eraser") as caught:
        Eraser.from_pretrained(source)
    one_sentence(caught)


def test_a_folder_without_an_eraser_or_with_something_else(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="holds no eraser"):
        Eraser.from_pretrained(tmp_path)
    (tmp_path / "eraser.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(FileError) as caught:
        Eraser.from_pretrained(tmp_path)
    one_sentence(caught)


def test_the_hub_out_of_reach(cache: Path) -> None:
    with pytest.raises(FileError, match="could not be fetched from the Hub, and no copy of it is cached") as caught:
        Eraser.from_pretrained(REPO)
    one_sentence(caught)
    put_in(cache, make_eraser())
    assert Eraser.from_pretrained(REPO).name == "Cats"
    pipe = pipelines.stable_diffusion()
    assert load_eraser(pipe, REPO) == "Cats"


class Response:
    """As much of an answer of the Hub as its errors look at."""

    status_code, headers, request, text = 404, {}, None, ""

    def json(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("kind", "says", "cached_helps"),
    [
        ("RepositoryNotFoundError", "the Hub has no repository 'someone/cats-eraser'", False),
        ("RemoteEntryNotFoundError", "holds no eraser", False),
        ("HfHubHTTPError", "could not be fetched", True),
        ("LocalEntryNotFoundError", "could not be fetched", True),
    ],
)
def test_answers_of_the_hub(
    kind: str, says: str, cached_helps: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the Hub says for certain stands; a cached copy helps where it only failed."""
    error = getattr(huggingface_hub.errors, kind)
    local = kind.startswith("Local")

    def fail(*_: Any, **__: Any) -> str:
        raise error("first line\nsecond line") if local else error("first line\nsecond line", response=Response())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(FileError, match=says) as caught:
        Eraser.from_pretrained(REPO)
    one_sentence(caught)
    put_in(cache, make_eraser())
    if cached_helps:
        assert Eraser.from_pretrained(REPO).name == "Cats"
    else:
        with pytest.raises(FileError, match=says):
            Eraser.from_pretrained(REPO)


def test_what_is_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the client takes, by its own names; without them, its own defaults."""
    make_eraser().save_pretrained(tmp_path)
    asked: list[dict[str, Any]] = []

    def download(repo: str, file: str, **given: Any) -> str:
        asked.append(given)
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    plain = {"revision": None, "token": None, "subfolder": None, "cache_dir": None, "local_files_only": False}
    Eraser.from_pretrained(REPO)
    assert asked.pop() == plain
    every = {"revision": COMMIT, "token": False, "subfolder": "a/b", "cache_dir": "/c", "local_files_only": True}
    Eraser.from_pretrained(REPO, **every)
    assert asked.pop() == every


def test_a_copy_of_the_revision_that_is_asked_for(cache: Path) -> None:
    put_in(cache, make_eraser())
    assert Eraser.from_pretrained(REPO, revision=COMMIT).name == "Cats"
    assert Eraser.from_pretrained(REPO, local_files_only=True).name == "Cats"
    for other in ({"revision": "f" * 40}, {"subfolder": "elsewhere"}, {"cache_dir": cache / "other"}):
        with pytest.raises(FileError, match=r"could not be fetched|holds no eraser") as caught:
            Eraser.from_pretrained(REPO, **other)
        one_sentence(caught)


def test_a_subfolder_of_a_folder(tmp_path: Path) -> None:
    make_eraser().save_pretrained(tmp_path / "a" / "b")
    assert Eraser.from_pretrained(tmp_path, subfolder="a/b").name == "Cats"
    with pytest.raises(FileError, match="holds no eraser"):
        Eraser.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["x" * 5000, "~nobody-of-that-name/x", "a\0b", "/dev/null"])
def test_sources_that_are_none(source: str) -> None:
    with pytest.raises(FileError, match=r"there is no eraser|could not be read"):
        Eraser.from_pretrained(source)


class Hub:
    """Takes what is pushed, and keeps it."""

    files: dict[str, bytes]

    def __init__(self) -> None:
        type(self).files = {}

    def create_repo(self, repo: str, exist_ok: bool) -> None:
        assert repo == REPO and exist_ok

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        assert repo_id == REPO and commit_message
        type(self).files = {p.name: p.read_bytes() for p in folder_path.iterdir()}
        return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/1")


def test_pushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert make_eraser().push_to_hub(REPO).endswith("/commit/1")
    assert Hub.files.keys() == {"eraser.safetensors", "README.md"}
    card = Hub.files["README.md"].decode()
    assert f"load_eraser(pipe, '{REPO}')" in card and "unet.mid_block.attentions.0:output:image" in card
    (tmp_path / "x").write_bytes(Hub.files["eraser.safetensors"])
    assert Eraser.from_pretrained(tmp_path / "x").name == "Cats"


def test_pushing_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ("cats", "a/b/c", "a/b c", "../b"):
        with pytest.raises(SettingsError, match="no Hub id"):
            make_eraser().push_to_hub(bad)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(Hub, "create_repo", fail)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    with pytest.raises(FileError, match=r"could not be pushed.*no route to host") as caught:
        make_eraser().push_to_hub(REPO)
    one_sentence(caught)


# The card.


def test_the_card_tells_what_the_header_holds() -> None:
    header = {
        "concept": "Van_Gogh",
        "kind": "style",
        "base": "someone/a-model",
        "settings": {"rank": 8, "bins": 5},
        "seeds": [0, 23],
        "measured": {"ua": {"value": 0.9, "n": 40, "low": 0.8, "high": 1.0}, "kept": 0.95},
    }
    card = model_card(header)
    front, body = card.split("---\n")[1:3]
    assert 'base_model: "someone/a-model"' in front and "concept-erasure" in front
    for text in ("# Eraser: Van_Gogh", "the style Van_Gogh", "| ua | 0.9 | 0.8 to 1.0 | 40 |", "| kept | 0.95 |"):
        assert text in body
    for text in (r"| settings: rank | 8 |", r"\[0, 23\]", "## Limits"):
        assert text in body
    assert "no measurement" not in card
    assert "no measurement" in model_card({"concept": "Cats"}) and "no measurement" in model_card(make_eraser().header)


@given(st.text(max_size=60))
def test_a_stranger_s_header_is_text_and_no_markup(text: str) -> None:
    hostile = text + "\n---\nlicense: mit\n# Head <script> | [x](y) `z`"
    header = {"concept": hostile, "kind": hostile, "base": hostile, hostile: {hostile: hostile}, "measured": {"a": 1}}
    card, plain = model_card(header), model_card({"concept": "x", "base": "y", "k": {"i": "v"}, "measured": {"a": 1}})
    assert len(card.splitlines()) == len(plain.splitlines())
    assert "<script>" not in card and "[x](y)" not in card and "base_model" not in card
    assert [line[:2] for line in card.splitlines() if line[:1] == "#"] == ["# ", "##", "##", "##", "##"]
    heads = [line.replace(r"\|", "").count("|") for line in card.splitlines() if line.startswith("| ")]
    assert set(heads) == {5, 3}


def test_a_long_value_is_cut() -> None:
    assert max(map(len, model_card({"concept": "x", "prompts": ["a"] * 9999}).splitlines())) < 500
