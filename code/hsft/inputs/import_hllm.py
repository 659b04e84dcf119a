"""Import one side of a pretrained HLLM checkpoint as a transformers model folder.

Transformers takes seconds to import; the functions that need it do so.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from hsft.config import Config
from hsft.data.cache import DTYPES
from hsft.hub import fetch as hub
from hsft.hub.convert import write_weights
from hsft.hub.layout import (
    CONFIG_FILE,
    Layout,
    Side,
    check_tensors,
    open_side,
    read_layout,
    refuse_no_checkpoint,
)
from hsft.hub.manifest import MANIFEST_FILE, read_manifest
from hsft.hub.options import ImportOptions
from hsft.utils.environment import versions
from hsft.utils.errors import InputError, Interrupted, brief
from hsft.utils.files import atomic_path, free_bytes, sha256
from hsft.utils.logs import set_up_logging
from hsft.utils.signals import StopSignals

log = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Room for configuration, tokenizer, index and manifest beside the weights.
_SMALL_FILES_BYTES = 16 * hub.MB


def import_checkpoint(options: ImportOptions) -> bool:
    """Import one side of a checkpoint; a finished import is left alone unless forced.

    The folder appears whole at the end or not at all. It holds safetensors, `config.json`, the
    tokenizer (item side), `hllm_extra.safetensors` and `import.json`, which says where all of it
    came from.

    Returns:
        True if the folder was written, False if it was left alone.

    Raises:
        InputError: the checkpoint or base model is missing, damaged or does not fit, the disk is
            too small, or `out` holds something that must not be replaced.
        Interrupted: SIGINT or SIGTERM came; nothing half-written is left.
    """
    set_up_logging()
    try:
        with StopSignals():
            return _import(options)
    except Interrupted as ending:
        raise Interrupted(
            f"{ending}; no model folder was written, and what was downloaded is kept: run again",
            ending.exit_code,
        ) from None


def import_pretrained(config: Config) -> Config:
    """Import the checkpoint of `load_pretrain` into a model folder beside it for each LLM.

    An LLM is imported where its folder is named, which has its config.json and tokenizer. Weights keep
    their number type. A folder that holds this checkpoint already is left as it is.

    Returns:
        The configuration with these folders as `user_pretrain_dir` and `item_pretrain_dir`, and
        without the keys that chose other weights.

    Raises:
        InputError: as `import_checkpoint`.
    """
    if config.load_pretrain is None:
        return config
    # Gigabytes, which both sides ask for.
    hash_once = cache(hub.hash_file)
    for side, base in _pretrained_sides(config):
        _import(_pretrained_options(config.load_pretrain, side, base, hash_once))
    return with_pretrained(config)


def check_pretrained(config: Config) -> None:
    """Check that the checkpoint of `load_pretrain` fits the LLMs, without reading its tensors.

    Raises:
        InputError: it is missing, no checkpoint of HLLM, or of other shapes.
    """
    if config.load_pretrain is None:
        return
    path = Path(config.load_pretrain)
    refuse_no_checkpoint(path)
    for side, base in _pretrained_sides(config):
        check_tensors(open_side(path, side), read_layout(base, side), path)


def with_pretrained(config: Config) -> Config:
    """Return what `import_pretrained` returns where it has been called, else the same configuration."""
    if config.load_pretrain is None:
        return config
    folders = {
        f"{side}_pretrain_dir": pretrained_folder(config.load_pretrain, side)
        for side, _ in _pretrained_sides(config)
    }
    if not all((folder / MANIFEST_FILE).is_file() for folder in folders.values()):
        return config
    changes = {name: str(folder) for name, folder in folders.items()}
    reset = {"load_pretrain": None, "user_llm_init": None, "item_llm_init": True}
    return config.model_copy(update={**changes, **reset})


def pretrained_folder(checkpoint: str, side: Side) -> Path:
    """Return the model folder of one LLM of a checkpoint that `load_pretrain` names."""
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}_{side.capitalize()}LLM")


def _pretrained_sides(config: Config) -> list[tuple[Side, Path]]:
    """Return the sides that a configuration reads, with the folders of config.json and tokenizer."""
    sides: list[tuple[Side, Path]] = []
    if config.user_pretrain_dir is not None:
        sides.append(("user", Path(config.user_pretrain_dir)))
    if config.item_pretrain_dir is not None:
        sides.append(("item", Path(config.item_pretrain_dir)))
    return sides


def _pretrained_options(
    checkpoint: str, side: Side, base: Path, hash_file: Callable[[Path], str]
) -> ImportOptions:
    """Return how one side of a checkpoint is imported: again where the file or the base changed."""
    path = Path(checkpoint)
    refuse_no_checkpoint(path)
    weights = open_side(path, side)
    kinds = {str(value.dtype).removeprefix("torch.") for value in weights.values()}
    options = ImportOptions(
        side=side,
        out=pretrained_folder(checkpoint, side).absolute(),
        from_file=path,
        sha256=None,
        repo="",
        file="",
        revision="",
        base_repo="",
        base_revision="",
        base_dir=base,
        cache=path.parent,
        dtype="float32" if "float32" in kinds else min(kinds & set(DTYPES), default="bfloat16"),
        shard_bytes=250 * hub.MB,
        force=False,
    )
    if not (options.out / MANIFEST_FILE).is_file():
        return options
    there = read_manifest(options.out)
    same = (
        there.get("dtype") == options.dtype
        and there.get("base") == {"path": str(base.resolve())}
        and there["source"].get("sha256") == hash_file(path)
    )
    return replace(options, force=not same)


def _import(options: ImportOptions) -> bool:
    if _is_done(options):
        return False
    if options.from_file is not None:
        refuse_no_checkpoint(options.from_file)
    base, base_source = _base_files(options)
    layout = read_layout(base[CONFIG_FILE].parent, options.side)
    remote = None
    with _other_way("", "give a local file with --from_file"):
        if options.from_file is None:
            remote = hub.look_up(options.repo, options.file, options.revision, options.cache)
        _check_disk(options, layout, remote)
        checkpoint, source = _checkpoint(options, remote)
    with atomic_path(options.out) as folder:
        folder.mkdir()
        _write_config(folder, base, layout, options)
        write_weights(folder, checkpoint, layout, DTYPES[options.dtype], options.shard_bytes)
        _write_manifest(folder, options, source, base_source)
    log.info("wrote %s: the %sLLM in %s.", options.out, options.side.capitalize(), options.dtype)
    if remote is not None:
        log.info(
            "the download (%s) stays in %s for the other LLM's import; `hf cache rm model/%s` "
            "frees it.",
            hub.size_text(checkpoint.stat().st_size),
            options.cache,
            options.repo,
        )
    return True


def _is_done(options: ImportOptions) -> bool:
    """Look at what `out` holds: False if it may be written, True if it is to be left alone."""
    out = options.out
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST_FILE).is_file():
        raise InputError(
            f"{out} exists and is no import of an HLLM checkpoint (it has no {MANIFEST_FILE}); "
            f"move it away or give another --out."
        )
    manifest = read_manifest(out)
    files = manifest["files"]
    if options.force:
        foreign = sorted({path.name for path in out.iterdir()} - {*files, MANIFEST_FILE})
        if foreign:
            raise InputError(
                f"{out} also holds {foreign[0]}, which the import did not write and --force would "
                f"delete; move it away first."
            )
        log.info("%s is replaced (--force).", out)
        return False
    damage = _find_damage(out, files)
    if damage is not None:
        raise InputError(f"{out} is a damaged import: {damage}; import it again with --force.")
    _refuse_other_request(options, manifest)
    log.info("%s is there, whole and of this source: left alone (--force imports again).", out)
    return True


def _find_damage(folder: Path, files: Mapping[str, Any]) -> str | None:
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        stated = entry if isinstance(entry, dict) else {}
        if path.stat().st_size != stated.get("bytes") or sha256(path) != stated.get("sha256"):
            return f"{name} has changed"
    return None


def _refuse_other_request(options: ImportOptions, manifest: Mapping[str, Any]) -> None:
    there = manifest["source"]
    pairs: list[tuple[str, Any, Any]] = [
        ("side", manifest.get("side"), options.side),
        ("dtype", manifest.get("dtype"), options.dtype),
        *((name, there.get(name), value) for name, value in _asked(options).items()),
    ]
    for name, has, asked in pairs:
        if has != asked:
            raise InputError(
                f"{options.out} holds another import: its {name} is {has}, you asked for {asked}; "
                f"give another --out, or --force to replace it."
            )


def _asked(options: ImportOptions) -> dict[str, str]:
    """Where the checkpoint comes from, as the manifest names it."""
    if options.from_file is not None:
        return {"path": str(options.from_file.resolve())}
    return {"repo": options.repo, "file": options.file, "revision": options.revision}


def _base_files(options: ImportOptions) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the base model's configuration and, for the item side, its tokenizer files."""
    tokenizer_files = TOKENIZER_FILES if options.side == "item" else ()
    if options.base_dir is not None:
        if not options.base_dir.is_dir():
            raise InputError(f"--base_dir {options.base_dir} is not a folder.")
        source = {"path": str(options.base_dir.resolve())}
        files = {CONFIG_FILE: options.base_dir / CONFIG_FILE}
        paths: dict[str, Path | None] = {name: options.base_dir / name for name in tokenizer_files}
    else:
        location = (options.base_repo, options.base_revision, options.cache)
        with _other_way(*_about_base(options)):
            config = hub.look_up(location[0], CONFIG_FILE, location[1], location[2])
            source = {"repo": options.base_repo, "revision": location[1], "commit": config.commit}
            files = {CONFIG_FILE: hub.fetch(config)[0]}
            paths = {
                name: hub.fetch_optional(location[0], name, *location[1:])
                for name in tokenizer_files
            }
    files |= {name: path for name, path in paths.items() if path is not None and path.is_file()}
    if tokenizer_files and not {"tokenizer.json", "tokenizer.model"} & files.keys():
        raise InputError(
            f"{options.base_dir or options.base_repo} has no tokenizer.json and no "
            f"tokenizer.model; name HLLM's base model."
        )
    return files, source


def _about_base(options: ImportOptions) -> tuple[str, str]:
    """Say what the base model is for, and what to do where it cannot be fetched."""
    lacks = "neither config.json nor tokenizer" if options.side == "item" else "no config.json"
    come = "which come" if options.side == "item" else "which comes"
    too = " (and the checkpoint with --from_file)" if options.from_file is None else ""
    return (
        f"HLLM's checkpoint has {lacks}, {come} from its base model: ",
        f"name a local folder of that model with --base_dir{too}; any other transformers folder "
        f"can be used as it is with --{options.side}_pretrain_dir",
    )


@contextmanager
def _other_way(before: str, remedy: str) -> Iterator[None]:
    """Add to the sentence about a hub that is out of reach what it was asked for, and another way."""
    try:
        yield
    except hub.OutOfReach as error:
        raise InputError(f"{before}{error.reason}, or {remedy}.") from error


def _check_disk(options: ImportOptions, layout: Layout, remote: hub.HubFile | None) -> None:
    """State what disk space is needed and refuse when there is too little."""
    output = layout.num_bytes(DTYPES[options.dtype]) + _SMALL_FILES_BYTES
    needs = [(options.out, output, f"the model folder {options.out}")]
    if remote is not None:
        what = f"the download to {remote.cache}"
        if not remote.missing_bytes:
            log.info("%s is in the cache; nothing of it is downloaded.", remote.where)
        needs.append((remote.cache, remote.missing_bytes, what))
    total = sum(size for _, size, _ in needs)
    parts = " + ".join(f"{hub.size_text(size)} for {what}" for _, size, what in needs if size)
    log.info("disk space needed: %s (%s).", hub.size_text(total), parts)
    disks: dict[int, list[tuple[Path, int]]] = {}
    for folder, size, _ in needs:
        disks.setdefault(_disk_of(folder), []).append((folder, size))
    for on_disk in disks.values():
        folder, needed = on_disk[0][0], sum(size for _, size in on_disk)
        free = free_bytes(folder)
        if needed > free:
            raise InputError(
                f"the disk of {folder} has {hub.size_text(free)} free, but "
                f"{hub.size_text(needed)} are needed ({parts}); free some space, or choose another "
                f"disk with --out or --cache_dir."
            )


def _disk_of(path: Path) -> int:
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev


def _checkpoint(options: ImportOptions, remote: hub.HubFile | None) -> tuple[Path, dict[str, Any]]:
    """Return the checkpoint, fetched and checked, and what the manifest says of it."""
    about: dict[str, Any] = dict(_asked(options))
    if remote is None:
        assert options.from_file is not None
        path, digest = options.from_file, hub.hash_file(options.from_file)
        verified = options.sha256 is not None
    else:
        path, digest = hub.fetch(remote)
        about["commit"] = remote.commit
        verified = remote.sha256 is not None or options.sha256 is not None
    if options.sha256 is not None and digest != options.sha256:
        raise InputError(
            f"{path} has the SHA-256 {digest}, but --sha256 says {options.sha256}; fetch it again."
        )
    log.info(
        "%s: SHA-256 %s, %s.", path, digest, "as stated" if verified else "with nothing to compare"
    )
    return path, about | {
        "bytes": path.stat().st_size,
        "sha256": digest,
        "sha256_was_stated": verified,
    }


def _write_config(
    folder: Path, base: Mapping[str, Path], layout: Layout, options: ImportOptions
) -> None:
    layout.config.dtype = DTYPES[options.dtype]
    layout.config.save_pretrained(folder)
    for name, path in base.items():
        if name != CONFIG_FILE:
            shutil.copyfile(path, folder / name)
    if layout.side == "user":
        return
    from transformers import AutoTokenizer

    where = options.base_dir or options.base_repo
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # transformers raises many kinds for damaged tokenizers
        raise InputError(
            f"the tokenizer of {where} cannot be loaded: {brief(error)}; name HLLM's base model."
        ) from error
    if len(tokenizer) > layout.config.vocab_size:
        raise InputError(
            f"the tokenizer of {where} has {len(tokenizer)} tokens, its config.json says "
            f"{layout.config.vocab_size}; name HLLM's base model."
        )


def _write_manifest(
    folder: Path, options: ImportOptions, source: dict[str, Any], base: dict[str, str]
) -> None:
    """Record where the import came from and the SHA-256 of every file written."""
    manifest = {
        "side": options.side,
        "dtype": options.dtype,
        "source": source,
        "base": base,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(folder.iterdir())
        },
        "versions": versions() | {"huggingface_hub": importlib.metadata.version("huggingface_hub")},
    }
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")
