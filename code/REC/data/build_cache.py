"""Encode a catalogue's items once, shared out over processes and resumably."""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from REC.data.cache import DTYPES, write_cache
from REC.data.item_text import ItemTexts
from REC.data.parts import Parts
from REC.data.tokens import Tokens, open_tokens, tokenize_in_memory, tokenize_to_folder
from REC.model.item_llm import ItemEncoder, length_batches
from REC.utils.errors import InputError
from REC.utils.processes import Processes
from REC.utils.progress import Meter

log = logging.getLogger(__name__)

# Items written to disk at a time: what an interruption can cost.
ITEMS_PER_PART = 2048

# Batches of item numbers that are encoded and written together.
Group = list[np.ndarray]


@dataclass(frozen=True)
class EncodingJob:
    """What decides every number in a cache; two equal jobs give equal caches.

    Attributes:
        model: the ItemLLM's folder.
        text_keys, prompt, max_text_length, dtype, batch_tokens: configuration keys.
        compute_dtype: number type that the ItemLLM computes in.
        pooling: `emb_token` or `mean`.
        fingerprint: of the ids and texts.
        source: SHA-256 of the HLLM checkpoint that the ItemLLM was imported from, else empty.
        model_fingerprint: of the ItemLLM's files.
    """

    model: str
    text_keys: tuple[str, ...]
    prompt: str
    max_text_length: int
    dtype: str
    pooling: str
    fingerprint: str
    batch_tokens: int
    compute_dtype: str = "float32"
    source: str = ""
    model_fingerprint: str = ""

    def metadata(self) -> dict[str, str]:
        """Return the job as the cache file's metadata."""
        return {
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "text_keys": json.dumps(list(self.text_keys), ensure_ascii=False),
            "prompt": self.prompt,
            "max_text_length": str(self.max_text_length),
            "pooling": self.pooling,
            "fingerprint": self.fingerprint,
            "compute_dtype": self.compute_dtype,
            "model_source": self.source,
        }

    def digest(self) -> str:
        """Return a SHA-256 that tells this job from any other."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def encode_items(
    encoder: ItemEncoder,
    items: ItemTexts,
    job: EncodingJob,
    *,
    show_progress: bool = True,
    processes: Processes | None = None,
) -> Tensor:
    """Encode every item into a matrix in memory.

    Args:
        encoder: the ItemLLM.
        items: ids and texts.
        job: settings.
        show_progress: show a bar.
        processes: share the work; each returns the whole matrix.

    Returns:
        [n, D] in the job's dtype, rows in the order of `items`.

    Raises:
        InputError: an embedding does not fit in the dtype.
    """
    processes = processes or Processes()
    _count_empty(items.texts, encoder)
    tokens = tokenize_in_memory(encoder.tokenize, items.texts)
    encoder.share_prefix(tokens.common_prefix())
    groups = plan_groups(tokens.lengths, job.batch_tokens, encoder)
    owners = share_out(_costs(groups, tokens, encoder), processes.size)
    result = torch.zeros((len(items), encoder.dim), dtype=DTYPES[job.dtype])
    own = np.flatnonzero(owners == processes.rank).tolist()
    with Meter(
        "encoding items",
        _rows_in(groups, own),
        "items",
        show_progress,
        device=encoder.model.device,
        tokens=_tokens_in(groups, own, tokens, encoder),
    ) as bar:
        for number in own:
            found = encode_group(encoder, tokens, groups[number], job, items.item_ids, bar.advance)
            result[torch.from_numpy(np.concatenate(groups[number]))] = found
    if processes.size > 1:
        for owner, group in zip(owners.tolist(), groups, strict=True):
            place = torch.from_numpy(np.concatenate(group))
            own_block = result[place] if owner == processes.rank else None
            block = processes.broadcast(own_block, owner)
            assert block is not None
            result[place] = block
    return result


@dataclass
class CacheBuild:
    """The building of one cache file by all processes of a run, resumable at any point.

    Process 0 writes the tokens of all texts into the parts folder, every process encodes its share
    of the groups that are not there yet and writes them as parts, and process 0 streams the parts
    into the file. Groups do not depend on the number of processes, so neither does the file. No
    process holds more than one group of embeddings, and process 0 alone ever holds the texts.

    Attributes:
        target: the cache file.
        parts_dir: folder of the parts and of the unfinished file, on a disk that all processes
            share; removed at the end.
        processes: those that take part.
        show_progress: show a bar.
    """

    target: Path
    parts_dir: Path
    processes: Processes
    show_progress: bool = True

    def run(
        self,
        encoder: ItemEncoder,
        job: EncodingJob,
        item_ids: Sequence[str],
        take_texts: Callable[[], list[str]],
    ) -> None:
        """Build the file. Collective.

        Args:
            encoder: the ItemLLM.
            job: settings; finished parts of the same job are used.
            item_ids: ids, needed in process 0 only.
            take_texts: gives the texts, in process 0 only, and lets go of them.

        Raises:
            InputError: an embedding does not fit in the dtype, the disk is full, or the processes
                do not share the folder.
        """
        processes = self.processes
        parts = Parts(self.parts_dir, encoder.dim, DTYPES[job.dtype])
        name = processes.on_first(lambda: self._start(parts, encoder, job, take_texts()))
        tokens = processes.agreed(lambda: open_tokens(self.parts_dir, name))
        encoder.share_prefix(tokens.common_prefix())
        groups = plan_groups(tokens.lengths, job.batch_tokens, encoder)
        missing = processes.on_first(lambda: _missing(parts, groups))
        costs = _costs([groups[number] for number in missing], tokens, encoder)
        own = [
            number
            for number, owner in zip(missing, share_out(costs, processes.size), strict=True)
            if owner == processes.rank
        ]
        there = len(tokens) - _rows_in(groups, missing) if processes.size == 1 else 0
        total = there + _rows_in(groups, own)
        share = f" (share of process {processes.rank})" if processes.size > 1 else ""
        with Meter(
            f"encoding items{share}",
            total,
            "items",
            self.show_progress,
            device=encoder.model.device,
            tokens=_tokens_in(groups, own, tokens, encoder),
        ) as bar:
            bar.skip(there)
            for number in own:
                rows = np.concatenate(groups[number])
                parts.write(
                    number,
                    rows,
                    encode_group(encoder, tokens, groups[number], job, item_ids, bar.advance),
                )
        processes.barrier()
        processes.on_first(lambda: self._merge(parts, groups, job, item_ids))

    def _start(self, parts: Parts, encoder: ItemEncoder, job: EncodingJob, texts: list[str]) -> str:
        parts.claim(job.digest())
        _count_empty(texts, encoder)
        return tokenize_to_folder(encoder.tokenize, texts, self.parts_dir, self.show_progress)

    def _merge(
        self, parts: Parts, groups: list[Group], job: EncodingJob, item_ids: Sequence[str]
    ) -> None:
        def blocks() -> Iterator[tuple[np.ndarray, Tensor]]:
            for number, group in enumerate(groups):
                rows = np.concatenate(group)
                embeddings = parts.read(number, rows)
                if embeddings is None:
                    raise InputError(
                        f"part {number} of {self.parts_dir} is missing or damaged; run the same "
                        f"command again, with the folder on a disk that all machines share."
                    )
                yield rows, embeddings

        unfinished = self.parts_dir / "unfinished.safetensors"
        try:
            write_cache(unfinished, item_ids, parts.dim, parts.dtype, job.metadata(), blocks())
            os.replace(unfinished, self.target)
        except OSError as error:
            raise InputError(
                f"cannot write {self.target}: {error.strerror or error}; free some space and run "
                f"the same command again: nothing is encoded twice."
            ) from error


def encode_group(
    encoder: ItemEncoder,
    tokens: Tokens,
    group: Group,
    job: EncodingJob,
    item_ids: Sequence[str],
    on_batch: Callable[[int, int], None] = lambda items, tokens: None,
) -> Tensor:
    """Encode a group of batches: [b, D] in the job's dtype.

    Args:
        encoder: the ItemLLM.
        tokens: of the whole catalogue.
        group: batches of item numbers.
        job: for the dtype.
        item_ids: to name an item in an error; its number is given where they are not at hand.
        on_batch: called with the number of items just encoded and of the tokens in them.

    Raises:
        InputError: an embedding does not fit in the dtype.
    """
    encoded = []
    for batch in group:
        encoded.append(encoder.encode([tokens[int(i)] for i in batch]))
        on_batch(len(batch), _tokens_of(batch, tokens, encoder))
    done = torch.cat(encoded).to(DTYPES[job.dtype])
    bad = (~done.isfinite().all(dim=1)).nonzero()
    if len(bad):
        row = int(np.concatenate(group)[int(bad[0])])
        item = f"item '{item_ids[row]}'" if item_ids else f"item number {row + 1}"
        raise InputError(
            f"the embedding of {item} does not fit in {job.dtype}; use --item_cache_dtype bfloat16 "
            f"or float32."
        )
    return done


def plan_groups(lengths: np.ndarray, batch_tokens: int, encoder: ItemEncoder) -> list[Group]:
    """Put items into batches of similar length, and batches into groups of at least 2048 items."""
    groups: list[Group] = []
    size = ITEMS_PER_PART
    for batch in length_batches(lengths, batch_tokens, int(encoder.pooling == "emb_token")):
        if size >= ITEMS_PER_PART:
            groups.append([])
            size = 0
        groups[-1].append(batch)
        size += len(batch)
    return groups


def share_out(costs: Sequence[int], size: int) -> np.ndarray:
    """Deal pieces of work out evenly: the most expensive first, each to whoever has least.

    Returns:
        int64 [len(costs)], the process that does each.
    """
    owners = np.zeros(len(costs), dtype=np.int64)
    loads = [(0, rank) for rank in range(size)]
    for piece in sorted(range(len(costs)), key=lambda number: -costs[number]):
        load, rank = heapq.heappop(loads)
        owners[piece] = rank
        heapq.heappush(loads, (load + costs[piece], rank))
    return owners


def _costs(groups: Sequence[Group], tokens: Tokens, encoder: ItemEncoder) -> list[int]:
    extra = int(encoder.pooling == "emb_token")
    return [
        sum(len(batch) * (int(tokens.lengths[batch].max()) + extra) for batch in group)
        for group in groups
    ]


def _rows_in(groups: Sequence[Group], numbers: Sequence[int]) -> int:
    return sum(len(batch) for number in numbers for batch in groups[number])


def _tokens_in(
    groups: Sequence[Group], numbers: Sequence[int], tokens: Tokens, encoder: ItemEncoder
) -> int:
    return sum(_tokens_of(batch, tokens, encoder) for number in numbers for batch in groups[number])


def _tokens_of(batch: np.ndarray, tokens: Tokens, encoder: ItemEncoder) -> int:
    """Count the positions that the ItemLLM reads: text and emb token, without padding."""
    extra = len(batch) if encoder.pooling == "emb_token" else 0
    return int(tokens.lengths[batch].sum()) + extra


def _missing(parts: Parts, groups: Sequence[Group]) -> list[int]:
    return [
        number
        for number, group in enumerate(groups)
        if parts.read(number, np.concatenate(group)) is None
    ]


def _count_empty(texts: Sequence[str], encoder: ItemEncoder) -> None:
    empty = sum(1 for text in texts if not text)
    if empty:
        given = "the bare emb token's embedding" if encoder.pooling == "emb_token" else "zeros"
        log.info("%d of %d items have no text and get %s.", empty, len(texts), given)
