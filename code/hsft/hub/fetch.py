"""Fetch single files of a Hugging Face repository into its cache, resumably and checksum-verified.

`hf_hub_download` does not resume: since version 2 (2.4.0 was read) it downloads to a temporary file
of a random name and deletes that file when the download fails or the process is interrupted, so an
interrupted 8.8 GB file starts from its first byte. This module downloads large files itself, with
huggingface_hub's `http_get` and under the same lock, to `<etag>.incomplete`, and hands the finished
file to the cache.

Only a download of this module that turns out damaged is removed from the cache. huggingface_hub
reads `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and `HF_TOKEN` when it is imported.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import _CACHED_NO_EXIST, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, tqdm

from hsft.utils.errors import InputError, brief
from hsft.utils.files import sha256
from hsft.utils.progress import Meter

log = logging.getLogger(__name__)

MB = 1_000_000
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SAFE_ETAG = re.compile(r"[\w+=-][\w.+=-]{0,127}")
# Below this neither a progress display nor an interruption matters.
_SMALL_BYTES = 64 * MB


class OutOfReach(InputError):
    """The hub cannot be asked and the cache lacks the file.

    Attributes:
        reason: the sentence without its full stop, for a program that knows another way to add.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}.")
        self.reason = reason


@dataclass(frozen=True)
class HubFile:
    """One file of a repository, before it is fetched.

    Attributes:
        repo, name, revision: as asked for.
        commit: the commit that `revision` stands for.
        etag: the hub's checksum: SHA-256 for files in its large-file storage, else something else.
        size: bytes, None if the hub does not say.
        cache: the Hugging Face cache folder.
        cached: where the cache has the file, None if it has not.
        reachable: whether the hub itself said so.
    """

    repo: str
    name: str
    revision: str
    commit: str
    etag: str
    size: int | None
    cache: Path
    cached: Path | None
    reachable: bool = True

    @property
    def sha256(self) -> str | None:
        """The SHA-256 that the hub states, None if it states none."""
        return self.etag if _SHA256.fullmatch(self.etag) else None

    @property
    def blob(self) -> Path:
        """Where the cache keeps the content."""
        return _blob(self.cache, self.repo, self.etag)

    @property
    def partial(self) -> Path:
        """Where an unfinished download waits: the name that `hf cache prune` knows as such."""
        return self.blob.with_name(f"{self.etag}.incomplete")

    @property
    def missing_bytes(self) -> int:
        """Bytes that are still to be downloaded."""
        if self.cached is not None:
            return 0
        have = self.partial.stat().st_size if self.partial.is_file() else 0
        size = self.size or 0
        return size - have if have <= size else size

    @property
    def where(self) -> str:
        """The file's name for messages."""
        return f"{self.name} of {self.repo}"


def look_up(repo: str, name: str, revision: str, cache: Path) -> HubFile:
    """Ask the hub, or the cache when the hub is out of reach, for a file without fetching it.

    Raises:
        InputError: there is no such file; `OutOfReach` where the hub cannot be asked and the cache
            lacks the file.
    """
    try:
        url = huggingface_hub.hf_hub_url(repo, name, revision=revision)
        metadata = huggingface_hub.get_hf_file_metadata(url)
    except (
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RemoteEntryNotFoundError,
        HFValidationError,
    ) as error:
        raise _refusal(repo, name, revision, error) from error
    except Exception as error:  # huggingface_hub and its HTTP client raise many kinds
        cached = _in_cache(repo, name, revision, cache)
        if cached is None:
            raise _refusal(repo, name, revision, error) from error
        log.info("%s cannot be asked; taking %s of %s from the cache.", _endpoint(), name, repo)
        return cached
    commit, etag = metadata.commit_hash, metadata.etag
    if commit is None or etag is None or not _SAFE_ETAG.fullmatch(etag):
        raise InputError(
            f"cannot fetch {name} of {repo}: {_endpoint()} does not answer like a Hugging Face hub "
            f"(no X-Repo-Commit or no usable ETag); check HF_ENDPOINT and the proxy."
        )
    blob = _blob(cache, repo, etag)
    content = _snapshot_path(repo, name, commit, cache) or (blob if blob.is_file() else None)
    return HubFile(repo, name, revision, commit, etag, metadata.size, cache, content)


def fetch(file: HubFile) -> tuple[Path, str]:
    """Return a file's path in the cache and its SHA-256, downloading what is not there yet.

    An interrupted download is kept and continued the next time. The result lies where
    `hf_hub_download` would have put it.

    Raises:
        InputError: the download failed, or the content has another checksum than the hub states.
    """
    known = _download(file) if file.cached is None else None
    path = file.cached
    if path is None or file.reachable:
        try:
            # The content is there already; this adds the snapshot's link and the ref.
            path = Path(
                huggingface_hub.hf_hub_download(
                    file.repo, file.name, revision=file.revision, cache_dir=file.cache
                )
            )
        except Exception as error:  # as above
            raise _refusal(file.repo, file.name, file.revision, error) from error
    if known is not None and path.resolve().name == file.etag:
        return path, known
    digest = hash_file(path)
    if file.sha256 is not None and digest != file.sha256:
        raise InputError(
            f"{path.resolve()} is damaged: its SHA-256 is {digest}, the hub states {file.sha256}; "
            f"delete that file and run again."
        )
    return path, digest


def fetch_optional(repo: str, name: str, revision: str, cache: Path) -> Path | None:
    """As `look_up` and `fetch`, with None for a file that the repository does not have."""
    try:
        return fetch(look_up(repo, name, revision, cache))[0]
    except InputError as error:
        if isinstance(error.__cause__, RemoteEntryNotFoundError):
            # Makes the cache remember that there is no such file, for when the hub is out of reach.
            with contextlib.suppress(Exception):
                huggingface_hub.hf_hub_download(
                    repo, name, revision=revision, cache_dir=cache, dry_run=True
                )
            return None
        known = huggingface_hub.try_to_load_from_cache(
            repo, name, cache_dir=cache, revision=revision
        )
        if known is _CACHED_NO_EXIST:
            return None
        raise


def hash_file(path: Path) -> str:
    """Return a file's SHA-256, with progress for a large file.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with _byte_meter("checksum", path.stat().st_size) as count:
            return sha256(path, on_bytes=count)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def size_text(count: int) -> str:
    """Write a number of bytes as `8.8 GB` or `1.2 MB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _download(file: HubFile) -> str:
    """Download to the cache's blob, continuing what an earlier download left."""
    locks = file.cache / ".locks" / _repo_folder(file.repo)
    locks.mkdir(parents=True, exist_ok=True)
    file.blob.parent.mkdir(parents=True, exist_ok=True)
    # hf_hub_download takes the same lock, so nobody downloads the file a second time meanwhile.
    with WeakFileLock(locks / f"{file.etag}.lock"):
        if not file.blob.is_file():
            try:
                _stream(file)
            except Exception as error:  # as in `look_up`
                raise _refusal(file.repo, file.name, file.revision, error) from error
            _verify_partial(file)
            file.partial.replace(file.blob)
    return file.sha256 or hash_file(file.blob)


def _stream(file: HubFile) -> None:
    # The commit, not the branch: what is continued tomorrow must be the same content.
    url = huggingface_hub.hf_hub_url(file.repo, file.name, revision=file.commit)
    with file.partial.open("ab") as stream:
        have = stream.tell()
        if have and (file.size is None or have > file.size):
            stream.truncate(0)
            have = 0
        if have:
            log.info("continuing the download of %s at %s.", file.where, size_text(have))
        with _byte_meter("download", file.size or 0, have) as count:
            http_get(
                url,
                stream,
                resume_size=have,
                headers={**build_hf_headers(), "Accept-Encoding": "identity"},
                expected_size=file.size,
                displayed_filename=file.name,
                tqdm_class=_bar(count),
            )
        stream.flush()
        os.fsync(stream.fileno())


def _verify_partial(file: HubFile) -> None:
    if file.sha256 is None:
        if (file.size or 0) >= _SMALL_BYTES:
            log.warning("the hub states no SHA-256 for %s; only its size is checked.", file.where)
        return
    digest = hash_file(file.partial)
    if digest != file.sha256:
        file.partial.unlink()
        raise InputError(
            f"the download of {file.where} is damaged: its SHA-256 is {digest}, the hub states "
            f"{file.sha256}; it was discarded, run again."
        )


class _ByteCount:
    """Passes bytes on to a meter that counts whole megabytes."""

    def __init__(self, shown: Meter, bytes_done: int) -> None:
        self._shown = shown
        self._bytes = bytes_done
        shown.skip(bytes_done // MB)

    def __call__(self, count: int) -> None:
        before = self._bytes // MB
        self._bytes += count
        self._shown.advance(self._bytes // MB - before)


@contextlib.contextmanager
def _byte_meter(task: str, total: int, done: int = 0) -> Any:
    with Meter(task, total // MB, "MB", enabled=total >= _SMALL_BYTES) as shown:
        yield _ByteCount(shown, done)


def _bar(count: Callable[[int], None]) -> Any:
    """Return what `http_get` takes for a tqdm class, showing our own progress instead."""

    class Bar(tqdm):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**{**settings, "disable": True})

        def update(self, n: float | None = 1) -> None:
            count(int(n or 0))

    return Bar


def _in_cache(repo: str, name: str, revision: str, cache: Path) -> HubFile | None:
    path = _snapshot_path(repo, name, revision, cache)
    if path is None:
        return None
    commit = path.relative_to(cache / _repo_folder(repo) / "snapshots").parts[0]
    # The cache names a blob after the ETag that the hub stated for it.
    etag = path.resolve().name
    return HubFile(repo, name, revision, commit, etag, path.stat().st_size, cache, path, False)


def _snapshot_path(repo: str, name: str, revision: str, cache: Path) -> Path | None:
    path = huggingface_hub.try_to_load_from_cache(repo, name, cache_dir=cache, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _blob(cache: Path, repo: str, etag: str) -> Path:
    return cache / _repo_folder(repo) / "blobs" / etag


def _repo_folder(repo: str) -> str:
    return repo_folder_name(repo_id=repo, repo_type="model")


def _endpoint() -> str:
    return str(constants.ENDPOINT)


def _refusal(repo: str, name: str, revision: str, error: Exception) -> InputError:
    where = f"{name} of {repo}"
    if isinstance(error, GatedRepoError):
        return InputError(
            f"cannot fetch {where}: the repository wants its terms accepted; accept them on "
            f"{_endpoint()}/{repo} and log in with `hf auth login`."
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputError(
            f"cannot fetch {where}: {_endpoint()} has no such repository, or it is private; check "
            f"the name or log in with `hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return InputError(
            f"cannot fetch {where}: the repository has no revision '{revision}'; check --revision."
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return InputError(f"cannot fetch {where}: the repository has no such file; check the name.")
    if isinstance(error, HFValidationError):
        return InputError(f"cannot fetch {where}: {brief(error)}; write OWNER/NAME.")
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, OfflineModeIsEnabled):
        return OutOfReach(
            f"cannot fetch {where}: the cache does not have it, and HF_HUB_OFFLINE is set; unset it"
        )
    return OutOfReach(
        f"cannot fetch {where} from {_endpoint()}: {brief(error)}; check the connection and "
        f"HF_ENDPOINT and run again (what was downloaded is kept)"
    )
