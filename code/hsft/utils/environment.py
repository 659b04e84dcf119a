"""What a result has to say about where it came from: versions, revision, hardware, memory."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
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
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


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
    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name(device))
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak resident memory of this process and the peak GPU memory, in bytes."""
    peak: dict[str, int] = {"host_bytes": _peak_resident()}
    if device.type == "cuda":
        peak["gpu_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def current_memory(device: torch.device) -> dict[str, int]:
    """Return this process's resident memory and the GPU memory in use, in bytes.

    The keys are those of `peak_memory`. Neither number waits for the GPU.
    """
    memory: dict[str, int] = {"host_bytes": psutil.Process().memory_info().rss}
    if device.type == "cuda":
        memory["gpu_bytes"] = torch.cuda.memory_allocated(device)
    return memory


def _peak_resident() -> int:
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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
