"""Fetch single files of a Hugging Face repository into the user's cache, and say what went wrong.

Nothing is ever removed from that cache. `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` work as
everywhere: huggingface_hub reads them when it is imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import _CACHED_NO_EXIST, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from REC.utils.errors import InputError

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """One file of a repository, before it is fetched.

    Attributes:
        repo, name: the repository and the file's path in it.
        commit: the revision that `main` is at.
        missing_bytes: bytes still to be downloaded; 0 for a file in the cache.
    """

    repo: str
    name: str
    commit: str
    missing_bytes: int


def look_up(repo: str, name: str) -> HubFile:
    """Ask the hub, or the cache when the hub is out of reach, for a file without fetching it.

    Raises:
        InputError: there is no such file, or the hub is out of reach and the cache lacks it.
    """
    try:
        found = huggingface_hub.hf_hub_download(repo, name, dry_run=True)
    except Exception as error:  # huggingface_hub, its HTTP client and xet raise many kinds
        raise _refusal(repo, name, error) from error
    missing = (found.file_size or 0) if found.will_download else 0
    return HubFile(repo, name, found.commit_hash, missing)


def fetch(repo: str, name: str) -> Path:
    """Return the path of a file in the cache, downloading it first if need be.

    Raises:
        InputError: there is no such file, or the download failed.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name))
    except Exception as error:  # as above
        raise _refusal(repo, name, error) from error


def fetch_optional(repo: str, name: str) -> Path | None:
    """As `fetch`, with None for a file that the repository does not have."""
    try:
        return Path(huggingface_hub.hf_hub_download(repo, name))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError as error:
        # Out of reach is not absent, unless the cache remembers that the hub had no such file.
        if huggingface_hub.try_to_load_from_cache(repo, name) is _CACHED_NO_EXIST:
            return None
        raise _refusal(repo, name, error) from error
    except Exception as error:  # as above
        raise _refusal(repo, name, error) from error


def stated_sha256(file: HubFile, path: Path) -> str | None:
    """Return the SHA-256 that the hub states for a fetched file, None if it states none.

    Large files have their SHA-256 as ETag. When the hub is out of reach the name of the cache's
    blob is used: the cache names it after the ETag that the hub stated for the download.

    Args:
        file: what `look_up` returned.
        path: what `fetch` returned.
    """
    etag: str | None = path.resolve().name
    try:
        url = huggingface_hub.hf_hub_url(file.repo, file.name, revision=file.commit)
        etag = huggingface_hub.get_hf_file_metadata(url).etag
    except Exception:  # noqa: S110 - any kind of network trouble; the blob's name remains
        pass
    return etag if etag is not None and _SHA256.fullmatch(etag) else None


def cache_folder() -> Path:
    """Return the folder that downloads go to."""
    return Path(constants.HF_HUB_CACHE)


def _refusal(repo: str, name: str, error: Exception) -> InputError:
    where = f"{name} of {repo}"
    if isinstance(error, GatedRepoError):
        return InputError(
            f"cannot fetch {where}: the repository wants its terms accepted; accept them on "
            f"{constants.ENDPOINT}/{repo} and log in with `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"cannot fetch {where}: {constants.ENDPOINT} has no such repository, or it is "
            f"private; check the name or log in with `hf auth login`."
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return InputError(f"cannot fetch {where}: the repository has no such file; check the name.")
    if isinstance(error, HFValidationError):
        return InputError(f"cannot fetch {where}: {one_line(error)}; write OWNER/NAME.")
    return InputError(
        f"cannot fetch {where} from {constants.ENDPOINT}: {one_line(error)}; check the connection, "
        f"HF_ENDPOINT and the disk's free space and run again, or give local files with "
        f"--from_file and --base_dir."
    )


def one_line(error: Any) -> str:
    """Return an exception's text as one line of at most 200 characters, without a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text[:200] + " ...") if len(text) > 200 else text.rstrip(".")
