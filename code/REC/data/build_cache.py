"""Encode a catalogue's items once, resumably, and write the item cache."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from REC.data.cache import DTYPES
from REC.data.item_text import ItemTexts
from REC.model.item_llm import ItemEncoder, length_batches
from REC.utils.errors import InputError
from REC.utils.files import atomic_path, remove, write_json
from REC.utils.progress import meter

log = logging.getLogger(__name__)

# Items written to disk at a time: what an interruption can cost.
ITEMS_PER_PART = 2048


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

    def metadata(self) -> dict[str, str]:
        """Return the job as the cache file's metadata."""
        return {
            "model": self.model,
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
    parts_dir: Path | None = None,
    show_progress: bool = True,
) -> Tensor:
    """Encode every item.

    Args:
        encoder: the ItemLLM.
        items: ids and texts.
        job: settings, used to recognise finished parts of an interrupted run.
        parts_dir: folder for finished parts; None keeps everything in memory. The caller removes
            it once the cache is written.
        show_progress: show a bar.

    Returns:
        [n, D] in the job's dtype, rows in the order of `items`.

    Raises:
        InputError: an embedding does not fit in the dtype.
    """
    tokens = encoder.tokenize(items.texts)
    lengths = np.array([len(ids) for ids in tokens])
    empty = sum(1 for text in items.texts if not text)
    if empty:
        given = "the bare emb token's embedding" if encoder.pooling == "emb_token" else "zeros"
        log.info("%d of %d items have no text and get %s.", empty, len(items), given)
    extra = int(encoder.pooling == "emb_token")
    batches = list(length_batches(lengths, job.batch_tokens, extra))
    result = torch.zeros((len(items), encoder.dim), dtype=DTYPES[job.dtype])
    parts = _Parts(parts_dir, job) if parts_dir is not None else None
    with meter("encoding items", len(items), "items", show_progress) as bar:
        for number, group in enumerate(_group(batches)):
            rows = np.concatenate(group)
            done = parts.read(number, rows, encoder.dim) if parts else None
            if done is None:
                encoded = []
                for batch in group:
                    encoded.append(encoder.encode([tokens[i] for i in batch]))
                    bar.advance(len(batch))
                done = torch.cat(encoded).to(result.dtype)
                _refuse_overflow(done, rows, items, job.dtype)
                if parts:
                    parts.write(number, rows, done)
            else:
                bar.skip(len(rows))
            result[torch.from_numpy(rows)] = done
    return result


def _group(batches: list[np.ndarray]) -> list[list[np.ndarray]]:
    groups: list[list[np.ndarray]] = []
    size = ITEMS_PER_PART
    for batch in batches:
        if size >= ITEMS_PER_PART:
            groups.append([])
            size = 0
        groups[-1].append(batch)
        size += len(batch)
    return groups


class _Parts:
    """Finished groups of an encoding job, one file each."""

    def __init__(self, folder: Path, job: EncodingJob) -> None:
        self.folder = folder
        stamp = folder / "job.json"
        try:
            same = json.loads(stamp.read_text(encoding="utf-8")) == {"digest": job.digest()}
        except (OSError, ValueError):
            same = False
        if not same:
            remove(folder)
            write_json(stamp, {"digest": job.digest()})
        elif any(folder.glob("part-*.safetensors")):
            log.info("continuing the interrupted encoding in %s.", folder)

    def read(self, number: int, rows: np.ndarray, dim: int) -> Tensor | None:
        try:
            part = load_file(self._path(number))
        except (OSError, SafetensorError):
            return None
        same = np.array_equal(part["rows"].numpy(), rows)
        return part["embeddings"] if same and part["embeddings"].shape[1] == dim else None

    def write(self, number: int, rows: np.ndarray, embeddings: Tensor) -> None:
        with atomic_path(self._path(number)) as temporary:
            save_file({"rows": torch.from_numpy(rows), "embeddings": embeddings}, temporary)

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.safetensors"


def _refuse_overflow(values: Tensor, rows: np.ndarray, items: ItemTexts, dtype: str) -> None:
    bad = (~values.isfinite().all(dim=1)).nonzero()
    if len(bad):
        raise InputError(
            f"the embedding of item '{items.item_ids[rows[int(bad[0])]]}' does not fit in {dtype}; "
            f"use --item_cache_dtype bfloat16 or float32."
        )
