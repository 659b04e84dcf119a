"""Training sequences for the padding benchmarks: the demo's, and lengths like Pixel200K's."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from hsft.data.dataset import CachedEmbeddingTrainDataset
from hsft.data.interactions import Interactions, read_interactions
from hsft.data.split import leave_one_out

PIXEL_USERS, PIXEL_ITEMS, PIXEL_INTERACTIONS = 200_000, 96_282, 3_965_656
# The PixelRec paper gives totals only: the spread and the shortest history are assumptions.
_SPREAD, _SHORTEST = 0.8, 5


def pixel_like(seed: int = 0, users: int = PIXEL_USERS) -> Interactions:
    """Make histories with Pixel200K's mean length, log-normal, at least 5 items; Zipf popularity."""
    rng = np.random.default_rng(seed)
    mean = PIXEL_INTERACTIONS / PIXEL_USERS - _SHORTEST
    drawn = rng.lognormal(math.log(mean) - _SPREAD**2 / 2, _SPREAD, users)
    lengths = _SHORTEST + np.rint(drawn).astype(np.int64)
    weights = 1 / np.arange(1, PIXEL_ITEMS + 1)
    cumulative = np.cumsum(weights / weights.sum())
    total = int(lengths.sum())
    ranks = np.searchsorted(cumulative, rng.random(total)).clip(max=PIXEL_ITEMS - 1)
    return Interactions(
        user_ids=np.arange(users).astype(str),
        item_ids=np.arange(PIXEL_ITEMS + 1).astype(str),
        items=(ranks + 1).astype(np.int32),
        timestamps=np.arange(total),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
    )


def sequences(interactions: Interactions, max_length: int) -> CachedEmbeddingTrainDataset:
    """Cut histories into training sequences of at most `max_length` transitions."""
    return CachedEmbeddingTrainDataset(leave_one_out(interactions), max_length)


def demo(root: Path) -> Interactions:
    """Read MovieLens-100K as the demo prepared it."""
    return read_interactions(root / "dataset" / "ml-100k.csv")
