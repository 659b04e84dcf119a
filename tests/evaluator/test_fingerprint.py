"""What makes two evaluations comparable."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from hsft.data.dataset import CachedEmbeddingEvalDataset
from hsft.data.interactions import Interactions
from hsft.data.split import leave_one_out
from hsft.evaluator.evaluator import EvalProtocol
from hsft.evaluator.fingerprint import differing_parts, evaluation_fingerprint

HISTORIES = {"u1": ["a", "b", "c"], "u2": ["b", "d"], "u10": ["c", "a", "d", "b"]}
FULL = EvalProtocol("full", (5,), ("Recall",))
SAMPLED = replace(FULL, kind="sampled", candidates=2)


def fingerprint(
    histories: dict[str, list[str]],
    protocol: EvalProtocol = FULL,
    length: int = 8,
    items: Sequence[str] = (),
) -> dict[str, str]:
    items = [*items] or list(dict.fromkeys(item for each in histories.values() for item in each))
    numbers = [1 + items.index(item) for history in histories.values() for item in history]
    data = Interactions(
        items=np.array(numbers, dtype=np.int32),
        timestamps=np.arange(len(numbers)),
        offsets=np.cumsum([0, *map(len, histories.values())]),
        user_ids=np.array(list(histories), dtype=object),
        item_ids=np.array(["[PAD]", *items], dtype=object),
    )
    dataset = CachedEmbeddingEvalDataset(leave_one_out(data), "test", length)
    return evaluation_fingerprint(dataset, protocol)


CASES = {
    "the same": (HISTORIES, FULL, []),
    "other cut-offs": (HISTORIES, replace(FULL, topk=(1, 20), budget_bytes=1), []),
    "sampled": (HISTORIES, SAMPLED, ["protocol"]),
    "another order of users": (
        dict(reversed(HISTORIES.items())),
        FULL,
        ["order of users"],
    ),
    "another target": (
        HISTORIES | {"u2": ["b", "c"]},
        FULL,
        ["held-out items"],
    ),
    "another history": (HISTORIES | {"u2": ["a", "d"]}, FULL, ["histories"]),
    "another user": (
        {"u1": HISTORIES["u1"], "u3": HISTORIES["u2"], "u10": HISTORIES["u10"]},
        FULL,
        ["users"],
    ),
    "one more item, of a user without a history": (
        HISTORIES | {"u4": ["e"]},
        FULL,
        ["catalogue"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_differs_is_named(case: str) -> None:
    histories, protocol, parts = CASES[case]
    assert differing_parts(fingerprint(HISTORIES), fingerprint(histories, protocol)) == parts


def test_the_length_that_a_model_reads_does_not_count() -> None:
    assert fingerprint(HISTORIES, length=2) == fingerprint(HISTORIES)


def test_candidate_lists_depend_on_the_seed() -> None:
    assert differing_parts(
        fingerprint(HISTORIES, SAMPLED), fingerprint(HISTORIES, replace(SAMPLED, seed=1))
    ) == ["protocol"]
    # Full ranking draws nothing.
    assert fingerprint(HISTORIES, replace(FULL, seed=1)) == fingerprint(HISTORIES)


def test_candidate_lists_depend_on_the_order_of_items() -> None:
    """They are drawn by number, and numbers follow the rows of the file."""
    one, other = fingerprint(HISTORIES, SAMPLED), fingerprint(HISTORIES, SAMPLED, items="dcba")
    assert differing_parts(one, other) == ["order of items"]
    assert fingerprint(HISTORIES, items="dcba") == fingerprint(HISTORIES)


def test_hashes_are_over_sorted_ids() -> None:
    actual = fingerprint(HISTORIES)
    # By name u1, u10 and u2; the lengths of their names first.
    lengths = np.array([2, 3, 2], dtype="<i8").tobytes()
    assert actual["users"] == hashlib.sha256(lengths + b"u1u10u2").hexdigest()[:32]
    # Histories without the targets: a b, then c a d, then b; and the lengths with them.
    numbers = np.array([0, 1, 2, 0, 3, 1, 3, 4, 2], dtype="<i8").tobytes()
    assert actual["histories"] == hashlib.sha256(numbers).hexdigest()[:32]
