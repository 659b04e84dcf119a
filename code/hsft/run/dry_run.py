"""`--dry_run True`: what a fine-tuning run would need of a GPU, from shapes alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import LlamaConfig

from hsft.config import Config
from hsft.data.cache import DTYPES, is_native, open_cache, read_header
from hsft.data.dataset import CachedEmbeddingTrainDataset
from hsft.data.files import cache_path, find_cache, has_interactions, interaction_file
from hsft.data.interactions import Interactions, load_interactions
from hsft.data.split import leave_one_out
from hsft.encoding.item_tower import freeze
from hsft.encoding.sentence_encoder import MODULES, read_sentence_folder
from hsft.model.attention import VARLEN
from hsft.model.backbone import (
    check_lora_targets,
    choose_attention,
    cut_decoder,
    decoder_config,
    load_model_config,
    read_extra,
)
from hsft.model.folder import check_decoder, check_embeddings, check_positions
from hsft.model.item_adapter import check_width
from hsft.report.memory import (
    GIB,
    MIB,
    TrainingShape,
    estimate,
    item_llm_bytes,
    largest_batch,
    meta_decoder,
    rows,
    saved_bytes_per_token,
)
from hsft.run.setup import packed_row_length
from hsft.utils.errors import InputError
from hsft.utils.files import is_file, is_folder

# TinyLlama-1.1B's config.json, for LlamaConfig: HLLM-1B's UserLLM is fine-tuned from it.
TINYLLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
CARDS_GIB = (6, 8, 10, 12, 16, 24)
# How much of a card's free memory a step may be estimated to fill without quantisation: estimates are
# within 10 % of what was measured, and CUDA graphs take a few percent more.
FILLED_SHARE = 0.9
# What a desktop takes of a card.
_DISPLAY = 512 * MIB
_DTYPES = {"16-mixed": torch.float16, "32-true": torch.float32}


@dataclass(frozen=True)
class _Items:
    """The item table's size as far as it is known, and what stands in for a file that is not there.

    Attributes:
        count: I, None when nothing tells it.
        dtype: name of the table's number type.
        assumed: sentences.
        width: dimensions of the embeddings, None: as wide as the UserLLM.
    """

    count: int | None
    dtype: str
    assumed: tuple[str, ...] = ()
    width: int | None = None


def dry_run(config: Config) -> None:
    """Print the estimate for a configuration, as a run on one CUDA card would need it.

    It needs no file: what stands in for one that is not there is said in the output.

    Raises:
        InputError: what is there is bad or does not fit, or nothing would be fine-tuned.
    """
    shape, assumed = assumed_shape(config)
    sys.stdout.write(describe(config, shape, assumed))


def training_shape(config: Config, interactions: Interactions | None = None) -> TrainingShape:
    """Return what memory depends on, as `assumed_shape`."""
    return assumed_shape(config, interactions)[0]


def choose_quant_type(
    shape: TrainingShape, batch_size: int, free_bytes: int
) -> tuple[Literal["nf4", "none"], str]:
    """Resolve `qlora_quant_type: auto` for a CUDA card: plain weights where a step fits with them.

    Args:
        shape: the run, of any `quant_type`.
        batch_size: sequences per forward pass.
        free_bytes: of the card.

    Returns:
        What is taken, and a sentence with the figures.
    """
    plain = replace(shape, quant_type="none")
    needed = estimate(plain, batch_size).total
    name = str(plain.weight_dtype).removeprefix("torch.")
    fits = needed <= FILLED_SHARE * free_bytes
    figures = (
        f"a training step with {name} weights is estimated at {needed / GIB:.2f} GiB, which is "
        f"{'within' if fits else 'more than'} {FILLED_SHARE:.0%} of the {free_bytes / GIB:.2f} GiB "
        f"that are free"
    )
    if fits:
        return "none", f"qlora_quant_type: auto takes none (plain LoRA): {figures}."
    return "nf4", f"qlora_quant_type: auto takes nf4: {figures}."


def assumed_shape(
    config: Config, interactions: Interactions | None = None
) -> tuple[TrainingShape, list[str]]:
    """Read what memory depends on from `config.json` and the item cache.

    Without a model folder the UserLLM is of TinyLlama-1.1B's shape. Without a cache the items are
    those of the interactions, as wide as the UserLLM; without these the item table is not counted.
    Wherever this runs, `precision: auto` is taken as bf16-mixed, and attention as on an NVIDIA GPU
    of compute capability 8.0 or later. The positions of a packed batch follow from the interactions'
    lengths; without these every sequence is taken to be full. `qlora_quant_type: auto` is taken as nf4.

    Args:
        config: the configuration.
        interactions: where they have been read; None: they are read when they are needed.

    Returns:
        The shape, and a sentence for everything that was assumed for want of a file.

    Raises:
        InputError: what is there is bad or does not fit, or nothing would be fine-tuned.
    """
    if config.model != "HLLM" or config.val_only:
        raise InputError(
            "dry_run estimates fine-tuning of the UserLLM; set model: HLLM, not val_only."
        )
    named = config.user_pretrain_dir
    model_config, assumed = _user_model(config, Path(named) if named else None)
    # Read where it is needed, once.
    read = cache(lambda: load_interactions(config) if interactions is None else interactions)
    items = _items(config, int(model_config.hidden_size), read, known_width=not assumed)
    asked = config.attn_implementation
    kernel = choose_attention(
        "auto" if asked == "flash_attention_2" else asked,
        allow_flash=False,
        device=torch.device("cuda"),
        half=config.precision != "32-true",
        model_config=model_config,
    )
    transformed = config.item_embedding_transform != "none"
    precision = "bf16-mixed" if config.precision == "auto" else config.precision
    lengths = _lengths(config, read) if packed_row_length(config, kernel) else None
    shape = TrainingShape(
        model_config=model_config,
        quant_type="nf4" if config.qlora_quant_type == "auto" else config.qlora_quant_type,
        lora_rank=config.qlora_r if config.use_qlora else None,
        lora_targets=tuple(config.qlora_target_modules),
        mixed=precision.endswith("mixed"),
        dtype=_DTYPES.get(precision, torch.bfloat16),
        optimizer_8bit=config.optimizer.endswith("8bit"),
        checkpointing=config.gradient_checkpointing,
        items=items.count,
        item_bytes=4 if transformed else DTYPES[items.dtype].itemsize,
        adapter=config.item_adapter,
        adapter_rank=config.item_adapter_rank,
        item_width=items.width,
        id_vectors=config.item_id_embedding,
        length=config.MAX_ITEM_LIST_LENGTH,
        masked_row=None if kernel == VARLEN else packed_row_length(config, kernel),
        mean_length=None if lengths is None else float(lengths.mean()),
        length_deviation=0.0 if lengths is None else float(lengths.std()),
        negatives=config.effective_negatives,
        num_negatives=config.num_negatives or 0,
        negatives_logq=config.negatives_logq,
        budget_bytes=config.logits_budget_mb * MIB,
        attention="eager" if kernel == "eager" else "sdpa",
    )
    if config.trains_items:
        shape, sentences = _with_item_llm(config, shape)
        assumed = [*assumed, *sentences]
    return shape, [*assumed, *items.assumed]


def _with_item_llm(config: Config, shape: TrainingShape) -> tuple[TrainingShape, list[str]]:
    """Add the ItemLLM that is trained, of TinyLlama-1.1B's shape where its folder is not there."""
    assumed = []
    folder = Path(config.encoder or config.item_pretrain_dir or "")
    if is_folder(folder):
        if is_file(folder / MODULES):
            folder = read_sentence_folder(folder).transformer
        model_config = load_model_config(folder, config.trust_remote_code)
    else:
        assumed = [f"no model folder at {folder}: the ItemLLM is taken as TinyLlama-1.1B's shape."]
        model_config = LlamaConfig(**TINYLLAMA)
    model = meta_decoder(model_config, config.trust_remote_code)
    lora = config.trains_item_lora
    if lora:
        check_lora_targets(model, config.item_lora_target_modules, "ItemLLM")
    freeze(model, config.item_freeze_layers, config.item_freeze_embeddings)
    item_llm = replace(
        shape,
        model_config=model_config,
        quant_type=config.item_quant_type,
        lora_rank=config.item_lora_r if lora else None,
        lora_targets=tuple(config.item_lora_target_modules),
        checkpointing=config.item_gradient_checkpointing,
        adapter="none",
        item_width=None,
        id_vectors=False,
        # The emb token comes after the longest text.
        length=config.MAX_TEXT_LENGTH + 1,
        mean_length=None,
        masked_row=None,
    )
    held, chunk = item_llm_bytes(item_llm, model, config.item_chunk_tokens)
    if not config.trains_items_along:
        # It is gone when the UserLLM is trained.
        return replace(shape, item_chunk_bytes=held + chunk), assumed
    # A history and its last target are one item more than its positions; drawn ones come besides.
    drawn = config.MAX_ITEM_LIST_LENGTH + 1 if config.negatives == "per_sequence" else 0
    each = (config.MAX_ITEM_LIST_LENGTH + 1 + drawn) * config.gradient_accumulation_steps
    return replace(shape, item_llm_bytes=held, item_chunk_bytes=chunk, step_items=each), assumed


def _user_model(config: Config, folder: Path | None) -> tuple[Any, list[str]]:
    """Return the UserLLM's configuration cut to the layers in use, and what was assumed."""
    assumed = []
    if folder is not None and (is_folder(folder) or is_file(folder)):
        model_config = decoder_config(
            folder, config.user_llm_layers, trust_remote_code=config.trust_remote_code
        )
    else:
        where = f"no model folder at {folder}" if folder else "no UserLLM is named"
        folder = Path("TinyLlama-1.1B")
        model_config = LlamaConfig(**TINYLLAMA)
        check_decoder(model_config, folder, config.user_llm_layers)
        cut_decoder(model_config, config.user_llm_layers)
        assumed = [f"{where}: estimated for TinyLlama-1.1B's shape, HLLM-1B's UserLLM."]
    model = meta_decoder(model_config, config.trust_remote_code)
    check_embeddings(model, folder)
    check_positions(model, config.MAX_ITEM_LIST_LENGTH, folder, "MAX_ITEM_LIST_LENGTH")
    if config.use_qlora:
        check_lora_targets(model, config.qlora_target_modules)
    return model_config, assumed


def _lengths(config: Config, read: Callable[[], Interactions]) -> np.ndarray | None:
    """Return the positions of every training sequence, None where the interactions are not there."""
    if not has_interactions(config):
        return None
    dataset = CachedEmbeddingTrainDataset(leave_one_out(read()), config.MAX_ITEM_LIST_LENGTH)
    return dataset.lengths if len(dataset) else None


def _items(
    config: Config, width: int, read: Callable[[], Interactions], *, known_width: bool
) -> _Items:
    """Count the items: of the cache that would be read, else of the interactions.

    Args:
        config: the configuration.
        width: the UserLLM's hidden size.
        read: reads the interactions.
        known_width: False when it is assumed, and need not be the cache's.
    """
    path = None
    if config.use_item_cache and (config.item_cache_path or config.dataset):
        path = cache_path(config)
        native = path.suffix == ".pt" and is_file(path.with_suffix(".safetensors"))
        if native or is_file(path) or is_folder(path):
            return _cached_items(config, find_cache(path), width, known_width=known_width)
    assumed = (
        ()
        if path is None
        else (f"no item cache at {path}: its vectors are taken as {width} wide.",)
    )
    data = interaction_file(config)
    if has_interactions(config):
        sentence = f"the number of items is that of {data}."
        return _Items(read().num_items, config.item_cache_dtype, (*assumed, sentence))
    missing = f"no interactions at {data}" if config.dataset else "no dataset is named"
    sentence = f"{missing}: the number of items is unknown and the item table is not counted."
    return _Items(None, config.item_cache_dtype, (*assumed, sentence))


def _cached_items(config: Config, path: Path, width: int, *, known_width: bool) -> _Items:
    if is_native(path):
        count, dim, dtype = read_header(path)
    else:
        items = open_cache(path)
        count, dim = len(items), items.dim
        dtype = str(items.embeddings.dtype).removeprefix("torch.")
    if known_width:
        check_width(config, read_extra(config.user_pretrain_dir or ""), path, dim, width)
    elif dim != width:
        sentence = f"item cache {path} has {dim} dimensions: only its number of items is used."
        return _Items(count, dtype, (sentence,))
    return _Items(count, dtype, width=dim)


def _trained_how(shape: TrainingShape) -> str:
    layers = f"The UserLLM's {shape.model_config.num_hidden_layers} layers"
    number = str(shape.dtype).removeprefix("torch.") + " products" * shape.mixed
    name = shape.attention if shape.masked_row or shape.attention == "eager" else "unmasked"
    kernel = f"{number}, {name} attention"
    if shape.lora_rank is None:
        return f"{layers}: all weights trained, {kernel}."
    frozen = "frozen weights" if shape.quant_type == "none" else f"{shape.quant_type} weights"
    targets = ", ".join(shape.lora_targets)
    return f"{layers}: LoRA of rank {shape.lora_rank} on {targets}, over {frozen}, {kernel}."


def _items_trained_how(config: Config) -> list[str]:
    if not config.trains_items:
        return []
    how = "all weights trained"
    if config.trains_item_lora:
        frozen = "frozen" if config.item_quant_type == "none" else config.item_quant_type
        how = f"LoRA of rank {config.item_lora_r} over {frozen} weights"
    again = ", gradient checkpointing" if config.item_gradient_checkpointing else ""
    return [
        f"The ItemLLM: {how}, {config.item_chunk_tokens:,} tokens at a time{again}. What it needs when "
        f"the UserLLM's step is over counts as far as it is more than that."
    ]


def _automatic_type(config: Config, shape: TrainingShape, model: torch.nn.Module) -> list[str]:
    if config.qlora_quant_type != "auto" or shape.lora_rank is None:
        return []
    plain = replace(shape, quant_type="none")
    needed = estimate(plain, config.train_batch_size, model).total
    name = str(plain.weight_dtype).removeprefix("torch.")
    return [
        f"qlora_quant_type: auto takes none (plain LoRA) where {needed / FILLED_SHARE / GIB:.2f} GiB "
        f"are free: the step with {name} weights is estimated at {needed / GIB:.2f} GiB. Else it takes "
        f"nf4, as estimated here.",
        "",
    ]


def describe(config: Config, shape: TrainingShape, assumed: Sequence[str] = ()) -> str:
    """Write the estimate, what was assumed for it, and the table of cards."""
    # Counted once: the same with and without gradient checkpointing, and for every batch size.
    model = meta_decoder(shape.model_config)
    counted = saved_bytes_per_token(shape)
    needed = estimate(shape, config.train_batch_size, model, counted)
    how = "gradient checkpointing" if shape.checkpointing else "no gradient checkpointing"
    counted_rows = [
        (name, size)
        for name, size in rows(needed)
        if (shape.items is not None or name != "item table") and (size or name != "item llm")
    ]
    known = "an unknown number of" if shape.items is None else f"{shape.items:,}"
    lines = [
        f"Estimated GPU memory of a training step: batch {config.train_batch_size} x "
        f"{shape.length} items ({shape.positions(config.train_batch_size):,} positions), "
        f"{known} items in the catalogue, {how}.",
        _trained_how(shape),
        *_items_trained_how(config),
        *(f"Assumed: {sentence}" for sentence in assumed),
        "",
        *(f"{name:<14}{size / MIB:>10,.0f} MiB" for name, size in counted_rows),
        "",
        *_automatic_type(config, shape, model),
        "largest train_batch_size, without and with gradient_checkpointing, "
        f"{_DISPLAY // MIB} MiB left for a display:",
    ]
    both = [replace(shape, checkpointing=value) for value in (False, True)]
    for card in CARDS_GIB:
        sizes = [largest_batch(each, card * GIB - _DISPLAY, model, counted) for each in both]
        cells = [f"{size:,}" if size else "none fits" for size in sizes]
        lines.append(f"{card:>5} GiB {cells[0]:>12} {cells[1]:>12}")
    return "\n".join(lines) + "\n"
