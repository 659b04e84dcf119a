"""Add items that a finished run's data does not have: their texts are encoded as its item cache was."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hsft.config import Config
from hsft.data.cache import DTYPES, ItemCache
from hsft.data.item_text import ItemTexts, read_item_texts, read_item_titles, select_items
from hsft.encoding.item_llm import ItemEncoder, model_fingerprint
from hsft.encoding.item_tower import ItemTower
from hsft.encoding.tokens import tokenize_in_memory
from hsft.finished.open_run import OpenRun
from hsft.inputs.cache_items import encode_texts, encoding_job, load_text_encoder
from hsft.inputs.load_tower import load_item_tower
from hsft.model.backbone import load_model_config
from hsft.trainer.checkpoint import BEST_DIR
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import is_folder

# This program has no --text_keys: those of the item cache rule.
_REMEDIES = ("check --add_items", "change the file")

log = logging.getLogger(__name__)


class NewItemEncoder:
    """The ItemLLM that encodes new items as a run's item cache was made; loaded once, when needed.

    Args:
        run: an open run whose model reads item embeddings.

    Raises:
        InputError: the run's model cannot score new items.
    """

    def __init__(self, run: OpenRun) -> None:
        run.refuse_new_items()
        self._run = run
        self._encoder: ItemEncoder | None = None
        self._tower: ItemTower | None = None

    @property
    def _cache(self) -> ItemCache:
        cache = self._run.data.cache
        assert cache is not None
        return cache

    @cached_property
    def config(self) -> Config:
        """The run's configuration with the settings and the ItemLLM of its item cache.

        Raises:
            InputError: the cache's metadata are unreadable.
        """
        return _with_model(encoding_config(self._run.config, self._cache), self._cache)

    def encode(self, texts: ItemTexts) -> ItemCache:
        """Encode texts.

        Raises:
            InputError: there is no ItemLLM, or another than the one that made the cache.
        """
        if self._encoder is None and self._tower is None:
            _refuse_other_model(self.config, self._cache)
        if self.config.trains_items:
            return self._encode_trained(texts)
        if self._encoder is None:
            self._encoder = load_text_encoder(self.config)
        return encode_texts(self.config, texts, self._encoder)

    def _encode_trained(self, texts: ItemTexts) -> ItemCache:
        """Encode texts with the ItemLLM that the run trained."""
        run, config = self._run, self.config
        if self._tower is None:
            device, autocast = run.fabric.device, run.fabric.autocast
            tower, _ = load_item_tower(config, texts, device, autocast)
            tower.load(run.folder / BEST_DIR)
            self._tower = tower
        tower = self._tower
        log.info("encoding %d items with the ItemLLM that %s trained.", len(texts), run.folder)
        tokens = tokenize_in_memory(tower.encoder.tokenize, texts.texts)
        job = encoding_job(config, tower.encoder, texts.fingerprint)
        return tower.encode(tokens, job, texts.item_ids, config.show_progress)


def add_items(run: OpenRun, path: str | Path, encoder: NewItemEncoder | None = None) -> OpenRun:
    """Encode the items of an information CSV and return the run with them in its catalogue.

    Args:
        run: an open run whose model reads item embeddings.
        path: CSV with `item_id` and the `text_keys` that the item cache was made with.
        encoder: of the run, or of the run that items were added to; None loads the ItemLLM.

    Raises:
        InputError: the run's model cannot score new items; the file is bad or names an item of the
            catalogue; there is no ItemLLM, or another than the one that made the cache. Where the
            run names none, the folder that the cache was made from is used, if it has not changed.
    """
    encoder = encoder or NewItemEncoder(run)
    cache, config = run.data.cache, encoder.config
    assert cache is not None
    texts = read_item_texts(
        path, config.text_keys, config.item_prompt, config.text_format, _REMEDIES
    )
    run.refuse_known(texts.item_ids)
    titles = read_item_titles(path, config.text_keys[0])
    new = encoder.encode(texts)
    pooling = cache.metadata.get("pooling", new.metadata["pooling"])
    if new.metadata["pooling"] != pooling:
        raise InputError(
            f"the item cache {_name(cache)} was made with {pooling} pooling, which the ItemLLM in "
            f"{config.item_pretrain_dir} cannot do; name the ItemLLM that made it with "
            f"--item_pretrain_dir."
        )
    return run.with_items(new, titles)


def encode_as_trained(run: OpenRun, path: str | Path, item_ids: Sequence[str]) -> ItemCache:
    """Encode items of an information file with the ItemLLM that a run trained.

    Args:
        run: an open run with `train_item_llm`.
        path: CSV with `item_id` and the `text_keys` of the run's item cache.
        item_ids: the items; those without a row have no text.

    Raises:
        InputError: the file is bad, or the ItemLLM is missing or is not the run's.
    """
    encoder = NewItemEncoder(run)
    config = encoder.config
    texts = read_item_texts(path, config.text_keys, config.item_prompt, config.text_format)
    return encoder.encode(select_items(texts, item_ids))


def encoding_config(config: Config, cache: ItemCache) -> Config:
    """Return the configuration with the settings that an item cache says it was made with.

    Raises:
        InputError: what the cache says is not a setting.
    """
    stated = cache.metadata
    given: dict[str, Any] = {
        "item_cache_dtype": next(
            name for name, dtype in DTYPES.items() if dtype == cache.embeddings.dtype
        )
    }
    try:
        if "text_keys" in stated:
            given["text_keys"] = json.loads(stated["text_keys"])
        if "prompt" in stated:
            given["item_prompt"] = stated["prompt"]
            # Caches of before there were text formats have plain texts.
            given["text_format"] = stated.get("text_format", "plain")
        if "max_text_length" in stated:
            given["MAX_TEXT_LENGTH"] = int(stated["max_text_length"])
        if "pooling" in stated:
            given["item_emb_token_n"] = int(stated["pooling"] == "emb_token")
        if config.encoder is not None:
            given |= {"item_pretrain_dir": config.encoder, "encoder": None}
        return Config.model_validate({**config.model_dump(), **given})
    except (ValueError, RecursionError, ValidationError) as error:
        raise InputError(
            f"the item cache {_name(cache)} has unreadable metadata; make it again with "
            f"item_caching.py."
        ) from error


def _with_model(config: Config, cache: ItemCache) -> Config:
    """Name the folder that the cache was made from, where none is named and it is still that one."""
    folder = cache.metadata.get("model_folder", "")
    if config.item_pretrain_dir or not folder or not is_folder(folder):
        return config
    if model_fingerprint(folder) != _made_by(cache):
        return config
    log.info("encoding with %s, which made the item cache.", one_line(folder, 200))
    return config.model_copy(update={"item_pretrain_dir": folder})


def _refuse_other_model(config: Config, cache: ItemCache) -> None:
    folder = config.item_pretrain_dir
    if not folder:
        raise InputError(
            "no ItemLLM is named to encode the new items; give --item_pretrain_dir FOLDER, the one "
            "that made the item cache."
        )
    load_model_config(folder, config.trust_remote_code)
    made_by = _made_by(cache)
    if not made_by:
        log.warning(
            "the item cache %s does not say which ItemLLM made it; the scores of new items mean "
            "something only if it was %s, with this configuration's settings.",
            _name(cache),
            folder,
        )
    elif model_fingerprint(folder, config.random_item_seed) != made_by:
        raise InputError(
            f"the ItemLLM in {folder} is not the one that made the item cache {_name(cache)} "
            f"({cache.metadata.get('model', 'unnamed')}), so their embeddings cannot be compared; "
            f"name that one with --item_pretrain_dir."
        )


def _made_by(cache: ItemCache) -> str | None:
    """Return the fingerprint of the ItemLLM's folder, which a run may have trained further."""
    stated = cache.metadata
    return stated.get("base_model_fingerprint", stated.get("model_fingerprint"))


def _name(cache: ItemCache) -> str:
    return str(cache.path or "made now")
