"""Estimate the GPU memory of fine-tuning from shapes alone: no weights are loaded, no GPU is used.

Weights are counted on torch's meta device, so the parameter count is exact for any architecture that
transformers knows. Activations are counted, not guessed: one and two layers of the model run with
fake tensors, and every tensor that autograd saves is added up; further layers save the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from hsft.model.backbone import is_target, keep_layers, linear_layers
from hsft.model.losses import chunk_shape
from hsft.utils.errors import InputError, brief, one_line

GIB = 1 << 30
MIB = 1 << 20
# The driver's and cuBLAS's own memory, which no allocator statistic shows.
CUDA_CONTEXT = 600 * MIB
# bitsandbytes quantises blocks of 64 weights.
_BLOCK = 64
_TABLES = 4 * 16
# bitsandbytes keeps 32-bit state for tensors smaller than this; larger ones have blocks of 256.
_SMALLEST_8BIT, _STATE_BLOCK = 4096, 256
# Rows of the fake batch: enough that what is saved once a layer hardly counts.
_ROWS = 256
_NO_MASK = "sdpa_without_mask"
_LARGEST_BATCH = 1 << 16
# Items of a catalogue not known: more than any budget of logits takes at once.
_ANY_NUMBER = 1 << 40

AttentionInterface.register(_NO_MASK, sdpa_attention_forward)
AttentionMaskInterface.register(_NO_MASK, lambda *_, **__: None)

QuantType = Literal["nf4", "fp4", "int8", "none"]


@dataclass(frozen=True)
class TrainingShape:
    """What a fine-tuning run's memory depends on.

    Attributes:
        model_config: transformers config, cut to the layers in use and without vocabulary.
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
    """

    model_config: Any
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
    mean_length: float | None = None
    length_deviation: float = 0.0
    negatives_logq: bool = False
    item_llm_bytes: int = 0
    item_chunk_bytes: int = 0
    step_items: int = 0

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


def meta_decoder(model_config: Any, trust_remote_code: bool = False) -> nn.Module:
    """Build the decoder on torch's meta device: shapes without numbers.

    Args:
        model_config: as `decoder_config` gives.
        trust_remote_code: let transformers run code from the model's folder.

    Raises:
        InputError: no model can be built so.
    """
    try:
        with torch.device("meta"):
            # Every model has eager attention, and nothing is computed.
            model: nn.Module = AutoModel.from_config(
                model_config, attn_implementation="eager", trust_remote_code=trust_remote_code
            )
    except Exception as error:  # models and layers raise many kinds for sizes that do not fit
        raise InputError(
            f"the config.json of {model_config.name_or_path} describes a model of type "
            f"{one_line(model_config.model_type, 40)} that cannot be built: {brief(error)}."
        ) from error
    return model


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


def weight_bytes(model: nn.Module, shape: TrainingShape) -> int:
    """Return the bytes of the decoder's weights, LoRA not counted. `model`: see `meta_decoder`."""
    total = 0
    linear = {id(module.weight): module for module in linear_layers(model).values()}
    for weight in model.parameters():
        module = linear.get(id(weight))
        if module is not None and shape.quantised:
            total += quantised_bytes(weight.numel(), _widths(module)[1], shape.quant_type)
        else:
            kind = shape.weight_dtype if module is not None else shape.residual_dtype
            total += weight.numel() * kind.itemsize
    return total


def trained_sizes(model: nn.Module, shape: TrainingShape) -> list[int]:
    """Return the number of weights of every trained tensor: LoRA's A and B, or all; item adapter."""
    sizes = [1]
    dim = int(shape.model_config.hidden_size)
    if shape.lora_rank is None:
        sizes += [weight.numel() for weight in model.parameters() if weight.requires_grad]
    for module in targets(model, shape.lora_targets) if shape.lora_rank is not None else ():
        assert shape.lora_rank is not None
        sizes += [shape.lora_rank * width for width in _widths(module)]
    width = shape.item_width or dim
    if shape.adapter == "linear":
        sizes.append(dim * width)
    elif shape.adapter == "lowrank":
        sizes += [width * shape.adapter_rank, dim * shape.adapter_rank]
    elif shape.adapter == "mlp":
        sizes += [dim * width, dim, dim * dim, dim] + [dim * width] * (width != dim)
    if shape.id_vectors and shape.items is not None:
        sizes.append((shape.items + 1) * dim)
    return sizes


def _table_bytes(items: int, dim: int, shape: TrainingShape) -> int:
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
    """Count what autograd saves for the backward pass, with a fake model of one and two layers.

    Returns:
        (bytes per position and layer, bytes per position outside the layers).
    """
    one, two = (_saved(shape, layers) for layers in (1, 2))
    positions = _ROWS * (shape.masked_row or shape.length)
    return (two - one) / positions, (2 * one - two) / positions


def estimate(
    shape: TrainingShape,
    batch_size: int,
    model: nn.Module | None = None,
    per_token: tuple[float, float] | None = None,
) -> Memory:
    """Estimate the peak of a training step.

    - activations: what autograd saves, per position, in every layer; with gradient checkpointing
      (arXiv 1604.06174) each layer's input, and one layer's activations while it is recomputed.
    - logits: `catalogue`: the chunk that `losses.chunk_shape` chooses, and four float32 [T, D] of
      queries; otherwise three [T, P] float32 within the budget and three [T + P, D] of vectors.
    - workspace: the largest weight as dequantised for a product, and three MLP-wide gradients of
      all positions at the last layer's backward pass.

    Args:
        shape: the run.
        batch_size: sequences per forward pass.
        model: as `meta_decoder` gives, built when None.
        per_token: as `saved_bytes_per_token` gives, counted when None.
    """
    model = meta_decoder(shape.model_config) if model is None else model
    per_token = per_token if per_token is not None else saved_bytes_per_token(shape)
    tokens, dim = shape.positions(batch_size), shape.model_config.hidden_size
    sizes = trained_sizes(model, shape)
    trained = sum(sizes)
    width = 4 if shape.lora_rank is not None or shape.mixed else shape.dtype.itemsize
    memory = Memory(
        weights=weight_bytes(model, shape),
        # Where all weights are trained, `weights` has them.
        adapters=width * trained if shape.lora_rank is not None else 0,
        gradients=width * trained,
        optimizer=optimizer_bytes(sizes, shape.optimizer_8bit) * width // 4,
        item_table=0 if shape.items is None else _table_bytes(shape.items, dim, shape),
        activations=_activation_bytes(shape, tokens, *per_token),
        logits=_logit_bytes(shape, batch_size),
        workspace=_workspace_bytes(shape, tokens, model),
    )
    return replace(memory, item_llm=_item_llm_bytes(shape, batch_size, memory))


def item_llm_bytes(shape: TrainingShape, model: nn.Module, chunk_tokens: int) -> tuple[int, int]:
    """Estimate what an ItemLLM that is trained takes.

    Args:
        shape: the ItemLLM in a UserLLM's place, with its token embedding, `length` its longest text.
        model: as `meta_decoder` gives; what does not require a gradient is not trained.
        chunk_tokens: positions that go through it at a time.

    Returns:
        Bytes of its weights, gradients and optimizer states, and those that a chunk needs besides.
    """
    held = estimate(replace(shape, items=None), 1, model, (0.0, 0.0))
    activations = _activation_bytes(shape, chunk_tokens, *saved_bytes_per_token(shape))
    return (
        held.weights + held.adapters + held.gradients + held.optimizer,
        activations + _workspace_bytes(shape, chunk_tokens, model),
    )


def _item_llm_bytes(shape: TrainingShape, batch_size: int, memory: Memory) -> int:
    """Return what a trained ItemLLM adds to the peak: a chunk comes when the UserLLM's step is over."""
    items = batch_size * shape.step_items + shape.num_negatives * (shape.step_items > 0)
    if shape.items is not None:
        items = min(items, shape.items)
    # The vectors, their gradients, and the table's gathered copies.
    vectors = 12 * items * (shape.item_width or int(shape.model_config.hidden_size))
    step = memory.activations + memory.logits + memory.workspace
    return shape.item_llm_bytes + vectors + max(0, shape.item_chunk_bytes - step)


def _activation_bytes(shape: TrainingShape, tokens: int, layer: float, rest: float) -> int:
    """Count what autograd keeps, given what it saves per position in a layer and beside them."""
    layers = shape.model_config.num_hidden_layers
    if not shape.checkpointing:
        return int(tokens * (layers * layer + rest))
    inputs = layers * shape.model_config.hidden_size * shape.residual_dtype.itemsize
    return int(tokens * (inputs + layer + rest))


def _logit_bytes(shape: TrainingShape, batch_size: int) -> int:
    tokens, dim = shape.positions(batch_size), shape.model_config.hidden_size
    if shape.negatives == "catalogue":
        count = _ANY_NUMBER if shape.items is None else shape.items
        rows, size = chunk_shape(tokens, count, dim, shape.budget_bytes)
        return 4 * (2 * rows * size + 8 * size * dim + 4 * tokens * dim)
    pool = tokens
    if shape.negatives == "sampled":
        pool = shape.num_negatives or batch_size * (shape.length + 1)
        pool += tokens if shape.negatives_logq else 0
    return min(shape.budget_bytes, 12 * tokens * pool) + 12 * (tokens + pool) * dim


def _workspace_bytes(shape: TrainingShape, tokens: int, model: nn.Module) -> int:
    widths = [_widths(module) for module in linear_layers(model).values()]
    dequantised = max(read * given for read, given in widths) if shape.quantised else 0
    gradients = 3 * tokens * max(given for _, given in widths) * shape.residual_dtype.itemsize
    return gradients + dequantised * shape.dtype.itemsize


def largest_batch(
    shape: TrainingShape,
    bytes_available: int,
    model: nn.Module | None = None,
    per_token: tuple[float, float] | None = None,
) -> int:
    """Return the most sequences per forward pass that fit, 0 when not even one does.

    Args:
        shape: the run.
        bytes_available: of the card.
        model, per_token: as for `estimate`.
    """
    model = meta_decoder(shape.model_config) if model is None else model
    counted = saved_bytes_per_token(shape) if per_token is None else per_token

    def fits(size: int) -> bool:
        return estimate(shape, size, model, counted).total <= bytes_available

    low, high = 0, _LARGEST_BATCH
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def targets(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Return the linear layers that peft would adapt."""
    return [module for name, module in linear_layers(model).items() if is_target(name, names)]


class _Quantised(nn.Linear):
    """Saves what bitsandbytes' layers save: inputs in the compute type, outputs in the input's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


class _QuantisedConv1D(Conv1D):
    """The same for GPT-2's layers, whose weight is the transpose of a linear layer's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight.T, self.bias).to(x.dtype)


class _NormSaves(torch.autograd.Function):
    """Saves what torch's RMS norm saves on a GPU: its input, and a float32 per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("only what is saved is counted")


class _Norm(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _NormSaves.apply(x, self.weight)
        return result


def _with_fused_norms(model: nn.Module) -> nn.Module:
    """Replace the norms of the kinds that `norms.fuse_norms` replaces in a model with weights."""
    for parent in list(model.modules()):
        for name, module in parent.named_children():
            weight: Any = getattr(module, "weight", None)
            plain = hasattr(module, "variance_epsilon") and "RMSNorm" in type(module).__name__
            if plain and weight is not None:
                setattr(parent, name, _Norm(weight))
    return model


def _widths(module: nn.Module) -> tuple[int, int]:
    """Return how many numbers a linear layer reads and gives."""
    if isinstance(module, Conv1D):
        read, given = module.weight.shape
        return read, given
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _saved(shape: TrainingShape, layers: int) -> int:
    """Count the bytes that autograd saves in a fake model's forward pass over `_ROWS` rows.

    With a mask, transformers' sdpa repeats keys and values for grouped queries; without one, as in
    the flash kernels, it does not. For eager attention transformers always makes one itself.
    """
    config = copy.deepcopy(shape.model_config)
    keep_layers(config, layers)
    eager = shape.attention == "eager"
    masked = shape.masked_row is not None and not eager
    with torch.device("meta"):
        plain = AutoModel.from_config(
            config,
            attn_implementation=shape.attention if masked or eager else _NO_MASK,
            dtype=shape.residual_dtype,
        )
        model = _adapted(_with_fused_norms(plain), shape).train()
    with FakeTensorMode():
        _without_storage(model)
        length = shape.masked_row or shape.length
        vectors = torch.zeros(
            _ROWS, length, config.hidden_size, dtype=shape.residual_dtype, requires_grad=True
        )
        # Positions too: some models would count them from a mask of another shape.
        given = {
            "attention_mask": torch.zeros(_ROWS, 1, length, length, dtype=torch.bool),
            "position_ids": torch.arange(length).expand(_ROWS, length),
        }
        weights = {_storage(weight) for weight in [*model.parameters(), *model.buffers()]}
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            key = _storage(tensor)
            if key not in weights and tensor.ndim > 1:
                saved[key] = max(saved.get(key, 0), tensor.untyped_storage().nbytes())
                kept.append(tensor)
            return tensor

        kept: list[Tensor] = []
        # The autocast type of the GPU is what counts; fake tensors are on the CPU, which has no
        # float16 mode, and both types have two bytes.
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=shape.autocast)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), mixed:
            model(inputs_embeds=vectors, use_cache=False, **(given if masked else {}))
    return sum(saved.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _without_storage(model: nn.Module) -> None:
    """Replace a meta model's tensors by fake ones of the CPU: autocast does not act on meta."""
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _adapted(model: nn.Module, shape: TrainingShape) -> nn.Module:
    """Give a decoder the number types and the LoRA matrices that training has."""
    half = torch.bfloat16 if shape.dtype == torch.float16 else shape.dtype
    for module in linear_layers(model).values() if shape.quantised else ():
        weight: Any = module.weight
        module.weight = nn.Parameter(weight.detach().to(half), requires_grad=False)
        module.__class__ = _QuantisedConv1D if isinstance(module, Conv1D) else _Quantised
    if shape.lora_rank is None:
        return model
    from peft import LoraConfig, get_peft_model

    from hsft.model.fast_layers import use_fast_lora_layers

    names = list(shape.lora_targets)
    chosen: Any = "all-linear" if names == ["all-linear"] else names
    settings = LoraConfig(r=shape.lora_rank, lora_dropout=0.05, target_modules=chosen)
    if shape.quant_type != "int8":
        use_fast_lora_layers(settings)
    adapted: nn.Module = get_peft_model(model, settings)
    return adapted


def rows(memory: Memory) -> Iterator[tuple[str, int]]:
    """Yield (part, bytes) with the parts' names in words, the total last."""
    for part in fields(memory):
        yield part.name.replace("_", " "), getattr(memory, part.name)
    yield "total", memory.total
