"""The refusals that need no more than the configuration and a look at the disk.

They come before torch is imported, so that a mistyped name is answered at once. `run/check.py` finds the
same and more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hsft.config import Config
from hsft.data.files import (
    cache_path,
    dataset_file,
    find_cache,
    has_cache_path,
    information_file,
    item_llm_folder,
    user_llm_folder,
)
from hsft.utils.errors import InputError


def missing_for_run(config: Config) -> list[str]:
    """Return a sentence for each file or folder that a run reads and that is missing."""
    finds: list[Callable[[], Path]] = [lambda: dataset_file(config.data_path, config.dataset)]
    if config.item_data is not None:
        finds.append(lambda: dataset_file(config.data_path, config.item_data, "item_data"))
    if config.has_user_llm:
        finds.append(lambda: user_llm_folder(config))
    if config.trains_items or (config.reads_embeddings and not config.use_item_cache):
        finds += _encoding(config)
    if config.reads_embeddings and config.use_item_cache and has_cache_path(config):
        finds.append(lambda: find_cache(cache_path(config)))
    return _problems(finds)


def missing_for_caching(config: Config) -> list[str]:
    """Return a sentence for each file or folder that item caching reads and that is missing."""
    return _problems(_encoding(config))


def _encoding(config: Config) -> list[Callable[[], Path]]:
    return [
        lambda: information_file(config.text_path, config.dataset),
        lambda: item_llm_folder(config),
    ]


def _problems(finds: Sequence[Callable[[], Path]]) -> list[str]:
    problems = []
    for find in finds:
        try:
            find()
        except InputError as error:
            problems.append(str(error))
    return problems
