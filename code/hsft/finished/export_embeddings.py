"""Export the item vectors and user vectors of a run, with a FAISS index over the items."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from hsft.config.help import dump_config
from hsft.config.schema import TRAINED_MODELS
from hsft.data.cache import DTYPES, ids_fingerprint, write_cache
from hsft.data.time_fields import ItemTimes, item_times
from hsft.encoding.build_cache import ITEMS_PER_PART, SECONDS_PER_PART
from hsft.encoding.parts import Batches, Parts, PartWriter
from hsft.evaluator.evaluator import Scorer
from hsft.evaluator.user_vectors import encode_users
from hsft.finished.export import (
    portable_config,
    refuse_full_disk,
    refuse_out,
    result_table,
    write_json_file,
)
from hsft.finished.item_index import (
    INDEX_FILE,
    RECALL_AT,
    IndexKind,
    build_index,
    kind_for,
    recall,
    require_faiss,
    search_width,
    tune,
)
from hsft.finished.open_run import OpenRun, open_run
from hsft.hub.manifest import EXPORT_FILE
from hsft.hub.repository import run_name
from hsft.model.recommender import Recommender
from hsft.report.embeddings_card import ExportedEmbeddings, MeasuredIndex, embeddings_card
from hsft.report.result import read_result
from hsft.run.run_dir import CONFIG_FILE
from hsft.run.saved_model import run_config, user_llm_fingerprint
from hsft.trainer.checkpoint import BEST_DIR
from hsft.utils.environment import versions
from hsft.utils.errors import InputError, Interrupted
from hsft.utils.files import atomic_path, cannot_write, remove
from hsft.utils.progress import Meter
from hsft.utils.signals import StopSignals

log = logging.getLogger(__name__)

VectorFiles = Literal["safetensors", "parquet"]
VECTOR_FILES: tuple[VectorFiles, ...] = get_args(VectorFiles)
# Models whose vectors mean something outside of this program.
_MODELS_WITH_VECTORS = (*TRAINED_MODELS, "item_knn")
# Users whose nearest items are searched exactly, half of them to choose how widely the index searches.
_MEASURED_USERS = 2_000
_ITEMS_AT_A_TIME = 4_096
# Batches of users that are sorted by length and written together.
_BATCHES_AT_A_TIME = 32
_SCORES_AT_A_TIME = 1 << 24


@dataclass(frozen=True)
class EmbeddingOptions:
    """What to export.

    Attributes:
        run: the run's folder.
        out: the folder to write.
        files: `safetensors` or `parquet`.
        dtype: `float32` or `float16`.
        index: a kind of index, `auto` for one by the number of items, or `none`.
        model: one of the run's models; None: the last, the fine-tuned where there is one.
        overwrite: replace an earlier export at `out`.
        overrides: keys of the run's configuration with other values, for what has moved.
    """

    run: Path
    out: Path
    files: VectorFiles = "safetensors"
    dtype: str = "float32"
    index: IndexKind | Literal["auto", "none"] = "auto"
    model: str | None = None
    overwrite: bool = False
    overrides: Mapping[str, Any] | None = None


def export_embeddings(options: EmbeddingOptions) -> Path:
    """Write a run's vectors of all items and of all users; their inner products are its scores.

    The folder appears whole at the end or not at all. It holds `items` and `users`, as safetensors
    (`embeddings` [n, D], and `item_ids` or `user_ids`, a JSON list in UTF-8 bytes) or as parquet
    (a column of ids and one of vectors); `items.faiss`, whose row r is row r of the items; the card
    `README.md`, `config.yaml` and `export.json`. A user's vector is of all the user's items, those
    included that were held out, as `recommend` has it.

    An export that was stopped keeps the users' vectors in a folder beside `out`, and the next one of
    the same model and data goes on from there, whatever its files and index.

    Returns:
        The folder.

    Raises:
        InputError: the run is not finished, its model has no vectors or reads the time of a request,
            a package or a file is missing, the disk is too small, or `out` must not be replaced.
        Interrupted: SIGINT or SIGTERM came; nothing half-written is left.
    """
    try:
        with StopSignals() as stop:
            return _export(options, stop)
    except Interrupted as ending:
        kept = "nothing was exported"
        if any(_parts_folder(options).glob("part-*")):
            kept = "the vectors of users so far are kept, and the same command goes on from there"
        raise Interrupted(f"{ending}; {kept}", ending.exit_code) from None


def _parts_folder(options: EmbeddingOptions) -> Path:
    return options.out.with_name(f"{options.out.name}.parts")


def _export(options: EmbeddingOptions, stop: StopSignals) -> Path:
    _refuse(options)
    run = open_run(options.run, {"show_progress": True, **(options.overrides or {})})
    name = options.model or run.models[-1]
    vectors = _Vectors(run, run.build(name))
    _refuse_full_disk(options, vectors)
    parts = Parts(_parts_folder(options), vectors.dim, torch.float32)
    parts.claim(_digest(vectors, name))
    finished = _encode_users(vectors, parts, stop)
    with atomic_path(options.out) as folder:
        folder.mkdir()
        items = partial(_write_vectors, folder / f"items.{options.files}", "item_ids", options)
        items(vectors.item_ids, vectors.dim, vectors.item_blocks())
        users = partial(_write_vectors, folder / f"users.{options.files}", "user_ids", options)
        users(vectors.user_ids, vectors.dim, _user_blocks(vectors, parts, finished))
        index = None
        if options.index != "none":
            kind = kind_for(vectors.num_items) if options.index == "auto" else options.index
            index = _write_index(folder / INDEX_FILE, kind, vectors)
        _write_about(folder, options, vectors, name, index)
    remove(parts.folder)
    log.info("wrote %s.", options.out)
    return options.out


def _refuse(options: EmbeddingOptions) -> None:
    """Refuse what cannot be exported, before anything large is read."""
    refuse_out(options.out, options.overwrite)
    config = run_config(options.run, options.overrides)
    read_result(options.run)
    if config.model not in _MODELS_WITH_VECTORS:
        raise InputError(
            f"{options.run} is a run of model: {config.model}, whose scores are not those of vectors "
            f"to export; name a run of {', '.join(_MODELS_WITH_VECTORS)}."
        )
    if config.use_timestamps and config.predict_at == "target":
        raise InputError(
            f"{options.run} predicts for a given time (predict_at: target), so that a user has no one "
            f"vector; recommend with the run itself, or export a run without."
        )
    if options.dtype not in ("float16", "float32"):
        raise InputError(
            f"--dtype {options.dtype} is not read by numpy, parquet and FAISS; use float32 or float16 "
            f"for --format embeddings."
        )
    if options.index != "none":
        require_faiss()
    if options.files == "parquet":
        _require_pyarrow()


def _require_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise InputError(
            "parquet files need the package pyarrow, which is not installed; install it with pip "
            "install 'hsft[parquet]', or write safetensors."
        ) from error


def _refuse_full_disk(options: EmbeddingOptions, vectors: _Vectors) -> None:
    numbers = (vectors.num_items + len(vectors.user_ids)) * vectors.dim
    needed = numbers * DTYPES[options.dtype].itemsize
    # The parts.
    needed += len(vectors.user_ids) * vectors.dim * 4
    if options.index != "none":
        # A graph's links are small beside its vectors.
        needed += vectors.num_items * (vectors.dim * 4 + 512)
    refuse_full_disk(options.out, needed)


@dataclass(frozen=True)
class _Vectors:
    """The vectors of a run's model, computed part by part."""

    run: OpenRun
    scorer: Scorer

    @property
    def item_ids(self) -> list[str]:
        """I ids; row r of the item vectors is item number r + 1."""
        return [str(item) for item in self.run.data.interactions.item_ids[1:]]

    @property
    def user_ids(self) -> list[str]:
        return [str(user) for user in self.run.data.interactions.user_ids]

    @property
    def num_items(self) -> int:
        return self.scorer.num_items

    @cached_property
    def times(self) -> ItemTimes | None:
        return item_times(self.run.config, self.run.data.interactions)

    @cached_property
    def dim(self) -> int:
        return self.items(0, 1).shape[1]

    @property
    def similarity(self) -> str:
        """How users and items are compared, `cosine` or `dot`; either is an inner product here."""
        scorer = self.scorer
        return scorer.settings.similarity if isinstance(scorer, Recommender) else "cosine"

    @torch.no_grad()
    def items(self, start: int, end: int) -> np.ndarray:
        """Return the vectors of rows start..end-1: float32 [end - start, D]."""
        with self.run.fabric.autocast():
            rows = self.scorer.item_slice(start + 1, end + 1)
        return rows.float().numpy(force=True)

    def item_blocks(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield rows and their vectors, in order."""
        for start in range(0, self.num_items, _ITEMS_AT_A_TIME):
            rows = np.arange(start, min(start + _ITEMS_AT_A_TIME, self.num_items))
            yield rows, torch.from_numpy(self.items(start, start + len(rows)))

    def users(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of some users: int64 [n] -> float32 [n, D]."""
        data, config = self.run.data.interactions, self.run.config
        with self.run.fabric.autocast():
            return encode_users(
                self.scorer,
                data.items,
                data.offsets[:-1][rows],
                data.offsets[1:][rows],
                max_length=config.eval_list_length,
                device=self.run.fabric.device,
                times=self.times,
            ).numpy(force=True)

    @property
    def users_at_a_time(self) -> int:
        """How many consecutive users are sorted by length and written together."""
        return self.run.config.eval_batch_size * _BATCHES_AT_A_TIME

    @cached_property
    def user_batches(self) -> Batches:
        """The rows of all users; of `users_at_a_time`, those of alike length are in one batch."""
        lengths = self.run.data.interactions.lengths
        size = self.run.config.eval_batch_size
        batches = []
        for start in range(0, len(lengths), self.users_at_a_time):
            # Little is padded then.
            order = np.argsort(lengths[start : start + self.users_at_a_time], kind="stable") + start
            batches += [order[first : first + size] for first in range(0, len(order), size)]
        return Batches(batches)


def _digest(vectors: _Vectors, name: str) -> str:
    """Return what tells the vectors of a model from those of any other, and of other data."""
    run, data = vectors.run, vectors.run.data.interactions
    files = sorted(path for path in (run.folder / BEST_DIR).rglob("*") if path.is_file())
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    settings = portable_config(run.config).model_dump_json()
    digest = hashlib.sha256(
        repr([name, settings, user_llm_fingerprint(run.config), states]).encode()
    )
    some = vectors.items(0, min(_ITEMS_AT_A_TIME, vectors.num_items))
    times = [] if vectors.times is None else [vectors.times.seconds]
    for array in (data.items, data.offsets, *times, some):
        digest.update(np.ascontiguousarray(array).data)
    return f"{ids_fingerprint(data.item_ids[1:])} {digest.hexdigest()}"


def _encode_users(vectors: _Vectors, parts: Parts, stop: StopSignals) -> dict[str, range]:
    """Encode the users that no part has yet into parts; return all parts with their batches."""
    batches = vectors.user_batches
    finished = parts.find(batches)
    done = {number for numbers in finished.values() for number in numbers}
    writer = PartWriter(
        parts, batches, stop.held_back, items=ITEMS_PER_PART, seconds=SECONDS_PER_PART
    )
    show = vectors.run.config.show_progress
    with Meter("encoding users", len(vectors.user_ids), "users", show) as bar:
        bar.skip(sum(len(batches.all[number]) for number in done))
        with writer.writing_rest():
            for number, rows in enumerate(batches.all):
                if number not in done:
                    writer.add(number, torch.from_numpy(vectors.users(rows)))
                    bar.advance(len(rows))
    return {**finished, **writer.written}


def _user_blocks(
    vectors: _Vectors, parts: Parts, finished: Mapping[str, range]
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield rows of users and their vectors, in order."""
    count, together = len(vectors.user_ids), vectors.users_at_a_time
    start = filled = 0
    block = torch.empty((min(together, count), vectors.dim))
    for name, numbers in sorted(finished.items(), key=lambda part: part[1].start):
        rows = vectors.user_batches.rows(numbers)
        embeddings = parts.read(name, rows)
        if embeddings is None:
            raise InputError(
                f"{parts.folder / name} is missing or damaged; run the same command again."
            )
        while len(rows):
            # A part may reach into the next block; rows of a block come before those of the next.
            taken = int((rows < start + together).sum())
            block[torch.from_numpy(rows[:taken] - start)] = embeddings[:taken]
            rows, embeddings = rows[taken:], embeddings[taken:]
            filled += taken
            if filled == len(block):
                yield np.arange(start, start + len(block)), block
                start, filled = start + len(block), 0
                block = torch.empty((min(together, count - start), vectors.dim))


def _write_vectors(
    path: Path,
    ids_name: str,
    options: EmbeddingOptions,
    ids: Sequence[str],
    dim: int,
    blocks: Iterator[tuple[np.ndarray, torch.Tensor]],
) -> None:
    dtype = DTYPES[options.dtype]
    converted = ((rows, _converted(vectors, dtype)) for rows, vectors in blocks)
    if options.files == "parquet":
        _write_parquet(path, ids_name.removesuffix("s"), ids, dim, converted)
    else:
        metadata = {"model": f"vectors of the run {run_name(options.run)}"}
        write_cache(path, ids, dim, dtype, metadata, converted, ids_name)


def _converted(vectors: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    converted = vectors.to(dtype)
    if not bool(converted.isfinite().all()):
        raise InputError(
            f"a vector is not finite in {str(dtype).removeprefix('torch.')}; use --dtype float32, or "
            f"train the run again if it is not finite there."
        )
    return converted


def _write_parquet(
    path: Path,
    id_name: str,
    ids: Sequence[str],
    dim: int,
    blocks: Iterator[tuple[np.ndarray, torch.Tensor]],
) -> None:
    """Write a column of ids and one of vectors, a row group for each block of rows in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for rows, vectors in blocks:
        flat = pa.array(vectors.numpy().reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, dim)
        names = pa.array([ids[row] for row in rows], pa.string())
        table = pa.table({id_name: names, "embedding": column})
        if writer is None:
            writer = pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _write_index(path: Path, kind: IndexKind, vectors: _Vectors) -> MeasuredIndex:
    """Build, tune, measure and write the index."""
    faiss = require_faiss()
    run = vectors.run
    if run.config.num_threads is not None:
        faiss.omp_set_num_threads(run.config.num_threads)
    began = time.perf_counter()
    index = build_index(
        kind, vectors.items, vectors.num_items, vectors.dim, run.config.show_progress
    )
    seconds = time.perf_counter() - began
    count = len(run.data.interactions.user_ids)
    rows = np.unique(np.linspace(0, count - 1, min(count, _MEASURED_USERS)).astype(np.int64))
    size = run.config.eval_batch_size
    users = np.concatenate(
        [vectors.users(rows[first : first + size]) for first in range(0, len(rows), size)]
    )
    exact = _exact_rows(vectors, users, min(RECALL_AT, vectors.num_items))
    # One half chooses the width of the search, the other measures it.
    measured = slice(1, None, 2) if len(rows) > 1 else slice(None)
    tune(index, users[::2], exact[::2])
    share = recall(index.search(users[measured], exact.shape[1])[1], exact[measured])
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise cannot_write(path, error) from error
    log.info("%s index: recall@%d of exact search %.4f.", kind, RECALL_AT, share)
    width = search_width(index)
    return MeasuredIndex(
        kind=kind,
        settings={} if width is None else dict([width]),
        recall=share,
        users=len(users[measured]),
        build_seconds=seconds,
        megabytes=path.stat().st_size / 1e6,
    )


@torch.no_grad()
def _exact_rows(vectors: _Vectors, users: np.ndarray, count: int) -> np.ndarray:
    """Return the rows of the items of the greatest inner products: float32 [n, D] -> int64 [n, K]."""
    given = torch.from_numpy(users).to(vectors.run.fabric.device)
    best_scores = given.new_empty((len(users), 0))
    best_rows = torch.empty((len(users), 0), dtype=torch.int64, device=given.device)
    step = max(count, min(_ITEMS_AT_A_TIME, _SCORES_AT_A_TIME // len(users)))
    for start in range(0, vectors.num_items, step):
        end = min(start + step, vectors.num_items)
        items = torch.from_numpy(vectors.items(start, end)).to(given.device)
        rows = torch.arange(start, end, device=given.device).expand(len(users), -1)
        scores = torch.cat([best_scores, given @ items.T], dim=1)
        kept = scores.topk(min(count, scores.shape[1]), dim=1)
        best_scores = kept.values
        best_rows = torch.cat([best_rows, rows], dim=1).gather(1, kept.indices)
    return best_rows.numpy(force=True)


def _write_about(
    folder: Path,
    options: EmbeddingOptions,
    vectors: _Vectors,
    name: str,
    index: MeasuredIndex | None,
) -> None:
    run = vectors.run
    card = ExportedEmbeddings(
        name=run_name(options.run),
        model=name,
        config=run.config,
        table=result_table(options.run),
        similarity=vectors.similarity,
        files=options.files,
        dtype=options.dtype,
        items=vectors.num_items,
        users=len(vectors.user_ids),
        dim=vectors.dim,
        index=index,
    )
    (folder / "README.md").write_text(embeddings_card(card), encoding="utf-8")
    (folder / CONFIG_FILE).write_text(dump_config(portable_config(run.config)), encoding="utf-8")
    about: dict[str, Any] = {
        "format": "embeddings",
        "run": card.name,
        "model": name,
        "similarity": card.similarity,
        "files": options.files,
        "dtype": options.dtype,
        "items": card.items,
        "users": card.users,
        "dim": card.dim,
        "item_ids_sha256": ids_fingerprint(run.data.interactions.item_ids[1:]),
        "index": None if index is None else index.as_dict(),
        "versions": versions(),
    }
    write_json_file(folder / EXPORT_FILE, about)
