"""Training losses on user vectors and item vectors.

Shapes: T scored positions, P negatives in a shared pool, I items in the catalogue, D dimensions.
All losses compute logits in float32 whatever dtype comes in.

Cut Cross-Entropy and Liger, the kernel libraries for this on CUDA, are not used. Both want all item
vectors as one matrix [I, D], here the normalised, adapted float32 copy that `catalogue_softmax`
avoids. Cut Cross-Entropy works on 16-bit inputs: under a scale of up to 100 the cosines' rounding of
2^-9 moves a logit by up to 0.2. Liger still writes out logits over the whole catalogue for a block
of positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

LOGIT_SCALE_INIT = math.log(1 / 0.07)
LOGIT_SCALE_MAX = math.log(100)

# Positions of a chunk of items, and of a block where all items' vectors are held.
_FEWEST_POSITIONS = 4096
_FEWEST_ROWS = 256
_FLOATS_PER_ITEM_VALUE = 8


def normalize(vectors: Tensor) -> Tensor:
    """Scale rows to unit length in float32; a zero row stays zero. Shape is kept."""
    return F.normalize(vectors.float(), dim=-1)


def info_nce(
    queries: Tensor,
    positives: Tensor,
    pool: Tensor,
    logit_scale: Tensor,
    nce_thres: float = 0.99,
    excluded: Tensor | None = None,
    budget_bytes: int = 1 << 28,
    weights: Tensor | None = None,
    item_ids: tuple[Tensor, Tensor] | None = None,
    counts: Tensor | None = None,
    log_counts: Tensor | None = None,
    *,
    cosine: bool = True,
) -> Tensor:
    """HLLM's InfoNCE (arXiv 2409.12740, eq. 2 and its public code).

    Mean over positions of -log softmax of the positive among itself and the pool, with logits
    exp(logit_scale) * cosine. A pool item whose cosine with the positive exceeds `nce_thres`
    is taken for the positive itself and masked for that position.

    With `log_counts` it estimates the softmax over the whole catalogue. The pool is a sample in
    which item j is expected n_j times; a position with the score s+ of its positive, and scores s_j
    of the pool's items, costs log(e^s+ + sum_j e^s_j / n_j) - s+. The sum over the pool is an
    unbiased estimate of the one over all other items (importance sampling: Bengio and Senecal 2008,
    IEEE TNN 19 (4)). For in-batch negatives n_j grows with an item's popularity (Yi et al. 2019,
    RecSys, who correct the positive as well; it is no sample and is left as it is here).

    Args:
        queries: [T, D] user vectors.
        positives: [T, D] item vectors of the next items.
        pool: [P, D] item vectors of the negatives; the very tensor `positives` is normalised once.
        logit_scale: scalar, log of the factor; the caller keeps it in [0, ln 100].
        nce_thres: cosine above which a negative is masked.
        excluded: bool [T, P] further (position, negative) pairs to mask, or None.
        budget_bytes: for the [T, P] float32 matrices held at once; larger ones are computed in
            blocks of positions.
        weights: float32 [T], 1 for positions that count, 0 for others; None: all count.
        item_ids: int64 [T] of the positives and int64 [P] of the pool: a position's own item is no
            negative, whatever `nce_thres` is and however its vectors differ. None: not known.
        counts: int64 [4], to which `count_negatives` of this call is added; None: not counted.
        log_counts: float32 [P], log n_j of the pool's items, without gradient; None: not corrected.
        cosine: score by cosine; else by dot product, under which `nce_thres` masks nothing.

    Returns:
        Scalar float32; 0 when no position counts.
    """
    same = pool is positives
    scored = normalize if cosine else Tensor.float
    queries, positives = scored(queries), scored(positives)
    pool = positives if same else scored(pool)

    @torch.no_grad()
    def mask(
        p: Tensor, w: Tensor, ids: Tensor, pool: Tensor, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        same = ids.unsqueeze(1) == pool_ids
        masked = same if out is None else same | out
        if cosine:
            masked = masked | (p @ pool.T > nce_thres)
        if counts is None:
            return masked, w.new_zeros(4, dtype=torch.int64)
        return masked, count_negatives(masked, out, same, w)

    def block(
        q: Tensor,
        p: Tensor,
        w: Tensor,
        ids: Tensor,
        pool: Tensor,
        scale: Tensor,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        masked, negatives = mask(p, w, ids, pool, out)
        negative = (q @ pool.T) * scale.exp()
        if log_counts is not None:
            negative = negative - log_counts
        negative = negative.masked_fill(masked, -torch.inf)
        positive = (q * p).sum(dim=-1, keepdim=True) * scale.exp()
        logits = torch.cat([positive, negative], dim=-1)
        labels = logits.new_zeros(len(q), dtype=torch.long)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return (losses * w).sum(), negatives

    weighted = _ones(queries) if weights is None else weights
    ids, pool_ids = item_ids or (_ones(queries), -_ones(pool))
    total, negatives = _sum_in_blocks(
        block,
        (queries, positives, weighted, ids),
        (pool, logit_scale),
        excluded,
        _block_size(3 * len(pool), budget_bytes),
    )
    if counts is not None:
        counts += negatives
    return total / _number_of_terms(queries, weights)


def count_negatives(
    masked: Tensor, fillers: Tensor | None, same_item: Tensor, weights: Tensor
) -> Tensor:
    """Count how many negatives a loss masks, without waiting for the device.

    Args:
        masked: bool [T, P], (position, negative) pairs that do not count, `fillers` among them.
        fillers: bool [T, P], pairs that only fill up the matrix, or None.
        same_item: bool [T, P], pairs whose negative is the position's own positive: it is no
            negative, masked or not.
        weights: float32 [T], 1 for positions that count, 0 for others.

    Returns:
        int64 [4]: masked pairs and all pairs, both without `fillers` and `same_item`; positions
        without a negative left, and all positions.
    """
    other = ~same_item if fillers is None else ~(same_item | fillers)
    per_position = ((masked & other).sum(dim=1), other.sum(dim=1), masked.all(dim=1))
    real = weights.long()
    return torch.stack([*((count * real).sum() for count in per_position), real.sum()])


def _ones(queries: Tensor) -> Tensor:
    return torch.ones(len(queries), device=queries.device)


def _number_of_terms(queries: Tensor, weights: Tensor | None) -> int | Tensor:
    return max(len(queries), 1) if weights is None else weights.sum().clamp_min(1)


class Catalogue(Protocol):
    """Item vectors that are computed a piece at a time, when they are asked for."""

    @property
    def num_items(self) -> int:
        """Number of items I."""

    @property
    def dim(self) -> int:
        """Dimension D."""

    @property
    def is_frozen(self) -> bool:
        """Whether no gradient goes through the vectors."""

    def chunks(self, size: int) -> list[Callable[[], Tensor]]:
        """Return one function per `size` items; calling it gives their vectors [size, D]."""


class _Matrix:
    """A tensor of item vectors [I, D] as a `Catalogue`."""

    def __init__(self, vectors: Tensor) -> None:
        self._vectors = vectors
        self.num_items, self.dim = vectors.shape
        self.is_frozen = not vectors.requires_grad

    def chunks(self, size: int) -> list[Callable[[], Tensor]]:
        return split_chunks(self._vectors, size)


def split_chunks(vectors: Tensor, size: int) -> list[Callable[[], Tensor]]:
    """Return the chunks of a matrix [I, D] that is there already, as a `Catalogue` gives them."""
    # One split, not many slices: each slice's gradient would be a whole [I, D] of zeros.
    return [partial(_itself, piece) for piece in vectors.split(size)]


def _itself(piece: Tensor) -> Tensor:
    return piece


def catalogue_softmax(
    queries: Tensor,
    items: Tensor | Catalogue,
    targets: Tensor,
    logit_scale: Tensor,
    *,
    cosine: bool = True,
    budget_bytes: int = 1 << 28,
    weights: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy of the next item against every item of the catalogue.

    Neither the logits [T, I] nor a float32 copy of the catalogue [I, D] need be held at once. Where
    the copy fits, the loss is summed over blocks of positions. Else the softmax goes through chunks
    of items: of frozen ones once, with the gradient of the queries summed up along with the
    denominator; where items have gradients too, what a chunk needs is computed again in the backward
    pass, which knows the denominator of all chunks.

    Args:
        queries: [T, D] user vectors.
        items: [I, D] item vectors, or a `Catalogue` that computes them in chunks.
        targets: int64 [T], index into `items` of the next item.
        logit_scale: scalar, log of the factor on the scores.
        cosine: score by cosine; else by dot product.
        budget_bytes: memory for chunks of logits and item vectors, in forward and backward pass.
            Beside it there are float32 [T, D] of queries, and [T] per chunk.
        weights: float32 [T], 1 for positions that count, 0 for others; None: all count.

    Returns:
        Scalar float32, the mean over positions; 0 when none counts.
    """
    catalogue = _Matrix(items) if isinstance(items, Tensor) else items
    scored = normalize if cosine else Tensor.float
    queries = scored(queries) * logit_scale.exp()
    rows, size = chunk_shape(len(queries), catalogue.num_items, catalogue.dim, budget_bytes)
    pieces = catalogue.chunks(size)
    if not len(queries):
        return queries.sum()

    def chunk(q: Tensor, local: Tensor, piece: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        return _ChunkScores.apply(q, scored(piece()), local)

    def block(q: Tensor, t: Tensor, w: Tensor, vectors: Tensor, _: None) -> tuple[Tensor]:
        normalizers, positives = _ChunkScores.apply(q, vectors, t)
        return (((normalizers - positives) * w).sum(),)

    if len(pieces) == 1:
        counted = _ones(queries) if weights is None else weights
        shared = (scored(pieces[0]()),)
        (total,) = _sum_in_blocks(block, (queries, targets, counted), shared, None, rows)
        return total / _number_of_terms(queries, weights)
    total = queries.new_zeros(())
    for start in range(0, len(queries), rows):
        q, t = queries[start : start + rows], targets[start : start + rows]
        if catalogue.is_frozen:
            terms = _FrozenSoftmax.apply(q, t, pieces, size, scored)
        else:
            chunks = [
                _recompute(chunk, q, t - number * size, piece)
                for number, piece in enumerate(pieces)
            ]
            normalizers, positives = zip(*chunks, strict=True)
            terms = torch.stack(normalizers).logsumexp(dim=0) - torch.stack(positives).sum(dim=0)
        total = total + (terms if weights is None else terms * weights[start : start + rows]).sum()
    return total / _number_of_terms(queries, weights)


def _recompute(block: Callable[..., Any], *values: Any) -> Any:
    """Compute a block, and compute it again in the backward pass instead of keeping what it needs."""
    # Nothing in a block is random, and saving a GPU's generator would wait for the device.
    return checkpoint(block, *values, use_reentrant=False, preserve_rng_state=False)


def chunk_shape(positions: int, items: int, dim: int, budget_bytes: int) -> tuple[int, int]:
    """Choose how many positions and how many items `catalogue_softmax` takes at a time.

    A chunk of n items and m positions holds at most 2 m n floats of logits (the matrix and the
    gradient that is made of it) and 8 n D floats of item vectors (stored, adapted, summed,
    normalised, and the gradients of these).

    Returns:
        (positions, items) per chunk, each at least 1.
    """
    floats = budget_bytes // 4
    rows = min(positions, (floats - _FLOATS_PER_ITEM_VALUE * items * dim) // (2 * max(1, items)))
    if rows >= min(positions, _FEWEST_ROWS):
        return max(1, rows), max(1, items)
    # Few item vectors per chunk would be recomputed for every block of positions.
    rows = max(1, min(positions, max(4 * dim, _FEWEST_POSITIONS), floats // 16))
    return rows, max(1, min(items, floats // (2 * rows + _FLOATS_PER_ITEM_VALUE * dim)))


class _FrozenSoftmax(torch.autograd.Function):
    """Cross-entropy against chunks of items without gradient, each of which is read once.

    Inputs: q [m, D] scaled queries, targets int64 [m], one function per chunk of `size` items, and
    what makes of their vectors those that are scored.
    Output: each position's loss, log sum_j exp(q v_j) - q v_target [m].

    The gradient of a loss, sum_j softmax_j v_j - v_target, is a weighted sum as in attention: summed
    up chunk by chunk relative to the largest score so far (online softmax: Milakov and Gimelshein
    2018, arXiv 1805.02867).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        targets: Tensor,
        pieces: list[Callable[[], Tensor]],
        size: int,
        scored: Callable[[Tensor], Tensor],
    ) -> Tensor:
        largest = q.new_full((len(q), 1), -torch.inf)
        total, positive = q.new_zeros(len(q), 1), q.new_zeros(len(q))
        # Of the gradient: the sum over all items, and the target's vector.
        summed, target = torch.zeros_like(q), torch.zeros_like(q)
        for number, piece in enumerate(pieces):
            v = scored(piece())
            scores = q @ v.T
            index, inside, of_target = _pick_targets(scores, targets - number * size)
            positive += of_target
            before, largest = largest, torch.maximum(largest, scores.amax(dim=1, keepdim=True))
            shrunk = (before - largest).exp_()
            weights = scores.sub_(largest).exp_()
            total = total.mul_(shrunk).add_(weights.sum(dim=1, keepdim=True))
            if ctx.needs_input_grad[0]:
                summed.mul_(shrunk).addmm_(weights, v)
                target.addcmul_(v[index], inside.unsqueeze(1))
        ctx.save_for_backward(summed.div_(total).sub_(target))
        return (total.log() + largest).squeeze(1) - positive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * factor.unsqueeze(1), None, None, None, None


def _pick_targets(scores: Tensor, local: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of each position the target's index in a chunk, whether it is there, and its score.

    Args:
        scores: float32 [m, n].
        local: int64 [m], the target's index in the chunk; outside 0..n-1: it is in another chunk.

    Returns:
        int64 [m], within 0..n-1; bool [m]; float32 [m], 0 for targets of other chunks.
    """
    count = scores.shape[1]
    inside = (local >= 0) & (local < count)
    index = local.clamp(0, count - 1)
    positive = scores.gather(1, index.unsqueeze(1)).squeeze(1).masked_fill(~inside, 0.0)
    return index, inside, positive


class _ChunkScores(torch.autograd.Function):
    """Scores of positions against a chunk of items, reduced to what cross-entropy needs.

    Inputs: q [m, D] scaled queries, v [n, D] item vectors, local int64 [m], the target's index in
    the chunk (outside 0..n-1: the target is in another chunk).
    Outputs: log sum_j exp(q v_j) [m], and the target's score [m], 0 where it is elsewhere.

    Holds one [m, n] matrix where cross_entropy on q v' holds three in its backward pass: the
    softmax replaces the logits in place, and upstream gradients, being per row, are applied to
    the [m, D] side of the products.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, v: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ v.T
        index, inside, positive = _pick_targets(scores, local)
        largest = scores.amax(dim=1, keepdim=True)
        weights = scores.sub_(largest).exp_()
        summed = weights.sum(dim=1, keepdim=True)
        ctx.save_for_backward(q, v, index, inside, weights.div_(summed))
        return (summed.log() + largest).squeeze(1), positive

    @staticmethod
    def backward(
        ctx: Any, g_total: Tensor, g_positive: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        q, v, index, inside, softmax = ctx.saved_tensors
        g_total, g_positive = g_total.unsqueeze(1), (g_positive * inside).unsqueeze(1)
        g_q = g_v = None
        if ctx.needs_input_grad[0]:
            g_q = (softmax @ v).mul_(g_total).addcmul_(v[index], g_positive)
        if ctx.needs_input_grad[1]:
            g_v = (softmax.T @ (q * g_total)).index_add_(0, index, q * g_positive)
        return g_q, g_v, None


def binary_cross_entropy(
    queries: Tensor,
    positives: Tensor,
    pool: Tensor,
    excluded: Tensor | None = None,
    budget_bytes: int = 1 << 28,
    weights: Tensor | None = None,
) -> Tensor:
    """The published HSFT's loss: BCEWithLogits on dot products, label 1 for the positive.

    Args:
        queries: [T, D] user vectors.
        positives: [T, D] item vectors of the next items.
        pool: [P, D] item vectors of the negatives, label 0.
        excluded: bool [T, P], (position, negative) pairs that do not count, such as a negative
            that is the positive itself; or None.
        budget_bytes: as for `info_nce`.
        weights: float32 [T], 0 for positions whose pair with the positive does not count, 1 for the
            others; None: all count. Their pairs with the pool are left out by `excluded`.

    Returns:
        Scalar float32: the mean over all (position, item) pairs that count; 0 when none does.
    """
    queries, positives, pool = queries.float(), positives.float(), pool.float()

    def block(q: Tensor, p: Tensor, w: Tensor, pool: Tensor, out: Tensor | None) -> tuple[Tensor]:
        positive = (F.softplus(-(q * p).sum(dim=-1)) * w).sum()
        negative = F.softplus(q @ pool.T)
        return (positive + (negative if out is None else negative.masked_fill(out, 0.0)).sum(),)

    counted = _ones(queries) if weights is None else weights
    pairs = counted.sum() + len(queries) * len(pool)
    if excluded is not None:
        pairs = pairs - excluded.sum()
    size = _block_size(2 * len(pool), budget_bytes)
    (total,) = _sum_in_blocks(block, (queries, positives, counted), (pool,), excluded, size)
    return total / pairs.clamp_min(1)


def _block_size(floats_per_row: int, budget_bytes: int) -> int:
    """Return how many rows keep their matrices within the budget."""
    return max(1, budget_bytes // max(1, floats_per_row * 4))


def _sum_in_blocks(
    block: Callable[..., tuple[Tensor, ...]],
    rows: tuple[Tensor, ...],
    shared: tuple[Tensor, ...],
    excluded: Tensor | None,
    size: int,
) -> tuple[Tensor, ...]:
    """Sum what `block` returns over blocks of rows.

    Args:
        block: given slices of the rows, the shared tensors and a slice of `excluded`, returns a
            scalar with gradient and tensors without.
        rows: tensors [T, ...].
        shared: tensors that every block reads.
        excluded: [T, P] or None.
        size: rows of a block.
    """
    if len(rows[0]) <= size:
        return block(*rows, *shared, excluded)
    sums: tuple[Tensor, ...] = _BlockSums.apply(block, size, excluded, len(rows), *rows, *shared)
    return sums


class _BlockSums(torch.autograd.Function):
    """Sums over blocks of rows, whose gradients are computed along with them, block by block.

    A loss is a scalar, so its gradient is known but for a factor as soon as it is computed. Nothing
    of a block has to be kept for the backward pass, nor computed twice.

    Outputs: the scalar that has a gradient, and the sums that have none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        block: Callable[..., tuple[Tensor, ...]],
        size: int,
        excluded: Tensor | None,
        num_rows: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        needed = ctx.needs_input_grad[-len(tensors) :]
        gradients = [
            torch.zeros_like(tensor) if need else None
            for tensor, need in zip(tensors, needed, strict=True)
        ]
        totals: list[Tensor] = []
        for start in range(0, len(tensors[0]), size):
            part = slice(start, start + size)
            leaves = [
                (tensor[part] if number < num_rows else tensor).detach().requires_grad_(need)
                for number, (tensor, need) in enumerate(zip(tensors, needed, strict=True))
            ]
            with torch.enable_grad():
                sums = block(*leaves, None if excluded is None else excluded[part])
            if any(needed):
                wanted = [leaf for leaf, need in zip(leaves, needed, strict=True) if need]
                parts = iter(torch.autograd.grad(sums[0], wanted))
                for number, gradient in enumerate(gradients):
                    if gradient is not None:
                        (gradient[part] if number < num_rows else gradient).add_(next(parts))
            sums = tuple(value.detach() for value in sums)
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else list(sums)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*totals[1:])
        return tuple(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if value is None else value * factor for value in ctx.saved_tensors)
        return (None, None, None, None, *gradients)
