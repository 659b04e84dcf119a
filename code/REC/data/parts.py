"""Finished pieces of an encoding job on disk: what an interrupted or shared-out job goes on from."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from REC.utils.files import atomic_path, remove, write_json

log = logging.getLogger(__name__)

_STAMP = "job.json"


class Parts:
    """Finished groups of items, one safetensors file each, with a checksum.

    Args:
        folder: where the files are.
        dim, dtype: of the embeddings.
    """

    def __init__(self, folder: Path, dim: int, dtype: torch.dtype) -> None:
        self.folder = folder
        self.dim, self.dtype = dim, dtype

    def claim(self, digest: str) -> None:
        """Keep the folder's files if they are of the job with this digest, else begin anew.

        Raises:
            InputError: the folder cannot be written.
        """
        stamp = self.folder / _STAMP
        try:
            same = json.loads(stamp.read_text(encoding="utf-8")) == {"digest": digest}
        except (OSError, ValueError):
            same = False
        if not same:
            remove(self.folder)
            write_json(stamp, {"digest": digest})
            return
        for leftover in self.folder.glob(".*.tmp"):
            remove(leftover)
        if any(self.folder.glob("part-*.safetensors")):
            log.info("continuing the interrupted encoding in %s.", self.folder)

    def read(self, number: int, rows: np.ndarray) -> Tensor | None:
        """Return a group's embeddings [b, D], or None when they are missing or damaged.

        Args:
            number: the group.
            rows: int64 [b], the items that belong in it.
        """
        path = self._path(number)
        try:
            with safe_open(path, framework="pt") as file:
                stated = (file.metadata() or {}).get("sha256")
                found, embeddings = file.get_tensor("rows"), file.get_tensor("embeddings")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("%s is damaged (%s) and is encoded again.", path, error)
            return None
        whole = stated == _checksum(found.numpy(), embeddings)
        fits = embeddings.shape == (len(rows), self.dim) and embeddings.dtype == self.dtype
        if not (whole and fits and np.array_equal(found.numpy(), rows)):
            log.warning("%s is damaged or of another job and is encoded again.", path)
            return None
        return embeddings

    def write(self, number: int, rows: np.ndarray, embeddings: Tensor) -> None:
        """Write a group's file, whole or not at all.

        Raises:
            InputError: the disk is full or the folder cannot be written.
        """
        with atomic_path(self._path(number)) as temporary:
            save_file(
                {"rows": torch.from_numpy(rows), "embeddings": embeddings},
                temporary,
                metadata={"sha256": _checksum(rows, embeddings)},
            )

    def _path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.safetensors"


def _checksum(rows: np.ndarray, embeddings: Tensor) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(rows).data)
    digest.update(embeddings.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
