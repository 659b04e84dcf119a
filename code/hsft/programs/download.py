"""`hsft download-itemllm` and `hsft download-userllm`: download_itemllm.py, download_userllm.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hsft.hub.options import parse_options
from hsft.utils.errors import EXIT_OK

if TYPE_CHECKING:
    from hsft.hub.layout import Side


def download_itemllm(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    return _download("item", argv)


def download_userllm(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    return _download("user", argv)


def _download(side: Side, argv: Sequence[str]) -> int:
    options = parse_options(side, argv)
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.inputs.import_hllm import import_checkpoint
    from hsft.run.first_look import look_at_model

    if import_checkpoint(options):
        look_at_model(side, options.out)
    return EXIT_OK
