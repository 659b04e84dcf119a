"""Reference models without training: random, popularity, and nearest items by embedding or by words.

Each is a pair of vectors whose dot product is the score, so that the evaluator ranks them exactly
as it ranks the UserLLM.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hsft.config import Config
from hsft.data.cache import ItemCache
from hsft.data.files import information_file
from hsft.data.item_text import read_plain_texts
from hsft.data.split import Split, train_item_counts
from hsft.evaluator.evaluator import Scorer
from hsft.model.item_table import table_from_cache
from hsft.model.losses import normalize
from hsft.model.tfidf import TfIdf, history_weights, tfidf_rows
from hsft.utils.errors import InputError

# Scores of independent Gaussian vectors order the items uniformly at random for each user.
_RANDOM_DIMENSIONS = 32


class Popularity:
    """Ranks items by how often they occur among the training items (never the held-out ones).

    Args:
        counts: int64 [I + 1], entry 0 the padding item.
    """

    def __init__(self, counts: Tensor) -> None:
        self._counts = counts.float().unsqueeze(1)

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return len(self._counts) - 1

    def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Return ones: float32 [B, 1]."""
        return torch.ones((len(history), 1), device=history.device)

    def item_slice(self, start: int, end: int) -> Tensor:
        """Return counts: float32 [end - start, 1]."""
        return self._counts[start:end]

    def item_vectors(self, items: Tensor) -> Tensor:
        """Return counts: int64 [...] -> float32 [..., 1]."""
        return self._counts[items]


class RandomScores:
    """Ranks items at random, seeded.

    Args:
        num_items: I.
        seed: of the vectors.
        device: where they are.
    """

    def __init__(self, num_items: int, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        table = torch.randn(num_items + 1, _RANDOM_DIMENSIONS, generator=self._generator)
        # Unit length: a longer vector would be at the top, or the bottom, more often than others.
        self._table = normalize(table).to(device)

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return len(self._table) - 1

    def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Draw a vector a user: float32 [B, D]."""
        drawn = torch.randn(len(history), _RANDOM_DIMENSIONS, generator=self._generator)
        return drawn.to(history.device)

    def item_slice(self, start: int, end: int) -> Tensor:
        """Return random vectors: float32 [end - start, D]."""
        return self._table[start:end]

    def item_vectors(self, items: Tensor) -> Tensor:
        """Return random vectors: int64 [...] -> float32 [..., D]."""
        return self._table[items]


class ItemKNN:
    """Ranks items by their cosine to the last item, or to the mean of the history's unit vectors.

    Args:
        table: [I + 1, D] item embeddings, row 0 the padding item.
        history: `last` or `mean`.
        decay: weight of an item relative to that of the next newer one, for `mean`.
    """

    def __init__(self, table: Tensor, history: str, decay: float = 1.0) -> None:
        self._table = normalize(table)
        self._history = history
        self._decay = decay

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return len(self._table) - 1

    def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Return the last item's vector or the mean: float32 [B, D] of unit length."""
        if self._history == "last":
            return self._table[history[torch.arange(len(history)), lengths - 1]]
        weights = history_weights(history, lengths, self._history, self._decay)
        return normalize((self._table[history] * weights.unsqueeze(-1)).sum(dim=1))

    def item_slice(self, start: int, end: int) -> Tensor:
        """Return unit vectors: float32 [end - start, D]."""
        return self._table[start:end]

    def item_vectors(self, items: Tensor) -> Tensor:
        """Return unit vectors: int64 [...] -> float32 [..., D]."""
        return self._table[items]


def build_reference(
    config: Config,
    split: Split,
    cache: ItemCache | None,
    device: torch.device,
    own_items: int | None = None,
) -> Scorer:
    """Make the reference model that the configuration's `model` names.

    `own_items` is as in `table_from_cache`.

    Raises:
        InputError: the item texts of tfidf are missing or bad.
    """
    if config.model == "pop":
        return Popularity(torch.from_numpy(train_item_counts(split)).to(device))
    if config.model == "random":
        return RandomScores(split.interactions.num_items, config.seed, device)
    if config.model == "tfidf":
        path = information_file(config.text_path, config.dataset)
        texts = read_plain_texts(path, config.text_keys)
        # The padding item comes first, without text.
        of_items = [texts.get(str(item), "") for item in split.interactions.item_ids]
        if not any(of_items):
            raise InputError(
                f"none of the {len(of_items) - 1} items of the catalogue has text in {path} under the "
                f"text_keys {', '.join(config.text_keys)}; put their rows there or change --text_path or "
                f"--text_keys."
            )
        rows = tfidf_rows(of_items)
        return TfIdf(rows.to(device), config.knn_history, config.knn_decay)
    assert cache is not None
    table = table_from_cache(
        cache, split.interactions.item_ids, config.item_embedding_transform, own_items
    )
    return ItemKNN(table.to(device), config.knn_history, config.knn_decay)
