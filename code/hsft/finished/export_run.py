"""Export a run as a whole: a folder that every program takes for the run, on any machine."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from hsft.config import Config
from hsft.config.help import dump_config
from hsft.data.cache import open_cache, save_cache
from hsft.data.files import cache_path, dataset_file, default_cache_path, information_file
from hsft.finished.export import (
    portable_config,
    refuse_full_disk,
    refuse_out,
    result_table,
    whole_or_nothing,
    write_json_file,
)
from hsft.hub.manifest import EXPORT_FILE, RUN_FORMAT
from hsft.hub.repository import run_name
from hsft.report.result import RANKS_FILE, RESULT_FILE, read_ranks, read_result
from hsft.report.run_card import ExportedRun, run_card
from hsft.run.run_dir import CONFIG_FILE
from hsft.run.saved_model import DATA_DIR, INFORMATION_DIR, run_config
from hsft.trainer.checkpoint import BEST_DIR
from hsft.utils.environment import versions
from hsft.utils.errors import InputError
from hsft.utils.files import atomic_path, is_folder, read_json

log = logging.getLogger(__name__)

# Keys that name models, which stay where they are.
_MODEL_KEYS = ("user_pretrain_dir", "item_pretrain_dir", "encoder")
_WEIGHTS = (".json", ".safetensors")


@dataclass(frozen=True)
class RunOptions:
    """What to export.

    Attributes:
        run: the run's folder.
        out: the folder to write.
        with_data: include interactions, item information and item cache.
        overwrite: replace an earlier export at `out`.
        overrides: keys of the run's configuration with other values, for what has moved.
    """

    run: Path
    out: Path
    with_data: bool = True
    overwrite: bool = False
    overrides: Mapping[str, Any] | None = None


def export_run(options: RunOptions) -> Path:
    """Copy what the programs read of a finished run, with its data, into one folder.

    The folder appears whole at the end or not at all. It holds `result.json`, `ranks.safetensors`,
    `config.yaml`, `best/` where the run trained, the card `README.md` and `export.json`; with data also
    the interactions and the item cache in `dataset/` and the item information in `information/`. Paths
    of this machine are cut to their last part. The weights of the UserLLM and ItemLLM that the run
    started from are left out: they are somebody else's, and large.

    Returns:
        The folder.

    Raises:
        InputError: the run is not finished or is an ensemble, a file is missing or damaged, the disk
            is too small, or `out` must not be replaced.
        Interrupted: SIGINT or SIGTERM came; nothing half-written is left.
    """
    with whole_or_nothing():
        return _export(options)


def _export(options: RunOptions) -> Path:
    refuse_out(options.out, options.overwrite)
    result = read_result(options.run)
    config = run_config(options.run, options.overrides)
    if config.model == "ensemble":
        raise InputError(
            f"{options.run} is an ensemble, which is nothing without the folders of its runs; export "
            f"these."
        )
    for row in result["rows"]:
        read_ranks(options.run, row["name"])
    copied = {options.run / RANKS_FILE: RANKS_FILE}
    copied |= {path: str(path.relative_to(options.run)) for path in _weights(options.run)}
    if options.with_data:
        copied |= _data_files(config)
    cache = cache_path(config) if options.with_data and _reads_cache(config) else None
    sizes = [path.stat().st_size for path in copied]
    if cache is not None:
        embeddings = open_cache(cache)
        sizes.append(embeddings.embeddings.nbytes)
    refuse_full_disk(options.out, sum(sizes))
    with atomic_path(options.out) as folder:
        for source, name in copied.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".json":
                write_json_file(target, _without_paths(read_json(source)))
            else:
                shutil.copyfile(source, target)
        if cache is not None:
            save_cache(
                default_cache_path(str(folder / DATA_DIR), config.dataset),
                embeddings.item_ids,
                embeddings.embeddings,
                _without_paths(embeddings.metadata),
            )
        _write_about(options, folder, config, result)
    log.info("wrote %s, %.1f MB.", options.out, sum(sizes) / 1e6)
    return options.out


def _reads_cache(config: Config) -> bool:
    # A trained ItemLLM's is in `best/`.
    return config.reads_embeddings and config.use_item_cache and not config.trains_items


def _weights(run: Path) -> Iterator[Path]:
    for path in sorted((run / BEST_DIR).rglob("*")):
        if path.suffix in _WEIGHTS and path.is_file():
            yield path


def _data_files(config: Config) -> dict[Path, str]:
    """Return path -> name in the export, of the interactions and, if there is one, the information."""
    names = [config.dataset, *([config.item_data] if config.item_data else [])]
    paths = [(name, dataset_file(config.data_path, name)) for name in names]
    files = {path: f"{DATA_DIR}/{name}{path.suffix}" for name, path in paths}
    try:
        information = information_file(config.text_path, config.dataset)
    except InputError:
        log.warning("there is no item information; the export has no titles of items.")
        return files
    return {**files, information: f"{INFORMATION_DIR}/{config.dataset}{information.suffix}"}


def _write_about(
    options: RunOptions, folder: Path, config: Config, result: Mapping[str, Any]
) -> None:
    name = run_name(options.run)
    models = {key: _without_paths(getattr(config, key)) for key in _MODEL_KEYS}
    portable = portable_config(config).model_copy(update={**models, "trust_remote_code": False})
    (folder / CONFIG_FILE).write_text(dump_config(portable), encoding="utf-8")
    write_json_file(folder / RESULT_FILE, _without_paths(result))
    user_llm = None
    if config.has_user_llm and config.user_pretrain_dir:
        user_llm = {
            "folder": Path(config.user_pretrain_dir).name,
            "repo": _source_repo(result),
            "fingerprint": result.get("user_llm_fingerprint"),
        }
    has_best = is_folder(folder / BEST_DIR)
    # Of the copy, which names no path of this machine.
    table = result_table(folder)
    card = ExportedRun(name, config, result, table, options.with_data, has_best, user_llm)
    (folder / "README.md").write_text(run_card(card), encoding="utf-8")
    manifest = {
        "format": RUN_FORMAT,
        "run": name,
        "dataset": config.dataset,
        "model": config.model,
        "with_data": options.with_data,
        "user_llm": user_llm,
        "versions": versions(),
    }
    write_json_file(folder / EXPORT_FILE, manifest)


def _source_repo(result: Mapping[str, Any]) -> str | None:
    """Return the hub's name of the checkpoint that the UserLLM was imported from, where known."""
    known = result.get("user_llm")
    source = known.get("source") if isinstance(known, dict) else None
    repo = source.get("repo") if isinstance(source, dict) else None
    return repo if isinstance(repo, str) else None


def _without_paths(value: Any) -> Any:
    """Return plain data with the last part of each absolute path in its place."""
    if isinstance(value, dict):
        return {key: _without_paths(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_paths(entry) for entry in value]
    if isinstance(value, str) and (Path(value).is_absolute() or PureWindowsPath(value).drive):
        # A Windows path takes both kinds of slashes apart.
        return PureWindowsPath(value).name
    return value
