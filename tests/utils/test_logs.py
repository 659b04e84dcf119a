"""What reaches the log."""

from __future__ import annotations

import warnings

from hsft.utils.logs import set_up_logging


def test_libraries_deprecations_stay_off_the_terminal_and_ours_do_not() -> None:
    def warned(module: str) -> int:
        with warnings.catch_warnings(record=True) as caught:
            warnings.resetwarnings()
            set_up_logging()
            warnings.warn_explicit("soon gone", FutureWarning, "file.py", 1, module)
        return len(caught)

    assert [warned("transformers.modeling_utils"), warned("torch")] == [0, 0]
    assert [warned("torchmetrics"), warned("hsft.data.cache")] == [1, 1]
