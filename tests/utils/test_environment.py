"""What is measured of this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hsft.utils.environment import current_memory, peak_memory

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no /proc")
def test_memory_in_use_follows_an_allocation() -> None:
    before = current_memory(CPU)["host_bytes"]
    block = np.ones(96 << 20, dtype=np.uint8)
    after = current_memory(CPU)["host_bytes"]
    assert after - before > 80 << 20
    # The kernel counts pages a batch at a time for each thread.
    assert peak_memory(CPU)["host_bytes"] > after - (8 << 20)
    del block
    assert current_memory(CPU)["host_bytes"] < after - (80 << 20)
