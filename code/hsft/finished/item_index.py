"""A FAISS index over item vectors: made by size, its recall measured, searched instead of all items."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from hsft.data.interactions import PAD
from hsft.evaluator.evaluator import Scorer
from hsft.evaluator.recommend import Recommendations
from hsft.hub.manifest import EXPORT_FILE
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import is_file, read_json, require_file
from hsft.utils.progress import Meter

IndexKind = Literal["flat", "hnsw", "ivf"]
INDEX_FILE = "items.faiss"
INDEX_KINDS: tuple[IndexKind, ...] = get_args(IndexKind)
# Items at a recall@10 are compared, as the metric's name says.
RECALL_AT = 10
# Search is widened until this share of the exact items is found, where it can be.
TARGET_RECALL = 0.95
# Up to these numbers of items exact search is fast enough, and a graph is made within minutes.
_FLAT_ITEMS, _HNSW_ITEMS = 50_000, 1_000_000
# FAISS's guidelines: links of a node, and candidates while the graph is made.
_LINKS, _CONSTRUCTION = 32, 80
# Vectors a cell that the cells of `ivf` are fitted on.
_TRAINED_ON = 64
_WIDEST_SEARCH = 1024
# Above this number of neighbours the exact search is used, as an index has no advantage.
_MOST_NEIGHBOURS = 2048
_ITEMS_AT_A_TIME = 4096

# Takes rows start and end, returns float32 [end - start, D].
ReadItems = Callable[[int, int], np.ndarray]


def require_faiss() -> Any:
    """Import FAISS.

    Raises:
        InputError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "an index of items needs the package faiss-cpu, which is not installed; install it with "
            "pip install 'hsft[index]', or leave the index out (--index none)."
        ) from error
    return faiss


def kind_for(items: int) -> IndexKind:
    """Return the kind of index for a number of items.

    `flat` compares all items; `hnsw` is a graph (Malkov and Yashunin 2018), fast to search, slow to
    make; `ivf` compares the items of the nearest cells.
    """
    if items <= _FLAT_ITEMS:
        return "flat"
    return "hnsw" if items <= _HNSW_ITEMS else "ivf"


def cells_for(items: int) -> int:
    """Return the number of cells of `ivf`: 4 sqrt(I), and no more than can be fitted."""
    return max(1, min(int(4 * items**0.5), items // 39))


def build_index(
    kind: IndexKind, read: ReadItems, items: int, dim: int, show_progress: bool = False
) -> Any:
    """Build a FAISS index over inner products; its result row r is `read`'s row r.

    Args:
        kind: of the index.
        read: gives the item vectors, a part at a time.
        items: I.
        dim: D.
        show_progress: show a bar or lines.

    Raises:
        InputError: FAISS is not installed.
    """
    faiss = require_faiss()
    names = {"flat": "Flat", "hnsw": f"HNSW{_LINKS}", "ivf": f"IVF{cells_for(items)},Flat"}
    index = faiss.index_factory(dim, names[kind], faiss.METRIC_INNER_PRODUCT)
    starts = range(0, items, _ITEMS_AT_A_TIME)
    if kind == "hnsw":
        index.hnsw.efConstruction = _CONSTRUCTION
    if kind == "ivf":
        step = max(1, items // (_TRAINED_ON * cells_for(items)))
        parts = (read(start, min(start + starts.step, items))[::step] for start in starts)
        # Copied, since a part would be held as a whole otherwise.
        index.train(np.concatenate([np.ascontiguousarray(part) for part in parts]))
    with Meter("indexing items", items, "items", show_progress) as bar:
        for start in starts:
            end = min(start + starts.step, items)
            index.add(np.ascontiguousarray(read(start, end), dtype=np.float32))
            bar.advance(end - start)
    return index


def recall(rows: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of the exact rows that were returned: int64 [n, K] and [n, K] -> 0 to 1."""
    return float((exact[:, :, None] == rows[:, None, :]).any(axis=2).mean())


def search_width(index: Any) -> tuple[str, int] | None:
    """Return the name and value of what trades an index's speed for recall, None for `flat`."""
    if hasattr(index, "hnsw"):
        return "efSearch", int(index.hnsw.efSearch)
    return ("nprobe", int(index.nprobe)) if hasattr(index, "nprobe") else None


def _set_search_width(index: Any, width: int) -> None:
    if hasattr(index, "hnsw"):
        index.hnsw.efSearch = width
    else:
        index.nprobe = width


def tune(index: Any, users: np.ndarray, exact: np.ndarray, target: float = TARGET_RECALL) -> None:
    """Double an index's search width until its recall reaches `target`, or the widest search.

    Args:
        index: of `build_index`; the width is stored in it.
        users: float32 [n, D], user vectors.
        exact: int64 [n, K], the rows of the K items of the greatest inner products.
        target: share of `exact`.
    """
    if search_width(index) is None:
        return
    cells = getattr(index, "nlist", None)
    widest = min(_WIDEST_SEARCH, cells or _WIDEST_SEARCH)
    width = 1 if cells else 16
    while True:
        _set_search_width(index, width)
        if width == widest or recall(index.search(users, exact.shape[1])[1], exact) >= target:
            return
        width = min(2 * width, widest)


@dataclass(frozen=True)
class ItemIndex:
    """An index over a run's items, read from an export.

    Attributes:
        folder: the export.
        model: whose vectors it holds, one of the run's models.
        faiss_index: the FAISS index; row r is item number r + 1.
    """

    folder: Path
    model: str
    faiss_index: Any

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return int(self.faiss_index.ntotal)

    def vectors(self, items: np.ndarray) -> np.ndarray:
        """Return the stored vectors of item numbers: int64 [n] -> float32 [n, D]."""
        if hasattr(self.faiss_index, "make_direct_map"):
            self.faiss_index.make_direct_map()
        return np.stack([self.faiss_index.reconstruct(int(item) - 1) for item in items])

    def best(
        self, users: np.ndarray, topk: int, seen: Sequence[np.ndarray] | None = None
    ) -> tuple[Recommendations, np.ndarray]:
        """Search the best items of users.

        Args:
            users: float32 [B, D], user vectors.
            topk: K, at most I.
            seen: item numbers of each user that are left out; None leaves none out.

        Returns:
            The items, and bool [B]: whether the index gave as many as there are.
        """
        distinct = [np.unique(items) for items in seen] if seen is not None else []
        sizes = np.array([len(items) for items in distinct] or [0] * len(users), dtype=np.int64)
        asked = min(topk + int(sizes.max(initial=0)), self.num_items)
        scores, rows = self.faiss_index.search(np.ascontiguousarray(users), asked)
        items = rows + 1
        kept = items != PAD
        if distinct:
            # One number for each user and item.
            owners = np.repeat(np.arange(len(users)), sizes) * (self.num_items + 1)
            pairs = np.arange(len(users))[:, None] * (self.num_items + 1) + items
            kept &= ~np.isin(pairs, owners + np.concatenate(distinct))
        # What is left out goes to the end; the others keep their order.
        order = np.argsort(~kept, axis=1, kind="stable")[:, :topk]
        kept, items, scores = (
            np.take_along_axis(values, order, axis=1) for values in (kept, items, scores)
        )
        whole = kept.sum(axis=1) >= np.minimum(topk, self.num_items - sizes)
        best = Recommendations(np.where(kept, items, PAD), np.where(kept, scores, -np.inf))
        return best, whole


def open_index(folder: Path) -> tuple[ItemIndex, str]:
    """Open the index of an export.

    Args:
        folder: written by `export.py --format embeddings`.

    Returns:
        The index, and the fingerprint of the ids of its items.

    Raises:
        InputError: FAISS is not installed, or the folder has no index or is damaged.
    """
    if not is_file(folder / EXPORT_FILE):
        raise InputError(
            f"{folder} is no export of embeddings (it has no {EXPORT_FILE}); make one with "
            f"export.py --format embeddings."
        )
    manifest = read_json(folder / EXPORT_FILE)
    about = manifest if isinstance(manifest, dict) else {}
    if not isinstance(about.get("index"), dict):
        raise InputError(
            f"{folder} has no index of items; make one with export.py --format embeddings --index auto."
        )
    model, item_ids = about.get("model"), about.get("item_ids_sha256")
    if not isinstance(model, str) or not isinstance(item_ids, str):
        raise InputError(f"{folder / EXPORT_FILE} is damaged; export the embeddings again.")
    return ItemIndex(folder, model, read_index(folder / INDEX_FILE)), item_ids


def read_index(path: Path) -> Any:
    """Read a FAISS index.

    Raises:
        InputError: FAISS is not installed, or the file is missing or damaged.
    """
    faiss = require_faiss()
    remedy = "export the embeddings again with an index"
    require_file(path, f"the index {path}", remedy)
    try:
        return faiss.read_index(str(path))
    except RuntimeError as error:
        raise InputError(
            f"the index {path} is damaged ({one_line(error, 120)}); {remedy}."
        ) from error


class IndexedScorer:
    """A model that recommends from an index of its items; its own vectors stay exact.

    Args:
        scorer: the model.
        index: over its item vectors.
    """

    def __init__(self, scorer: Scorer, index: ItemIndex) -> None:
        self.scorer = scorer
        self.index = index

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return self.scorer.num_items

    @property
    def reads_times(self) -> bool:
        """Whether users are encoded from the times of their items too."""
        return bool(getattr(self.scorer, "reads_times", False))

    def user_vectors(self, history: Tensor, lengths: Tensor, *times: Tensor) -> Tensor:
        """As the model."""
        return self.scorer.user_vectors(history, lengths, *times)

    def item_slice(self, start: int, end: int) -> Tensor:
        """As the model."""
        return self.scorer.item_slice(start, end)

    def item_vectors(self, items: Tensor) -> Tensor:
        """As the model."""
        return self.scorer.item_vectors(items)

    def can_answer(self, histories: Sequence[np.ndarray], topk: int, exclude_seen: bool) -> bool:
        """Say whether so few items are asked for that the index is of use."""
        longest = max((len(history) for history in histories), default=0)
        return topk + (longest if exclude_seen else 0) <= _MOST_NEIGHBOURS
