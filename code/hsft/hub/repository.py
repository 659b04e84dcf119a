"""Exported folders on the Hugging Face hub: upload of one, and `hf://OWNER/NAME` as a run's folder.

huggingface_hub reads `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_CACHE`, `HF_HUB_OFFLINE` and `HF_TOKEN`. It is
imported where it is needed, since runs on the disk are compared without it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hsft.hub.manifest import EXPORT_FILE, RUN_FORMAT, is_exported_run
from hsft.utils.errors import InputError, brief, one_line
from hsft.utils.files import is_file, is_folder, read_json
from hsft.utils.program import command

log = logging.getLogger(__name__)

PREFIX = "hf://"
# `Path` turns the two slashes into one.
_ADDRESS = re.compile(r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^\s]+))?")
# What is fetched of a run: no code, no pickle.
_RUN_FILES = ("*.csv", "*.json", "*.md", "*.parquet", "*.safetensors", "*.yaml")
# What a repository may hold besides an export.
_NOT_AN_EXPORT = frozenset({".gitattributes", "README.md"})


@dataclass(frozen=True)
class Address:
    """A run on the hub.

    Attributes:
        repo: `OWNER/NAME`.
        revision: a branch, tag or commit.
    """

    repo: str
    revision: str = "main"

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo.rpartition("/")[2]

    def __str__(self) -> str:
        at = "" if self.revision == "main" else f"@{self.revision}"
        return f"{PREFIX}{self.repo}{at}"


def read_address(name: str | Path) -> Address | None:
    """Read `hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`; None for the path of a folder.

    Raises:
        InputError: it begins with `hf://` and goes on otherwise.
    """
    text = str(name)
    match = _ADDRESS.fullmatch(text)
    if match:
        return Address(match["repo"], match["revision"] or "main")
    if text.startswith(PREFIX):
        raise InputError(
            f"'{one_line(text, 80)}' names no run on the hub; write {PREFIX}OWNER/NAME or "
            f"{PREFIX}OWNER/NAME@REVISION."
        )
    return None


def run_folder(name: str | Path) -> Path:
    """Return a run's folder, fetched to the hub's cache where it is named as `hf://OWNER/NAME`.

    Raises:
        InputError: the hub has no such repository or does not give it, or the repository holds no run.
    """
    address = read_address(name)
    if address is None:
        return Path(name)
    folder = _fetch(address)
    if not is_exported_run(folder):
        manifest = read_json(folder / EXPORT_FILE) if is_file(folder / EXPORT_FILE) else {}
        format = manifest.get("format") if isinstance(manifest, dict) else None
        holds = f"an export of --format {one_line(format, 20)}" if format else "no export of HSFT"
        raise InputError(
            f"{address} holds {holds} and not a run; push one with {command('export')} --run RUN "
            f"--format {RUN_FORMAT} --push_to_hub {address.repo}."
        )
    return folder


def output_folder(name: str | Path) -> Path:
    """Return where files about a run are written by default.

    The run's folder, or for one on the hub, or in its cache, a folder in the current one with the
    repository's name.
    """
    address = read_address(name)
    if address is not None:
        return Path(address.name)
    return Path(run_name(name)) if _is_snapshot(Path(name)) else Path(name)


def run_name(folder: str | Path) -> str:
    """Return a run's name: that of its folder, or of its repository for one in the hub's cache."""
    folder = Path(folder).absolute()
    return folder.parents[1].name.rpartition("--")[2] if _is_snapshot(folder) else folder.name


def _is_snapshot(folder: Path) -> bool:
    """Say whether a folder is a repository's in the hub's cache."""
    above = folder.absolute().parent
    return above.name == "snapshots" and above.parent.name.startswith("models--")


def check_push(repo: str) -> None:
    """Refuse a repository that cannot be pushed to, before the work of an export.

    Raises:
        InputError: the name is none, there is no token or the hub does not take it, or the hub does
            not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    if repo.count("/") != 1:
        raise InputError(f"--push_to_hub '{one_line(repo, 80)}' is no OWNER/NAME; name both.")
    with _push_errors(repo):
        validate_repo_id(repo)
        HfApi().whoami()


def push_folder(folder: Path, repo: str, *, private: bool) -> str:
    """Upload an exported folder to a repository of models, which is made where there is none.

    What an earlier push left there and this one does not have is deleted. A push that failed is
    repeated with the same call; large files that have arrived are not sent again.

    Args:
        folder: with `export.json`.
        repo: `OWNER/NAME`.
        private: whether a new repository is private; one that is there has to be, if this is True.

    Returns:
        The repository's address in a browser.

    Raises:
        InputError: the repository holds something else or is public, or the hub refuses the upload.
    """
    from huggingface_hub import HfApi, constants

    api = HfApi()
    with _push_errors(repo, folder):
        api.create_repo(repo, private=private, exist_ok=True)
        info = api.model_info(repo)
        if private and not info.private:
            raise InputError(
                f"{repo} is a public repository on {constants.ENDPOINT}; name a private one, or push "
                f"with --private False."
            )
        there = {file.rfilename for file in info.siblings or ()}
        if there - _NOT_AN_EXPORT and EXPORT_FILE not in there:
            raise InputError(
                f"{repo} holds files that are no export (it has no {EXPORT_FILE}); name another "
                f"repository."
            )
        log.info("uploading %s to %s/%s.", folder, constants.ENDPOINT, repo)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Upload an export of HSFT",
            delete_patterns="*",
        )
    return f"{constants.ENDPOINT}/{repo}"


def _fetch(address: Address) -> Path:
    """Return a repository's snapshot in the cache, with all files that a run consists of."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import DryRunError

    from hsft.hub.fetch import fetch, look_up

    cache = Path(constants.HF_HUB_CACHE)
    repo, revision = address.repo, address.revision
    with _open_errors(address):
        huggingface_hub.utils.validate_repo_id(repo)
        try:
            files = huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache,
                allow_patterns=list(_RUN_FILES),
                dry_run=True,
                tqdm_class=_silent_bar(),
            )
        except DryRunError as error:
            # The hub cannot be asked; the cache may have all of it.
            if error.__cause__ is not None and not _is_complete(address, cache):
                raise error.__cause__ from None
            files = []
        for file in sorted(files, key=lambda file: file.filename):
            if ".." in PurePosixPath(file.filename).parts:
                raise InputError(f"{address} has a file called '{one_line(file.filename, 80)}'.")
            # One by one: `fetch` continues a file where an earlier download broke off.
            if not file.is_cached:
                fetch(look_up(repo, file.filename, file.commit_hash, cache))
        commit = files[0].commit_hash if files else revision
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=commit,
                cache_dir=cache,
                allow_patterns=list(_RUN_FILES),
                local_files_only=True,
            )
        )


def _is_complete(address: Address, cache: Path) -> bool:
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            address.repo,
            revision=address.revision,
            cache_dir=cache,
            allow_patterns=list(_RUN_FILES),
            local_files_only=True,
        )
    except Exception:  # it is not there, or parts are missing
        return False
    log.warning("the hub cannot be asked for %s; taking it from the cache.", address)
    return is_folder(folder)


def _silent_bar() -> type:
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *given: object, **named: object) -> None:
            super().__init__(*given, **{**named, "disable": True})

    return Silent


@contextmanager
def _push_errors(repo: str, folder: Path | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises within the block into one sentence."""
    again = "" if folder is None else f"; {folder} is complete, hf upload {repo} {folder} sends it"
    with _hub_errors(f"cannot push to {repo}", again):
        yield


@contextmanager
def _open_errors(address: Address) -> Iterator[None]:
    with _hub_errors(f"cannot open {address}", ""):
        yield


@contextmanager
def _hub_errors(what: str, again: str) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub = constants.ENDPOINT
    try:
        yield
    except InputError:
        raise
    except HFValidationError as error:
        raise InputError(f"{what}: {brief(error)}; write OWNER/NAME.") from error
    except LocalTokenNotFoundError as error:
        raise InputError(
            f"{what}: there is no token for {hub}; log in with `hf auth login` or set "
            f"HF_TOKEN{again}."
        ) from error
    except GatedRepoError as error:
        raise InputError(
            f"{what}: the repository wants its terms accepted, on {hub}{again}."
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{what}: the repository has no such revision{again}.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        code = error.response.headers.get("X-Error-Code")
        # The hub answers so, with this code, to whoever must not know whether there is one.
        if isinstance(error, RepositoryNotFoundError) and (status != 401 or code == "RepoNotFound"):
            raise InputError(
                f"{what}: {hub} has no such repository, or it is private; check the name, or log in "
                f"with `hf auth login`{again}."
            ) from error
        if status in (401, 403):
            raise InputError(
                f"{what}: {hub} does not take the token ({status}); log in with `hf auth login` or set "
                f"HF_TOKEN to one with the right to write{again}."
                if "push" in what
                else f"{what}: {hub} does not take the token ({status}); log in with `hf auth login` "
                f"or set HF_TOKEN to one with the right to read{again}."
            ) from error
        raise InputError(f"{what}: {hub} answers {brief(error)}{again}.") from error
    except OfflineModeIsEnabled as error:
        lacking = "" if "push" in what else " and the cache does not have all of it"
        raise InputError(f"{what}: HF_HUB_OFFLINE is set{lacking}; unset it{again}.") from error
    except Exception as error:  # its HTTP client raises many kinds
        if "/xet-write-token/" in str(error):
            raise InputError(
                f"{what}: {hub} has no Xet storage; set HF_HUB_DISABLE_XET=1 and run again{again}."
            ) from error
        raise InputError(
            f"{what}: {hub} does not answer ({brief(error)}); check the connection and HF_ENDPOINT and "
            f"run again{again}."
        ) from error
