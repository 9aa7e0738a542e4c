"""A Hub that is made up: it takes what is pushed, keeps every commit, and gives files as the client lays them out."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from helpers.erasers import make_eraser
from helpers.sae_files import N, rand, sae
from neuraleraser.eraser import Eraser
from neuraleraser.eraser.provenance import Provenance
from neuraleraser.fitting import Reference
from neuraleraser.io.hub import HubFile
from neuraleraser.sae import SAE
from neuraleraser.sites import Site

REPO = "someone/something"


def make_reference(seed: int = 0) -> Reference:
    """Two rows, two timesteps; it means nothing."""
    pooled = rand(2, 2, 1, N).abs().half()
    provenance = Provenance(((500, 501),), ("a cat", "a dog"))
    times = torch.tensor([750.0, 250.0])
    site = Site("unet.mid_block.attentions.0")
    return Reference(sae(seed), site, pooled, times, ["a cat", "a dog"], [frozenset({"cat"}), frozenset()], provenance)


MAKERS: dict[str, Any] = {"eraser": make_eraser, "SAE": sae, "reference": make_reference}
"""One of each kind that is kept on the Hub."""


def content(of: HubFile) -> dict[str, bytes]:
    """Return the bytes of its files."""
    with tempfile.TemporaryDirectory() as folder:
        of.save_pretrained(folder)
        return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def facts(of: HubFile) -> Any:
    """Return what is the same in two that were written and read again: no two files have the same bytes."""
    if isinstance(of, Reference):
        header = {**of.sae.header, "site": str(of.site)}
        return [facts(SAE(**dict(of.sae.named_parameters()), header=header)), of.site, of.prompts, of.labels]
    if isinstance(of, SAE):
        return [of.header, *(p.tolist() for p in of.parameters())]
    assert isinstance(of, Eraser)
    with tempfile.TemporaryDirectory() as folder:  # files are in half precision
        of.save_pretrained(folder)
        return Eraser.load(Path(folder) / "eraser.safetensors").content_hash


class Response:
    """As much of an answer of the Hub as its errors look at."""

    status_code, headers, request, text = 404, {}, None, ""

    def json(self) -> dict[str, Any]:
        return {}


class FakeHub:
    """repositories: by id, branch (or commit) to files. asked: what was downloaded, and with which options."""

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache = cache
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.asked: list[tuple[str, str, dict[str, Any]]] = []
        self.pushed: list[dict[str, Any]] = []
        self.token: Any = None
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.setattr(huggingface_hub, "HfApi", self.api)

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files to a branch; return the commit."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        branches = self.repositories.setdefault(repo, {})
        branches[branch] = branches[commit] = files
        return commit

    def download(self, repo: str, name: str, **options: Any) -> str:
        self.asked.append((repo, name, options))
        if repo not in self.repositories:
            raise RepositoryNotFoundError("no such\nrepository", response=Response())  # type: ignore[arg-type]
        files = self.repositories[repo].get(options["revision"] or "main")
        if files is None:
            raise RevisionNotFoundError("no such\nrevision", response=Response())  # type: ignore[arg-type]
        inside = "/".join(filter(None, (options["subfolder"], name)))
        if inside not in files:
            raise RemoteEntryNotFoundError("no such\nfile", response=Response())  # type: ignore[arg-type]
        commit = next(c for c, held in self.repositories[repo].items() if held is files and len(c) == 40)
        path = self.cache / repo / "snapshots" / commit / inside
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[inside])
        return str(path)

    def api(self, token: Any = None) -> FakeHub:
        self.token = token
        return self

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        self.pushed.append({"private": private})
        self.repositories.setdefault(repo, {})

    def upload_folder(self, *, repo_id: str, folder_path: str, revision: str | None, **given: Any) -> Any:
        commit = self.put(repo_id, {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}, revision or "main")
        self.pushed[-1] |= {"revision": revision, **given}
        address = f"https://hub.example/{repo_id}"
        return SimpleNamespace(
            commit_url=f"{address}/commit/{commit}", pr_url=f"{address}/discussions/1" if given["create_pr"] else None
        )
