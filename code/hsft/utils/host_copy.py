"""Tensors on their way from the device, so that nothing waits for what is queued after them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A small tensor copied to the CPU in the background.

    `Tensor.item()` waits for everything that is queued on the GPU; this waits only for what was
    queued before the copy, so a value read one step late costs no idle time. So on CUDA; from other
    devices the value is copied at once.

    Args:
        values: a tensor on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: Any = None
        # With non_blocking, torch copies from a GPU into pinned memory.
        self._values = values.to("cpu", non_blocking=values.is_cuda)
        if values.is_cuda:
            self._event = torch.cuda.Event()
            # Of the tensor's device, which need not be the current one.
            self._event.record(torch.cuda.current_stream(values.device))

    def read(self) -> Tensor:
        """Wait for the copy and return it, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._values
