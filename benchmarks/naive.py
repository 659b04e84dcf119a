"""The usual way to do what HSFT does, for comparison.

This is what a competent researcher writes first, and what widely copied recommender code does; it is
not slowed down on purpose. Users' histories come from `groupby(...).apply(... sort_values ...)`, as in
much copied BERT4Rec code. Item embeddings are a dictionary of one tensor an item, read from a `.pt`
file. A dataset's `__getitem__` stacks one sample's tensors and pads them to the fixed length L;
`collate` stacks samples and gives every row its own candidates, `[B, B, D]`. Negatives are drawn in
Python, one user at a time, and so is the ranking, where the item matrix is normalised once and a
user's scores are one matrix-vector product and a sort. Items are encoded in batches of a fixed number
of texts in file order, padded to the longest in the batch.

`load_tuned` is the same load by someone who knows pandas well: sorted once, then grouped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset


@dataclass
class Histories:
    """Every user's items and their leave-one-out split, by id.

    Attributes:
        items: all item ids, in order of first appearance.
        full: user id -> item ids by time.
        train, valid, test: user id -> item ids; the last item is test's, the one before valid's.
    """

    items: list[str]
    full: dict[str, list[str]]
    train: dict[str, list[str]]
    valid: dict[str, list[str]]
    test: dict[str, list[str]]


def load(path: Path) -> Histories:
    """Read an interaction file and split it, a group at a time."""
    frame = pd.read_csv(path, dtype={"item_id": str, "user_id": str})
    items = frame["item_id"].unique().tolist()
    groups = frame.groupby("user_id", sort=False)[["item_id", "timestamp"]]
    full = groups.apply(
        lambda rows: rows.sort_values("timestamp", kind="stable")["item_id"].tolist()
    ).to_dict()
    return _split(items, full)


def load_tuned(path: Path) -> Histories:
    """Read and split as `load` does, sorting all rows at once."""
    frame = pd.read_csv(path, dtype={"item_id": str, "user_id": str})
    items = frame["item_id"].unique().tolist()
    ordered = frame.sort_values("timestamp", kind="stable")
    full = ordered.groupby("user_id", sort=False)["item_id"].agg(list).to_dict()
    return _split(items, full)


def _split(items: list[str], full: dict[Any, list[str]]) -> Histories:
    train, valid, test = {}, {}, {}
    for user, history in full.items():
        train[user], valid[user], test[user] = history[:-2], history[-2:-1], history[-1:]
    return Histories(items, full, train, valid, test)


def save_cache(path: Path, item_ids: Sequence[str], embeddings: Tensor) -> None:
    """Write a dictionary of one tensor an item."""
    rows = {item: embeddings[row].clone() for row, item in enumerate(item_ids)}
    torch.save(rows, path)


def load_cache(path: Path) -> dict[str, Tensor]:
    """Read a dictionary of one tensor an item."""
    return torch.load(path, map_location="cpu", weights_only=True)


def pad_stack(cache: Mapping[str, Tensor], items: Sequence[str], length: int) -> Tensor:
    """Stack items' embeddings and pad them with zeros to `length` rows: float32 [L, D]."""
    stacked = torch.stack([cache[item] for item in items]).float()
    return F.pad(stacked, (0, 0, 0, length - len(items)))


class TrainDataset(Dataset[dict[str, Any]]):
    """One sample a piece of a user's training history; its last item is the target.

    Args:
        histories: the users.
        cache: item id -> [D].
        max_length: L.
        num_negatives: drawn items a sample; 0 for none.
    """

    def __init__(
        self,
        histories: Histories,
        cache: Mapping[str, Tensor],
        max_length: int,
        num_negatives: int = 0,
    ) -> None:
        self.cache = cache
        self.max_length = max_length
        self.num_negatives = num_negatives
        self.items = histories.items
        self.seen = {user: set(items) for user, items in histories.train.items()}
        self.samples: list[tuple[str, list[str]]] = []
        for user, items in histories.train.items():
            pieces: list[list[str]] = []
            end = len(items)
            while end >= 2 and (not pieces or end > max_length):
                pieces.append(items[max(0, end - max_length - 1) : end])
                end -= max_length + 1
            self.samples += [(user, piece) for piece in reversed(pieces)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return history [L, D], mask [L], target [D] and, when drawn, negatives [n, D]."""
        user, items = self.samples[index]
        history = items[:-1]
        mask = torch.zeros(self.max_length, dtype=torch.bool)
        mask[: len(history)] = True
        sample: dict[str, Any] = {
            "history": pad_stack(self.cache, history, self.max_length),
            "mask": mask,
            "target": self.cache[items[-1]].float(),
        }
        if self.num_negatives:
            drawn = draw_negatives(self.items, self.seen[user], self.num_negatives)
            sample["negatives"] = pad_stack(self.cache, drawn, self.num_negatives)
        return sample


def draw_negatives(items: Sequence[str], seen: set[str], count: int) -> list[str]:
    """Draw items that a user has not seen, one by one."""
    drawn: list[str] = []
    while len(drawn) < count:
        item = random.choice(items)
        if item not in seen:
            drawn.append(item)
    return drawn


def collate_train(samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack samples: history [B, L, D], mask [B, L], candidates [B, B or 1 + n, D], target first."""
    targets = [sample["target"] for sample in samples]
    if "negatives" in samples[0]:
        candidates = torch.stack(
            [torch.cat([s["target"].unsqueeze(0), s["negatives"]]) for s in samples]
        )
    else:
        candidates = torch.stack(
            [
                torch.stack([target, *targets[:row], *targets[row + 1 :]])
                for row, target in enumerate(targets)
            ]
        )
    return {
        "history": torch.stack([sample["history"] for sample in samples]),
        "mask": torch.stack([sample["mask"] for sample in samples]),
        "candidates": candidates,
    }


class EvalDataset(Dataset[dict[str, Any]]):
    """One sample a user: the test item and what stands before it.

    Args:
        histories: the users.
        cache: item id -> [D].
        max_length: L.
    """

    def __init__(self, histories: Histories, cache: Mapping[str, Tensor], max_length: int) -> None:
        self.cache = cache
        self.max_length = max_length
        self.item_rows = {item: row for row, item in enumerate(histories.items)}
        self.histories = [items for items in histories.full.values() if len(items) >= 2]

    def __len__(self) -> int:
        return len(self.histories)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return history [L, D], its length, the target's row and the seen items' rows."""
        items = self.histories[index]
        recent = items[:-1][-self.max_length :]
        return {
            "history": pad_stack(self.cache, recent, self.max_length),
            "length": len(recent),
            "target": self.item_rows[items[-1]],
            "seen": torch.tensor([self.item_rows[item] for item in items[:-1]]),
        }


def collate_eval(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples: history [B, L, D], lengths [B], targets [B], and a list of seen rows."""
    return {
        "history": torch.stack([sample["history"] for sample in samples]),
        "lengths": torch.tensor([sample["length"] for sample in samples]),
        "targets": torch.tensor([sample["target"] for sample in samples]),
        "seen": [sample["seen"] for sample in samples],
    }


def item_matrix(cache: Mapping[str, Tensor], items: Sequence[str]) -> Tensor:
    """Stack the catalogue and scale it to unit length, once: float32 [I, D]."""
    return F.normalize(torch.stack([cache[item] for item in items]).float(), dim=-1)


@torch.inference_mode()
def rank_users(
    dataset: EvalDataset,
    users: Sequence[int],
    matrix: Tensor,
    user_vector: Callable[[Tensor, int], Tensor],
) -> list[int]:
    """Rank each user's target among all items but the seen ones, one user at a time.

    Args:
        dataset: the users.
        users: which of them.
        matrix: [I, D] unit vectors, rows as `EvalDataset.item_rows`.
        user_vector: history [L, D] and its length -> unit vector [D].
    """
    ranks = []
    for user in users:
        sample = dataset[user]
        scores = matrix @ user_vector(sample["history"], sample["length"])
        scores[sample["seen"]] = -torch.inf
        order = scores.argsort(descending=True)
        ranks.append(int((order == sample["target"]).nonzero()) + 1)
    return ranks


@torch.inference_mode()
def encode_texts(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int,
    batch_size: int = 64,
    fixed_width: bool = False,
) -> Tensor:
    """Mean-pool texts in file order, a fixed number at a time: float32 [n, D].

    Batches are padded to their longest text, or to `max_length` when `fixed_width` is set.
    """
    encoded = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]),
            padding="max_length" if fixed_width else "longest",
            truncation=True,
            max_length=max_length,
            padding_side="right",
            return_tensors="pt",
        )
        states = model(**batch, use_cache=False).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        encoded.append((states * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1))
    return torch.cat(encoded)


def train_step(
    decoder: nn.Module, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> float:
    """Take one step on a fixed-length batch: binary cross-entropy at each row's last position."""
    states = decoder(
        inputs_embeds=batch["history"], attention_mask=batch["mask"].long(), use_cache=False
    ).last_hidden_state
    last = states[torch.arange(len(states)), batch["mask"].sum(dim=1) - 1]
    scores = (last.unsqueeze(1) * batch["candidates"]).sum(dim=-1)
    labels = torch.zeros_like(scores)
    labels[:, 0] = 1.0
    loss = F.binary_cross_entropy_with_logits(scores, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())
