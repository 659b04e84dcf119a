"""The last items' vectors as the start of a user's vector."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsft.config import Config
from hsft.model.folder import EXTRA_FILE
from hsft.model.losses import normalize
from hsft.utils.errors import InputError, one_line

# What its tensors' names begin with in a model folder's `hllm_extra.safetensors`.
PREFIX = "residual."
_DECAY = 0.8


class HistoryResidual(nn.Module):
    """u_t = x_t + sum over k of a_k x_(t-k) + W h_t, of unit vectors x and h, k from 1 to N - 1.

    x are the vectors of the items read, as they are scored, and h the UserLLM's outputs. W is zero at
    first and a_k is 0.8^k, so that an untrained model ranks as item kNN by the last N items does, and
    training adds to that (a residual connection that starts as the identity, as in ReZero, arXiv
    2003.04887).

    Args:
        dim: D.
        items: N.
    """

    def __init__(self, dim: int, items: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, dim))
        self.lags = nn.Parameter(_DECAY ** torch.arange(1, items)) if items > 1 else None

    def forward(self, states: Tensor, vectors: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return user vectors: float32 [B, T, D].

        Args:
            states: float [B, T, D], the UserLLM's output.
            vectors: float [B, T, D], the items' vectors.
            positions: int64 [B, T] when rows hold several histories: each item's number in its own.
        """
        units = normalize(vectors)
        # Of the weight's number type, which is bfloat16 with precision: bf16-true.
        directions = normalize(states).to(self.weight.dtype)
        users = units + F.linear(directions, self.weight).float()
        if self.lags is None:
            return users
        for lag, factor in enumerate(self.lags[: units.shape[1] - 1], start=1):
            earlier = F.pad(units[:, :-lag], (0, 0, lag, 0)) * factor
            if positions is not None:
                earlier = earlier * (positions >= lag).unsqueeze(-1)
            users = users + earlier
        return users


def residual_items(
    config: Config,
    extra: Mapping[str, Tensor],
    folder: str | Path,
    hidden_size: int,
    *,
    train: bool,
) -> int:
    """Return the N of a model: the stored residual's, else the configuration's when it is trained.

    Args:
        config: the configuration.
        extra: as `read_extra` returns.
        folder: the model folder it is from.
        hidden_size: D of the UserLLM in it.
        train: whether the configuration's trainable parts are built.

    Returns:
        N; 0: the UserLLM's output stays as it is.

    Raises:
        InputError: the stored residual is damaged, or is of another N than the one to be trained.
    """
    asked = config.residual_items if train else 0
    stored = _stored_items(extra, Path(folder) / EXTRA_FILE, hidden_size)
    if asked and stored and asked != stored:
        raise InputError(
            f"the model in {folder} was trained with residual_items {stored}, which residual_items "
            f"{asked} cannot go on from; set --residual_items {stored}, or 0 to keep it as it is."
        )
    return stored or asked


def make_residual(
    config: Config,
    extra: Mapping[str, Tensor],
    folder: str | Path,
    hidden_size: int,
    *,
    train: bool,
) -> HistoryResidual | None:
    """Make a model's residual, with the stored weights where its folder has some.

    Stored weights are frozen unless training goes on from them.

    Args:
        config, extra, folder, hidden_size, train: as for `residual_items`.

    Returns:
        None: the UserLLM's output stays as it is.

    Raises:
        InputError: as `residual_items`.
    """
    items = residual_items(config, extra, folder, hidden_size, train=train)
    if not items:
        return None
    residual = HistoryResidual(hidden_size, items)
    stored = _stored(extra)
    if stored:
        residual.load_state_dict({name: value.float() for name, value in stored.items()})
        residual.requires_grad_(train and config.residual_items > 0)
    return residual


def residual_tensors(residual: HistoryResidual | None) -> dict[str, Tensor]:
    """Return a residual as `hllm_extra.safetensors` stores it: float32 `residual.weight` [D, D] and,
    for N > 1, `residual.lags` [N - 1]; empty without one."""
    if residual is None:
        return {}
    return {
        f"{PREFIX}{name}": value.detach().float().cpu().contiguous()
        for name, value in residual.state_dict().items()
    }


def _stored(extra: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(PREFIX): value for name, value in extra.items() if name.startswith(PREFIX)
    }


def _stored_items(extra: Mapping[str, Tensor], path: Path, hidden_size: int) -> int:
    """Return the N of what `hllm_extra.safetensors` stores, 0 where it stores no residual."""
    stored = _stored(extra)
    if not stored:
        return 0
    for name in stored:
        if name not in ("weight", "lags"):
            raise InputError(
                f"{path} holds {one_line(PREFIX + name, 40)}, which is no part of a residual; export "
                f"the run again."
            )
    if "weight" not in stored:
        raise InputError(f"{path} lacks {PREFIX}weight; export the run again.")
    shape = tuple(stored["weight"].shape)
    if shape != (hidden_size, hidden_size):
        raise InputError(
            f"{path}: {PREFIX}weight has shape {shape}, the UserLLM's hidden size needs "
            f"{(hidden_size, hidden_size)}; export the run again."
        )
    if "lags" not in stored:
        return 1
    if stored["lags"].ndim != 1 or not len(stored["lags"]):
        raise InputError(
            f"{path}: {PREFIX}lags has shape {tuple(stored['lags'].shape)}, not one number for each "
            f"item before the last; export the run again."
        )
    return 1 + len(stored["lags"])
