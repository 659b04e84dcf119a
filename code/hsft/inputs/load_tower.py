"""Load the ItemLLM that a run trains, with the tokens of its catalogue."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hsft.config import Config
from hsft.data.cache import ItemCache
from hsft.data.files import information_file, interaction_file, item_llm_folder
from hsft.data.item_text import ItemTexts, read_item_texts, select_items, unfit_texts
from hsft.encoding.build_cache import EncodingJob, log_empty
from hsft.encoding.item_llm import model_fingerprint
from hsft.encoding.item_tower import Autocast, ItemTower, freeze
from hsft.encoding.tokens import tokenize_in_memory
from hsft.inputs.cache_items import encoding_job, load_encoder, with_encoder
from hsft.model.backbone import LoraSettings, computes_in_bfloat16, enable_checkpointing
from hsft.model.parameter_names import freeze_prefixed
from hsft.model.weights import ITEM_LLM
from hsft.trainer.fabric import choose_precision, compute_dtype
from hsft.utils.errors import InputError, refuse

log = logging.getLogger(__name__)


def item_lora_settings(config: Config) -> LoraSettings:
    """Return the LoRA and quantisation settings of the ItemLLM."""
    return LoraSettings(
        rank=config.item_lora_r,
        alpha=config.item_lora_alpha,
        dropout=config.item_lora_dropout,
        target_modules=tuple(config.item_lora_target_modules),
        quant_type=config.item_quant_type,
        compute_dtype=compute_dtype(config),
        part="ItemLLM",
    )


def read_catalogue(config: Config, item_ids: Sequence[str] | np.ndarray) -> tuple[ItemTexts, str]:
    """Read the texts of a run's items.

    Args:
        config: the configuration.
        item_ids: of items 1..I.

    Returns:
        Their texts in this order, without text where the file has none, and the file's path.

    Raises:
        InputError: the file is bad, or no item has text.
    """
    config = with_encoder(config)
    path = information_file(config.text_path, config.dataset)
    items = read_item_texts(path, config.text_keys, config.item_prompt, config.text_format)
    refuse(unfit_texts(items, path, config.text_keys, item_ids, interaction_file(config)))
    return select_items(items, item_ids), str(path)


def load_item_tower(
    config: Config,
    texts: ItemTexts,
    device: torch.device,
    autocast: Autocast = nullcontext,
    *,
    information: str = "",
    plain: bool = False,
) -> tuple[ItemTower, EncodingJob]:
    """Load the configuration's ItemLLM with the parts that `train_item_llm` trains.

    Args:
        config: the configuration.
        texts: of items 1..I.
        device: where it runs.
        autocast: makes the context of the run's precision.
        information: where the texts were read.
        plain: load quantised weights as plain ones of the same values, to merge LoRA into.

    Raises:
        InputError: the model folder is unusable, or LoRA or `item_freeze_layers` do not fit it.
    """
    # Compiled for encoding alone.
    config = with_encoder(config).model_copy(update={"item_compile": False})
    lora = item_lora_settings(config) if config.trains_item_lora else None
    if lora is not None:
        lora = replace(lora, plain=plain)
    # As in `build_user_llm`: what is trained whole stays in float32 under mixed precision.
    whole = lora is None and choose_precision(config) != "bf16-true"
    dtype = torch.float32 if whole else compute_dtype(config)
    encoder = load_encoder(config, str(item_llm_folder(config)), device, dtype, lora)
    model: Any = encoder.model
    pooler = getattr(model, "pooler", None)
    if pooler is not None:
        # BERT's own, which no pooling here reads.
        pooler.requires_grad_(False)
    freeze(model, config.item_freeze_layers, config.item_freeze_embeddings)
    if config.item_gradient_checkpointing:
        enable_checkpointing(model)
    log_empty(texts.texts, encoder)
    tower = ItemTower(
        encoder,
        tokenize_in_memory(encoder.tokenize, texts.texts),
        autocast=nullcontext if computes_in_bfloat16(model) else autocast,
        chunk_tokens=config.item_chunk_tokens,
        train_emb_token=config.item_freeze_layers == 0,
    )
    freeze_prefixed(tower, config, ITEM_LLM)
    if not any(weight.requires_grad for weight in tower.parameters()):
        raise InputError(
            "freeze_prefix keeps all of the ItemLLM as it is; use train_item_llm: none, which reads its "
            "vectors from the item cache."
        )
    job = encoding_job(config, encoder, texts.fingerprint, information)
    return tower.to(device), job


def refuse_other_item_llm(config: Config, cache: ItemCache, dim: int | None = None) -> None:
    """Refuse to train an ItemLLM from a cache that another one made.

    Args:
        config: the configuration.
        cache: what the run starts from.
        dim: dimension of the ItemLLM's vectors, None where it is not loaded.

    Raises:
        InputError: the cache is of another ItemLLM.
    """
    folder = item_llm_folder(config)
    made_by = cache.metadata.get("model_fingerprint")
    mark = model_fingerprint(folder, config.random_item_seed)
    if dim not in (None, cache.dim) or made_by not in (None, mark):
        raise InputError(
            f"the item cache {cache.path or 'made now'} was not made by the ItemLLM in {folder}, "
            f"which is to be trained; make it again with item_caching.py, or name the ItemLLM that made "
            f"it."
        )
    if made_by is None:
        log.warning(
            "the item cache %s does not say which ItemLLM made it; the untrained row means something "
            "only if it was %s.",
            cache.path,
            folder,
        )
