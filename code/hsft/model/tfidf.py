"""TF-IDF of the item texts: what words alone say of a history, for any other model to beat."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hsft.data.interactions import PAD

# scikit-learn's default: two letters or digits at least.
_WORD = re.compile(r"\w\w+")


@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix of item vectors, row after row (CSR).

    Attributes:
        starts: int64 [rows + 1], where each row's entries start.
        columns: int64 [entries].
        values: float32 [entries].
        width: number of columns.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    def to(self, device: torch.device) -> SparseRows:
        """Return the matrix on a device."""
        starts, columns, values = self.starts, self.columns, self.values
        return SparseRows(starts.to(device), columns.to(device), values.to(device), self.width)

    def dense(self, rows: Tensor) -> Tensor:
        """Return some rows: int64 [n] -> float32 [n, width]."""
        counts = self.starts[rows + 1] - self.starts[rows]
        owners = torch.arange(len(rows), device=rows.device).repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        entries = torch.arange(len(owners), device=rows.device)
        entries = entries - before[owners] + self.starts[rows][owners]
        vectors = torch.zeros((len(rows), self.width), device=rows.device)
        vectors[owners, self.columns[entries]] = self.values[entries]
        return vectors


def tfidf_rows(texts: Sequence[str], max_words: int | None = None) -> SparseRows:
    """Weigh the words of each text, in unit vectors.

    The weight of a word is (1 + ln count in the text) * (1 + ln((1 + n) / (1 + texts that have
    it))), as scikit-learn's TfidfVectorizer(sublinear_tf=True) has it for n texts. A word that one
    text has is left out after the vectors are scaled to unit length: it is in no other vector, so
    that no cosine between two texts changes.

    Args:
        texts: [n].
        max_words: keep the words that most texts have, None keeps all.

    Returns:
        [n, words].
    """
    counted = [Counter(_WORD.findall(text.lower())) for text in texts]
    numbers: dict[str, int] = {}
    for count in counted:
        for word in count:
            numbers.setdefault(word, len(numbers))
    sizes = np.array([len(count) for count in counted], dtype=np.int64)
    rows = np.repeat(np.arange(len(texts)), sizes)
    columns = np.array([numbers[word] for count in counted for word in count], dtype=np.int64)
    times = np.array([times for count in counted for times in count.values()], dtype=np.float64)
    having = np.bincount(columns, minlength=len(numbers))
    rarity = 1 + np.log((1 + len(texts)) / (1 + having))
    values = (1 + np.log(times)) * rarity[columns]
    lengths = np.sqrt(np.bincount(rows, values**2, minlength=len(texts)))
    values = values / lengths[rows]
    kept = np.flatnonzero(having > 1)
    if max_words is not None and len(kept) > max_words:
        kept = kept[np.argsort(-having[kept], kind="stable")[:max_words]]
    new = np.full(len(numbers), -1)
    new[kept] = np.arange(len(kept))
    shared = new[columns] >= 0
    starts = np.concatenate([[0], np.bincount(rows[shared], minlength=len(texts)).cumsum()])
    return SparseRows(
        torch.from_numpy(starts),
        torch.from_numpy(new[columns[shared]]),
        torch.from_numpy(values[shared].astype(np.float32)),
        max(len(kept), 1),
    )


class TfIdf:
    """Ranks items by the cosine of their text's TF-IDF to the history's weighted sum.

    Args:
        rows: [I + 1, words], row 0, the padding item, without entries.
        history: `last` or `mean`.
        decay: weight of an item relative to that of the next newer one, for `mean`.
    """

    def __init__(self, rows: SparseRows, history: str, decay: float) -> None:
        self._rows = rows
        self._history = history
        self._decay = decay

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return len(self._rows.starts) - 2

    def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Return weighted sums of word weights: float32 [B, words]."""
        weights = history_weights(history, lengths, self._history, self._decay)
        users, positions = (history != PAD).nonzero(as_tuple=True)
        known, numbers = history[users, positions].unique(return_inverse=True)
        spread = torch.zeros((len(history), len(known)), device=history.device)
        spread.index_put_((users, numbers), weights[users, positions], accumulate=True)
        return spread @ self._rows.dense(known)

    def item_slice(self, start: int, end: int) -> Tensor:
        """Return unit vectors: float32 [end - start, words]."""
        return self._rows.dense(torch.arange(start, end, device=self._rows.starts.device))

    def item_vectors(self, items: Tensor) -> Tensor:
        """Return unit vectors: int64 [...] -> float32 [..., words]."""
        return self._rows.dense(items.flatten()).view(*items.shape, -1)


def history_weights(history: Tensor, lengths: Tensor, kind: str, decay: float) -> Tensor:
    """Weigh the items of histories: int64 [B, T] and [B] -> float32 [B, T], 0 for padding.

    Args:
        history: right-padded with 0.
        lengths: real items in each row.
        kind: `last` gives the last item all the weight; `mean` gives the item n steps before it
            decay ** n.
        decay: as above; 1 is the plain mean.
    """
    age = lengths.unsqueeze(1) - 1 - torch.arange(history.shape[1], device=history.device)
    if kind == "last":
        return (age == 0).float()
    return torch.where(age >= 0, torch.as_tensor(decay) ** age.clamp_min(0), 0.0)
