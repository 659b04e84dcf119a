"""Train the ItemLLM along with the UserLLM: every item of an optimizer step is encoded once, in chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsft.data.cache import ItemCache, open_cache, save_cache
from hsft.data.dataset import TrainBatch
from hsft.data.interactions import PAD
from hsft.encoding.build_cache import EncodingJob
from hsft.encoding.item_llm import add_file, to_device
from hsft.encoding.item_tower import ITEM_CACHE_FILE, ITEM_WEIGHTS_FILE, ItemTower
from hsft.model.item_table import ItemTable
from hsft.trainer.checkpoint import restore_torch_rng, torch_rng_state
from hsft.utils.distributed import (
    all_gather_ids,
    all_reduce,
    broadcast_tensor,
    global_rank,
    world_size,
)
from hsft.utils.errors import InputError

# Numbers that are exchanged between processes at a time.
_BUCKET = 1 << 24


@dataclass
class ItemTraining:
    """An ItemLLM that is trained, and the item table that its vectors go into.

    Attributes:
        tower: the ItemLLM.
        table: of the model whose loss is trained.
        job: how the catalogue is encoded at a validation.
        item_ids: of items 1..I.
        device: where both are.
        show_progress: show a bar while the catalogue is encoded.
        along: the ItemLLM is trained along with the model; else its vectors stay as they are.
        cache: the catalogue's vectors as they were encoded or loaded last; None before.
    """

    tower: ItemTower
    table: ItemTable
    job: EncodingJob
    item_ids: list[str]
    device: torch.device
    show_progress: bool = True
    along: bool = True
    cache: ItemCache | None = None

    @property
    def fingerprint(self) -> str:
        """What tells texts and ItemLLM from others; a run is continued with the same ones only."""
        return f"{self.job.fingerprint} {self.job.model_fingerprint}"

    def agree(self) -> None:
        """Give the trained weights of all processes the values of process 0."""
        for weight in _trained(self.tower):
            broadcast_tensor(weight.detach())

    @contextmanager
    def encoded(self, batches: Sequence[TrainBatch]) -> Iterator[None]:
        """Let the item table read vectors of the ItemLLM as it is, and train it with their gradient.

        Gradient caching (Gao et al. 2021, arXiv 2101.06983): the items are encoded chunk by chunk
        without gradients; the losses inside the context give the vectors' gradients; then each chunk
        is encoded again, with the same dropout, and its gradient goes on from there. The weights'
        gradients are those of one pass over all items, and only one chunk's activations are held.

        Several processes share the items of all their batches: each encodes its part of them, and
        what goes between processes is the vectors, their gradients and the weights' gradients.

        Args:
            batches: of one optimizer step and this process, on the CPU. The losses of all of them
                are taken back inside the context.

        Raises:
            InputError: a chunk does not fit the GPU's memory.
        """
        if not self.along:
            yield
            return
        items = self._items(batches)
        chunks = self.tower.chunks(self._share(items))
        rows = [to_device(np.searchsorted(items, chunk) + 1, self.device) for chunk in chunks]
        states, vectors = self._encode(chunks, rows, len(items))
        with self.table.reading(to_device(items, self.device), vectors):
            yield
        gradient = torch.zeros_like(vectors) if vectors.grad is None else vectors.grad
        if world_size() > 1:
            # The losses are scaled for the average over processes that DDP takes.
            gradient = all_reduce(gradient) / world_size()
        after = torch_rng_state(self.device)
        for chunk, at, state in zip(chunks, rows, states, strict=True):
            restore_torch_rng(state, self.device)
            with _naming_the_key():
                self.tower(chunk).backward(gradient[at])
        restore_torch_rng(after, self.device)
        if world_size() > 1:
            _sum_gradients(_trained(self.tower))

    def _items(self, batches: Sequence[TrainBatch]) -> np.ndarray:
        """Return the item numbers of some batches of all processes, each once: int64, ascending."""
        numbers = torch.cat(
            [
                part.reshape(-1)
                for batch in batches
                for part in (batch.history, batch.targets, batch.negatives)
            ]
        ).unique()
        if world_size() > 1:
            numbers = all_gather_ids(numbers.to(self.device)).cpu().unique()
        return numbers[numbers != PAD].numpy()

    def _share(self, items: np.ndarray) -> np.ndarray:
        """Return the items that this process encodes, alike in length to those of the others."""
        by_length = items[np.argsort(-self.tower.tokens.lengths[items - 1], kind="stable")]
        return by_length[global_rank() :: world_size()]

    def _encode(
        self, chunks: Sequence[np.ndarray], rows: Sequence[Tensor], count: int
    ) -> tuple[list[list[Tensor]], Tensor]:
        """Encode chunks without gradients.

        Returns:
            The random generators' states before each chunk, and [count + 1, dim], which requires a
            gradient: row 0 is the padding item's, `rows` those of the chunks, of all processes.
        """
        states, parts = [], []
        with torch.no_grad(), _naming_the_key():
            for chunk in chunks:
                states.append(torch_rng_state(self.device))
                parts.append(self.tower(chunk))
        dtype = parts[0].dtype if parts else torch.float32
        vectors = torch.zeros(count + 1, self.tower.dim, dtype=dtype, device=self.device)
        for at, part in zip(rows, parts, strict=True):
            vectors[at] = part
        return states, all_reduce(vectors).requires_grad_()

    def encode_catalogue(self) -> None:
        """Encode every item with the ItemLLM as it is, and score with these vectors. Collective."""
        tokens = self.tower.tokens
        self.use(self.tower.encode(tokens, self.job, self.item_ids, self.show_progress))

    def use(self, cache: ItemCache) -> None:
        """Score with vectors of the catalogue: those of `item_ids`, after the fixed map."""
        self.cache = cache
        self.table.embeddings = F.pad(cache.embeddings, (0, 0, 1, 0)).to(self.device)

    def save(self, folder: Path) -> None:
        """Write the ItemLLM's trained weights and the catalogue's vectors into a folder."""
        assert self.cache is not None
        self.tower.save(folder)
        metadata = {
            **self.cache.metadata,
            "base_model_fingerprint": self.job.model_fingerprint,
            "model_fingerprint": trained_fingerprint(self.job.model_fingerprint, folder),
        }
        self.cache = replace(self.cache, metadata=metadata)
        save_cache(
            folder / ITEM_CACHE_FILE, self.item_ids, self.cache.embeddings, self.cache.metadata
        )

    def load(self, folder: Path) -> None:
        """Load what `save` wrote.

        Raises:
            InputError: a file is missing, damaged, or of another ItemLLM or catalogue.
        """
        self.tower.load(folder)
        cache = open_cache(folder / ITEM_CACHE_FILE)
        if cache.item_ids != self.item_ids:
            raise InputError(
                f"{folder / ITEM_CACHE_FILE} holds the vectors of another catalogue; put the data of "
                f"the run back."
            )
        self.use(cache)


def trained_fingerprint(base: str, folder: Path) -> str:
    """Return a SHA-256 that tells a trained ItemLLM from others.

    Args:
        base: fingerprint of the ItemLLM that was trained.
        folder: holds its trained weights.
    """
    digest = hashlib.sha256(base.encode())
    add_file(digest, folder / ITEM_WEIGHTS_FILE)
    return digest.hexdigest()


@contextmanager
def _naming_the_key() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            "CUDA ran out of memory in the ItemLLM; lower --item_chunk_tokens, or set "
            "--item_gradient_checkpointing True."
        ) from error


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def _sum_gradients(weights: Sequence[nn.Parameter]) -> None:
    """Sum gradients over the processes; a process that encoded no item has none."""
    for bucket in _buckets(weights):
        grads = [
            torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in bucket
        ]
        summed = all_reduce(torch.cat([grad.reshape(-1) for grad in grads]))
        sizes = [weight.numel() for weight in bucket]
        for weight, part in zip(bucket, summed.split(sizes), strict=True):
            weight.grad = part.view_as(weight)


def _buckets(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Put weights of one number type into buckets of about `_BUCKET` numbers."""
    for dtype in dict.fromkeys(weight.dtype for weight in weights):
        bucket: list[nn.Parameter] = []
        for weight in weights:
            if weight.dtype != dtype:
                continue
            bucket.append(weight)
            if sum(each.numel() for each in bucket) >= _BUCKET:
                yield bucket
                bucket = []
        if bucket:
            yield bucket
