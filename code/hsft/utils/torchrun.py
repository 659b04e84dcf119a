"""What torchrun says to a process: which one of the run it is, and whether another has spoken."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import distributed as dist

_PATIENCE = timedelta(seconds=5)


def global_rank() -> int:
    """Return this process's number among all, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return this process's number among those of its machine, 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def say_once(line: str, *, at_once: bool = False) -> None:
    """Write a line to standard error, once for all processes of the run.

    Process 0 writes. The others keep silent when it does so within a few seconds; otherwise (only
    they have something to say, or process 0 is gone) one of them writes.

    Args:
        line: what to write.
        at_once: whichever process comes first writes, without waiting for process 0.
    """
    text = line.rstrip("\n")
    store = _store()
    key = f"hsft-said-{hashlib.sha256(text.encode()).hexdigest()}"
    try:
        if store is None or (at_once and store.add(f"{key}-count", 1) == 1):
            sys.stderr.write(f"{text}\n")
        elif not at_once:
            _say_in_turn(store, key, text)
    except RuntimeError:  # the launcher, which holds the store, has gone
        sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _say_in_turn(store: dist.TCPStore, key: str, text: str) -> None:
    if global_rank() == 0:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
        store.set(key, "1")
        return
    try:
        store.wait([key], _PATIENCE)
    except RuntimeError:
        if store.add(f"{key}-count", 1) == 1:
            where = f"process {global_rank()} on {socket.gethostname()}"
            sys.stderr.write(f"{text} ({where})\n")


def _store() -> dist.TCPStore | None:
    """Connect to the store that torchrun's agent keeps for its workers; None without one."""
    if world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    # Here, since torch takes seconds to import and a mistyped option should not.
    from torch import distributed as dist

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, is_master=False, timeout=_PATIENCE)
    except (KeyError, ValueError, RuntimeError):
        return None
