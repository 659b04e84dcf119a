"""Fingerprints of what users were scored on, by which runs are found to be comparable."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

# torch is imported where it is needed, since results are compared without it.
if TYPE_CHECKING:
    from hsft.data.dataset import CachedEmbeddingEvalDataset
    from hsft.evaluator.evaluator import EvalProtocol

_HEX_DIGITS = 32


def evaluation_fingerprint(
    dataset: CachedEmbeddingEvalDataset, protocol: EvalProtocol
) -> dict[str, str]:
    """Return a hash of each part that two evaluations must share to be compared user by user.

    The hashes are over sorted ids and not over numbers, so that a file whose rows stand in another
    order differs in `order of users` alone, by which stored ranks are paired.

    Args:
        dataset: the users of one phase.
        protocol: how they are scored; cut-offs and metrics do not count, since they are computed
            from ranks.

    Returns:
        Part -> first 32 hex digits of a SHA-256: `users`, `order of users`, `held-out items` (each
        user's target), `catalogue` (all item ids), `histories` (what comes before the targets, and
        so which items are masked), `split` (its kind and times) and `protocol`.
    """
    from hsft.data.split import ragged_positions

    data, segments = dataset.interactions, dataset.segments
    item_ids = data.item_ids[1:]
    by_item_id = np.argsort(item_ids)
    sorted_number = np.zeros(len(data.item_ids), dtype=np.int64)
    sorted_number[by_item_id + 1] = np.arange(len(by_item_id))
    user_ids = data.user_ids[segments.users]
    by_user_id = np.argsort(user_ids)
    starts, ends = segments.starts[by_user_id], segments.ends[by_user_id]
    before = ragged_positions(starts, ends - 1)
    kind = [protocol.kind]
    if protocol.kind == "sampled":
        kind += [str(protocol.candidates), str(protocol.seed)]
    return {
        "users": _hash_ids(user_ids[by_user_id]),
        "order of users": _hash_arrays(by_user_id),
        "held-out items": _hash_ids(data.item_ids[dataset.targets[by_user_id]]),
        "catalogue": _hash_ids(item_ids[by_item_id]),
        "histories": _hash_arrays(sorted_number[data.items[before]], ends - starts),
        "split": _hash_ids(np.array([dataset.split.identity], dtype=object)),
        "protocol": _hash_ids(np.array(kind, dtype=object)),
    }


def differing_parts(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Name the parts of two fingerprints that differ; parts that either lacks are not compared."""
    return [part for part in one if part in other and one[part] != other[part]]


def _hash_ids(ids: np.ndarray) -> str:
    encoded = [str(text).encode("utf-8", "surrogatepass") for text in ids]
    # The lengths tell ["ab", "c"] from ["a", "bc"].
    lengths = np.array([len(text) for text in encoded], dtype="<i8")
    return hashlib.sha256(lengths.tobytes() + b"".join(encoded)).hexdigest()[:_HEX_DIGITS]


def _hash_arrays(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype="<i8").data)
    return digest.hexdigest()[:_HEX_DIGITS]
