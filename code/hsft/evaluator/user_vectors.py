"""User vectors of whole histories, as recommendations are made from."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from hsft.data.dataset.collate_fn import gather_padded
from hsft.data.time_fields import ItemTimes
from hsft.evaluator.evaluator import Scorer


@torch.no_grad()
def encode_users(
    scorer: Scorer,
    items: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    *,
    max_length: int,
    device: torch.device,
    times: ItemTimes | None = None,
    time_shifts: np.ndarray | int = 0,
) -> Tensor:
    """Encode histories of which the last `max_length` items are read.

    Args:
        scorer: the model, in evaluation mode.
        items: int [N], item numbers.
        starts, ends: int64 [B]; history b is `items[starts[b]:ends[b]]`, oldest first, not empty.
        max_length: `Config.eval_list_length`.
        device: where the model is.
        times: of the items, for a model that reads times.
        time_shifts: how many more entries `times` has than `items` before each history.

    Returns:
        float32 [B, D].
    """
    recent = np.maximum(starts, ends - max_length)
    history, _ = gather_padded(items, recent, ends)
    given = [torch.from_numpy(history).to(device), torch.from_numpy(ends - recent).to(device)]
    if times is not None:
        fields = times.fields(recent + time_shifts, ends + time_shifts)
        given.append(torch.from_numpy(fields).to(device))
    return scorer.user_vectors(*given).float()
