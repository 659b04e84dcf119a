"""The interface of trainable models, and the loss that is computed inside the forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsft.data.dataset import TrainBatch
from hsft.data.interactions import PAD
from hsft.model import losses
from hsft.model.item_table import AdaptedItems, ItemTable
from hsft.model.proposal import Proposal
from hsft.utils.distributed import all_gather_ids, all_reduce, world_size

Similarity = Literal["cosine", "dot"]


class SequenceEncoder(nn.Module):
    """Turns histories of item numbers into user vectors, and item numbers into item vectors.

    Subclass this to plug in another model: everything else (losses, trainer, evaluator) only
    calls these two.

    Attributes:
        items: the table of item vectors; its `forward` and `slice` give item vectors.
        reads_times: whether `forward` takes `times` too, [B, T, F], see `ItemTimes`.
    """

    items: ItemTable
    reads_times = False

    def forward(self, history: Tensor, positions: Tensor | None = None) -> Tensor:
        """Encode every prefix of each history.

        Args:
            history: int64 [B, T] item numbers, right-padded with 0.
            positions: int64 [B, T] when rows hold several histories: each item's number in its
                own, which starts where 0 stands and must not be read by the others. An encoder
                that cannot do this is trained with `pack_sequences: False`. An encoder that is
                trained on single rows takes `cu_lengths`, int32 [S + 1], after it, and one whose
                items are adapted `vectors`, float32 [B, T, D], those of the history.

        Returns:
            [B, T, D]; position t has read items 0..t. Values at padded positions are undefined.
        """
        raise NotImplementedError

    def separates_sequences(self) -> bool:
        """Say whether the histories of one row do not see each other, as `pack_sequences` needs."""
        return False


@dataclass(frozen=True)
class LossSettings:
    """Which loss is trained; see the configuration keys of the same names.

    Attributes:
        loss, negatives, nce_thres, similarity: the keys of these names.
        budget_bytes: of the logits held at a time.
        mean: the key `loss_mean`.
    """

    loss: Literal["bce", "nce"]
    negatives: Literal["in_batch", "sampled", "catalogue"]
    nce_thres: float
    budget_bytes: int
    similarity: Similarity
    mean: Literal["positions", "batches"] = "positions"


class Recommender(nn.Module):
    """An encoder together with its loss.

    The loss is part of `forward`, so that wrappers which hook the forward pass (DDP, DeepSpeed)
    see every use of a parameter.

    Args:
        encoder: the model.
        settings: the loss.
        logit_scale: initial log factor on cosines; HLLM's ln(1/0.07) when None.
        fix_scale: keep that factor as it starts.

    Attributes:
        item_llm: what the items are encoded with, where it is trained along with the encoder. Not
            a part of `forward`: `trainer/item_training.py` hands its vectors to the item table.
        proposal: what `negatives_logq` corrects by, set before training; None: not corrected.
        negative_counts: int64 [4], sums of `losses.count_negatives` over the forward passes since
            the last `take_negative_counts`, in all processes.
    """

    negative_counts: Tensor

    def __init__(
        self,
        encoder: SequenceEncoder,
        settings: LossSettings,
        logit_scale: float | None = None,
        fix_scale: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.item_llm: nn.Module | None = None
        self.settings = settings
        self.proposal: Proposal | None = None
        initial = losses.LOGIT_SCALE_INIT if logit_scale is None else logit_scale
        self.logit_scale = nn.Parameter(
            # One element, not a scalar: DeepSpeed cannot broadcast parameters without dimensions.
            torch.tensor([initial], dtype=torch.float32),
            requires_grad=(
                settings.loss == "nce" and settings.similarity == "cosine" and not fix_scale
            ),
        )
        counts = torch.zeros(4, dtype=torch.int64)
        self.register_buffer("negative_counts", counts, persistent=False)

    def forward(self, batch: TrainBatch) -> Tensor:
        """Return the batch's loss: scalar float32, the mean over the batches of all processes.

        Every position of all processes has the same weight, or every process under `mean: batches`.
        With several processes the value is the same in each, so that all take the same decisions
        on it. Its gradient is W times this process's part of the mean's: processes hold different
        numbers of positions, and the average of gradients that DDP and DeepSpeed take is then
        the gradient of the mean over all positions, as in one process with the whole batch.
        """
        where = [part for part in (batch.positions, batch.cu_lengths) if part.numel()]
        adapted = None
        given: dict[str, Tensor] = {}
        if batch.items.numel():
            # Targets are scored in float32, so the adapter's products are.
            with torch.autocast(device_type=batch.items.device.type, enabled=False):
                adapted = self.encoder.items.adapt(batch.items)
            given = {"vectors": self.encoder.items(batch.history, adapted)}
        given |= _given(batch.times)
        states = self.encoder(batch.history, *where, **given).flatten(0, 1)
        targets = batch.targets.flatten()
        # Indices from the host: a mask's True entries would have to be counted on the device first.
        scored = batch.scored if batch.scored.numel() else batch.loss_mask.flatten().nonzero()[:, 0]
        # All positions of a bucket are scored, in order: nothing to gather.
        if not (batch.counted.numel() and len(scored) == len(targets)):
            states, targets = states.index_select(0, scored), targets.index_select(0, scored)
        # The loss is exact arithmetic on small vectors; autocast would round its logits.
        with torch.autocast(device_type=states.device.type, enabled=False):
            counts = torch.zeros_like(self.negative_counts)
            mean, terms = self._loss(states, targets, batch, adapted, counts)
            if world_size() > 1:
                weight = 1 if self.settings.mean == "batches" else terms
                mean, counts = _mean_over_processes(mean, weight, counts)
            self.negative_counts += counts
            return mean

    def _loss(
        self,
        states: Tensor,
        targets: Tensor,
        batch: TrainBatch,
        adapted: AdaptedItems | None,
        counts: Tensor,
    ) -> tuple[Tensor, int | Tensor]:
        """Return the mean over this process's batch, and the number of terms in it.

        What `losses.count_negatives` gives is added to `counts`.
        """
        settings = self.settings
        items = self.encoder.items
        scale = self.scale()
        weights = batch.counted.float() if batch.counted.numel() else None
        terms = len(targets) if weights is None else weights.sum()
        if settings.negatives == "catalogue":
            loss = losses.catalogue_softmax(
                states,
                items,
                targets - 1,
                scale,
                cosine=settings.similarity == "cosine",
                budget_bytes=settings.budget_bytes,
                weights=weights,
            )
            return loss, terms
        in_batch = drawn = targets[:0]
        if settings.negatives == "in_batch" or self.proposal is not None:
            in_batch = all_gather_ids(targets)
        if settings.negatives == "sampled":
            drawn = all_gather_ids(batch.negatives.reshape(-1))
        pool_ids = torch.cat([in_batch, drawn])
        positives = items(targets) if adapted is None else items(targets, adapted)
        # The same vectors, unless id vectors are dropped by occurrence.
        shared = in_batch is targets and not items.is_random
        if not shared:
            pool = items(pool_ids)
        else:
            pool = torch.cat([positives, items(drawn)]) if len(drawn) else positives
        # What fills a bucket up is neither a position nor a negative.
        fillers = None if weights is None else (pool_ids == PAD).expand(len(targets), -1)
        if settings.loss == "bce":
            same = targets.unsqueeze(1) == pool_ids
            excluded = same
            if weights is not None and fillers is not None:
                excluded = same | fillers | (weights == 0).unsqueeze(1)
            real = torch.ones_like(states[:, 0]) if weights is None else weights
            counts += losses.count_negatives(excluded, fillers, same, real)
            loss = losses.binary_cross_entropy(
                states, positives, pool, excluded, settings.budget_bytes, weights
            )
            return loss, terms + excluded.numel() - excluded.sum()
        cosine = settings.similarity == "cosine"
        log_counts: Tensor | None = None
        if self.proposal is not None:
            log_counts = self.proposal.log_counts(in_batch, drawn)
        loss = losses.info_nce(
            states,
            positives,
            pool,
            scale,
            settings.nce_thres,
            fillers,
            settings.budget_bytes,
            weights,
            (targets, pool_ids),
            counts,
            log_counts,
            cosine=cosine,
        )
        return loss, terms

    def take_negative_counts(self) -> Tensor:
        """Return `negative_counts` and set them to zero, without waiting for the device."""
        counts = self.negative_counts.clone()
        self.negative_counts.zero_()
        return counts

    def scale(self) -> Tensor:
        """Return the log factor on cosines, clamped to [0, ln 100] as HLLM does; 0 for dots."""
        if self.settings.similarity == "dot":
            return self.logit_scale.new_zeros(())
        with torch.no_grad():
            self.logit_scale.clamp_(0.0, math.log(100))
        return self.logit_scale[0]

    def user_vectors(self, history: Tensor, lengths: Tensor, times: Tensor | None = None) -> Tensor:
        """Encode users for scoring.

        Args:
            history: int64 [B, T], right-padded with 0.
            lengths: int64 [B], real items in each row.
            times: [B, T, F] of `ItemTimes` for a model that reads them (`reads_times`).

        Returns:
            float32 [B, D], of unit length under cosine similarity.
        """
        states = self.encoder(history, **_given(times))
        last = states[torch.arange(len(history), device=states.device), lengths - 1].float()
        return self._as_query(last)

    @property
    def reads_rows(self) -> bool:
        """Whether `row_user_vectors` can be called: the encoder reads many histories in a row."""
        return bool(getattr(self.encoder, "varlen", False))

    @property
    def reads_times(self) -> bool:
        """Whether users are encoded from the times of their items too."""
        return self.encoder.reads_times

    def row_user_vectors(
        self,
        row: Tensor,
        positions: Tensor,
        cu_lengths: Tensor,
        times: Tensor | None = None,
    ) -> Tensor:
        """Encode users for scoring, their histories one after the other in a single row.

        Args:
            row: int64 [1, N].
            positions: int64 [1, N], each item's number in its own history.
            cu_lengths: int32 [B + 1], where each history starts, and N.
            times: [1, N, F], as for `user_vectors`.

        Returns:
            As `user_vectors`.
        """
        states = self.encoder(row, positions, cu_lengths, **_given(times))[0]
        return self._as_query(states.index_select(0, cu_lengths[1:] - 1).float())

    def _as_query(self, last: Tensor) -> Tensor:
        return losses.normalize(last) if self.settings.similarity == "cosine" else last

    def item_slice(self, start: int, end: int) -> Tensor:
        """Return item vectors start..end-1 for scoring: float32 [end - start, D]."""
        return self._for_scoring(self.encoder.items.slice(start, end))

    def item_vectors(self, items: Tensor) -> Tensor:
        """Return the vectors of item numbers for scoring: int64 [...] -> float32 [..., D]."""
        return self._for_scoring(self.encoder.items(items))

    def _for_scoring(self, vectors: Tensor) -> Tensor:
        if self.settings.similarity != "cosine":
            return vectors.float()
        # As `losses.normalize`, in place: one piece of memory instead of two in ranking's inner loop.
        copied = vectors.to(torch.float32, copy=True)
        return F.normalize(copied, dim=-1, out=copied)

    @property
    def num_items(self) -> int:
        """Number of items I, the padding item not counted."""
        return self.encoder.items.num_items


def _given(times: Tensor | None) -> dict[str, Tensor]:
    return {} if times is None or not times.numel() else {"times": times}


def _mean_over_processes(
    mean: Tensor, count: int | Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the mean over the terms of all processes; see `Recommender.forward` on its gradient.

    Args:
        mean: scalar, over this process's terms.
        count: number of these terms, or another weight of the process.
        counts: int64 [n], which are summed over the processes on the way.
    """
    terms = torch.as_tensor(count, dtype=torch.float64, device=mean.device)
    local = torch.cat([torch.stack([mean.detach().double() * terms, terms]), counts.double()])
    reduced = all_reduce(local)
    summed, total = reduced[0], reduced[1].clamp_min(1.0)
    share = mean * (terms * world_size() / total).to(mean)
    return (share - share.detach()) + (summed / total).to(mean), reduced[2:].long()
