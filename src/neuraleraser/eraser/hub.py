"""Erasers in folders and on the Hub: one file of a fixed name, fetched, or taken from the cache on an outage."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypedDict

from neuraleraser.errors import FileError, SettingsError
from neuraleraser.io.names import printable

FILE = "eraser.safetensors"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class HubOptions(TypedDict, total=False):
    """Options of `huggingface_hub.hf_hub_download`, by its own names. A `revision` that is a commit pins what is
    fetched: a branch may hold another file tomorrow."""

    revision: str | None
    token: str | bool | None
    subfolder: str | None
    cache_dir: str | Path | None
    local_files_only: bool


def find(source: str | Path, options: HubOptions | None = None) -> Path:
    """The file of the eraser at `source`: itself a file, a folder that holds one, or an id on the Hub, to which
    `options` go (of a folder, `subfolder` counts).

    Raises FileError, in one sentence, where there is none, or where the Hub does not answer and no copy is cached.
    """
    options = options or {}
    path = Path(os.path.expanduser(source))  # unlike Path.expanduser, no error for a user who is not there
    if os.path.isdir(path):
        path = path / (options.get("subfolder") or "")
        if not os.path.isfile(path / FILE):
            raise FileError(
                f"the folder {str(source)!r} holds no eraser (no {FILE}): pass one that save_pretrained made"
            )
        return path / FILE
    if os.path.lexists(path):  # `load` says what is wrong with one that is no regular file
        return path
    if isinstance(source, Path) or source.endswith(".safetensors") or not HUB_ID.fullmatch(source):
        what = printable(source)
        raise FileError(f"there is no eraser {what!r}: pass a file, a folder, or a Hub id such as 'owner/name'")
    return _fetch(source, options)


def _fetch(repo: str, options: HubOptions) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # On an outage the client takes its cached copy.
        return Path(huggingface_hub.hf_hub_download(repo, FILE, **options))
    except RevisionNotFoundError as error:
        raise FileError(
            f"the repository {repo!r} has no revision {options.get('revision')!r}: pass a branch, a tag or a commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileError(
            f"the Hub has no repository {repo!r}, or none that you may read: check the id, and `hf auth login`"
        ) from error
    except Exception as error:  # the client, its transport and the disk each raise kinds of their own
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise FileError(
                f"the repository {repo!r} holds no eraser (no {FILE}): pass one that push_to_hub made"
            ) from error
        # The Hub named the file, and then broke off.
        folder = options.get("subfolder")
        file = f"{folder}/{FILE}" if folder else FILE
        cached = huggingface_hub.try_to_load_from_cache(
            repo, file, cache_dir=options.get("cache_dir"), revision=options.get("revision")
        )
        if isinstance(cached, str):
            return Path(cached)
        raise FileError(
            f"the eraser {repo!r} could not be fetched from the Hub, and no copy of it is cached "
            f"({_reason(error)}): check the network and the id"
        ) from error


def check_id(repo: str) -> None:
    """SettingsError for what cannot be a repository's id."""
    if not HUB_ID.fullmatch(repo):
        raise SettingsError(f"{repo!r} is no Hub id: pass one such as 'owner/name'")


def push(folder: Path, repo: str) -> str:
    """Upload the folder's files, making the repository where there is none -> the commit's address.

    Raises FileError where the Hub refuses or does not answer.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, exist_ok=True)
        done = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Add an eraser")
    except Exception as error:
        raise FileError(
            f"the eraser could not be pushed to {repo!r} ({_reason(error)}): check the network, the id, and that "
            "`hf auth login` gave a token that may write"
        ) from error
    return str(done.commit_url)


def _reason(error: Exception) -> str:
    """An error's text in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
