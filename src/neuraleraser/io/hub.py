"""Files of ours in folders and on the Hub: found, fetched, taken from the cache on an outage, saved and pushed."""

from __future__ import annotations

import os
import re
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypedDict

from neuraleraser.errors import FileError, SettingsError
from neuraleraser.io.atomic import write_bytes
from neuraleraser.io.names import printable

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_PINNED_ID = re.compile(rf"({HUB_ID.pattern})(?:@(\w[\w./-]*))?")
_COMMIT = re.compile("[0-9a-f]{40}")


class HubOptions(TypedDict):
    """Options of `huggingface_hub.hf_hub_download`, by its own names."""

    revision: str | None
    token: str | bool | None
    subfolder: str | None
    cache_dir: str | Path | None
    local_files_only: bool
    force_download: bool


def parse_hub_id(text: str, revision: str | None = None) -> tuple[str, str | None] | None:
    """Return ("owner/name", "v1") for "owner/name@v1", with `revision` for "owner/name", and None for what is no id.

    Raises SettingsError where the text names one revision and `revision` another.
    """
    found = _PINNED_ID.fullmatch(text)
    if not found:
        return None
    repo, said = found.groups()
    if said and revision and said != revision:
        raise SettingsError(f"{text!r} names one revision, and revision={revision!r} another: pass one of them")
    return repo, said or revision


class HubFile(ABC):
    """Base of what is kept in our own files: the methods that `huggingface_hub.ModelHubMixin` gives a model.

    The names and parameters are that class's. It is no base here, because it reads a stranger's config.json unchecked
    and passes it on, deletes a config.json that it finds where it saves, and sets attributes of a frozen value.

    `save` and `load` take the path of the file if there is one file, and that of the folder if there are several.

    Attributes:
        NOUN: Its name in messages.
        FILES: Its files in a folder or a repository.

    Examples:
        >>> sae.save_pretrained("sae")
        >>> SAE.from_pretrained("sae")  # a folder; or on the Hub "owner/name", or "owner/name@revision"
        SAE(n=256, d=128)
    """

    NOUN: ClassVar[str]
    FILES: ClassVar[tuple[str, ...]]

    @abstractmethod
    def save(self, path: Path, /) -> None:
        """Write it.

        Args:
            path: The file, or the folder if it has several files.

        Raises:
            FileError: The disk refuses.
        """

    @classmethod
    @abstractmethod
    def load(cls, path: Path, /) -> Self:
        """Read it.

        Args:
            path: The file, or the folder if it has several files.

        Returns:
            The object.

        Raises:
            FileError: There is none, or it is not sound.
        """

    @abstractmethod
    def generate_model_card(self, repo_id: str) -> ModelCard:
        """Return the card that `push_to_hub` uploads with it.

        Args:
            repo_id: "owner/name" of its repository.

        Returns:
            The card.
        """

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write it into a folder, from which `from_pretrained` reads it.

        Args:
            save_directory: The folder.

        Raises:
            NeuralEraserError: As for `save`.
        """
        folder = Path(save_directory)
        self.save(folder / self.FILES[0] if len(self.FILES) == 1 else folder)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
    ) -> Self:
        """Read it from a file, a folder or the Hub.

        If the Hub does not answer, the cached copy is used, unless the download is forced. The options after the first
        are those of `huggingface_hub.hf_hub_download`.

        Args:
            pretrained_model_name_or_path: A file, a folder, "owner/name", or "owner/name@revision".
            force_download: Download even if there is a cached copy.
            token: Access token of the Hub.
            cache_dir: Folder of the cache.
            local_files_only: Use the cached copy alone.
            revision: A commit, branch or tag. Pass the 40 digits of a commit if a service must give the same tomorrow:
                a branch may hold another file then.
            subfolder: Folder within the repository, or within a folder on disk.

        Returns:
            The object.

        Raises:
            FileError: There is none, or it is not sound; the message is one sentence.
        """
        options = HubOptions(
            revision=revision,
            token=token,
            subfolder=subfolder,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        return cls.load(_find(cls, pretrained_model_name_or_path, options))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Push with neuraleraser",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload it with a model card; the repository is created if need be.

        Args:
            repo_id: "owner/name" of the repository.
            commit_message: Message of the commit.
            private: True for a private repository; None: public, or as the organisation has it.
            token: Access token of the Hub.
            branch: A branch that exists; None: "main".
            create_pr: Open a pull request instead of a commit on the branch.

        Returns:
            The address of the commit or pull request.

        Raises:
            SettingsError: `repo_id` is no id.
            FileError: The Hub refuses or does not answer.
            NeuralEraserError: As for `save`, before anything is made on the Hub.
        """
        if not HUB_ID.fullmatch(repo_id):
            raise SettingsError(f"{repo_id!r} is no Hub id: pass one such as 'owner/name'")
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            write_bytes(Path(folder) / "README.md", str(self.generate_model_card(repo_id)).encode())
            try:
                api = HfApi(token=token)
                api.create_repo(repo_id, private=private, exist_ok=True)
                done = api.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    commit_message=commit_message,
                    revision=branch,
                    create_pr=create_pr,
                )
            except Exception as error:  # the client and its transport each raise kinds of their own
                where = repr(repo_id) if branch is None else f"branch {branch!r} of {repo_id!r}"
                raise FileError(
                    f"the {self.NOUN} could not be pushed to {where} ({_reason(error)}): check the network, the id, "
                    "and that `hf auth login` gave a token that may write"
                ) from error
        return str(done.pr_url or done.commit_url)


def _find(kind: type[HubFile], source: str | Path, options: HubOptions) -> Path:
    """Return the path that `kind.load` takes."""
    path = Path(os.path.expanduser(source))  # unlike Path.expanduser, no error for a user who is not there
    one = kind.FILES[0] if len(kind.FILES) == 1 else None
    if os.path.isdir(path):
        folder = path / (options["subfolder"] or "")
        if missing := [name for name in kind.FILES if not os.path.isfile(folder / name)]:
            raise FileError(
                f"the folder {str(source)!r} holds no {kind.NOUN} (no {missing[0]}): pass one that save_pretrained made"
            )
        return folder / one if one else folder
    if os.path.lexists(path):
        if one:  # `load` says what is wrong with one that is no regular file
            return path
        raise FileError(f"{printable(source)!r} is no folder: a {kind.NOUN} is one of {' and '.join(kind.FILES)}")
    asked = None
    if isinstance(source, str) and not source.endswith(".safetensors"):
        asked = parse_hub_id(source, options["revision"])
    if asked is None:
        places = "a file, a folder," if one else "a folder"
        raise FileError(
            f"there is no {kind.NOUN} {printable(source)!r}: pass {places} or a Hub id such as 'owner/name'"
        )
    repo, options["revision"] = asked
    first = _fetch(kind, repo, kind.FILES[0], options)
    # The client lays a snapshot out under its commit; all files are of that one, whatever is pushed meanwhile.
    commit = first.parents[len(Path(options["subfolder"] or "").parts)].name
    if _COMMIT.fullmatch(commit):
        options["revision"] = commit
    for name in kind.FILES[1:]:
        _fetch(kind, repo, name, options)
    return first if one else first.parent


def _fetch(kind: type[HubFile], repo: str, name: str, options: HubOptions) -> Path:
    """Return the path of a repository's file in the Hub's cache."""
    import huggingface_hub
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # On an outage the client takes its cached copy.
        return Path(huggingface_hub.hf_hub_download(repo, name, **options))
    except RevisionNotFoundError as error:
        raise FileError(
            f"the repository {repo!r} has no revision {options['revision']!r}: pass a branch, a tag or a commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileError(
            f"the Hub has no repository {repo!r}, or none that you may read: check the id, and `hf auth login`"
        ) from error
    except Exception as error:  # the client, its transport and the disk each raise kinds of their own
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise FileError(
                f"the repository {repo!r} holds no {kind.NOUN} (no {name}): pass one that push_to_hub made"
            ) from error
        # The Hub named the file, and then broke off.
        folder = options["subfolder"]
        file = f"{folder}/{name}" if folder else name
        cached: Any = None
        if not options["force_download"]:
            cached = huggingface_hub.try_to_load_from_cache(
                repo, file, cache_dir=options["cache_dir"], revision=options["revision"]
            )
        if isinstance(cached, str):
            return Path(cached)
        raise FileError(
            f"the {kind.NOUN} {repo!r} could not be fetched from the Hub, and no copy of it is cached "
            f"({_reason(error)}): check the network and the id"
        ) from error


def _reason(error: Exception) -> str:
    """Return an error's text in one short line."""
    return printable(error, 200) or type(error).__name__
