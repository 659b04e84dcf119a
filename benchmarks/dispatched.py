"""Counting the operations that torch dispatches."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# Operations that change no number and launch nothing.
VIEWS = frozenset(
    (
        *(
            "view",
            "_unsafe_view",
            "reshape",
            "_reshape_alias",
            "t",
            "transpose",
            "permute",
            "expand",
        ),
        *("slice", "select", "split", "squeeze", "unsqueeze", "as_strided", "alias", "detach"),
        *("empty", "empty_like", "new_empty", "empty_strided", "lift_fresh"),
    )
)


class Dispatched(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))

    @property
    def launches(self) -> int:
        """Operations that are no views."""
        return sum(count for name, count in self.counts.items() if name not in VIEWS)
