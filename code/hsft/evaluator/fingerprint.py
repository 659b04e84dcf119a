"""Fingerprints of what users were scored on, by which runs are found to be comparable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
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
        so which items are masked), `split` (its kind and times) and `protocol`; of sampled candidates
        also `order of items`, by whose numbers they are drawn.
    """
    from hsft.data.blocks import SAMPLES_AT_ONCE, slices
    from hsft.data.split import ragged_positions

    data, segments = dataset.interactions, dataset.segments
    item_ids = data.item_ids[1:]
    by_item_id = np.argsort(item_ids)
    sorted_number = np.zeros(len(data.item_ids), dtype=np.int64)
    sorted_number[by_item_id + 1] = np.arange(len(by_item_id))
    everybody = len(segments) == data.num_users
    by_user_id = np.argsort(data.user_ids if everybody else data.ids_of(segments.users))

    def samples() -> Iterator[np.ndarray]:
        for part in slices(len(by_user_id), SAMPLES_AT_ONCE):
            yield by_user_id[part]

    def user_ids() -> Iterator[np.ndarray]:
        yield from (data.user_ids[segments.users[some]] for some in samples())

    def held_out() -> Iterator[np.ndarray]:
        yield from (data.item_ids[data.items[segments.ends[some] - 1]] for some in samples())

    def histories() -> Iterator[np.ndarray]:
        for some in samples():
            rows = ragged_positions(segments.starts[some], segments.ends[some] - 1)
            yield sorted_number[data.items[rows]]
        yield from (segments.ends[some] - segments.starts[some] for some in samples())

    kind, more = [protocol.kind], {}
    if protocol.kind == "sampled":
        kind += [str(protocol.candidates), str(protocol.seed)]
        more["order of items"] = _hash_ids(lambda: iter([item_ids]))
    return {
        "users": _hash_ids(user_ids),
        "order of users": _hash_arrays(samples()),
        "held-out items": _hash_ids(held_out),
        "catalogue": _hash_ids(lambda: iter([item_ids[by_item_id]])),
        "histories": _hash_arrays(histories()),
        "split": _hash_ids(lambda: iter([np.array([dataset.split.identity], dtype=object)])),
        "protocol": _hash_ids(lambda: iter([np.array(kind, dtype=object)])),
        **more,
    }


def differing_parts(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """Name the parts of two fingerprints that differ; parts that either lacks are not compared."""
    return [part for part in one if part in other and one[part] != other[part]]


def _hash_ids(blocks: Callable[[], Iterator[np.ndarray]]) -> str:
    """Hash ids: of all of them the lengths, then the bytes.

    Args:
        blocks: returns the ids a block at a time, and is called twice.
    """

    def encoded() -> Iterator[list[bytes]]:
        for ids in blocks():
            yield [str(text).encode("utf-8", "surrogatepass") for text in ids.tolist()]

    digest = hashlib.sha256()
    # The lengths tell ["ab", "c"] from ["a", "bc"].
    for texts in encoded():
        digest.update(np.array([len(text) for text in texts], dtype="<i8").data)
    for texts in encoded():
        digest.update(b"".join(texts))
    return digest.hexdigest()[:_HEX_DIGITS]


def _hash_arrays(arrays: Iterator[np.ndarray]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array, dtype="<i8").data)
    return digest.hexdigest()[:_HEX_DIGITS]
