"""The catalogue's embeddings on the device, gathered by item number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsft.data.cache import ItemCache
from hsft.data.interactions import PAD

# Rows that a projection is fitted on.
_PCA_ROWS = 16_384


class AdaptedItems(NamedTuple):
    """Items whose embeddings went through the adapter once, whatever the number of their uses.

    Attributes:
        numbers: int64 [U], sorted item numbers; every item that is asked for is among them.
        vectors: float32 [U, D], without id vectors.
    """

    numbers: Tensor
    vectors: Tensor

    def gather(self, items: Tensor) -> Tensor:
        """Return the vectors of item numbers: int64 [...] -> float32 [..., D]."""
        return F.embedding(torch.searchsorted(self.numbers, items), self.vectors)


class ItemTable(nn.Module):
    """Frozen item embeddings, with an optional trained map after them and trained id vectors.

    The vector of item i is `adapt(embeddings[i]) + id_vectors[i]`, D wide: the UserLLM's hidden
    size. Where the embeddings are as wide (C = D), every adapter starts as the identity, so that an
    untrained table scores as one without; where they are not, it starts as `pca_projection`.

    Args:
        embeddings: [I + 1, C]; row 0 is the padding item.
        adapter: `none`; `linear`, x + Wx with W [D, D] starting at 0; `lowrank`, x + B(A x) with
            A [rank, D] random and B [D, rank] starting at 0; or `mlp`, x + V gelu(U x + u) + v with
            U [D, D] random and V [D, D] starting at 0. For C != D there is no `x +`: W [D, C] and
            B A start as the projection, and `mlp` adds a projection S x.
        rank: rank of `lowrank`.
        dim: D; C when None.
        id_items: number of items that have a trained id vector, items 1..id_items, starting at 0;
            later items have none. None: no item has one.
        id_dropout: in training mode, the share of id vectors left out, drawn for every occurrence
            of an item; without rescaling, so that what is left is the vector of an unseen item.

    Attributes:
        fitted_to: what trained weights depend on of the catalogue, and its fingerprint: the item order
            where single items have weights, the set of items where a fixed map was fitted on them.

    Raises:
        ValueError: C differs from D and there is no adapter.
    """

    embeddings: Tensor

    def __init__(
        self,
        embeddings: Tensor,
        adapter: str = "none",
        rank: int = 64,
        *,
        dim: int | None = None,
        id_items: int | None = None,
        id_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        # Not persistent: the cache is on disk already and must not be copied into checkpoints.
        self.register_buffer("embeddings", embeddings, persistent=False)
        self.fitted_to: Mapping[str, str] = {}
        width = embeddings.shape[1]
        self._dim = width if dim is None else dim
        self.id_dropout = id_dropout
        # Rows of the vectors read in place of the embeddings, by item number, and these vectors.
        self._given: tuple[Tensor, Tensor] | None = None
        self.adapter: nn.Module | None = None
        if adapter != "none":
            projection = None
            if width != self._dim:
                inner = min(rank, width, self._dim) if adapter == "lowrank" else None
                projection = pca_projection(embeddings[1:], self._dim, inner)
            self.adapter = _adapter(adapter, width, self._dim, rank, projection)
        elif width != self._dim:
            raise ValueError(f"embeddings of {width} dimensions need an adapter to {self._dim}")
        self.id_vectors: nn.Parameter | None = None
        if id_items is not None:
            self.id_vectors = nn.Parameter(torch.zeros(id_items + 1, self._dim))

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        return self._dim

    @property
    def num_items(self) -> int:
        """Number of items I, the padding item not counted."""
        return self.embeddings.shape[0] - 1

    @property
    def is_frozen(self) -> bool:
        """Whether nothing of the vectors is trained."""
        return not any(weight.requires_grad for weight in self.parameters())

    def adapt(self, numbers: Tensor) -> AdaptedItems:
        """Put the embeddings of some items through the adapter: int64 [U], sorted."""
        return AdaptedItems(numbers, self._adapt(self._read(numbers)))

    def forward(self, items: Tensor | slice, adapted: AdaptedItems | None = None) -> Tensor:
        """Return the vectors of item numbers: int64 [...] -> float32 [..., D].

        Args:
            items: item numbers; of a slice of them the vectors are read without a gather, and their
                id vectors are never dropped.
            adapted: these items, and perhaps others, with the adapter applied already; None: it is
                applied here.
        """
        if isinstance(items, slice):
            start, end = items.start, items.stop
            if self.id_vectors is None:
                return self._adapt(self.embeddings[start:end])
            return self._with_ids(start, end, self.id_vectors[start:end])
        vectors = adapted.gather(items) if adapted else self._adapt(self._read(items))
        if self.id_vectors is None:
            return vectors
        known = items < len(self.id_vectors)
        if self.is_random:
            known &= torch.rand(items.shape, device=items.device) >= self.id_dropout
        # The padding item's vector is 0 and, as `padding_idx`, gets no gradient.
        rows = items.masked_fill(~known, PAD)
        return vectors + F.embedding(rows, self.id_vectors, padding_idx=PAD).float()

    def slice(self, start: int, end: int) -> Tensor:
        """Return the vectors of items start..end-1, without a gather: float32 [end - start, D].

        Id vectors are never dropped here.
        """
        # Through `forward`: ZeRO stage 3 brings divided parameters together for a call of a module.
        vectors: Tensor = self(slice(start, end))
        return vectors

    def chunks(self, size: int) -> list[Callable[[], Tensor]]:
        """Return one function per `size` items (without the padding item) that gives their vectors.

        Nothing is converted or adapted before a function is called, so that a caller who drops the
        vectors again never holds more than [size, D] of them in float32. A function gives the same
        vectors whenever it is called: which id vectors are dropped is drawn here, once an item.
        """
        stop = self.num_items + 1
        bounds = [(start, min(start + size, stop)) for start in range(1, stop, size)]
        if self.id_vectors is None:
            return [partial(self.slice, start, end) for start, end in bounds]
        known = self.id_vectors[1:]
        # One split, not many slices: each slice's gradient would be a whole [I, D] of zeros.
        pieces = list(known.split(size)) + [known[:0]] * len(bounds)
        kept: list[Tensor | None] = [None] * len(bounds)
        if self.is_random:
            drawn = torch.rand(len(known), 1, device=known.device) >= self.id_dropout
            kept = [*drawn.split(size), *kept]
        return [
            partial(self._with_ids, start, end, ids, keep)
            for (start, end), ids, keep in zip(bounds, pieces, kept, strict=False)
        ]

    def _with_ids(self, start: int, end: int, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        vectors = self._adapt(self.embeddings[start:end])
        return _add_to_first(vectors, ids if keep is None else ids * keep)

    @property
    def is_random(self) -> bool:
        """Whether id vectors are dropped, so that two calls give an item different vectors."""
        return self.id_vectors is not None and self.training and self.id_dropout > 0

    @contextmanager
    def reading(self, items: Tensor, vectors: Tensor) -> Iterator[None]:
        """Read other vectors in place of some items' embeddings, as long as the context lasts.

        `forward` may then be called with these items and the padding item only; `slice` and `chunks`
        give the embeddings.

        Args:
            items: int64 [n], each once, on the device.
            vectors: [n + 1, C], through which gradients go; row 0 is the padding item's.
        """
        rows = torch.zeros(len(self.embeddings), dtype=torch.int64, device=items.device)
        rows[items] = torch.arange(1, len(items) + 1, device=items.device)
        self._given = rows, vectors
        try:
            yield
        finally:
            self._given = None

    def _read(self, items: Tensor) -> Tensor:
        if self._given is None:
            return self.embeddings[items]
        rows, vectors = self._given
        return F.embedding(rows[items], vectors, padding_idx=PAD)

    def _adapt(self, vectors: Tensor) -> Tensor:
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        if self.adapter is None:
            return vectors
        # The adapter's weights are 16-bit under bf16-true and DeepSpeed.
        mapped: Tensor = self.adapter(vectors.to(self._adapter_dtype)).float()
        return vectors + mapped if vectors.shape[-1] == self._dim else mapped

    @property
    def _adapter_dtype(self) -> torch.dtype:
        assert self.adapter is not None
        return next(self.adapter.parameters()).dtype

    def _apply(self, fn: Any, recurse: bool = True) -> ItemTable:
        # `module.bfloat16()`, as DeepSpeed and bf16-true call it, would round the cache.
        kept = self.embeddings
        super()._apply(fn, recurse)
        if self.embeddings.dtype != kept.dtype:
            self.embeddings = kept.to(self.embeddings.device)
        return self


class MlpAdapter(nn.Module):
    """V gelu(U x + u) + v, and S x where widths differ: float [..., C] -> [..., D].

    Args:
        width: C.
        dim: D, also the width of the hidden layer.
        projection: S [D, C] to start from, None without S.
    """

    def __init__(self, width: int, dim: int, projection: Tensor | None) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, dim)
        self.out = nn.Linear(dim, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.skip = None if projection is None else _linear(projection)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map item embeddings: float [..., C] -> [..., D]."""
        mapped: Tensor = self.out(F.gelu(self.hidden(vectors)))
        return mapped if self.skip is None else mapped + self.skip(vectors)


def _adapter(
    kind: str, width: int, dim: int, rank: int, projection: tuple[Tensor, Tensor] | None
) -> nn.Module:
    """Make a trainable map; `projection` is given where it changes the width."""
    if kind == "mlp":
        return MlpAdapter(width, dim, None if projection is None else projection[1] @ projection[0])
    if kind == "linear":
        if projection is not None:
            return _linear(projection[1] @ projection[0])
        square = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(square.weight)
        return square
    down, up = nn.Linear(width, rank, bias=False), nn.Linear(rank, dim, bias=False)
    if projection is None:
        nn.init.zeros_(up.weight)
    else:
        # A rank above both widths adds directions that begin without effect.
        with torch.no_grad():
            size = len(projection[0])
            down.weight[:size], down.weight[size:] = projection[0], 0.0
            up.weight[:, :size] = projection[1]
    return nn.Sequential(down, up)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def _add_to_first(vectors: Tensor, ids: Tensor) -> Tensor:
    """Add id vectors to as many of the first vectors: [n, D] and [at most n, D] -> [n, D]."""
    if len(ids) < len(vectors):
        ids = F.pad(ids, (0, 0, 0, len(vectors) - len(ids)))
    return vectors + ids.float()


def pca_projection(rows: Tensor, dim: int, inner: int | None = None) -> tuple[Tensor, Tensor]:
    """Return a map from C to D dimensions, in two factors, that keeps cosines as well as a map can.

    Rows of unit length are projected on the leading eigenvectors of their second moment, the best
    approximation of their Gram matrix of its rank (Eckart and Young 1936); they are not centred,
    since that would change cosines. An orthonormal map drawn at random, the same for every seed,
    then spreads them over all D dimensions, scaled so that the mean square of a number stays what
    it is. Where `inner` is at least C, cosines are kept exactly.

    Args:
        rows: [n, C] item embeddings, of any floating-point type; a part of them is read when they
            are many.
        dim: D.
        inner: number of eigenvectors K, at most C and D; min(C, D) when None.

    Returns:
        float32 [K, C] and [D, K]; their product maps C to D.
    """
    width = rows.shape[1]
    inner = min(width, dim) if inner is None else inner
    basis, kept = torch.eye(width, dtype=torch.float64), 1.0
    if inner < width and len(rows):
        sample = rows[:: -(-len(rows) // _PCA_ROWS)].double()
        unit = F.normalize(sample, dim=-1)
        values, vectors = torch.linalg.eigh(unit.T @ unit)
        basis = vectors.T.flip(0)
        values = values.clamp_min(0).flip(0)
        kept = max(float(values[:inner].sum() / values.sum().clamp_min(1e-12)), 1e-6)
    drawn = torch.randn(dim, inner, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spread = torch.linalg.qr(drawn).Q * (dim / (width * kept)) ** 0.5
    return basis[:inner].float(), spread.float()


def table_from_cache(
    cache: ItemCache, item_ids: np.ndarray, transform: str = "none", own_items: int | None = None
) -> Tensor:
    """Gather the catalogue's rows of a cache into one matrix.

    Args:
        cache: the item cache.
        item_ids: str [I + 1], entry 0 the padding item; every other id is in the cache.
        transform: `none`, `standardize` or `whiten`.
        own_items: the transform is fitted on the first n items and applied to all; None fits it on
            all of them.

    Returns:
        [I + 1, D], row 0 zeros; the cache's dtype, or float32 after a transform.
    """
    rows = cache.rows_of(item_ids[1:])
    table = torch.zeros((len(item_ids), cache.dim), dtype=cache.embeddings.dtype)
    torch.index_select(cache.embeddings, 0, torch.from_numpy(rows), out=table[1:])
    if transform == "none":
        return table
    table = table.float()
    fitted = fit_transform(transform, table[1:] if own_items is None else table[1 : own_items + 1])
    table[1:] = fitted(table[1:])
    table[PAD] = 0.0
    return table


def sample_cosines(
    cache: ItemCache, item_ids: np.ndarray, transform: str = "none", items: int = 2048
) -> np.ndarray:
    """Return cosines between different items, as they are after the transform.

    Args:
        cache: the item cache.
        item_ids: str [I + 1], entry 0 the padding item; every other id is in the cache.
        transform: as for `table_from_cache`, fitted on the sample.
        items: evenly spaced items that are compared, at most; whitening, which needs several times
            more vectors than dimensions, takes all items when there are fewer.

    Returns:
        float32 [pairs]: of every two of at most 64 items, else of each item with 16 others.
    """
    count = len(item_ids) - 1
    if transform == "whiten":
        items = max(items, 4 * cache.dim)
    numbers = np.unique(np.linspace(1, count, min(count, items)).astype(np.int64))
    sample = np.concatenate([item_ids[:1], item_ids[numbers]])
    vectors = F.normalize(table_from_cache(cache, sample, transform)[1:].float(), dim=-1)
    n = len(vectors)
    if n <= 64:
        rows, columns = np.triu_indices(n, 1)
        return (vectors[rows] * vectors[columns]).sum(dim=-1).numpy()
    steps = np.unique(np.geomspace(1, n // 2, 16).astype(np.int64)).tolist()
    shifted = [(vectors * vectors.roll(-step, dims=0)).sum(dim=-1) for step in steps]
    return torch.stack(shifted, dim=1).flatten().numpy()


def fit_transform(kind: str, rows: Tensor) -> FixedMap:
    """Fit `item_embedding_transform`: `standardize` or `whiten`, on float32 [n, D]."""
    return fit_standardize(rows) if kind == "standardize" else fit_whiten(rows)


class FixedMap(nn.Module):
    """A map of vectors that was fitted on some and is not trained: float32 [..., D] -> [..., D].

    Its numbers keep their type where `module.bfloat16()` would round them.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> FixedMap:
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, value in self.named_buffers():
            if value.dtype != kept[name].dtype:
                setattr(self, name, kept[name].to(value.device))
        return self


class Standardize(FixedMap):
    """(x - mean) / deviation, and 0 in dimensions of no deviation.

    Args:
        mean, deviation: float32 [D].
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map vectors."""
        centred = vectors - self.mean
        return torch.where(self.deviation > 1e-6, centred / self.deviation.clamp_min(1e-6), 0.0)


class Whiten(FixedMap):
    """(x - mean) U s, with U the eigenvectors of a covariance.

    Args:
        mean: float32 [D].
        directions: float64 [D, D], U.
        scale: float64 [D], s.
    """

    mean: Tensor
    directions: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, directions: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("directions", directions)
        self.register_buffer("scale", scale)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map vectors."""
        return (((vectors - self.mean).double() @ self.directions) * self.scale).float()


def fit_standardize(rows: Tensor) -> FixedMap:
    """Fit the map that gives every dimension mean 0 and variance 1 over `rows`, float32 [n, D].

    Dimensions that are constant over the rows become 0, whatever else is mapped.
    """
    mean = rows.mean(dim=0)
    return Standardize(mean, (rows - mean).pow(2).mean(dim=0).sqrt())


def fit_whiten(rows: Tensor, floor: float = 1e-3) -> FixedMap:
    """Fit the PCA map that gives `rows`, float32 [n, D], a covariance near the identity.

    Directions with less than `floor` of the mean variance are damped rather than blown up.
    """
    mean = rows.mean(dim=0)
    centred = (rows - mean).double()
    covariance = centred.T @ centred / len(centred)
    values, directions = torch.linalg.eigh(covariance)
    return Whiten(mean, directions, (values.clamp_min(0) + floor * values.mean()).rsqrt())
