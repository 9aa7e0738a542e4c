"""Erasers, SAEs and references in folders and on a Hub that is made up here."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard, ModelHubMixin, constants

from helpers import pipelines
from helpers.erasers import make_eraser
from helpers.fake_hub import MAKERS, REPO, FakeHub, Response, content, facts
from helpers.sae_files import sae
from neuraleraser import SAE, Eraser, Reference, load_eraser
from neuraleraser.errors import DataError, FileError, NeuralEraserError, SettingsError
from neuraleraser.io.hub import HubFile, parse_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"
KINDS: dict[str, type[HubFile]] = {"eraser": Eraser, "SAE": SAE, "reference": Reference}


@pytest.fixture(params=list(MAKERS))
def noun(request: pytest.FixtureRequest) -> str:
    """Each kind of thing that is kept on the Hub."""
    return request.param


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub's client, which the tests keep from the network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(tmp_path / "hub", monkeypatch)


def put_in(cache: Path, held: HubFile) -> None:
    """A cached copy, as the client lays it out."""
    repo = cache / f"models--{REPO.replace('/', '--')}"
    held.save_pretrained(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)


def one_sentence(error: pytest.ExceptionInfo[NeuralEraserError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


# The calls are those that a user of the Hub knows.


@pytest.mark.parametrize("name", ["from_pretrained", "save_pretrained", "push_to_hub"])
def test_calls_are_those_of_the_hub_s_own_mixin(name: str) -> None:
    """Every parameter of ours is one of theirs, of the same kind and default, but for a repository's folder and what a
    commit is called."""
    ours, theirs = (dict(inspect.signature(getattr(c, name)).parameters) for c in (HubFile, ModelHubMixin))
    ours.pop("subfolder", None)
    assert all(p.kind == theirs[key].kind for key, p in ours.items())
    assert all(p.default == theirs[key].default for key, p in ours.items() if key != "commit_message")
    if name == "from_pretrained":
        assert ours.keys() == theirs.keys() - {"model_kwargs"}


def test_the_mixin_itself_is_no_base_for_files_of_ours(tmp_path: Path) -> None:
    """The day that this fails, it may become one."""

    @dataclass(frozen=True)
    class Frozen(ModelHubMixin):
        header: dict[str, Any]

    with pytest.raises(FrozenInstanceError):
        Frozen({})

    class Theirs(ModelHubMixin):
        def _save_pretrained(self, save_directory: Path) -> None:
            pass

    (tmp_path / "config.json").write_text("of another model in this folder")
    Theirs().save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_importing_what_is_kept_on_the_hub_does_not_import_its_client() -> None:
    code = "import sys; from neuraleraser import SAE; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


# Folders and files.


def test_a_folder_there_and_back(noun: str, tmp_path: Path) -> None:
    held, folder = MAKERS[noun](), tmp_path / "deep" / "inside"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "config.json").write_text("{}")
    held.save_pretrained(folder)
    assert sorted(os.listdir(folder)) == sorted(KINDS[noun].FILES)
    held.save_pretrained(str(tmp_path / "deep"))
    assert (tmp_path / "deep" / "config.json").read_text() == "{}"
    for source in (folder, str(folder), *([folder / held.FILES[0]] if len(held.FILES) == 1 else [])):
        assert facts(KINDS[noun].from_pretrained(source)) == facts(held)
    assert facts(KINDS[noun].from_pretrained(tmp_path, subfolder="deep/inside")) == facts(held)


@pytest.mark.parametrize(
    "source",
    [
        *("nowhere", "./a/b/c", "no/where.safetensors", "a b/c", "", "../x/y", Path("no/x"), "x" * 5000, "a\0b"),
        *("~nobody-of-that-name/x", "a/b@", "a/b@ ", "a/b@-x", "a@b", "a/b@c@d"),
    ],
)
def test_places_that_hold_nothing(noun: str, source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=rf"there is no {noun}|holds no {noun}") as caught:
        KINDS[noun].from_pretrained(source)
    one_sentence(caught)


def test_a_folder_without_it_or_with_something_else(noun: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=rf"holds no {noun} \(no {KINDS[noun].FILES[0]}\)"):
        KINDS[noun].from_pretrained(tmp_path)
    for name in KINDS[noun].FILES:
        (tmp_path / name).write_bytes(b"\0" * 64)
    with pytest.raises(FileError) as caught:
        KINDS[noun].from_pretrained(tmp_path)
    one_sentence(caught)
    with pytest.raises(FileError, match=r"could not be read|is no folder"):
        KINDS[noun].from_pretrained("/dev/null")


def test_half_a_reference_is_none(tmp_path: Path) -> None:
    sae().save_pretrained(tmp_path)
    with pytest.raises(FileError, match=r"holds no reference \(no background.safetensors\)"):
        Reference.from_pretrained(tmp_path)
    with pytest.raises(FileError, match="is no folder: a reference is one of sae"):
        Reference.from_pretrained(tmp_path / "sae.safetensors")


# The Hub.


def test_pushed_and_fetched(noun: str, hub: FakeHub) -> None:
    held = MAKERS[noun]()
    address = held.push_to_hub(REPO, commit_message="first", private=True, token="secret")
    assert address.startswith(f"https://hub.example/{REPO}/commit/") and hub.token == "secret"
    assert hub.pushed == [{"private": True, "revision": None, "commit_message": "first", "create_pr": None}]
    files = hub.repositories[REPO]["main"]
    assert files.keys() == {"README.md", *KINDS[noun].FILES}
    card = ModelCard(files["README.md"].decode())
    assert card.data.to_dict()["library_name"] == "neuraleraser" and repr(REPO) in card.text
    assert facts(KINDS[noun].from_pretrained(REPO)) == facts(held)
    assert held.push_to_hub(REPO, branch="tried", create_pr=True).endswith("/discussions/1")
    assert hub.pushed[1]["revision"] == "tried" and hub.pushed[1]["private"] is None


def test_what_is_asked_of_the_hub(noun: str, hub: FakeHub) -> None:
    """All that the client takes, by its own names; without them, its own defaults."""
    held = MAKERS[noun]()
    files = content(held)
    commit = hub.put(REPO, files | {f"a/b/{name}": data for name, data in files.items()})
    plain = {"revision": None, "token": None, "subfolder": None, "cache_dir": None}
    plain |= {"local_files_only": False, "force_download": False}
    KINDS[noun].from_pretrained(REPO)
    first, *others = KINDS[noun].FILES
    assert hub.asked == [(REPO, first, plain), *((REPO, name, plain | {"revision": commit}) for name in others)]
    hub.asked.clear()
    every = {"revision": commit, "token": False, "subfolder": "a/b", "cache_dir": "/c"}
    every |= {"local_files_only": True, "force_download": True}
    assert facts(KINDS[noun].from_pretrained(REPO, **every)) == facts(held)  # type: ignore[arg-type]
    assert hub.asked == [(REPO, name, every) for name in KINDS[noun].FILES]


def test_a_revision_is_pinned_by_either_spelling(noun: str, hub: FakeHub, tmp_path: Path) -> None:
    old, new = MAKERS[noun](), MAKERS[noun](seed=3)
    assert facts(old) != facts(new)
    commit = hub.put(REPO, content(old), "v1.0")
    hub.put(REPO, content(new))
    kind = KINDS[noun]
    for revision in ("v1.0", commit):
        assert facts(kind.from_pretrained(REPO, revision=revision)) == facts(old)
        assert facts(kind.from_pretrained(f"{REPO}@{revision}")) == facts(old)
        assert facts(kind.from_pretrained(f"{REPO}@{revision}", revision=revision)) == facts(old)
    assert facts(kind.from_pretrained(REPO)) == facts(new)
    with pytest.raises(SettingsError, match="names one revision"):
        kind.from_pretrained(f"{REPO}@v1.0", revision=commit)
    with pytest.raises(FileError, match="has no revision 'v2'"):
        kind.from_pretrained(f"{REPO}@v2")


def test_files_of_one_reference_are_of_one_commit(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another is pushed between them."""
    hub.put(REPO, content(MAKERS["reference"]()))
    download = hub.download

    def then_push(repo: str, name: str, **options: Any) -> str:
        path = download(repo, name, **options)
        hub.put(REPO, {name: b"another" for name in Reference.FILES})
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", then_push)
    assert Reference.from_pretrained(REPO).site == MAKERS["reference"]().site


def test_ids_with_revisions() -> None:
    assert parse_hub_id("a/b") == ("a/b", None) and parse_hub_id("a/b", "v") == ("a/b", "v")
    assert parse_hub_id("a/b.c-d@refs/pr/1") == ("a/b.c-d", "refs/pr/1")
    assert [parse_hub_id(text) for text in ("a", "a/b/c", "a/b@", "@v", "a/b@..", "a/b@v w")] == [None] * 6


def test_the_hub_out_of_reach(noun: str, cache: Path) -> None:
    with pytest.raises(FileError, match="could not be fetched from the Hub, and no copy of it is cached") as caught:
        KINDS[noun].from_pretrained(REPO)
    one_sentence(caught)
    held = MAKERS[noun]()
    put_in(cache, held)
    assert facts(KINDS[noun].from_pretrained(REPO)) == facts(held)
    assert facts(KINDS[noun].from_pretrained(f"{REPO}@{COMMIT}", local_files_only=True)) == facts(held)
    for other in ({"revision": "f" * 40}, {"subfolder": "elsewhere"}, {"cache_dir": cache / "other"}):
        with pytest.raises(FileError, match=r"could not be fetched|holds no") as caught:
            KINDS[noun].from_pretrained(REPO, **other)
        one_sentence(caught)


def test_loaded_from_the_cache_into_a_pipeline(cache: Path) -> None:
    put_in(cache, make_eraser())
    pipe = pipelines.stable_diffusion()
    assert load_eraser(pipe, REPO) == load_eraser(pipe, f"{REPO}@{COMMIT}") == "Cats"


@pytest.mark.parametrize(
    ("kind", "says", "cached_helps"),
    [
        ("RepositoryNotFoundError", f"the Hub has no repository '{REPO}'", False),
        ("RemoteEntryNotFoundError", "holds no ", False),
        ("HfHubHTTPError", "could not be fetched", True),
        ("LocalEntryNotFoundError", "could not be fetched", True),
    ],
)
def test_answers_of_the_hub(
    noun: str, kind: str, says: str, cached_helps: bool, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says for certain stands; a cached copy helps where it only failed, unless it is to be fetched anew."""
    error = getattr(huggingface_hub.errors, kind)
    local = kind.startswith("Local")

    def fail(*_: Any, **__: Any) -> str:
        raise error("first line\nsecond line") if local else error("first line\nsecond line", response=Response())

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(FileError, match=says) as caught:
        KINDS[noun].from_pretrained(REPO)
    one_sentence(caught)
    held = MAKERS[noun]()
    put_in(cache, held)
    if cached_helps:
        assert facts(KINDS[noun].from_pretrained(REPO)) == facts(held)
    for options in ({"force_download": True}, *([] if cached_helps else [{}])):
        with pytest.raises(FileError, match=says):
            KINDS[noun].from_pretrained(REPO, **options)


def test_pushing_refused(noun: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for bad in ("cats", "a/b/c", "a/b c", "../b", "a/b@v1"):
        with pytest.raises(SettingsError, match="no Hub id"):
            MAKERS[noun]().push_to_hub(bad)

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(hub, "upload_folder", fail)
    with pytest.raises(FileError, match=rf"{noun} could not be pushed to '{REPO}' \(no route to host") as caught:
        MAKERS[noun]().push_to_hub(REPO)
    one_sentence(caught)
    with pytest.raises(FileError, match=f"to branch 'v1' of '{REPO}'"):
        MAKERS[noun]().push_to_hub(REPO, branch="v1")


def test_what_cannot_be_written_makes_no_repository(hub: FakeHub) -> None:
    broken = make_eraser()
    broken = Eraser(broken.gate, (), broken.header)
    with pytest.raises(DataError, match="was not written"):
        broken.push_to_hub(REPO)
    assert not hub.pushed and not hub.repositories
