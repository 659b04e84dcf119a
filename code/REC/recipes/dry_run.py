"""`--dry_run True`: what a fine-tuning run would need of a GPU, from shapes alone."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from REC.config import Config
from REC.data.cache import DTYPES, read_header
from REC.model.backbone import decoder_config
from REC.model.item_table import refuse_other_dim
from REC.recipes.cache_items import cache_path
from REC.recipes.setup import packed_row_length
from REC.report.memory import (
    GIB,
    MIB,
    TrainingShape,
    estimate,
    largest_batch,
    meta_decoder,
    rows,
    saved_bytes_per_token,
)
from REC.utils.errors import InputError

CARDS_GB = (8, 10, 12, 16, 24)
_DTYPES = {"16-mixed": torch.float16, "32-true": torch.float32}


def dry_run(config: Config) -> None:
    """Print the estimate for a configuration, as a run on one CUDA card would need it.

    Raises:
        InputError: the model folder or the item cache is missing or does not fit.
    """
    shape = training_shape(config)
    sys.stdout.write(describe(config, shape))


def training_shape(config: Config) -> TrainingShape:
    """Read what memory depends on from `config.json` and the item cache's header.

    Wherever this runs, `precision: auto` is taken as bf16-mixed, `optimizer: auto` as on CUDA and
    attention as sdpa, which needs more memory than flash-attn.
    """
    if config.model != "HLLM" or config.val_only:
        raise InputError(
            "dry_run estimates fine-tuning of the UserLLM; set model: HLLM, not val_only."
        )
    if not config.user_pretrain_dir:
        raise InputError("no UserLLM is named; give --user_pretrain_dir FOLDER.")
    model_config = decoder_config(
        config.user_pretrain_dir,
        config.user_llm_layers,
        trust_remote_code=config.trust_remote_code,
    )
    path = cache_path(config)
    items, dim, item_dtype = read_header(path)
    refuse_other_dim(path, dim, model_config.hidden_size, config.user_pretrain_dir)
    transformed = config.item_embedding_transform != "none"
    precision = "bf16-mixed" if config.precision == "auto" else config.precision
    return TrainingShape(
        model_config=model_config,
        quant_type=config.qlora_quant_type,
        double_quant=config.qlora_double_quant,
        lora_rank=config.qlora_r if config.use_qlora else None,
        lora_targets=tuple(config.qlora_target_modules),
        mixed=precision.endswith("mixed"),
        dtype=_DTYPES.get(precision, torch.bfloat16),
        optimizer_8bit=config.optimizer.endswith("8bit")
        or (config.optimizer == "auto" and config.use_qlora),
        checkpointing=config.gradient_checkpointing,
        items=items,
        item_bytes=4 if transformed else DTYPES[item_dtype].itemsize,
        adapter=config.item_adapter,
        adapter_rank=config.item_adapter_rank,
        length=config.MAX_ITEM_LIST_LENGTH,
        masked_row=packed_row_length(config, "sdpa"),
        negatives=config.effective_negatives,
        num_negatives=config.num_negatives or 0,
        budget_bytes=config.logits_budget_mb * MIB,
    )


def describe(config: Config, shape: TrainingShape) -> str:
    """Write the estimate and the table of cards."""
    # Counted once: the same with and without gradient checkpointing, and for every batch size.
    model = meta_decoder(shape.model_config)
    counted = saved_bytes_per_token(shape)
    found = estimate(shape, config.train_batch_size, model, counted)
    how = "gradient checkpointing" if shape.checkpointing else "no gradient checkpointing"
    lines = [
        f"Estimated GPU memory of a training step: batch {config.train_batch_size} x "
        f"{shape.length} items, {shape.items:,} items in the catalogue, {how}.",
        "",
        *(f"{name:<14}{size / MIB:>10,.0f} MiB" for name, size in rows(found)),
        "",
        "largest train_batch_size, without and with gradient_checkpointing:",
    ]
    both = [replace(shape, checkpointing=value) for value in (False, True)]
    for card in CARDS_GB:
        sizes = [largest_batch(each, card * GIB, model, counted) for each in both]
        cells = [f"{size:,}" if size else "none fits" for size in sizes]
        lines.append(f"{card:>5} GB {cells[0]:>12} {cells[1]:>12}")
    return "\n".join(lines) + "\n"
