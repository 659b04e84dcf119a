"""Seeded synthetic data sets at the sizes of PixelRec's, for the benchmarks.

Popularity is Zipf's: item number r is drawn with a weight of 1 / (r + 10)^0.9. The file has
PixelRec's layout (`item_id,user_id,timestamp`, ids such as `v184301` and `1907332`) with its rows
shuffled. What the numbers mean to a recommender is not modelled: only sizes and shapes matter here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hsft.data.cache import save_cache
from hsft.utils.files import atomic_path, write_json

SEED = 2020
_FIRST_TIME, _SECONDS = 1_580_000_000, 3 * 365 * 86_400


@dataclass(frozen=True)
class Size:
    """How large a data set is.

    Attributes:
        name: of the size and of its files.
        users, items, interactions: exact counts.
        dim: embedding dimension of its item cache.
        note: what is scaled down from the data set that it stands for, empty for nothing.
    """

    name: str
    users: int
    items: int
    interactions: int
    dim: int
    note: str = ""


SIZES = {
    "small": Size("small", 300, 400, 4_500, 32, "a smoke test, not a measurement"),
    "pixel200k": Size("pixel200k", 200_000, 96_282, 3_965_656, 2048),
    "pixel8m": Size(
        "pixel8m",
        445_000,
        400_000,
        7_900_000,
        2048,
        "the whole catalogue, one user in twenty (of 8.9 million)",
    ),
}


def make_interactions(size: Size, folder: Path, seed: int = SEED) -> Path:
    """Write `<folder>/<name>.csv` unless it is there for the same size and seed.

    Every user has at least 4 interactions and every item at least 1; no user has an item twice.

    Returns:
        The CSV file.
    """
    path = folder / f"{size.name}.csv"
    if _is_made(path, size, seed):
        return path
    rng = np.random.default_rng(seed)
    users, items = draw_pairs(size, rng)
    rows = rng.permutation(len(users))
    # Ids as in PixelRec: numbers without a pattern, items with a letter before them.
    user_names = rng.permutation(10 * size.users)[: size.users].astype(str).astype(object)
    numbers = rng.permutation(10 * size.items)[: size.items]
    item_names = np.array([f"v{number}" for number in numbers], dtype=object)
    frame = pd.DataFrame(
        {
            "item_id": item_names[items[rows]],
            "user_id": user_names[users[rows]],
            "timestamp": _FIRST_TIME + rng.integers(0, _SECONDS, size=len(rows)),
        }
    )
    with atomic_path(path) as temporary:
        frame.to_csv(temporary, index=False)
    _mark(path, size, seed)
    return path


def draw_pairs(size: Size, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw distinct (user, item) pairs: int64 [N] user numbers and int64 [N] item numbers from 0.

    Raises:
        ValueError: the size cannot be had, such as fewer interactions than items.
    """
    if size.interactions < max(size.items, 4 * size.users):
        raise ValueError(f"{size.name}: too few interactions for its users and items")
    activity = rng.lognormal(0.0, 0.9, size=size.users)
    spare = size.interactions - 4 * size.users
    lengths = 4 + np.floor(activity / activity.sum() * spare).astype(np.int64)
    lengths[rng.permutation(size.users)[: size.interactions - lengths.sum()]] += 1
    lengths = np.minimum(lengths, size.items // 2)
    users = np.repeat(np.arange(size.users), lengths)
    weights = 1.0 / (np.arange(size.items) + 10.0) ** 0.9
    bounds = np.cumsum(weights) / weights.sum()
    # Each item once, the others by popularity; repeats within a user are drawn again.
    items = np.full(len(users), -1, dtype=np.int64)
    items[rng.permutation(len(users))[: size.items]] = rng.permutation(size.items)
    fixed = items >= 0
    missing = np.flatnonzero(~fixed)
    while len(missing):
        items[missing] = np.searchsorted(bounds, rng.random(len(missing))).clip(max=size.items - 1)
        keys = users * size.items + items
        # Fixed pairs come first among equal ones, so that it is never they that are drawn again.
        order = np.lexsort((~fixed, keys))
        again = np.zeros(len(keys), dtype=bool)
        again[order[1:]] = keys[order[1:]] == keys[order[:-1]]
        missing = np.flatnonzero(again & ~fixed)
    return users, items


def make_cache(
    size: Size, item_ids: np.ndarray, folder: Path, *, dim: int | None = None, seed: int = SEED
) -> Path:
    """Write a native item cache of random float16 embeddings, in another order than `item_ids`.

    Args:
        size: the data set.
        item_ids: str [I], its ids.
        folder: where to.
        dim: embedding dimension; the size's own when None.
        seed: of the values.
    """
    dim = dim or size.dim
    path = folder / f"{size.name}_{dim}_item_embeddings.safetensors"
    if _is_made(path, size, seed):
        return path
    rng = np.random.default_rng(seed)
    ids = [str(item) for item in rng.permutation(item_ids)]
    save_cache(path, ids, random_embeddings(len(ids), dim, seed), {"model": "random"})
    _mark(path, size, seed)
    return path


def random_embeddings(rows: int, dim: int, seed: int = SEED) -> torch.Tensor:
    """Return seeded normal values: float16 [rows, dim], made in pieces to keep memory low."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty((rows, dim), dtype=torch.float16)
    for start in range(0, rows, 8192):
        part = values[start : start + 8192]
        part.copy_(torch.randn(part.shape, generator=generator))
    return values


def _is_made(path: Path, size: Size, seed: int) -> bool:
    try:
        stamp = json.loads(_stamp(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return path.is_file() and stamp == {**asdict(size), "seed": seed}


def _mark(path: Path, size: Size, seed: int) -> None:
    write_json(_stamp(path), {**asdict(size), "seed": seed})


def _stamp(path: Path) -> Path:
    return path.with_suffix(".made.json")
