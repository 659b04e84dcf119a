"""Count the bytes that autograd saves for a backward pass, with tensors that have shapes and no numbers."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


class SavedBytes:
    """Adds up the storages of what autograd saves, but for a model's weights and buffers.

    Args:
        model: the model.
        smallest_ndim: dimensions below which a tensor is not counted.

    Attributes:
        total: bytes so far, each storage once.
    """

    def __init__(self, model: nn.Module, smallest_ndim: int = 0) -> None:
        self._stored = {_storage(weight) for weight in [*model.parameters(), *model.buffers()]}
        self._smallest_ndim = smallest_ndim
        self._saved: dict[int, int] = {}
        # A storage that is freed may give its number to another one.
        self._kept: list[Tensor] = []

    @property
    def total(self) -> int:
        """Bytes so far."""
        return sum(self._saved.values())

    def hooks(self) -> AbstractContextManager[None]:
        """Return the context in which a forward pass is counted."""
        hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(
            self._note, lambda tensor: tensor
        )
        return hooks

    def _note(self, tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in self._stored and tensor.ndim >= self._smallest_ndim:
            self._saved[key] = max(self._saved.get(key, 0), tensor.untyped_storage().nbytes())
            self._kept.append(tensor)
        return tensor


def give_fake_storage(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace a meta model's tensors by fake ones of the CPU: autocast does not act on meta.

    Call it in torch's FakeTensorMode.

    Args:
        model: the model, on the meta device.
        dtype: of the weights; None: each its own.
    """
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                fake = torch.empty(weight.shape, dtype=dtype or weight.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
