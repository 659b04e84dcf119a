"""The evaluation loop: user vectors, ranks, metrics; the same for every model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hsft.data.dataset import CachedEmbeddingEvalDataset, EvalBatch, EvalCollate
from hsft.data.interactions import PAD
from hsft.data.negatives import NegativeSampler
from hsft.evaluator import metrics, ranking
from hsft.evaluator.list_metrics import ItemStatistics, ListMetrics, mean_history_popularity
from hsft.evaluator.tensor_cores import tensor_core_ranks
from hsft.utils.errors import InputError
from hsft.utils.host_copy import HostCopy
from hsft.utils.prefetch import prefetch

log = logging.getLogger(__name__)

# Candidate lists get a stream of their own, so that they do not depend on what else was drawn.
_CANDIDATE_STREAM = {"valid": 1, "test": 2}


class Scorer(Protocol):
    """What the evaluator needs of a model: vectors whose dot products are the scores."""

    @property
    def num_items(self) -> int:
        """Number of items I."""

    def user_vectors(self, history: Tensor, lengths: Tensor) -> Tensor:
        """Int64 [B, T] and [B] -> float32 [B, D]."""

    def item_slice(self, start: int, end: int) -> Tensor:
        """Item numbers start..end-1 -> float32 [end - start, D]."""

    def item_vectors(self, items: Tensor) -> Tensor:
        """Int64 [...] -> float32 [..., D]."""


class PartedScorer(Scorer, Protocol):
    """A model whose vectors are those of other models side by side, as an ensemble's are."""

    @property
    def parts(self) -> Sequence[Scorer]:
        """The other models, M of them."""


@dataclass(frozen=True)
class EvalProtocol:
    """How users are scored: the same object serves every row of a table.

    Attributes:
        kind: `full` or `sampled`.
        topk: cut-offs.
        metrics: metric names.
        candidates: drawn items per user of `sampled`.
        seed: seed of the candidate lists.
        budget_bytes: largest score matrix held at once.
        tensor_cores: full ranking by TF32 products, with exact scores near the target's; not where
            metrics of lists need the scores of all items. No rank depends on it but for ties of float32's
            rounding, so that it is not part of what evaluations are compared by.
    """

    kind: str
    topk: tuple[int, ...]
    metrics: tuple[str, ...]
    candidates: int = 99
    seed: int = 2020
    budget_bytes: int = 1 << 28
    tensor_cores: bool = False

    def describe(self) -> str:
        """Say the protocol in a few words, for tables."""
        if self.kind == "full":
            return "full ranking, seen items masked"
        return f"{self.candidates} sampled negatives a user (seed {self.seed})"


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation.

    Attributes:
        phase: `valid` or `test`.
        users: int64 [E], user numbers, ascending.
        ranks: int64 [E], rank of each user's target, 1 is best; `metrics.UNRANKED` for a target
            that is no candidate, which is a miss at every K.
        metrics: `NAME@K`, or the name of a metric without K -> value.
        seconds: wall time.
    """

    phase: str
    users: np.ndarray
    ranks: np.ndarray
    metrics: dict[str, float]
    seconds: float = 0.0


@dataclass(frozen=True)
class _Group:
    """Encoded users that are ranked together; fields as in `EvalBatch`, `vectors` float32 [b, D]."""

    vectors: Tensor
    rows: Tensor
    targets: Tensor
    seen_rows: Tensor
    seen_items: Tensor
    candidates: Tensor

    @classmethod
    def of(cls, batches: Sequence[tuple[Tensor, EvalBatch]]) -> _Group:
        """Put batches and their user vectors below one another."""
        sizes = [len(vectors) for vectors, _ in batches]
        before = [sum(sizes[:number]) for number in range(len(sizes))]
        return cls(
            vectors=torch.cat([vectors for vectors, _ in batches]),
            rows=torch.cat([batch.rows for _, batch in batches]),
            targets=torch.cat([batch.targets for _, batch in batches]),
            seen_rows=torch.cat(
                [batch.seen_rows + n for n, (_, batch) in zip(before, batches, strict=True)]
            ),
            seen_items=torch.cat([batch.seen_items for _, batch in batches]),
            candidates=torch.cat([batch.candidates for _, batch in batches]),
        )

    def seen(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Return `seen_rows` and `seen_items` of `size` users from number `start` on."""
        if size >= len(self.vectors):
            return self.seen_rows, self.seen_items
        # Waits for the device to count them; groups are made so that there is one part.
        in_part = (self.seen_rows >= start) & (self.seen_rows < start + size)
        return self.seen_rows[in_part] - start, self.seen_items[in_part]


class Evaluator:
    """Scores all users of one phase.

    Args:
        dataset: the users.
        protocol: how they are scored.
        batch_size: users encoded at a time.
        num_workers: processes preparing batches.
        rank: number of this process.
        world_size: number of processes. Each scores every world_size-th user, so that each user is
            counted exactly once. All processes encode the same number of users, the last of
            them possibly one whose score is thrown away, since under ZeRO stage 3 the model runs
            in all of them together.
        candidates: int64 [E, C], the users' lists of `sampled`, where the dataset is a part of the
            users for whom they were drawn; drawn here when None.
        statistics: what the recommended lists are measured by, under full ranking; None: no metrics of
            lists but Coverage, where the protocol has it.

    Raises:
        InputError: there are no users to score, or too few items for the candidate lists.
    """

    def __init__(
        self,
        dataset: CachedEmbeddingEvalDataset,
        protocol: EvalProtocol,
        *,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        candidates: np.ndarray | None = None,
        statistics: ItemStatistics | None = None,
    ) -> None:
        if not len(dataset):
            raise InputError(
                f"no user has a history and a {dataset.phase} target; the interactions need users "
                f"with {dataset.split.needs(dataset.phase)}."
            )
        self.dataset = dataset
        self.protocol = protocol
        self.world_size = world_size
        self._process = rank
        self._statistics = statistics
        self._share = np.arange(rank, len(dataset), world_size)
        if candidates is None and protocol.kind == "sampled":
            candidates = draw_candidates(dataset, protocol)
        self._candidates = candidates
        self._batch_size, self._num_workers = batch_size, num_workers
        # Given up in an evaluation where they do not pay.
        self._tensor_cores = protocol.tensor_cores

    @property
    def own_users(self) -> int:
        """Users that this process scores."""
        return len(self._share)

    def describe_lists(self) -> dict[str, Any] | None:
        """Return for `result.json` what recommended lists are measured by; None where they are not."""
        if self._statistics is None:
            return None
        return {
            "history_popularity": self._history_popularity,
            "vectors": self._statistics.vectors_origin,
        }

    @cached_property
    def _history_popularity(self) -> float:
        """Mean popularity of the users' histories; 0 where lists are not measured."""
        if self._statistics is None:
            return 0.0
        segments = self.dataset.segments
        return mean_history_popularity(
            self.dataset.interactions.items,
            segments.starts,
            segments.ends - 1,
            self._statistics.interactions,
        )

    # Not inference_mode: its tensors would stay behind as ZeRO stage 3's gathered parameters.
    @torch.no_grad()
    def run(
        self,
        scorer: Scorer,
        device: torch.device,
        *,
        all_reduce: Callable[[np.ndarray], np.ndarray] = lambda values: values,
        on_batch: Callable[[int], None] = lambda users: None,
        autocast: Callable[[], Any] | None = None,
    ) -> Evaluation:
        """Rank every user's target and average the metrics.

        Args:
            scorer: the model, in evaluation mode.
            device: where it is.
            all_reduce: returns the sum of an array, int64 or float64, over all processes.
            on_batch: called with the number of users just encoded.
            autocast: context manager factory for the model's forward pass.
        """
        began = time.perf_counter()
        self._tensor_cores = self.protocol.tensor_cores
        ranks = np.zeros(len(self.dataset), dtype=np.int64)
        lists = self._list_metrics(scorer)
        waiting: HostCopy | None = None
        for group in self._groups(scorer, device, on_batch, autocast):
            ranked = self._rank(scorer, group, 0 if lists is None else lists.depth)
            started = HostCopy(torch.cat([group.rows.unsqueeze(0), ranked]))
            # A group late, so that the device has the next one before this one is waited for.
            self._write(waiting, ranks, lists)
            waiting = started
        self._write(waiting, ranks, lists)
        if self.world_size > 1:
            counted = np.zeros_like(ranks)
            counted[self._share] = ranks[self._share]
            ranks = all_reduce(counted)
            if lists is not None:
                lists.add_up(all_reduce)
        values = metrics.compute(
            self.protocol.metrics, self.protocol.topk, ranks, self._count_candidates(scorer)
        )
        if lists is not None:
            values.update(lists.values())
        return Evaluation(
            phase=self.dataset.phase,
            users=self.dataset.segments.users,
            ranks=ranks,
            metrics=values,
            seconds=time.perf_counter() - began,
        )

    @torch.no_grad()
    def ranks_by_weights(
        self,
        scorer: PartedScorer,
        weights: np.ndarray,
        device: torch.device,
        *,
        all_reduce: Callable[[np.ndarray], np.ndarray] = lambda values: values,
        on_batch: Callable[[int], None] = lambda users: None,
        autocast: Callable[[], Any] | None = None,
    ) -> np.ndarray:
        """Rank every user's target by several weighted sums of a model's parts, in one pass.

        Args:
            scorer: the model, in evaluation mode.
            weights: float64 [W, M], factors on the scores of its parts.
            device, all_reduce, on_batch, autocast: as for `run`.

        Returns:
            int64 [W, E].
        """
        ranks = np.zeros((len(weights), len(self.dataset)), dtype=np.int64)
        for group in self._groups(scorer, device, on_batch, autocast):
            ranks[:, group.rows.numpy(force=True)] = self._rank_sums(scorer, group, weights)
        if self.world_size > 1:
            counted = np.zeros_like(ranks)
            counted[:, self._share] = ranks[:, self._share]
            ranks = all_reduce(counted)
        return ranks

    def _batches(self, single_row: bool) -> Iterator[EvalBatch]:
        """Gather this process's users, batch after batch.

        Padded rows come from the longest history to the shortest, so that those of a batch are
        alike in length and memory peaks at the start; single rows in the order of the users, so
        that they are.

        Args:
            single_row: put the histories of a batch into one row.
        """
        samples = np.resize(np.append(self._share, 0), -(-len(self.dataset) // self.world_size))
        if not single_row:
            samples = samples[np.argsort(-self.dataset.lengths[samples], kind="stable")]
        collate = EvalCollate(self.dataset, self._candidates)
        collate.single_row = single_row
        yield from DataLoader(
            self.dataset,
            batch_size=self._batch_size,
            sampler=samples,
            collate_fn=collate,
            num_workers=self._num_workers,
        )

    def _count_candidates(self, scorer: Scorer) -> np.ndarray | None:
        """Count what each user's target is ranked among: int64 [E]; None where no metric asks."""
        if not set(metrics.WHOLE_RANKING) & set(self.protocol.metrics):
            return None
        if self.protocol.kind == "sampled":
            return np.full(len(self.dataset), 1 + self.protocol.candidates)
        return scorer.num_items - self.dataset.count_seen_items()

    def _list_metrics(self, scorer: Scorer) -> ListMetrics | None:
        """Return what measures the recommended lists; None where no metric asks for them."""
        is_asked = self._statistics is not None or "Coverage" in self.protocol.metrics
        if not is_asked or self.protocol.kind != "full":
            return None
        return ListMetrics(
            self.protocol.topk, scorer.num_items, self._statistics, self._history_popularity
        )

    def _write(self, copy: HostCopy | None, ranks: np.ndarray, lists: ListMetrics | None) -> None:
        """Write a group's ranks into int64 [E] and add its lists.

        Args:
            copy: int64 [2 + depth, b]: samples, their ranks, and their lists' items, best first.
            ranks: of all users.
            lists: what adds up the lists; None where there are none.
        """
        if copy is None:
            return
        rows, values, *_ = copied = copy.read().numpy()
        ranks[rows] = values
        if lists is not None:
            # Others' users are encoded for the sake of their number alone.
            lists.add(copied[2:, rows % self.world_size == self._process].T)

    def _groups(
        self,
        scorer: Scorer,
        device: torch.device,
        on_batch: Callable[[int], None],
        autocast: Callable[[], Any] | None,
    ) -> Iterator[_Group]:
        """Encode batch after batch and yield them in groups.

        Full ranking prepares all item vectors for each group of users that it scores, so groups
        are as large as the budget allows; sampled ranking takes batches as they come.
        """
        waiting: list[tuple[Tensor, EvalBatch]] = []
        count = 0
        single_row = bool(getattr(scorer, "reads_rows", False))
        reader: Any = scorer
        batches = self._batches(single_row)
        if device.type == "cuda":
            batches = prefetch((batch.pin_memory() for batch in batches), device)
        for batch in batches:
            moved = batch.to(device)
            times = [moved.times] if getattr(scorer, "reads_times", False) else []
            with nullcontext() if autocast is None else autocast():
                if single_row:
                    row = (moved.row, moved.positions, moved.cu_lengths)
                    users = reader.row_user_vectors(*row, *times).float()
                else:
                    users = reader.user_vectors(moved.history, moved.lengths, *times).float()
            on_batch(len(users))
            if waiting and count + len(users) > self._users_at_a_time(scorer, users.shape[1]):
                yield _Group.of(waiting)
                waiting, count = [], 0
            waiting.append((users, moved))
            count += len(users)
        if waiting:
            yield _Group.of(waiting)

    def _users_at_a_time(self, scorer: Scorer, dim: int) -> int:
        if self.protocol.kind == "sampled":
            return 1
        # A model of several parts has a matrix for each, and one for their sum.
        parts: Sequence[Scorer] = getattr(scorer, "parts", ())
        budget = self.protocol.budget_bytes // (len(parts) + 1)
        return ranking.users_at_a_time(scorer.num_items, budget, dim)

    def _rank(self, scorer: Scorer, group: _Group, depth: int) -> Tensor:
        """Rank a group's targets.

        Args:
            scorer: the model.
            group: its users.
            depth: length of the lists to return beside the ranks, under full ranking.

        Returns:
            int64 [1 + depth, b]: ranks, then the best items, 0 where there are no more.
        """
        users = group.vectors
        if self.protocol.kind == "sampled":
            return self._rank_candidates(scorer, group).unsqueeze(0)
        dim = users.shape[1]
        size = self._part_size(scorer, users)
        at_a_time = ranking.items_at_a_time(dim, self.protocol.budget_bytes, users.device)
        buffer = users.new_empty((size, scorer.num_items + 1))
        ranks, lists = [], []
        for start in range(0, len(users), size):
            part = slice(start, start + size)
            seen = group.seen(start, size)
            if self._tensor_cores and not depth:
                placed = tensor_core_ranks(
                    users[part],
                    scorer.item_slice,
                    scorer.num_items,
                    group.targets[part],
                    seen,
                    items_at_a_time=at_a_time,
                    budget_bytes=self.protocol.budget_bytes,
                    out=buffer,
                )
                if placed is not None:
                    ranks.append(placed)
                    continue
                self._tensor_cores = False
                log.info(
                    "ranking_precision: too many items score too near the targets to be told apart "
                    "by tensor cores; from here on scores are computed in float32."
                )
            scores = ranking.full_scores(
                users[part], scorer.item_slice, scorer.num_items, at_a_time, buffer
            )
            ranks.append(ranking.full_ranks(scores, group.targets[part], *seen))
            if depth:
                best = scores.topk(depth, dim=1)
                # Padding, seen items and NaN.
                lists.append(torch.where(best.values > -torch.inf, best.indices, PAD).T)
        ranked = torch.cat(ranks).unsqueeze(0)
        return torch.cat([ranked, torch.cat(lists, dim=1)]) if depth else ranked

    def _part_size(self, scorer: Scorer, users: Tensor) -> int:
        """Return how many of a group's users, [b, D], are ranked at a time in full ranking."""
        most = self._users_at_a_time(scorer, users.shape[1])
        # Parts of equal size: a last part of a few users would cost as much as a full one.
        return -(-len(users) // -(-len(users) // most))

    def _rank_sums(self, scorer: PartedScorer, group: _Group, weights: np.ndarray) -> np.ndarray:
        """Rank a group's targets by weighted sums of the parts' scores: int64 [W, b]."""
        dims = [part.item_slice(0, 1).shape[1] for part in scorer.parts]
        users = group.vectors
        if self.protocol.kind == "sampled":
            items = torch.cat([group.targets.unsqueeze(1), group.candidates], dim=1)
            size = self._candidate_rows(items, users.shape[1])
        else:
            size = self._part_size(scorer, users)
        ranks = []
        for start in range(0, len(users), size):
            chosen = slice(start, start + size)
            parts = zip(scorer.parts, users[chosen].split(dims, dim=1), strict=True)
            if self.protocol.kind == "sampled":
                scores = [
                    ranking.candidate_scores(vectors, part.item_vectors(items[chosen]))
                    for part, vectors in parts
                ]
                by_weights = [ranking.ranks_of_first(_weighted_sum(scores, row)) for row in weights]
            else:
                budget, seen = self.protocol.budget_bytes, group.seen(start, size)
                scores = [
                    ranking.full_scores(
                        vectors,
                        part.item_slice,
                        scorer.num_items,
                        ranking.items_at_a_time(vectors.shape[1], budget, users.device),
                    )
                    for part, vectors in parts
                ]
                for matrix in scores:
                    matrix[:, PAD] = 0.0  # -inf, which a weight of 0 would turn into NaN
                by_weights = []
                for row in weights:
                    total = _weighted_sum(scores, row)
                    total[:, PAD] = -torch.inf
                    by_weights.append(ranking.full_ranks(total, group.targets[chosen], *seen))
            ranks.append(torch.stack(by_weights))
        return torch.cat(ranks, dim=1).numpy(force=True)

    def _rank_candidates(self, scorer: Scorer, group: _Group) -> Tensor:
        users = group.vectors
        items = torch.cat([group.targets.unsqueeze(1), group.candidates], dim=1)
        size = self._candidate_rows(items, users.shape[1])
        return torch.cat(
            [
                ranking.candidate_ranks(
                    users[start : start + size], scorer.item_vectors(items[start : start + size])
                )
                for start in range(0, len(users), size)
            ]
        )

    def _candidate_rows(self, items: Tensor, dim: int) -> int:
        """Return for how many users the vectors of candidates, int64 [b, 1 + C], are held at once."""
        return max(1, self.protocol.budget_bytes // (4 * items.shape[1] * dim))


def _weighted_sum(scores: Sequence[Tensor], weights: np.ndarray) -> Tensor:
    """Add up float32 [b, n] matrices of scores."""
    total = float(weights[0]) * scores[0]
    for matrix, weight in zip(scores[1:], weights[1:], strict=True):
        total.add_(matrix, alpha=float(weight))
    return total


def draw_candidates(dataset: CachedEmbeddingEvalDataset, protocol: EvalProtocol) -> np.ndarray:
    """Draw every user's candidate list: distinct items the user never interacted with.

    The lists depend on seed, phase and data alone, so every model is scored on the same ones.

    Returns:
        int64 [E, C].

    Raises:
        InputError: a user has fewer than C such items.
    """
    sampler = NegativeSampler(dataset.interactions)
    users = dataset.segments.users
    fewest = int(sampler.available[users].min())
    if fewest < protocol.candidates:
        raise InputError(
            f"eval_neg_sample_num is {protocol.candidates}, but a user has only {fewest} items left "
            f"to draw from in this catalogue; lower it to {fewest} or use eval_protocol: full."
        )
    rng = np.random.default_rng([protocol.seed, _CANDIDATE_STREAM[dataset.phase]])
    return sampler.draw(users, protocol.candidates, rng, distinct=True)
