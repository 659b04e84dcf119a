"""Which of a run's processes this is, as torchrun says it in the environment."""

from __future__ import annotations

import os


def global_rank() -> int:
    """Return this process's number among all, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process's number among those of its machine, 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))
