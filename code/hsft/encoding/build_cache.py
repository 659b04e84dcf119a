"""Encode a catalogue's items once, shared out over processes and resumably."""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hsft.data.cache import DTYPES, write_cache
from hsft.data.item_text import ItemTexts
from hsft.encoding.item_llm import ItemEncoder, length_batches
from hsft.encoding.parts import Batches, DeferSignals, Parts, PartWriter
from hsft.encoding.tokens import Tokens, open_tokens, tokenize_in_memory, tokenize_to_folder
from hsft.utils.distributed import (
    all_gather,
    broadcast,
    global_rank,
    run_on_all_ranks,
    run_on_rank_zero,
    world_size,
)
from hsft.utils.errors import InputError
from hsft.utils.progress import Meter

log = logging.getLogger(__name__)

# A part is written when it has this many items or is this old, whichever comes first: what a process
# that is killed can lose.
ITEMS_PER_PART = 2048
SECONDS_PER_PART = 60.0


@dataclass(frozen=True)
class EncodingJob:
    """What decides every number in a cache; two equal jobs give equal caches.

    Attributes:
        model: the ItemLLM's folder.
        text_keys, prompt, text_format, max_text_length, dtype, batch_tokens: configuration keys.
        compute_dtype: number type that the ItemLLM computes in.
        pooling: `emb_token`, `mean`, or `sentence` for a sentence encoder's own.
        fingerprint: of the ids and texts.
        source: SHA-256 of the HLLM checkpoint that the ItemLLM was imported from, else empty.
        model_fingerprint: of the ItemLLM's files.
        model_folder, information: where the ItemLLM and the texts were read, as named in the
            configuration. They decide no number, so jobs that differ only in them are equal.
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
    text_format: str = "plain"
    model_folder: str = field(default="", repr=False, compare=False)
    information: str = field(default="", repr=False, compare=False)

    def metadata(self) -> dict[str, str]:
        """Return what the cache file's metadata say of the job."""
        return {
            "model": self.model,
            "model_fingerprint": self.model_fingerprint,
            "text_keys": json.dumps(list(self.text_keys), ensure_ascii=False),
            "prompt": self.prompt,
            "text_format": self.text_format,
            "max_text_length": str(self.max_text_length),
            "pooling": self.pooling,
            "fingerprint": self.fingerprint,
            "compute_dtype": self.compute_dtype,
            "model_source": self.source,
        }

    def origin(self) -> dict[str, str]:
        """Return what they say of where it was done, as far as that is known."""
        paths = {"model_folder": self.model_folder, "information": self.information}
        return {name: path for name, path in paths.items() if path}

    def digest(self) -> str:
        """Return a SHA-256 that tells this job from any other."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def encode_items(
    encoder: ItemEncoder,
    items: ItemTexts,
    job: EncodingJob,
    *,
    show_progress: bool = True,
) -> Tensor:
    """Encode every item into a matrix in memory. Collective: each process returns all of it.

    Args:
        encoder: the ItemLLM.
        items: ids and texts.
        job: settings.
        show_progress: show a bar.

    Returns:
        [n, D] in the job's dtype, rows in the order of `items`.

    Raises:
        InputError: an embedding does not fit in the dtype.
    """
    log_empty(items.texts, encoder)
    tokens = tokenize_in_memory(encoder.tokenize, items.texts)
    return encode_tokens(encoder, tokens, job, items.item_ids, show_progress=show_progress)


def encode_tokens(
    encoder: ItemEncoder,
    tokens: Tokens,
    job: EncodingJob,
    item_ids: Sequence[str],
    *,
    show_progress: bool = True,
) -> Tensor:
    """Encode texts that are tokenised into a matrix in memory, as `encode_items` does.

    Args:
        encoder: the ItemLLM.
        tokens: of n texts.
        job: settings.
        item_ids: n ids.
        show_progress: show a bar.

    Returns:
        [n, D] in the job's dtype, rows in the order of `tokens`.

    Raises:
        InputError: an embedding does not fit in the dtype.
    """
    encoder.share_prefix(tokens.common_prefix())
    batches = plan_batches(tokens, job, encoder)
    groups = group_batches(batches, range(len(batches)))
    owners = share_out(_costs(batches, groups, tokens, encoder), world_size())
    assigned = _assigned(groups, owners)
    result = torch.zeros((len(tokens), encoder.dim), dtype=DTYPES[job.dtype])
    with _meter(batches, assigned, tokens, encoder, show_progress) as bar:
        for number, embeddings in encode_batches(encoder, tokens, batches, assigned, job, item_ids):
            rows = batches.all[number]
            result[torch.from_numpy(rows)] = embeddings
            bar.advance(len(rows), _tokens_of(rows, tokens, encoder))
    if world_size() > 1:
        for owner, group in zip(owners.tolist(), groups, strict=True):
            group_rows = torch.from_numpy(batches.rows(group))
            block = broadcast(result[group_rows] if owner == global_rank() else None, owner)
            assert block is not None
            result[group_rows] = block
    return result


@dataclass(frozen=True)
class _Work:
    """What one cache is built from, and where its parts go."""

    encoder: ItemEncoder
    job: EncodingJob
    item_ids: Sequence[str]
    tokens: Tokens
    batches: Batches
    parts: Parts


@dataclass
class CacheBuilder:
    """Builds one cache file with all processes of a run, resumable at any point.

    Process 0 writes the tokens of all texts into the parts folder, every process encodes its share
    of the batches that no part has yet and writes them as parts, and process 0 streams the parts
    into the file. Batches do not depend on the number of processes, nor on where an earlier run was
    stopped, so neither does the file. No process holds more than one part of embeddings, and process
    0 alone ever holds the texts.

    Attributes:
        target: the cache file.
        parts_dir: folder of the parts and of the unfinished file, on a disk that all processes
            share; removed at the end.
        show_progress: show a bar.
        defer_signals: makes a context in which signals wait: for a batch, and for the writing of a
            part.
        items: number of items in all, once the texts have been read.
        kept: items in finished parts, those of an earlier run included, once that is known; with
            several processes it stays None, since each knows its own parts only.
    """

    target: Path
    parts_dir: Path
    show_progress: bool = True
    defer_signals: DeferSignals = nullcontext
    items: int = 0
    kept: int | None = None

    def build(
        self,
        encoder: ItemEncoder,
        job: EncodingJob,
        item_ids: Sequence[str],
        pop_texts: Callable[[], Sequence[str]],
    ) -> None:
        """Build the file. Collective.

        Args:
            encoder: the ItemLLM.
            job: settings; finished parts of the same job are used.
            item_ids: ids, needed in process 0 only.
            pop_texts: returns the texts, in process 0 only, and keeps no reference to them.

        Raises:
            InputError: an embedding does not fit in the dtype, the disk is full, or the processes
                do not share the folder.
        """
        parts = Parts(self.parts_dir, encoder.dim, DTYPES[job.dtype])
        name = run_on_rank_zero(lambda: self._tokenize(parts, encoder, job, pop_texts()))
        tokens = run_on_all_ranks(lambda: open_tokens(self.parts_dir, name))
        self.items = len(tokens)
        encoder.share_prefix(tokens.common_prefix())
        batches = plan_batches(tokens, job, encoder)
        finished = run_on_rank_zero(lambda: parts.find(batches))
        encoded = {number for numbers in finished.values() for number in numbers}
        missing = [number for number in range(len(batches)) if number not in encoded]
        groups = group_batches(batches, missing)
        owners = share_out(_costs(batches, groups, tokens, encoder), world_size())
        work = _Work(encoder, job, item_ids, tokens, batches, parts)
        written = self._encode(work, _assigned(groups, owners), encoded)
        for of_process in all_gather(written):
            finished |= of_process
        run_on_rank_zero(lambda: self._merge(work, finished))

    def _tokenize(
        self, parts: Parts, encoder: ItemEncoder, job: EncodingJob, texts: Sequence[str]
    ) -> str:
        """Write the tokens of all texts into the parts folder and return their mark."""
        parts.claim(job.digest())
        log_empty(texts, encoder)
        return tokenize_to_folder(encoder.tokenize, texts, self.parts_dir, self.show_progress)

    def _encode(
        self, work: _Work, assigned: Sequence[int], encoded: Iterable[int]
    ) -> dict[str, range]:
        """Encode this process's batches into parts and return these.

        Args:
            work: what is encoded.
            assigned: numbers of the batches to encode.
            encoded: numbers of the batches that an earlier run has encoded.
        """
        alone = world_size() == 1
        before = sum(len(work.batches.all[number]) for number in encoded)
        share = "" if alone else f" (share of process {global_rank()})"
        writer = PartWriter(
            work.parts,
            work.batches,
            self.defer_signals,
            items=ITEMS_PER_PART,
            seconds=SECONDS_PER_PART,
        )
        with _meter(
            work.batches,
            assigned,
            work.tokens,
            work.encoder,
            self.show_progress,
            share,
            before * alone,
        ) as bar:
            try:
                stream = encode_batches(
                    work.encoder, work.tokens, work.batches, assigned, work.job, work.item_ids
                )
                with closing(stream), writer.writing_rest():
                    for number in assigned:
                        # A signal waits for the batch: what is encoded is not thrown away. On a GPU
                        # the batch after it, which is computed meanwhile, is.
                        with self.defer_signals():
                            writer.add(*next(stream))
                        rows = work.batches.all[number]
                        bar.advance(len(rows), _tokens_of(rows, work.tokens, work.encoder))
            finally:
                self.kept = before + writer.items if alone else None
        return writer.written

    def _merge(self, work: _Work, finished: Mapping[str, range]) -> None:
        """Stream the finished parts into the cache file, in process 0."""

        def blocks() -> Iterator[tuple[np.ndarray, Tensor]]:
            for name, numbers in finished.items():
                rows = work.batches.rows(numbers)
                embeddings = work.parts.read(name, rows)
                if embeddings is None:
                    raise InputError(
                        f"{self.parts_dir / name} is missing or damaged; run the same command "
                        f"again, with the folder on a disk that all machines share."
                    )
                yield rows, embeddings

        unfinished = self.parts_dir / "unfinished.safetensors"
        try:
            metadata = {**work.job.metadata(), **work.job.origin()}
            write_cache(
                unfinished, work.item_ids, work.parts.dim, work.parts.dtype, metadata, blocks()
            )
            os.replace(unfinished, self.target)
        except OSError as error:
            raise InputError(
                f"cannot write {self.target}: {error.strerror or error}; free some space and run "
                f"the same command again: nothing is encoded twice."
            ) from error


def encode_batches(
    encoder: ItemEncoder,
    tokens: Tokens,
    batches: Batches,
    numbers: Sequence[int],
    job: EncodingJob,
    item_ids: Sequence[str],
) -> Generator[tuple[int, Tensor]]:
    """Encode batch after batch.

    Args:
        encoder: the ItemLLM.
        tokens: of the whole catalogue.
        batches: the job's.
        numbers: of the batches to encode, in this order.
        job: for the dtype.
        item_ids: to name an item in an error; its number is given where they are not at hand.

    Yields:
        The batch's number, and [b, D] in the job's dtype on the CPU.

    Raises:
        InputError: an embedding does not fit in the dtype.
    """
    texts = ([tokens[row] for row in batches.all[number].tolist()] for number in numbers)
    with closing(encoder.encode_all(texts)) as stream:
        for number, embeddings in zip(numbers, stream, strict=True):
            done = embeddings.to(DTYPES[job.dtype])
            bad = (~done.isfinite().all(dim=1)).nonzero()
            if len(bad):
                row = int(batches.all[number][int(bad[0])])
                item = f"item '{item_ids[row]}'" if item_ids else f"item number {row + 1}"
                raise InputError(
                    f"the embedding of {item} does not fit in {job.dtype}; use --item_cache_dtype "
                    f"bfloat16 or float32."
                )
            yield number, done


def plan_batches(tokens: Tokens, job: EncodingJob, encoder: ItemEncoder) -> Batches:
    """Put items into batches of similar length; the same job always gives the same batches."""
    extra = int(encoder.pooling == "emb_token")
    return Batches(list(length_batches(tokens.lengths, job.batch_tokens, extra)))


def group_batches(batches: Batches, numbers: Iterable[int]) -> list[range]:
    """Put batches into groups, which are what is dealt out to processes.

    Args:
        batches: the job's.
        numbers: of the batches to group, ascending.

    Returns:
        Consecutive batches of about `ITEMS_PER_PART` items each, fewer before a gap.
    """
    groups: list[range] = []
    size = 0
    for number in numbers:
        if groups and size < ITEMS_PER_PART and groups[-1].stop == number:
            groups[-1] = range(groups[-1].start, number + 1)
        else:
            groups.append(range(number, number + 1))
            size = 0
        size += len(batches.all[number])
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


def _assigned(groups: Sequence[range], owners: np.ndarray) -> list[int]:
    """Return the numbers of this process's batches."""
    return [
        number
        for group, owner in zip(groups, owners.tolist(), strict=True)
        if owner == global_rank()
        for number in group
    ]


def _costs(
    batches: Batches, groups: Sequence[range], tokens: Tokens, encoder: ItemEncoder
) -> list[int]:
    extra = int(encoder.pooling == "emb_token")
    costs = [len(rows) * (int(tokens.lengths[rows].max()) + extra) for rows in batches.all]
    return [sum(costs[number] for number in group) for group in groups]


def _meter(
    batches: Batches,
    assigned: Sequence[int],
    tokens: Tokens,
    encoder: ItemEncoder,
    show_progress: bool,
    share: str = "",
    before: int = 0,
) -> Meter:
    """Make the bar for the batches to encode; `before` items of the total are encoded already."""
    bar = Meter(
        f"encoding items{share}",
        before + sum(len(batches.all[number]) for number in assigned),
        "items",
        show_progress,
        device=encoder.model.device,
        tokens=sum(_tokens_of(batches.all[number], tokens, encoder) for number in assigned),
    )
    bar.skip(before)
    return bar


def _tokens_of(batch: np.ndarray, tokens: Tokens, encoder: ItemEncoder) -> int:
    """Count the positions that the ItemLLM reads: text and emb token, without padding."""
    extra = len(batch) if encoder.pooling == "emb_token" else 0
    return int(tokens.lengths[batch].sum()) + extra


def log_empty(texts: Sequence[str], encoder: ItemEncoder) -> None:
    """Say what items without text get, which the tokenizer and the pooling decide."""
    empty = sum(1 for text in texts if not text)
    if not empty:
        return
    if len(encoder.tokenize([""])[0]):
        given = "the embedding of the tokenizer's begin-of-text token"
    elif encoder.pooling == "emb_token":
        given = "the bare emb token's embedding"
    else:
        given = "zeros"
    log.info("%d of %d items have no text and get %s.", empty, len(texts), given)
