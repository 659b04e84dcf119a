"""Estimate the GPU memory of fine-tuning from shapes alone: no weights are loaded, no GPU is used.

Weights are counted on torch's meta device (`model/meta.py`), so the parameter count is exact for any
architecture that transformers knows. Activations are counted, not guessed (`model/activations.py`); those
of plain decoders follow from their sizes (`model/plain_decoder.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import torch

from hsft.evaluator.ranking import items_at_a_time, users_at_a_time
from hsft.model.backbone import is_target
from hsft.model.losses import chunk_shape
from hsft.model.meta import source_key
from hsft.model.plain_decoder import read_plain
from hsft.model.structure import DecoderStructure, DecoderTraining, QuantType
from hsft.utils.records import remember

GIB = 1 << 30
MIB = 1 << 20
# The driver's and cuBLAS's own memory, which no allocator statistic shows. The workspaces that torch
# allocates for cuBLAS (one for the forward pass's thread and one for the backward pass's, 32 MiB each on
# Hopper, 8 on Ampere and Ada: ATen/cuda/CublasHandlePool.cpp) are not counted: logits, workspace and
# activations are added up though not all of them are held at the same time, which makes up for it.
CUDA_CONTEXT = 600 * MIB
# Those of the stream on which CUDA graphs are captured come on top of them.
_CAPTURE_WORKSPACES = 2 * 32 * MIB
# bitsandbytes quantises blocks of 64 weights.
_BLOCK = 64
_TABLES = 4 * 16
# bitsandbytes keeps 32-bit state for tensors smaller than this; larger ones have blocks of 256.
_SMALLEST_8BIT, _STATE_BLOCK = 4096, 256
_LARGEST_BATCH = 1 << 16
# Items of a catalogue not known: more than any budget of logits takes at once.
_ANY_NUMBER = 1 << 40


@dataclass(frozen=True)
class TrainingShape:
    """What a fine-tuning run's memory depends on.

    Attributes:
        decoder: the UserLLM, cut to the layers in use and without vocabulary.
        quant_type: of the frozen weights; `none` is plain LoRA.
        lora_rank: None trains all weights.
        lora_targets: module names, or `[all-linear]`.
        mixed: bf16 or fp16 autocast over float32 trained weights.
        dtype: number type of products, and of frozen weights that are not quantised.
        optimizer_8bit: 8-bit AdamW states.
        checkpointing: gradient checkpointing of the decoder layers.
        items: I, None when it is not known: the item table is not counted then; item_bytes: bytes
            per number of it; adapter: as `item_adapter`.
        adapter_rank: of `lowrank`.
        item_width: dimensions of the item embeddings, None: the UserLLM's hidden size.
        id_vectors: whether every item has a trained id vector.
        trained_items: whether the item table itself is trained.
        length: L, most positions of a sequence.
        mean_length, length_deviation: mean and standard deviation of the sequences' positions, where
            they are known and batches are packed; else every sequence is taken to be full.
        attention: `sdpa` or `eager`.
        masked_row: positions of a packed row whose attention takes a mask; None: not packed, and
            sdpa takes no mask.
        negatives: as `LossSettings`; num_negatives: drawn per forward pass, 0: L + 1 per sequence;
            negatives_logq: the batch's targets are negatives beside drawn ones.
        budget_bytes: of logits.
        item_llm_bytes, item_chunk_bytes: of an ItemLLM that is trained, as `item_llm_bytes` gives;
            step_items: most items that a sequence brings into a step, 0 where it is not trained.
        layer_kind: `decoder`, or that of a model on item ids, as `IdModel` has it.
        saved_bytes: as `saved_bytes_per_token` gives, of a model that is no decoder; None: a decoder's.
        scores: attention scores that a position holds, where they are all in memory at once, else 0.
        graph: whether training steps are CUDA graphs.
    """

    decoder: DecoderStructure
    quant_type: QuantType
    lora_rank: int | None
    lora_targets: tuple[str, ...]
    mixed: bool
    dtype: torch.dtype
    optimizer_8bit: bool
    checkpointing: bool
    items: int | None
    item_bytes: int
    adapter: str
    adapter_rank: int
    length: int
    masked_row: int | None
    negatives: str
    num_negatives: int
    budget_bytes: int
    attention: Literal["sdpa", "eager"] = "sdpa"
    item_width: int | None = None
    id_vectors: bool = False
    trained_items: bool = False
    mean_length: float | None = None
    length_deviation: float = 0.0
    negatives_logq: bool = False
    item_llm_bytes: int = 0
    item_chunk_bytes: int = 0
    step_items: int = 0
    layer_kind: str = "decoder"
    saved_bytes: tuple[float, float] | None = None
    scores: int = 0
    graph: bool = False

    def positions(self, batch_size: int) -> int:
        """Return the positions of a large batch: of a thousand, one or two have more."""
        full = batch_size * self.length
        if self.mean_length is None:
            return full
        mean = batch_size * self.mean_length
        return min(full, math.ceil(mean + 3 * math.sqrt(batch_size) * self.length_deviation))

    @property
    def autocast(self) -> bool:
        """Whether the decoder runs under autocast: not where it is bfloat16 throughout."""
        pure = self.lora_rank is not None and self.quant_type != "int8"
        return self.mixed and not (pure and self.dtype == torch.bfloat16)

    @property
    def quantised(self) -> bool:
        """Whether the decoder's linear layers are quantised."""
        return self.lora_rank is not None and self.quant_type != "none"

    @property
    def weight_dtype(self) -> torch.dtype:
        """Number type of the linear layers that are not quantised, as `build_user_llm` loads them."""
        return torch.float32 if self.lora_rank is None and self.mixed else self.dtype

    @property
    def residual_dtype(self) -> torch.dtype:
        """Number type of norms and residual stream: float32 where a quantised model has float16."""
        widened = self.quantised and self.dtype == torch.float16
        return torch.float32 if widened else self.weight_dtype


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU at the peak of a training step, in parts."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    item_table: int
    activations: int
    logits: int
    workspace: int
    item_llm: int = 0
    cuda_context: int = CUDA_CONTEXT

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


def quantised_bytes(weights: int, rows: int, quant_type: QuantType) -> int:
    """Return the bytes of one linear layer's quantised weight.

    nf4 and fp4 (QLoRA, arXiv 2305.14314, sections 3): half a byte a weight, one float32 constant per
    block of 64, also where constants were quantised: training holds them in float32.
    int8 (arXiv 2208.07339): a byte a weight, a float32 scale per row.
    """
    if quant_type == "int8":
        return weights + 4 * rows
    blocks = math.ceil(weights / _BLOCK)
    return math.ceil(weights / 2) + _TABLES + 4 * blocks


def weight_bytes(shape: TrainingShape) -> int:
    """Return the bytes of the decoder's weights, LoRA not counted."""
    total = sum(shape.decoder.other_sizes) * shape.residual_dtype.itemsize
    for read, given in shape.decoder.linear.values():
        if shape.quantised:
            total += quantised_bytes(read * given, given, shape.quant_type)
        else:
            total += read * given * shape.weight_dtype.itemsize
    return total


def trained_sizes(shape: TrainingShape) -> list[int]:
    """Return the number of weights of every trained tensor: LoRA's A and B, or all; item adapter."""
    sizes = [1]
    dim = shape.decoder.hidden_size
    if shape.lora_rank is None:
        sizes += shape.decoder.sizes
    else:
        for widths in targets(shape.decoder, shape.lora_targets):
            sizes += [shape.lora_rank * width for width in widths]
    sizes += adapter_matrices(shape)
    if shape.adapter == "mlp":
        # Biases.
        sizes += [dim, dim]
    if shape.id_vectors and shape.items is not None:
        sizes.append((shape.items + 1) * dim)
    if shape.trained_items and shape.items is not None:
        sizes.append((shape.items + 1) * (shape.item_width or dim))
    return sizes


def adapter_matrices(shape: TrainingShape) -> list[int]:
    """Return the number of weights of every matrix of the item adapter."""
    dim = shape.decoder.hidden_size
    width = shape.item_width or dim
    if shape.adapter == "linear":
        return [dim * width]
    if shape.adapter == "lowrank":
        return [width * shape.adapter_rank, dim * shape.adapter_rank]
    if shape.adapter == "mlp":
        return [dim * width, dim * dim] + [dim * width] * (width != dim)
    return []


def _table_bytes(items: int, dim: int, shape: TrainingShape) -> int:
    if shape.trained_items and shape.lora_rank is not None:
        # Among the trained weights beside the frozen ones.
        return 0
    return (items + 1) * (shape.item_width or dim) * shape.item_bytes


def optimizer_bytes(sizes: Sequence[int], bits8: bool) -> int:
    """Return the bytes of AdamW's two states (arXiv 2110.02861 for the 8-bit ones).

    8-bit: a byte a weight and state with a float32 per block of 256; small tensors stay in float32.
    """
    total = 0
    for size in sizes:
        if bits8 and size >= _SMALLEST_8BIT:
            total += 2 * (size + 4 * math.ceil(size / _STATE_BLOCK))
        else:
            total += 8 * size
    return total


def saved_bytes_per_token(shape: TrainingShape) -> tuple[float, float]:
    """Return what autograd saves for the backward pass.

    It is known of plain decoders in usual training, and counted with a fake model of one and two
    layers of others.

    Returns:
        (bytes per position and layer, bytes per position outside the layers).
    """
    if shape.saved_bytes is not None:
        return shape.saved_bytes
    source = shape.decoder.source
    training = DecoderTraining(
        quant_type=shape.quant_type,
        lora_rank=shape.lora_rank,
        lora_targets=shape.lora_targets,
        dtype=str(shape.dtype).removeprefix("torch."),
        residual_dtype=str(shape.residual_dtype).removeprefix("torch."),
        autocast=shape.autocast,
        attention=shape.attention,
        row_length=shape.masked_row or shape.length,
        masked=shape.masked_row is not None,
    )

    plain = read_plain(source)
    known = None if plain is None else plain.saved_bytes(training)
    if known is not None:
        return known

    def count() -> tuple[float, float]:
        # Imported here: transformers and peft take seconds.
        from hsft.model.activations import count_saved_bytes

        return count_saved_bytes(source, training)

    origin = source_key(source)
    depends_on = None if origin is None else {**origin, **asdict(training)}
    layer, rest = remember("saved activations", depends_on, count, packages=("peft",))
    return layer, rest


def estimate(
    shape: TrainingShape,
    batch_size: int,
    per_token: tuple[float, float] | None = None,
) -> Memory:
    """Estimate the peak of a training step.

    - activations: what autograd saves, per position, in every layer; with gradient checkpointing
      (arXiv 1604.06174) each layer's input, and one layer's activations while it is recomputed.
    - logits: `catalogue`: the chunk that `losses.chunk_shape` chooses, and four float32 [T, D] of
      queries; otherwise three [T, P] float32 within the budget and three [T + P, D] of vectors.
    - workspace: the largest weight as dequantised for a product, and three MLP-wide gradients of
      all positions at the last layer's backward pass; cuBLAS's on the stream of CUDA graphs.

    Args:
        shape: the run.
        batch_size: sequences per forward pass.
        per_token: as `saved_bytes_per_token` gives, counted when None.
    """
    per_token = per_token if per_token is not None else saved_bytes_per_token(shape)
    tokens, dim = shape.positions(batch_size), shape.decoder.hidden_size
    sizes = trained_sizes(shape)
    trained = sum(sizes)
    width = 4 if shape.lora_rank is not None or shape.mixed else shape.dtype.itemsize
    memory = Memory(
        weights=weight_bytes(shape),
        # Where all weights are trained, `weights` has them.
        adapters=width * trained if shape.lora_rank is not None else 0,
        gradients=width * trained,
        optimizer=optimizer_bytes(sizes, shape.optimizer_8bit) * width // 4,
        item_table=0 if shape.items is None else _table_bytes(shape.items, dim, shape),
        activations=_activation_bytes(shape, tokens, *per_token),
        logits=_logit_bytes(shape, batch_size),
        workspace=_workspace_bytes(shape, tokens) + (_CAPTURE_WORKSPACES if shape.graph else 0),
    )
    return replace(memory, item_llm=_item_llm_bytes(shape, batch_size, memory))


def evaluation_memory(shape: TrainingShape, users: int) -> Memory:
    """Estimate the peak of ranking users among all items.

    A layer holds no more than what it would save for a backward pass. Beside the scores of as many
    users as fit in the budget stand three copies of the item vectors that are scored at a time, a
    quarter of the budget each at most.

    Args:
        shape: the run, with nothing that is trained: its `lora_rank` is None.
        users: that are encoded at a time.
    """
    dim = shape.decoder.hidden_size
    items = shape.items or 0
    tokens = users * shape.length
    ranked = min(users, users_at_a_time(items, shape.budget_bytes, dim))
    scored = min(items, items_at_a_time(dim, shape.budget_bytes, torch.device("cuda")))
    return Memory(
        weights=weight_bytes(shape),
        adapters=4 * sum(adapter_matrices(shape)),
        gradients=0,
        optimizer=0,
        item_table=_table_bytes(items, dim, shape) if items else 0,
        activations=int(tokens * sum(saved_bytes_per_token(shape))),
        logits=4 * (ranked * (items + 1 + dim) + 3 * scored * dim),
        workspace=0,
    )


def item_llm_bytes(
    shape: TrainingShape, trained: DecoderStructure, chunk_tokens: int
) -> tuple[int, int]:
    """Estimate what an ItemLLM that is trained takes.

    Args:
        shape: the ItemLLM in a UserLLM's place, with its token embedding, `length` its longest text.
        trained: the parts of it that are not kept as they are.
        chunk_tokens: positions that go through it at a time.

    Returns:
        Bytes of its weights, gradients and optimizer states, and those that a chunk needs besides.
    """
    sizes = trained_sizes(replace(shape, decoder=trained, items=None))
    width = 4 if shape.lora_rank is not None or shape.mixed else shape.dtype.itemsize
    copies = 1 if shape.lora_rank is None else 2
    held = weight_bytes(shape) + copies * width * sum(sizes)
    held += optimizer_bytes(sizes, shape.optimizer_8bit) * width // 4
    activations = _activation_bytes(shape, chunk_tokens, *saved_bytes_per_token(shape))
    return held, activations + _workspace_bytes(shape, chunk_tokens)


def _item_llm_bytes(shape: TrainingShape, batch_size: int, memory: Memory) -> int:
    """Return what a trained ItemLLM adds to the peak: a chunk comes when the UserLLM's step is over."""
    items = batch_size * shape.step_items + shape.num_negatives * (shape.step_items > 0)
    if shape.items is not None:
        items = min(items, shape.items)
    # The vectors, their gradients, and the table's gathered copies.
    vectors = 12 * items * (shape.item_width or shape.decoder.hidden_size)
    step = memory.activations + memory.logits + memory.workspace
    return shape.item_llm_bytes + vectors + max(0, shape.item_chunk_bytes - step)


def _activation_bytes(shape: TrainingShape, tokens: int, layer: float, rest: float) -> int:
    """Count what autograd keeps, given what it saves per position in a layer and beside them."""
    layers = shape.decoder.layers
    if not shape.checkpointing:
        return int(tokens * (layers * layer + rest))
    inputs = layers * shape.decoder.hidden_size * shape.residual_dtype.itemsize
    return int(tokens * (inputs + layer + rest))


def _logit_bytes(shape: TrainingShape, batch_size: int) -> int:
    tokens, dim = shape.positions(batch_size), shape.decoder.hidden_size
    if shape.negatives == "catalogue":
        count = _ANY_NUMBER if shape.items is None else shape.items
        rows, size = chunk_shape(tokens, count, dim, shape.budget_bytes)
        return 4 * (2 * rows * size + 8 * size * dim + 4 * tokens * dim)
    pool = tokens
    if shape.negatives == "sampled":
        pool = shape.num_negatives or batch_size * (shape.length + 1)
        pool += tokens if shape.negatives_logq else 0
    return min(shape.budget_bytes, 12 * tokens * pool) + 12 * (tokens + pool) * dim


def _workspace_bytes(shape: TrainingShape, tokens: int) -> int:
    widths = list(shape.decoder.linear.values())
    dequantised = max(read * given for read, given in widths) if shape.quantised else 0
    gradients = 3 * tokens * max(given for _, given in widths) * shape.residual_dtype.itemsize
    # The gradients of scores, and of what is made of them.
    gradients = max(gradients, 2 * tokens * shape.scores * shape.residual_dtype.itemsize)
    return gradients + dequantised * shape.dtype.itemsize


def largest_batch(
    shape: TrainingShape,
    bytes_available: int,
    per_token: tuple[float, float] | None = None,
) -> int:
    """Return the most sequences per forward pass that fit, 0 when not even one does.

    Args:
        shape: the run.
        bytes_available: of the card.
        per_token: as for `estimate`.
    """
    counted = saved_bytes_per_token(shape) if per_token is None else per_token

    def fits(size: int) -> bool:
        return estimate(shape, size, counted).total <= bytes_available

    low, high = 0, _LARGEST_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def targets(decoder: DecoderStructure, names: Sequence[str]) -> list[tuple[int, int]]:
    """Return the widths of the linear layers that peft would adapt."""
    return [widths for name, widths in decoder.linear.items() if is_target(name, names)]


def rows(memory: Memory) -> Iterator[tuple[str, int]]:
    """Yield (part, bytes) with the parts' names in words, the total last."""
    for part in fields(memory):
        yield part.name.replace("_", " "), getattr(memory, part.name)
    yield "total", memory.total
