"""`--dry_run True`: what a run would need of a GPU, from shapes alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from hsft.config import Config
from hsft.config.schema import REFERENCES, TRAINED_MODELS
from hsft.data.cache import DTYPES, is_native, open_cache, read_header
from hsft.data.dataset import CachedEmbeddingEvalDataset, CachedEmbeddingTrainDataset
from hsft.data.dataset.packing import Buckets
from hsft.data.files import cache_path, find_cache, has_interactions, interaction_file
from hsft.data.interactions import load_interactions
from hsft.data.split import Split, make_split
from hsft.encoding.item_tower import check_frozen_layers
from hsft.evaluator.ranking import users_at_a_time
from hsft.inputs.cache_items import sentence_source
from hsft.model.accelerate import SHORTEST_GRAPH, choose_acceleration
from hsft.model.attention import VARLEN, choose_attention
from hsft.model.backbone import check_lora_targets
from hsft.model.folder import check_decoder, check_embeddings, check_positions, layer_number
from hsft.model.id_model import id_loss_settings
from hsft.model.item_adapter import check_width, user_extra
from hsft.model.meta import read_kind, read_structure
from hsft.model.structure import DecoderSource, DecoderStructure
from hsft.report.batch_size import batch_for_card, most_for_steps
from hsft.report.memory import (
    GIB,
    MIB,
    TrainingShape,
    estimate,
    evaluation_memory,
    item_llm_bytes,
    largest_batch,
    rows,
    saved_bytes_per_token,
)
from hsft.report.step_time import CARDS, seconds, training_work, validation_work
from hsft.run.setup import graph_obstacle, packed_row_length
from hsft.trainer.optim import steps_per_epoch
from hsft.utils.errors import InputError, counted
from hsft.utils.files import is_file, is_folder
from hsft.utils.progress import format_seconds

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
# How much of a card's free memory a step may be estimated to fill without quantisation: estimates are
# within 10 % of what was measured, and CUDA graphs take a few percent more.
FILLED_SHARE = 0.9
# What a desktop takes of a card.
_DISPLAY = 512 * MIB
# Of `train_batch_size: auto` where no interactions bound it; the positions do.
_LARGEST_AUTO = 1 << 16
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


@dataclass(frozen=True)
class RunSize:
    """How much a run trains and validates on.

    Attributes:
        lengths: int64 [S], positions of every training sequence.
        valid_users: users of a validation.
        valid_positions: positions of their histories, on average.
    """

    lengths: np.ndarray
    valid_users: int
    valid_positions: float


def dry_run(config: Config) -> None:
    """Print the estimate for a configuration, as a run on one CUDA card would need it.

    It needs no file: what stands in for one that is not there is said in the output.

    Raises:
        InputError: what is there is bad or does not fit, or nothing would be fine-tuned.
    """
    split = _reader(config)
    if config.model in REFERENCES:
        sys.stdout.write(_describe_reference(config, split))
        return
    if config.val_only:
        sys.stdout.write(_describe_evaluation(config, split))
        return
    shape, assumed = assumed_shape(config, split)
    size = _run_size(config, split)
    time = split().time if has_interactions(config) else None
    left = [] if time is None else [*time.sentences(), ""]
    if config.chooses_batch_size:
        most = _LARGEST_AUTO if size is None else _most_for_steps(config, size)
        config = with_batch_size(config, batch_for_card(shape, most, None))
        left += [_automatic_batch(config), ""]
    sys.stdout.write(
        "".join(f"{line}\n" for line in left)
        + describe(config, shape, assumed)
        + "\n"
        + describe_times(config, shape, size)
    )


def with_batch_size(config: Config, size: int) -> Config:
    """Return the configuration with another `train_batch_size`."""
    return config.model_copy(update={"train_batch_size": size})


def _most_for_steps(config: Config, size: RunSize) -> int:
    return most_for_steps(
        len(size.lengths), config.epochs, config.gradient_accumulation_steps, processes=1
    )


def _automatic_batch(config: Config) -> str:
    return (
        f"train_batch_size: auto takes {config.train_batch_size}, as estimated here, and where that is "
        f"more than {FILLED_SHARE:.0%} of what is free on a card, the largest power of two below that "
        f"fits; on a processor it takes another number."
    )


def training_shape(config: Config, split: Split | None = None) -> TrainingShape:
    """Return what memory depends on, as `assumed_shape`.

    Args:
        config: the configuration.
        split: the interactions where they have been read; None: they are read when they are needed.
    """
    return assumed_shape(config, None if split is None else lambda: split)[0]


def _reader(config: Config) -> Callable[[], Split]:
    """Return a function that reads and splits the interactions, once."""
    return cache(lambda: make_split(config, load_interactions(config)))


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
    config: Config, split: Callable[[], Split] | None = None
) -> tuple[TrainingShape, list[str]]:
    """Read what memory depends on from `config.json` and the item cache.

    Without a model folder the UserLLM is of TinyLlama-1.1B's shape. Without a cache the items are
    those of the interactions, as wide as the UserLLM; without these the item table is not counted.
    Wherever this runs, `precision: auto` is taken as bf16-mixed, and attention as on an NVIDIA GPU
    of compute capability 8.0 or later. The positions of a packed batch follow from the interactions'
    lengths; without these every sequence is taken to be full. `qlora_quant_type: auto` is taken as nf4.

    Args:
        config: the configuration.
        split: gives the interactions; None: they are read from their file, once, when they are needed.

    Returns:
        The shape, and a sentence for everything that was assumed for want of a file.

    Raises:
        InputError: what is there is bad or does not fit, or nothing would be fine-tuned.
    """
    if config.model not in TRAINED_MODELS:
        raise InputError(
            f"dry_run estimates a run of one model, and model: {config.model} adds up the scores of "
            f"finished runs; estimate each of these with its own configuration."
        )
    if not config.has_user_llm:
        return _id_shape(config, split or _reader(config))
    named = config.user_pretrain_dir
    decoder, assumed = _user_model(config, Path(named) if named else None)
    split = split or _reader(config)
    on_ids = config.model == "llm_id"
    if on_ids:
        width = config.llm_id.item_width or decoder.hidden_size
        items = _trained_items(config, width, split)
    else:
        items = _items(config, decoder.hidden_size, split, known_width=not assumed)
    asked = config.attn_implementation
    kernel = choose_attention(
        "auto" if asked == "flash_attention_2" else asked,
        allow_flash=False,
        device=torch.device("cuda"),
        half=config.precision != "32-true",
        kind=read_kind(decoder.source),
    )
    transformed = config.item_embedding_transform != "none" and not on_ids
    adapter = config.item_adapter
    negatives = config.effective_negatives
    if on_ids:
        adapter = "none" if items.width == decoder.hidden_size else "linear"
        negatives = id_loss_settings(config, "cosine").negatives
    precision = "bf16-mixed" if config.precision == "auto" else config.precision
    lengths = _lengths(config, split) if packed_row_length(config, kernel) else None
    shape = TrainingShape(
        decoder=decoder,
        quant_type="nf4" if config.qlora_quant_type == "auto" else config.qlora_quant_type,
        lora_rank=config.qlora_r if config.use_qlora else None,
        lora_targets=tuple(config.qlora_target_modules),
        mixed=precision.endswith("mixed"),
        dtype=_DTYPES.get(precision, torch.bfloat16),
        optimizer_8bit=config.optimizer.endswith("8bit"),
        checkpointing=config.gradient_checkpointing,
        items=items.count,
        item_bytes=4 if transformed else DTYPES[items.dtype].itemsize,
        adapter=adapter,
        adapter_rank=config.item_adapter_rank,
        item_width=items.width,
        id_vectors=config.item_id_embedding and not on_ids,
        trained_items=on_ids,
        length=config.MAX_ITEM_LIST_LENGTH,
        masked_row=None if kernel == VARLEN else packed_row_length(config, kernel),
        mean_length=None if lengths is None else float(lengths.mean()),
        length_deviation=0.0 if lengths is None else float(lengths.std()),
        negatives=negatives,
        num_negatives=config.num_negatives or 0,
        negatives_logq=config.negatives_logq,
        budget_bytes=config.logits_budget_mb * MIB,
        attention="eager" if kernel == "eager" else "sdpa",
        # Of a run that is long enough.
        graph=_takes_graphs(
            config,
            precision,
            single_row=config.pack_sequences and kernel == VARLEN,
            steps=SHORTEST_GRAPH,
        ),
    )
    if config.trains_items:
        shape, sentences = _with_item_llm(config, shape)
        assumed = [*assumed, *sentences]
    return shape, [*assumed, *items.assumed]


def _id_shape(config: Config, split: Callable[[], Split]) -> tuple[TrainingShape, list[str]]:
    """Read what memory depends on for `model: sasrec` and `hstu`, as `assumed_shape`."""
    # Imported here: an LLM's estimate does without.
    from hsft.model.id_estimate import count_saved_bytes, read_id_model

    model = read_id_model(config)
    dim = model.structure.hidden_size
    items = _trained_items(config, model.item_width, split)
    precision = "bf16-mixed" if config.precision == "auto" else config.precision
    dtype, mixed = _DTYPES.get(precision, torch.bfloat16), precision.endswith("mixed")
    weights = torch.float32 if mixed else dtype
    masked_row = packed_row_length(config, "sdpa")
    row_length = masked_row or config.MAX_ITEM_LIST_LENGTH
    lengths = _lengths(config, split) if masked_row else None
    shape = TrainingShape(
        decoder=model.structure,
        quant_type="none",
        lora_rank=None,
        lora_targets=(),
        mixed=mixed,
        dtype=dtype,
        optimizer_8bit=config.optimizer.endswith("8bit"),
        checkpointing=False,
        items=items.count,
        item_bytes=4,
        adapter="none" if model.item_width == dim else "linear",
        adapter_rank=0,
        item_width=items.width,
        trained_items=True,
        length=config.MAX_ITEM_LIST_LENGTH,
        masked_row=masked_row,
        mean_length=None if lengths is None else float(lengths.mean()),
        length_deviation=0.0 if lengths is None else float(lengths.std()),
        negatives=id_loss_settings(config, "cosine").negatives,
        num_negatives=config.num_negatives or 0,
        budget_bytes=config.logits_budget_mb * MIB,
        layer_kind=model.kind,
        saved_bytes=count_saved_bytes(
            config, row_length, packed=masked_row is not None, dtype=weights, autocast=mixed
        ),
        scores=model.heads * row_length if model.kind == "hstu" else 0,
    )
    return shape, list(items.assumed)


def _with_item_llm(config: Config, shape: TrainingShape) -> tuple[TrainingShape, list[str]]:
    """Add the ItemLLM that is trained, of TinyLlama-1.1B's shape where its folder is not there."""
    assumed = []
    folder = Path(config.encoder or config.item_pretrain_dir or "")
    llama = None
    if not is_folder(folder):
        assumed = [f"no model folder at {folder}: the ItemLLM is taken as TinyLlama-1.1B's shape."]
        llama = TINYLLAMA
    else:
        folder = sentence_source(str(folder), config.trust_remote_code).folder
    decoder = read_structure(
        DecoderSource(
            folder,
            keep_token_embedding=True,
            trust_remote_code=config.trust_remote_code,
            llama=llama,
        )
    )
    lora = config.trains_item_lora
    if lora:
        check_lora_targets(decoder.linear, config.item_lora_target_modules, "ItemLLM")
    check_frozen_layers(decoder.linear, config.item_freeze_layers)
    item_llm = replace(
        shape,
        decoder=decoder,
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
    trained = _trained_part(decoder, config.item_freeze_layers, config.item_freeze_embeddings)
    held, chunk = item_llm_bytes(item_llm, trained, config.item_chunk_tokens)
    if not config.trains_items_along:
        # It is gone when the UserLLM is trained.
        return replace(shape, item_chunk_bytes=held + chunk), assumed
    # A history and its last target are one item more than its positions; drawn ones come besides.
    drawn = config.MAX_ITEM_LIST_LENGTH + 1 if config.negatives == "per_sequence" else 0
    each = (config.MAX_ITEM_LIST_LENGTH + 1 + drawn) * config.gradient_accumulation_steps
    return replace(shape, item_llm_bytes=held, item_chunk_bytes=chunk, step_items=each), assumed


def _trained_part(decoder: DecoderStructure, layers: int, embeddings: bool) -> DecoderStructure:
    """Leave out what `freeze` keeps: the first layers' matrices, and the largest table."""
    linear = {
        name: widths
        for name, widths in decoder.linear.items()
        if (layer_number(name) or 0) >= layers
    }
    others = sorted(decoder.other_sizes)
    kept = others[:-1] if embeddings or layers else others
    return replace(decoder, linear=linear, other_sizes=tuple(kept))


def _user_model(config: Config, folder: Path | None) -> tuple[DecoderStructure, list[str]]:
    """Return the UserLLM's structure cut to the layers in use, and what was assumed."""
    assumed = []
    layers = config.user_llm_layers
    if folder is not None and (is_folder(folder) or is_file(folder)):
        source = DecoderSource(folder, layers, trust_remote_code=config.trust_remote_code)
    else:
        where = f"no model folder at {folder}" if folder else "no UserLLM is named"
        folder = Path("TinyLlama-1.1B")
        source = DecoderSource(folder, layers, llama=TINYLLAMA)
        assumed = [f"{where}: estimated for TinyLlama-1.1B's shape, HLLM-1B's UserLLM."]
    check_decoder(read_kind(source), folder, layers)
    decoder = read_structure(source)
    check_embeddings(decoder.embedding_width, decoder.hidden_size, folder)
    check_positions(decoder, config.longest_list_length, folder, "MAX_ITEM_LIST_LENGTH")
    if config.use_qlora:
        check_lora_targets(decoder.linear, config.qlora_target_modules)
    return decoder, assumed


def _lengths(config: Config, split: Callable[[], Split]) -> np.ndarray | None:
    """Return the positions of every training sequence, None where the interactions are not there."""
    if not has_interactions(config):
        return None
    dataset = CachedEmbeddingTrainDataset(split(), config.MAX_ITEM_LIST_LENGTH)
    return dataset.lengths if len(dataset) else None


def _run_size(config: Config, split: Callable[[], Split]) -> RunSize | None:
    """Count sequences and users, None where the interactions are not there or train nothing."""
    lengths = _lengths(config, split)
    if lengths is None:
        return None
    valid = CachedEmbeddingEvalDataset(split(), "valid", config.eval_list_length)
    users = min(len(valid), config.valid_users or len(valid))
    return RunSize(lengths, users, float(valid.lengths.mean()) if len(valid) else 0.0)


def _items(config: Config, width: int, split: Callable[[], Split], *, known_width: bool) -> _Items:
    """Count the items: of the cache that would be read, else of the interactions.

    Args:
        config: the configuration.
        width: the UserLLM's hidden size.
        split: reads the interactions.
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
        return _Items(split().interactions.num_items, config.item_cache_dtype, (*assumed, sentence))
    missing = f"no interactions at {data}" if config.dataset else "no dataset is named"
    sentence = f"{missing}: the number of items is unknown and the item table is not counted."
    return _Items(None, config.item_cache_dtype, (*assumed, sentence))


def _trained_items(config: Config, width: int, split: Callable[[], Split]) -> _Items:
    """Count the items of a model that trains a vector for each: those of the interactions."""
    if has_interactions(config):
        return _Items(split().interactions.num_items, "float32", width=width)
    sentence = "there are no interactions: the number of items is unknown and the item table is not counted."
    return _Items(None, "float32", (sentence,), width)


def _cached_items(config: Config, path: Path, width: int, *, known_width: bool) -> _Items:
    if is_native(path):
        count, dim, dtype = read_header(path)
    else:
        items = open_cache(path)
        count, dim = len(items), items.dim
        dtype = str(items.embeddings.dtype).removeprefix("torch.")
    if known_width:
        check_width(config, user_extra(config), path, dim, width)
    elif dim != width:
        sentence = f"item cache {path} has {dim} dimensions: only its number of items is used."
        return _Items(count, dtype, (sentence,))
    return _Items(count, dtype, width=dim)


def _trained_how(shape: TrainingShape) -> str:
    number = str(shape.dtype).removeprefix("torch.") + " products" * shape.mixed
    layers = counted(shape.decoder.layers, "layer")
    if shape.layer_kind != "decoder":
        name = "HSTU" if shape.layer_kind == "hstu" else "SASRec"
        masked = "with" if shape.masked_row else "without"
        return (
            f"{name}'s {layers} and the item table: all weights trained, {number}, "
            f"attention {masked} a mask."
        )
    layers = f"The UserLLM's {layers}"
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


def _automatic_type(config: Config, shape: TrainingShape) -> list[str]:
    if config.qlora_quant_type != "auto" or shape.lora_rank is None:
        return []
    plain = replace(shape, quant_type="none")
    needed = estimate(plain, config.train_batch_size).total
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
    counted = saved_bytes_per_token(shape)
    needed = estimate(shape, config.train_batch_size, counted)
    is_decoder = shape.layer_kind == "decoder"
    how = "gradient checkpointing" if shape.checkpointing else "no gradient checkpointing"
    counted_rows = [
        (name, size)
        for name, size in rows(needed)
        if (shape.items is not None or name != "item table")
        and (size or name not in ("item llm", "adapters"))
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
        *_automatic_type(config, shape),
        f"largest train_batch_size, {'without and with gradient_checkpointing, ' * is_decoder}"
        f"{_DISPLAY // MIB} MiB left for a display:",
    ]
    kinds = (False, True) if is_decoder else (False,)
    shapes = [replace(shape, checkpointing=value) for value in kinds]
    for card in CARDS:
        sizes = [largest_batch(each, card.gib * GIB - _DISPLAY, counted) for each in shapes]
        cells = [f"{size:,}" if size else "none fits" for size in sizes]
        lines.append(f"{card.gib:>5} GiB " + " ".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines) + "\n"


def _describe_evaluation(config: Config, split: Callable[[], Split]) -> str:
    """Write the estimated memory and time of `val_only`, in which nothing is trained."""
    shape, assumed = assumed_shape(config, split)
    shape = replace(
        shape, lora_rank=None, quant_type="none", mixed=False, length=config.eval_list_length
    )
    needed = evaluation_memory(shape, config.eval_batch_size)
    known = "an unknown number of" if shape.items is None else f"{shape.items:,}"
    lines = [
        f"Estimated GPU memory of an evaluation: {config.eval_batch_size} users at a time x "
        f"{shape.length} items, {known} items in the catalogue. Nothing is trained.",
        *(f"Assumed: {sentence}" for sentence in assumed),
        "",
        *(f"{name:<14}{size / MIB:>10,.0f} MiB" for name, size in rows(needed) if size),
        "",
    ]
    if shape.items is None or not has_interactions(config):
        return "\n".join([*lines, "No time is estimated without the interactions."]) + "\n"
    dataset = CachedEmbeddingEvalDataset(split(), config.eval_phase, config.eval_list_length)
    positions = float(dataset.lengths.mean()) if len(dataset) else 0.0
    work = validation_work(
        shape, len(dataset), positions, config.eval_batch_size, saved_bytes_per_token(shape)
    )
    ranked = "" if config.eval_protocol == "full" else ", as if the whole catalogue were ranked"
    lines.append(
        f"estimated time of the evaluation ({len(dataset):,} users{ranked}); see "
        f"docs/performance-gpu.md for how far off:"
    )
    for card in CARDS:
        fits = needed.total <= card.gib * GIB - _DISPLAY
        cell = format_seconds(seconds(work, card, graph=False)) if fits else "does not fit"
        lines.append(f"{card.gib:>5} GiB {cell:>12}  {card.name}")
    return "\n".join(lines) + "\n"


def _describe_reference(config: Config, split: Callable[[], Split]) -> str:
    """Say what a model without weights needs: the scores of some users, and item vectors."""
    parts = [f"model: {config.model} trains nothing and loads no LLM."]
    if not has_interactions(config):
        return f"{parts[0]} Its memory is that of scores and item vectors; no time is estimated.\n"
    items = split().interactions.num_items
    users = min(config.eval_batch_size, users_at_a_time(items, config.logits_budget_mb * MIB))
    parts.append(
        f"An evaluation holds the scores of {users:,} users over {items:,} items at a time, "
        f"{4 * users * (items + 1) / MIB:,.1f} MiB"
    )
    beside = {
        "item_knn": "and every vector of the item cache in float32",
        "tfidf": "and the catalogue's TF-IDF vectors, whose number depends on the texts",
    }.get(config.model)
    parts[-1] += f", {beside}." if beside else ", and little else."
    return " ".join(parts) + " No time is estimated.\n"


def describe_times(config: Config, shape: TrainingShape, size: RunSize | None) -> str:
    """Write the estimated time of an epoch and of a validation on a usual card of each size."""
    if config.trains_items_along:
        return "No time is estimated where the ItemLLM is trained.\n"
    if size is None or shape.items is None:
        return "No time is estimated without the interactions.\n"
    counted = saved_bytes_per_token(shape)
    sequences = min(config.train_batch_size, len(size.lengths))
    batches = -(-len(size.lengths) // config.train_batch_size)
    graph = _takes_graphs(
        config,
        config.precision,
        single_row=config.pack_sequences and shape.masked_row is None,
        steps=config.epochs * steps_per_epoch(batches, config.gradient_accumulation_steps),
    )
    work = training_work(
        shape, sequences, *_positions(config, shape, size, sequences, graph=graph), counted
    )
    validation = validation_work(
        shape, size.valid_users, size.valid_positions, config.eval_batch_size, counted
    )
    fits = {
        card: estimate(shape, config.train_batch_size, counted).total <= card.gib * GIB - _DISPLAY
        for card in CARDS
    }
    how = "as CUDA graphs" if graph else "launched kernel by kernel"
    ranked = "" if config.eval_protocol == "full" else ", as if the whole catalogue were ranked"
    lines = [
        f"estimated time of an epoch ({batches:,} batches, {how}) and of a validation "
        f"({size.valid_users:,} users{ranked}); see docs/performance-gpu.md for how far off:",
    ]
    for card in CARDS:
        times = [
            format_seconds(batches * seconds(work, card, graph=graph)),
            format_seconds(seconds(validation, card, graph=False)),
        ]
        cells = times if fits[card] else ["does not fit", ""]
        line = f"{card.gib:>5} GiB {cells[0]:>12} {cells[1]:>12}  {card.name}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _takes_graphs(config: Config, precision: str, *, single_row: bool, steps: int) -> bool:
    """Say whether one NVIDIA card would train by CUDA graphs, in so many optimizer steps."""
    chosen, _ = choose_acceleration(
        config.compile,
        torch.device("cuda"),
        single_row=single_row,
        processes=1,
        steps=steps,
        obstacle=graph_obstacle(config, precision),
    )
    return chosen.graph


def _positions(
    config: Config, shape: TrainingShape, size: RunSize, sequences: int, *, graph: bool
) -> tuple[float, float]:
    """Return the positions of a batch, padding included, and how many attention spans for each."""
    lengths = size.lengths.astype(np.float64)
    if not config.pack_sequences:
        return sequences * float(shape.length), float(shape.length)
    positions = sequences * float(lengths.mean())
    if graph:
        # A row is padded up by between 1 and `step` positions.
        step = Buckets.of(size.lengths, config.train_batch_size, shape.length).step
        positions += (step + 1) / 2
    span = float(np.square(lengths).sum() / lengths.sum())
    return positions, span if shape.masked_row is None else float(shape.masked_row)
