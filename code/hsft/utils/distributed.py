"""The processes that torchrun started: which one this is, and what they send to each other.

Importing this module does not import torch, which takes seconds: `--help` and a mistyped option
need only the process's number. Every function from `init_process_group` on is collective: all
processes call it, in the same order.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hsft.utils.errors import InputError, problems_of, refuse

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor
    from torch import distributed as dist

T = TypeVar("T")

# How long a process waits for another one inside a collective operation. torchrun ends all
# processes as soon as one of them dies; this is for one that is alive and does not answer. It has
# to be longer than anything that one process does alone, such as writing a large model.
TIMEOUT = timedelta(minutes=30)

# How long a process waits for process 0 to print a line.
_PRINT_TIMEOUT = timedelta(seconds=5)


def global_rank() -> int:
    """Return this process's number among all, 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number among those of its machine, 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return the number of processes that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank_zero() -> bool:
    """Say whether this is process 0, the one that writes files and prints."""
    return global_rank() == 0


def init_process_group(timeout: timedelta = TIMEOUT) -> None:
    """Join the processes that torchrun started, for messages between their CPUs (gloo).

    Without torchrun, and where a group exists (Lightning Fabric makes one), there is nothing to do.
    The group lasts until the program ends, since torchrun's store cannot set up a second one.

    Args:
        timeout: how long one process waits for another.
    """
    from torch import distributed as dist

    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timeout)
        atexit.register(_destroy_process_group)


def _destroy_process_group() -> None:
    from torch import distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast(value: T, source: int = 0) -> T:
    """Return the value that process `source` passed: any object that can be pickled."""
    if world_size() == 1:
        return value
    from torch import distributed as dist

    box: list[Any] = [value]
    dist.broadcast_object_list(box, source)
    return box[0]


def broadcast_tensor(values: Tensor, source: int = 0) -> None:
    """Give a tensor the values that it has in process `source`, in place.

    Args:
        values: the same shape and dtype in every process, on a device that the group serves.
        source: rank of the process.
    """
    if world_size() > 1:
        from torch import distributed as dist

        dist.broadcast(values, source)


def all_gather(value: T) -> list[T]:
    """Return every process's value, in the order of ranks: any object that can be pickled."""
    if world_size() == 1:
        return [value]
    from torch import distributed as dist

    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box


def barrier() -> None:
    """Wait until all processes are here."""
    all_gather(None)


def all_reduce(values: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
    """Return the sum or maximum of a tensor over all processes, without gradient.

    Args:
        values: the same shape and dtype in every process, on the device that the group serves;
            left as it is.
        op: what to compute.
    """
    if world_size() == 1:
        return values
    from torch import distributed as dist

    result = values.detach().clone()
    dist.all_reduce(result, dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM)
    return result


def all_reduce_array(values: np.ndarray, device: torch.device) -> np.ndarray:
    """Return the sum of an array over all processes.

    Args:
        values: int64 or float64, the same shape in every process.
        device: a device that the group serves.
    """
    import torch

    return all_reduce(torch.from_numpy(values).to(device)).numpy(force=True)


def all_gather_ids(ids: Tensor) -> Tensor:
    """Return the ids of all processes one after the other, in the order of ranks.

    Args:
        ids: int64 [n]; n may differ between processes.

    Returns:
        int64 [sum of all n].
    """
    if world_size() == 1:
        return ids
    import torch
    from torch import distributed as dist

    def gather(values: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(values) for _ in range(world_size())]
        dist.all_gather(everyone, values)
        return everyone

    sizes = torch.cat(gather(ids.new_tensor([len(ids)]))).tolist()
    padded = ids.new_zeros(max(sizes))
    padded[: len(ids)] = ids
    return torch.cat([part[:size] for part, size in zip(gather(padded), sizes, strict=True)])


def run_on_rank_zero(make: Callable[[], T]) -> T:
    """Run `make` in process 0 alone and return its result in every process.

    Raises:
        InputError: what `make` raised, in every process.
    """
    if world_size() == 1:
        return make()
    value: T | None = None
    problems: list[str] = []
    if is_rank_zero():
        try:
            value = make()
        except InputError as error:
            problems = problems_of(error)
    value, problems = broadcast((value, problems))
    refuse(problems)
    return value  # type: ignore[return-value]


def run_on_all_ranks(make: Callable[[], T]) -> T:
    """Run `make` in every process and return its result, or fail in all of them.

    Raises:
        InputError: what `make` raised in the process of the lowest rank that failed.
    """
    value: T | None = None
    problems: list[str] = []
    try:
        value = make()
    except InputError as error:
        problems = problems_of(error)
    refuse(next(filter(None, all_gather(problems)), []))
    return value  # type: ignore[return-value]


def is_lost_process(error: BaseException) -> bool:
    """Say whether an exception means that another process of the group has gone or is silent."""
    from torch import distributed as dist

    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    # gloo raises plain RuntimeErrors that name its source files.
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def print_once(line: str) -> None:
    """Write a line that every process may have to standard error, once.

    Process 0 writes it. If it does not within a few seconds (only another process has the line, or
    process 0 is gone), one of the others writes it, with its rank.
    """
    text = line.rstrip("\n")
    store = _torchrun_store()
    if store is None:
        _print(text)
        return
    key = _print_key(text)
    try:
        if is_rank_zero():
            _print(text)
            store.set(key, "1")
            return
        try:
            store.wait([key], _PRINT_TIMEOUT)
        except RuntimeError:
            if store.add(f"{key}-count", 1) == 1:
                _print(f"{text} (process {global_rank()} on {socket.gethostname()})")
    except RuntimeError:  # the launcher, which holds the store, has gone
        _print(text)


def print_by_first_process(line: str) -> None:
    """Write a line to standard error in whichever process comes first, without waiting for 0."""
    text = line.rstrip("\n")
    store = _torchrun_store()
    try:
        if store is None or store.add(f"{_print_key(text)}-count", 1) == 1:
            _print(text)
    except RuntimeError:  # as in `print_once`
        _print(text)


def _print(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _print_key(text: str) -> str:
    return f"hsft-printed-{hashlib.sha256(text.encode()).hexdigest()}"


def _torchrun_store() -> dist.TCPStore | None:
    """Connect to the store that torchrun's agent keeps for its workers; None without one."""
    if world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch import distributed as dist

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(address, port, is_master=False, timeout=_PRINT_TIMEOUT)
    except (KeyError, ValueError, RuntimeError):
        return None
