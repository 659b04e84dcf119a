"""Encode a dataset's items through the ItemLLM, to a cache file or in memory."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from REC.config import Config
from REC.data.build_cache import EncodingJob, encode_items
from REC.data.cache import ItemCache, default_cache_path, save_cache
from REC.data.interactions import read_interactions
from REC.data.item_text import ItemTexts, information_file, read_item_texts, with_items
from REC.hub.manifest import origin
from REC.model.backbone import choose_attention
from REC.model.item_llm import ItemEncoder, load_item_encoder
from REC.trainer.fabric import choose_device, compute_dtype
from REC.utils.errors import InputError
from REC.utils.files import remove

log = logging.getLogger(__name__)


def cache_path(config: Config) -> Path:
    """Return where the item cache is: `item_cache_path`, or the dataset's default file."""
    if config.item_cache_path:
        return Path(config.item_cache_path)
    return default_cache_path(config.data_path, config.dataset)


def write_item_cache(config: Config) -> Path:
    """Encode every item and write the cache file; an interrupted run is continued.

    A `.pt` path in `item_cache_path` stands for the native file beside it, since pickles are not
    written; `open_cache` finds it under either name.

    Returns:
        The file written.

    Raises:
        InputError: a file or model folder is missing or unusable.
    """
    target = cache_path(config).with_suffix(".safetensors")
    items = _catalogue(config)
    encoder, job = _encoder(config, items)
    parts = target.with_name(f"{target.name}.parts")
    embeddings = encode_items(
        encoder, items, job, parts_dir=parts, show_progress=config.show_progress
    )
    save_cache(target, items.item_ids, embeddings, job.metadata())
    remove(parts)
    log.info(
        "wrote %s: %d items of %d dimensions in %s.",
        target,
        len(items),
        embeddings.shape[1],
        job.dtype,
    )
    return target


def encode_in_memory(config: Config) -> ItemCache:
    """Encode every item now, through the code that writes cache files (`use_item_cache: False`)."""
    items = _catalogue(config)
    encoder, job = _encoder(config, items)
    embeddings = encode_items(encoder, items, job, show_progress=config.show_progress)
    return ItemCache(items.item_ids, embeddings, job.metadata())


def _catalogue(config: Config) -> ItemTexts:
    """Read the item texts, and add items that only the interactions name, without text."""
    path = information_file(config.text_path, config.dataset)
    items = read_item_texts(path, config.text_keys, config.item_prompt)
    interactions = Path(config.data_path) / f"{config.dataset}.csv"
    if not config.dataset or not interactions.is_file():
        return items
    return with_items(items, read_interactions(interactions).item_ids[1:])


def _encoder(config: Config, items: ItemTexts) -> tuple[ItemEncoder, EncodingJob]:
    if not config.item_pretrain_dir:
        raise InputError(
            "no ItemLLM is named; give --item_pretrain_dir FOLDER (download_itemllm.py makes one)."
        )
    device = torch.device(choose_device(config))
    dtype = compute_dtype(config)
    attention = choose_attention(
        config.attn_implementation,
        config.use_ft_flash_attn,
        device,
        half=dtype in (torch.bfloat16, torch.float16),
    )
    encoder = load_item_encoder(
        config.item_pretrain_dir,
        item_emb_token_n=config.item_emb_token_n,
        max_text_length=config.MAX_TEXT_LENGTH,
        device=device,
        dtype=dtype,
        attention=attention,
        trust_remote_code=config.trust_remote_code,
    )
    if config.item_compile:
        encoder.compile()
    imported = origin(config.item_pretrain_dir)
    job = EncodingJob(
        model=Path(config.item_pretrain_dir).name,
        text_keys=tuple(config.text_keys),
        prompt=config.item_prompt,
        max_text_length=config.MAX_TEXT_LENGTH,
        dtype=config.item_cache_dtype,
        pooling=encoder.pooling,
        fingerprint=items.fingerprint,
        batch_tokens=config.item_batch_tokens,
        compute_dtype=str(dtype).removeprefix("torch."),
        source=imported["source"]["sha256"] if imported else "",
    )
    log.info(
        "encoding %d items with %s on %s in %s, %s pooling.",
        len(items),
        config.item_pretrain_dir,
        device,
        job.compute_dtype,
        job.pooling,
    )
    return encoder, job
