"""What a result has to say about where it came from: versions, revision, hardware, memory."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import resource
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "torch",
    "transformers",
    "lightning",
    "peft",
    "bitsandbytes",
    "deepspeed",
    "safetensors",
    "pandas",
    "numpy",
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def now() -> str:
    """Return the time in UTC to the second: `2026-01-31T12:00:00+00:00`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def git_revision(folder: Path | None = None) -> str | None:
    """Return the git commit of the code, with `-dirty` for uncommitted changes; None without git."""
    where = folder or Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=where,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak resident memory of this process and the peak GPU memory, in bytes."""
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    peak: dict[str, int] = {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def current_memory(device: torch.device) -> dict[str, int]:
    """Return this process's resident memory and the GPU memory in use, in bytes.

    The keys are those of `peak_memory`; a system that does not say leaves its key out. Neither
    number waits for the GPU.
    """
    found: dict[str, int] = {}
    # Linux alone has it: the second field counts resident pages.
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        found["host_bytes"] = pages * resource.getpagesize()
    if device.type == "cuda":
        found["gpu_bytes"] = torch.cuda.memory_allocated(device)
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """Return versions, git revision, device and platform for `result.json`."""
    return {
        "versions": versions(),
        "git_revision": git_revision(),
        "device": str(device),
        "device_name": device_name(device),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def set_threads(count: int | None) -> None:
    """Set torch's CPU threads; None leaves torch's own choice."""
    if count is not None:
        torch.set_num_threads(count)
