"""Where the files of a run are, and what is said where one is missing; without numpy or torch."""

from __future__ import annotations

from pathlib import Path

from hsft.config.schema import Config
from hsft.utils.errors import InputError
from hsft.utils.files import is_file, is_folder, require_file

# Endings of tables, the usual one first.
_TABLES = (".csv", ".parquet")


def _table_file(folder: Path, name: str) -> Path:
    """Return the path of a table: CSV, or parquet where there is that.

    Raises:
        InputError: there are both.
    """
    paths = [folder / f"{name}{ending}" for ending in _TABLES]
    found = [path for path in paths if is_file(path)]
    if len(found) > 1:
        raise InputError(
            f"{found[0]} and {found[1]} are both there; remove the one that is not meant."
        )
    return found[0] if found else paths[0]


def dataset_file(data_path: str, dataset: str | None, key: str = "dataset") -> Path:
    """Return the path of a dataset's interaction file.

    Args:
        data_path: its folder.
        dataset: its name.
        key: the configuration key that names it, for the error.

    Raises:
        InputError: no dataset is named or there is no such file; existing ones are listed.
    """
    dataset = _named(dataset)
    folder = Path(data_path)
    path = _table_file(folder, dataset)
    if is_file(path):
        return path
    known: list[str] = []
    if is_folder(folder):
        known = sorted({file.stem for ending in _TABLES for file in folder.glob(f"*{ending}")})
    hint = f"there is no folder {folder.absolute()}"
    if is_folder(folder):
        hint = f"{folder.absolute()} holds no CSV file"
    if known:
        hint = f"datasets found there: {', '.join(known[:8])}"
    raise InputError(
        f"unknown {key} '{dataset}': {path} does not exist ({hint}); "
        f"put the interactions there or change --{key} or --data_path."
    )


def _named(dataset: str | None) -> str:
    if not dataset:
        raise InputError("no dataset is named; give --dataset NAME, for example Pixel200K.")
    return dataset


def information_file(text_path: str, dataset: str | None) -> Path:
    """Return the item information file: `text_path` itself, or `<text_path>/<dataset>.csv`.

    Raises:
        InputError: there is no such file, nor a parquet file in its place, or there are both.
    """
    path = Path(text_path)
    if is_file(path):
        return path
    path = _table_file(path, _named(dataset))
    if not is_file(path):
        raise InputError(
            f"{path} does not exist; put the item information there or change --text_path."
        )
    return path


def default_cache_path(data_path: str, dataset: str | None) -> Path:
    """Return `<data_path>/<dataset in lower case>_item_embeddings.safetensors`."""
    return Path(data_path) / f"{_named(dataset).lower()}_item_embeddings.safetensors"


def cache_path(config: Config) -> Path:
    """Return where the item cache is: `item_cache_path`, or the dataset's default file."""
    if config.item_cache_path:
        return Path(config.item_cache_path)
    return default_cache_path(config.data_path, config.dataset)


def find_cache(path: str | Path) -> Path:
    """Return the cache file to read for `path`.

    A `.pt` path that does not exist stands for the native file beside it, so that commands
    written for the published HSFT's `.pt` caches find what item_caching.py wrote.

    Raises:
        InputError: neither is there.
    """
    path = Path(path)
    if is_file(path):
        return path
    native = path.with_suffix(".safetensors") if path.name else path
    if path.suffix == ".pt" and is_file(native):
        return native
    also = f" (nor {native})" if path.suffix == ".pt" else ""
    return require_file(
        path,
        f"item cache {path}{also}",
        "make it with python item_caching.py, the same --config_file and --dataset, and "
        "--item_pretrain_dir FOLDER, or change --item_cache_path",
    )


def require_model_folder(folder: Path) -> Path:
    """Return a folder, after refusing one that is no model folder.

    Raises:
        InputError: there is no such folder, or it has no config.json.
    """
    if not is_folder(folder):
        raise InputError(
            f"model folder {folder} does not exist; fetch it with download_itemllm.py or "
            f"download_userllm.py, or name another folder."
        )
    if not is_file(folder / "config.json"):
        raise InputError(f"model folder {folder} has no config.json; name a transformers folder.")
    return folder


def user_llm_folder(config: Config) -> Path:
    """Return the UserLLM's folder.

    Raises:
        InputError: none is named, or it is no model folder.
    """
    if not config.user_pretrain_dir:
        raise InputError(
            "no UserLLM is named; give --user_pretrain_dir FOLDER (download_userllm.py makes one)."
        )
    return require_model_folder(Path(config.user_pretrain_dir))


def item_llm_folder(config: Config) -> Path:
    """Return the folder of what encodes items: `encoder`, else `item_pretrain_dir`.

    Raises:
        InputError: none is named, or it is no model folder.
    """
    if config.encoder is not None:
        # Its parts may lie in folders inside; `sentence_encoder.py` reads them.
        if not is_folder(config.encoder):
            require_model_folder(Path(config.encoder))
        return Path(config.encoder)
    if not config.item_pretrain_dir:
        raise InputError(
            "no ItemLLM is named; give --item_pretrain_dir FOLDER (download_itemllm.py makes one), or "
            "--encoder FOLDER for a sentence encoder."
        )
    return require_model_folder(Path(config.item_pretrain_dir))


def interaction_file(config: Config) -> Path:
    """Return the path of the interaction file, whether or not it is there."""
    return _table_file(Path(config.data_path), str(config.dataset))


def has_interactions(config: Config) -> bool:
    """Say whether the interaction file is there."""
    return bool(config.dataset) and is_file(interaction_file(config))


def has_cache_path(config: Config) -> bool:
    """Say whether the path of the item cache is worth looking at.

    The default cache of a dataset that is not there would only be a second problem.
    """
    return config.item_cache_path is not None or has_interactions(config)
