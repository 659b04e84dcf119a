"""Estimate how long training steps and validations take on a card, from shapes alone.

A step's time is that of its arithmetic, of the memory it reads and writes, and of its kernels, which are
launched one by one by the processor or, as a CUDA graph, all at once. Counts follow from the shapes;
the constants below are from one H200, on which docs/performance-gpu.md says how far off the estimate is.
"""

from __future__ import annotations

from dataclasses import dataclass

from hsft.evaluator.ranking import users_at_a_time
from hsft.report.memory import TrainingShape, adapter_matrices, targets, trained_sizes


@dataclass(frozen=True)
class Card:
    """A GPU, by its data sheet.

    Attributes:
        name: as NVIDIA calls it.
        gib: GiB of memory.
        tflops: dense 16-bit products with float32 sums, in TFLOP/s.
        float32_tflops: float32 products, in TFLOP/s.
        bandwidth: of its memory, in GB/s.
    """

    name: str
    gib: int
    tflops: float
    float32_tflops: float
    bandwidth: float


# A usual card of each size of memory.
CARDS = (
    Card("RTX 3050", 6, 13.5, 6.8, 168),
    Card("RTX 4060", 8, 30.2, 15.1, 272),
    Card("RTX 3080", 10, 59.5, 29.8, 760),
    Card("RTX 3060", 12, 25.5, 12.7, 360),
    Card("RTX 4060 Ti", 16, 44.1, 22.1, 288),
    Card("RTX 4090", 24, 165.2, 82.6, 1008),
)

# Shares of the data sheet's figures that large products and element-wise kernels reach.
_REACHED_TFLOPS, _REACHED_BANDWIDTH = 0.8, 0.6
# Seconds of a kernel whose work is small; what a product of a layer takes beside its arithmetic; what
# the processor takes to launch an operation, views included; and more for bitsandbytes' own.
_KERNEL, _PRODUCT, _OPERATION, _DEQUANTISE = 2e-6, 8e-6, 14e-6, 160e-6
# Bytes read and written for each byte that is kept for the backward pass, in training and without.
_TRAFFIC, _FORWARD_TRAFFIC = 12, 5
# Bytes that AdamW reads and writes for a float32 weight: weight, gradient, two states.
_ADAMW_TRAFFIC = 28
# Operations of a step as `benchmarks/launches.py` counts them for a Llama: kernels and views of a layer,
# of a LoRA adapter, and of all the rest; then those of a forward pass in evaluation.
_LORA, _REST = (17, 23), (93, 5)
_FORWARD_LORA, _FORWARD_REST = (4, 9), (14, 1)
# Kernels and views of a layer of each kind, in training and in evaluation, counted alike. torch runs a
# transformer's layer as one operation of some twelve kernels where nothing is trained.
_LAYER = {"decoder": (62, 77), "hstu": (50, 70), "sasrec": (68, 116), "ligr": (90, 118)}
_FORWARD_LAYER = {"decoder": (24, 37), "hstu": (22, 30), "sasrec": (12, 2), "ligr": (18, 23)}
_FORWARD_DEQUANTISE_VIEWS = 3


@dataclass(frozen=True)
class Work:
    """What a GPU has to do.

    Attributes:
        products: floating-point operations of 16-bit products.
        float32: floating-point operations of float32 products.
        traffic: bytes read and written.
        kernels: kernels.
        operations: kernels and views.
        layer_products: products with a layer's weight, which are among the kernels.
        dequantisations: of 4-bit weights, which are among the kernels.
    """

    products: float
    float32: float
    traffic: float
    kernels: float
    operations: float
    layer_products: float
    dequantisations: float


def seconds(work: Work, card: Card, *, graph: bool) -> float:
    """Return the time of some work on a card.

    Args:
        work: the work.
        card: the card.
        graph: kernels are launched as a CUDA graph; else one by one, which the GPU waits for where it
            takes longer than the work.
    """
    tera = 1e12 * _REACHED_TFLOPS
    device = (
        work.products / (card.tflops * tera)
        + work.float32 / (card.float32_tflops * tera)
        + work.traffic / (card.bandwidth * 1e9 * _REACHED_BANDWIDTH)
        + work.kernels * _KERNEL
        + work.layer_products * _PRODUCT
    )
    host = work.operations * _OPERATION + work.dequantisations * _DEQUANTISE
    return device if graph else max(device, host)


def training_work(
    shape: TrainingShape, sequences: int, tokens: float, span: float, per_token: tuple[float, float]
) -> Work:
    """Count a training step.

    Products with W weights take 2 W operations a position forward, as many for the inputs' gradients,
    and as many again for the gradients of weights that are trained; frozen ones have none. LoRA's
    inputs' gradients and weights' gradients are both taken. Attention takes 4 D for a position and one
    that it sees, which is half of its span on average, forward, and twice that backward. The losses
    and item adapters compute in float32; item embeddings have no gradient.

    Args:
        shape: the run.
        sequences: of a forward pass.
        tokens: positions of a forward pass, T.
        span: positions that attention spans, on average over positions.
        per_token: as `saved_bytes_per_token` gives.
    """
    decoder = shape.decoder
    dim, linear = decoder.hidden_size, len(decoder.linear)
    weights, adapted, low_rank = _layer_weights(shape)
    passes = (2 if shape.lora_rank is not None else 3) + shape.checkpointing
    attention = (3 + shape.checkpointing) * 2 * dim * span * decoder.layers
    products = tokens * (2 * passes * weights + 6 * low_rank + attention)
    dequantisations = linear * (2 + shape.checkpointing) if _is_four_bit(shape) else 0
    layer, rest = per_token
    traffic = (
        _TRAFFIC * tokens * (decoder.layers * layer + rest)
        + (passes if shape.lora_rank is not None else 2) * _weight_traffic(shape, weights)
        + _ADAMW_TRAFFIC * sum(trained_sizes(shape))
    )
    each, again = _LAYER[shape.layer_kind], _FORWARD_LAYER[shape.layer_kind]
    kernels, views = (decoder.layers * each[n] + adapted * _LORA[n] + _REST[n] for n in (0, 1))
    if shape.checkpointing:
        kernels += decoder.layers * again[0] + adapted * _FORWARD_LORA[0]
        views += decoder.layers * again[1] + adapted * _FORWARD_LORA[1]
    half, float32 = _by_precision(shape, products)
    return Work(
        products=half,
        float32=float32 + _loss_products(shape, sequences, tokens),
        traffic=traffic,
        kernels=kernels + dequantisations,
        operations=kernels + dequantisations + views,
        layer_products=passes * linear,
        dequantisations=dequantisations,
    )


def _by_precision(shape: TrainingShape, products: float) -> tuple[float, float]:
    """Return a model's products of 16 bits, and those in float32."""
    return (products, 0.0) if shape.mixed or shape.dtype.itemsize == 2 else (0.0, products)


def _layer_weights(shape: TrainingShape) -> tuple[int, int, int]:
    """Return the weights of all linear layers, how many have LoRA, and the weights of LoRA."""
    decoder = shape.decoder
    weights = sum(read * given for read, given in decoder.linear.values())
    if shape.lora_rank is None:
        return weights, 0, 0
    adapted = targets(decoder, shape.lora_targets)
    return weights, len(adapted), shape.lora_rank * sum(read + given for read, given in adapted)


def _is_four_bit(shape: TrainingShape) -> bool:
    return shape.quantised and shape.quant_type != "int8"


def _weight_traffic(shape: TrainingShape, weights: int) -> float:
    """Return the bytes that a product with every weight reads and writes for the weights."""
    size = shape.dtype.itemsize
    if not shape.quantised:
        return weights * shape.weight_dtype.itemsize
    return weights * ((1 if shape.quant_type == "int8" else 0.5) + 2 * size)


def _loss_products(shape: TrainingShape, sequences: int, tokens: float) -> float:
    """Count the products of the loss and of the item adapter, forward and backward."""
    dim, weights = shape.decoder.hidden_size, sum(adapter_matrices(shape))
    trained = weights > 0 or shape.id_vectors
    # The batch's items, each once: one more a sequence than positions.
    adapter = 4 * weights * (tokens + sequences)
    if shape.negatives == "catalogue":
        # Scores and adapted items are computed again in the backward pass.
        items = shape.items or 0
        return adapter + items * (6 * weights + (8 if trained else 6) * tokens * dim)
    pool, drawn = tokens, 0.0
    if shape.negatives == "sampled":
        drawn = shape.num_negatives or sequences * (shape.length + 1)
        pool = drawn + (tokens if shape.negatives_logq else 0)
    # Scores, and the cosines with the positives, which mask.
    return adapter + 4 * weights * drawn + (8 if trained else 6) * tokens * pool * dim


def validation_work(
    shape: TrainingShape, users: int, positions: float, batch: int, per_token: tuple[float, float]
) -> Work:
    """Count the ranking of users among all items.

    Args:
        shape: the run; the catalogue is taken as one item where it is not known.
        users: number of them.
        positions: of their histories, on average.
        batch: users that are encoded at a time.
        per_token: as `saved_bytes_per_token` gives.
    """
    decoder = shape.decoder
    dim, linear = decoder.hidden_size, len(decoder.linear)
    weights, adapted, low_rank = _layer_weights(shape)
    items = shape.items or 1
    tokens = users * positions
    batches = -(-users // batch)
    groups = -(-users // min(batch, users_at_a_time(items, shape.budget_bytes, dim)))
    layer, rest = per_token
    dequantisations = batches * linear if _is_four_bit(shape) else 0
    kernels, views = (
        batches
        * (
            decoder.layers * _FORWARD_LAYER[shape.layer_kind][n]
            + adapted * _FORWARD_LORA[n]
            + _FORWARD_REST[n]
        )
        for n in (0, 1)
    )
    half, float32 = _by_precision(
        shape, tokens * (2 * weights + 2 * low_rank + 2 * dim * positions * decoder.layers)
    )
    return Work(
        products=half,
        float32=float32
        + 2 * items * dim * users
        + groups * 2 * sum(adapter_matrices(shape)) * items,
        traffic=_FORWARD_TRAFFIC * tokens * (decoder.layers * layer + rest)
        + batches * _weight_traffic(shape, weights)
        # Item vectors are read, normalised and scored; scores are written, masked and compared.
        + groups * items * dim * (shape.item_bytes + 16)
        + 12 * users * items,
        kernels=kernels + dequantisations,
        operations=kernels + views + dequantisations * (1 + _FORWARD_DEQUANTISE_VIEWS),
        layer_products=batches * linear,
        dequantisations=dequantisations,
    )
