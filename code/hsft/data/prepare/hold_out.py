"""Items taken out of a data set, so that recommending items never trained on can be measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hsft.data.csv_rows import csv_rows, read_header
from hsft.data.interactions import Interactions
from hsft.data.prepare.table import Table
from hsft.data.prepare.write import Target, write_rows
from hsft.utils.errors import InputError


@dataclass(frozen=True)
class HeldOut:
    """What was taken out.

    Attributes:
        items: bool [I + 1], the items taken out; entry 0 (padding) is False.
        interactions: their interactions.
        targets: users whose test target is one of them.
        all_targets: users who have a test target.
    """

    items: np.ndarray
    interactions: int
    targets: int
    all_targets: int


def choose_items(interactions: Interactions, share: float, seed: int) -> HeldOut:
    """Draw a share of the items, at least one; the same for the same ids, share and seed.

    Raises:
        InputError: the share is not between 0 and 1, or no interaction would be left.
    """
    if not 0 < share < 1:
        raise InputError(f"--share {share:g} is not between 0 and 1; give for example 0.1.")
    # Sorted, so that the order of the file's rows does not matter.
    by_id = np.argsort(interactions.item_ids[1:], kind="stable") + 1
    count = max(1, round(share * interactions.num_items))
    drawn = np.random.default_rng(seed).permutation(by_id)[:count]
    items = np.zeros(interactions.num_items + 1, dtype=bool)
    items[drawn] = True
    held = items[interactions.items]
    if held.all():
        raise InputError(f"--share {share:g} leaves no interaction; give a smaller one.")
    # Leave-one-out: the last item of a user with a history is the test target.
    last = interactions.offsets[1:][interactions.lengths >= 2] - 1
    return HeldOut(items, int(held.sum()), int(held[last].sum()), len(last))


def without(interactions: Interactions, held: HeldOut) -> Table:
    """Return the interactions of the other items, each user's by time."""
    keep = ~held.items[interactions.items]
    users = np.repeat(np.arange(interactions.num_users), interactions.lengths)
    return Table(
        interactions.item_ids.tolist(),
        interactions.user_ids.tolist(),
        interactions.items[keep].astype(np.int32),
        users[keep].astype(np.int32),
        interactions.timestamps[keep],
    )


def copy_information(source: Path, target: Target, item_ids: set[str]) -> int:
    """Copy an information file's rows of the items, with all its columns.

    Returns:
        How many of them have a text in any column.

    Raises:
        InputError: the file is not UTF-8 CSV, lacks `item_id`, has rows of another length, or has
            none of the items.
    """
    header = read_header(source, ["item_id"], "change the file")
    position = header.index("item_id")
    with_text: list[bool] = []

    def kept() -> Iterator[list[str]]:
        rows = csv_rows(source)
        next(rows)
        for row, cells in rows:
            if len(cells) != len(header):
                raise InputError(
                    f"{source}, row {row}: has {len(cells)} fields where the header has "
                    f"{len(header)}; correct the row."
                )
            if cells[position] in item_ids:
                with_text.append(sum(map(bool, cells)) > 1)
                yield cells

    write_rows(target, header, kept())
    if not with_text:
        raise InputError(
            f"none of the {len(item_ids)} items left is in {source}; check that it is the item "
            f"information of this data set."
        )
    return sum(with_text)
