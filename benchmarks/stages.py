"""What the benchmark measures: one function a stage and side, each run in a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import naive, synthetic
from hsft.data.cache import ItemCache, open_cache
from hsft.data.dataset import (
    CachedEmbeddingEvalDataset,
    CachedEmbeddingTrainDataset,
    EvalCollate,
    TrainCollate,
)
from hsft.data.interactions import Interactions, read_interactions
from hsft.data.negatives import NegativeSampler
from hsft.data.split import Split, leave_one_out
from hsft.evaluator.evaluator import EvalProtocol, Evaluator
from hsft.model.item_table import ItemTable, table_from_cache
from hsft.model.losses import normalize
from hsft.model.recommender import LossSettings, Recommender, SequenceEncoder

ROOT = Path(__file__).resolve().parents[1]
DEMO_LLM = ROOT / "model_checkpoints" / "SmolLM2-135M-Instruct"
DEMO_INTERACTIONS = ROOT / "dataset" / "ml-100k.csv"
DEMO_TEXTS = ROOT / "information" / "ml-100k.csv"
DEMO_CACHE = ROOT / "dataset" / "ml-100k_item_embeddings.safetensors"

BATCH = 64
NEGATIVES_PER_ROW = 16
TOPK = 20
# A run that takes longer than this is not repeated.
LONG_SECONDS = 60.0


class Skipped(Exception):
    """A stage cannot be measured here; the text says why."""


@dataclass
class Figure:
    """One measured number.

    Attributes:
        case: what was measured, the same text on every side.
        unit: of the values.
        values: one a repeat.
        note: the sample it was measured on, or anything else to know.
    """

    case: str
    unit: str
    values: list[float]
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data with median and spread."""
        return {
            "case": self.case,
            "unit": self.unit,
            "values": self.values,
            "median": statistics.median(self.values),
            "min": min(self.values),
            "max": max(self.values),
            "note": self.note,
        }


@dataclass
class Context:
    """What a stage is run with.

    Attributes:
        size: of the synthetic data.
        work: folder for made files.
        repeats: runs of each measurement.
        seed: of everything random.
        quick: the smoke test's small samples.
        extra: per stage, anything else to report, such as a check that both sides agree.
    """

    size: synthetic.Size
    work: Path
    repeats: int
    seed: int
    quick: bool
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def csv(self) -> Path:
        """The interaction file."""
        return self.work / f"{self.size.name}.csv"

    def seconds(self, run: Callable[[], Any]) -> list[float]:
        """Time `run` once for each repeat; a long one only once."""
        values = []
        for _ in range(self.repeats):
            began = time.perf_counter()
            run()
            values.append(time.perf_counter() - began)
            if values[-1] > LONG_SECONDS:
                break
        return values

    def rates(self, run: Callable[[], Any], count: float) -> list[float]:
        """Return `count` per second of `run` for each repeat."""
        return [count / seconds for seconds in self.seconds(run)]


def prepare(context: Context) -> None:
    """Make the files that the stages read, outside every measurement."""
    synthetic.make_interactions(context.size, context.work, context.seed)
    interactions = read_interactions(context.csv)
    path = synthetic.make_cache(
        context.size, interactions.item_ids[1:], context.work, seed=context.seed
    )
    target = naive_cache_path(context)
    if not target.is_file() or target.stat().st_mtime < path.stat().st_mtime:
        cache = open_cache(path)
        naive.save_cache(target, cache.item_ids, cache.embeddings)


def native_cache_path(context: Context) -> Path:
    """Where the synthetic native cache is."""
    name = f"{context.size.name}_{context.size.dim}_item_embeddings.safetensors"
    return context.work / name


def naive_cache_path(context: Context) -> Path:
    """Where the same embeddings are as a dictionary of tensors."""
    return native_cache_path(context).with_suffix(".pt")


# --- load ---------------------------------------------------------------------------------------


def load_hsft(context: Context) -> list[Figure]:
    """Read the CSV, split it and cut training sequences."""

    def run() -> None:
        split = leave_one_out(read_interactions(context.csv))
        CachedEmbeddingTrainDataset(split, 50)
        CachedEmbeddingEvalDataset(split, "test", 50)

    return [Figure("load and split", "s", context.seconds(run))]


def load_naive(context: Context) -> list[Figure]:
    """Read the CSV and split it group by group."""
    return [Figure("load and split", "s", context.seconds(lambda: naive.load(context.csv)))]


def load_tuned(context: Context) -> list[Figure]:
    """Read the CSV and split it with one sort and one grouping in pandas."""
    return [Figure("load and split", "s", context.seconds(lambda: naive.load_tuned(context.csv)))]


# --- cache --------------------------------------------------------------------------------------


def cache_hsft(context: Context) -> list[Figure]:
    """Open the native cache, and let worker processes read batches from it."""
    path = native_cache_path(context)
    figures = [Figure("open the item cache", "s", context.seconds(lambda: open_cache(path)))]
    before = _memory([_own_memory()])
    cache = open_cache(path)
    rows = np.random.default_rng(context.seed).integers(0, len(cache), size=(100, BATCH * 10))

    def work() -> None:
        for batch in rows:
            cache.embeddings[torch.from_numpy(batch)].float()

    return figures + _workers_memory(work, before)


def cache_naive(context: Context) -> list[Figure]:
    """Read the dictionary of tensors, and let worker processes read batches from it."""
    path = naive_cache_path(context)
    figures = [Figure("open the item cache", "s", context.seconds(lambda: naive.load_cache(path)))]
    before = _memory([_own_memory()])
    cache = naive.load_cache(path)
    ids = list(cache)
    rows = np.random.default_rng(context.seed).integers(0, len(ids), size=(100, BATCH * 10))

    def work() -> None:
        for batch in rows:
            torch.stack([cache[ids[row]] for row in batch]).float()

    return figures + _workers_memory(work, before)


def _workers_memory(work: Callable[[], None], before: dict[str, float]) -> list[Figure]:
    """Fork 1 and 4 workers, let all read, and add up memory over them and this process."""
    figures = []
    fork = multiprocessing.get_context("fork")
    for count in (1, 4):
        barrier = fork.Barrier(count + 1)
        queue = fork.SimpleQueue()

        def worker(barrier: Any = barrier, queue: Any = queue) -> None:
            torch.set_num_threads(1)
            work()
            barrier.wait()
            # All are alive and have read: a shared page is divided among those that map it.
            queue.put(_own_memory())
            barrier.wait()

        processes = [fork.Process(target=worker) for _ in range(count)]
        for process in processes:
            process.start()
        barrier.wait()
        this_process = _own_memory()
        memory = _memory([this_process, *(queue.get() for _ in processes)])
        barrier.wait()
        for process in processes:
            process.join()
        label = f"{count} worker" if count == 1 else f"{count} workers"
        for name in ("RSS", "PSS"):
            figures.append(
                Figure(
                    f"{name}, main process and {label}",
                    "MB",
                    [memory[name]],
                    f"{before[name]:,.0f} MB before the cache, without workers",
                )
            )
    return figures


def _own_memory() -> dict[str, float]:
    """Return this process's RSS and PSS in MB; Linux only."""
    path = Path("/proc/self/smaps_rollup")
    if not path.is_file():
        raise Skipped("/proc/self/smaps_rollup is needed to measure shared memory")
    lines = dict(
        line.split(":", 1) for line in path.read_text().splitlines()[1:] if line.endswith(" kB")
    )
    return {name.upper(): int(lines[name].split()[0]) * 1024 / 1e6 for name in ("Rss", "Pss")}


def _memory(processes: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(process[name] for process in processes) for name in ("RSS", "PSS")}


# --- collate ------------------------------------------------------------------------------------


def collate_hsft(context: Context) -> list[Figure]:
    """Make training and evaluation batches of item numbers."""
    split = leave_one_out(read_interactions(context.csv))
    sampler = NegativeSampler(split.interactions, held_out=2)
    cache = open_cache(native_cache_path(context))
    table = table_from_cache(cache, split.interactions.item_ids)
    rng = np.random.default_rng(context.seed)
    count = 20 if context.quick else 2000
    figures = []
    for length in (50, 10):
        train = CachedEmbeddingTrainDataset(split, length)
        batches = _batches(rng.permutation(len(train)), count)
        for drawn in (0, NEGATIVES_PER_ROW):
            collate = TrainCollate(
                train, sampler=sampler if drawn else None, num_negatives=drawn, seed=context.seed
            )
            figures.append(_batch_rate(context, _train_case(length, drawn), collate, batches))
            if not drawn:

                def gather(rows: np.ndarray, collate: TrainCollate = collate) -> None:
                    batch = collate(rows)
                    table[batch.history].float()
                    table[batch.targets].float()

                case = f"{_train_case(length, drawn)}, embeddings gathered on the CPU"
                figures.append(_batch_rate(context, case, gather, batches[: max(1, count // 50)]))
        test = CachedEmbeddingEvalDataset(split, "test", length)
        batches = _batches(rng.permutation(len(test)), count)
        figures.append(_batch_rate(context, _eval_case(length), EvalCollate(test), batches))
    return figures


def collate_naive(context: Context) -> list[Figure]:
    """Make training and evaluation batches of stacked embeddings."""
    histories = naive.load_tuned(context.csv)
    cache = naive.load_cache(naive_cache_path(context))
    rng = np.random.default_rng(context.seed)
    random.seed(context.seed)
    count = 4 if context.quick else 12
    figures = []
    for length in (50, 10):
        for drawn in (0, NEGATIVES_PER_ROW):
            train = naive.TrainDataset(histories, cache, length, drawn)
            batches = _batches(rng.permutation(len(train)), count)

            def make(rows: np.ndarray, data: Any = train) -> None:
                naive.collate_train([data[int(row)] for row in rows])

            figure = _batch_rate(context, _train_case(length, drawn), make, batches)
            figures.append(figure)
            if not drawn:
                case = f"{_train_case(length, drawn)}, embeddings gathered on the CPU"
                figures.append(Figure(case, figure.unit, figure.values, figure.note))
        test = naive.EvalDataset(histories, cache, length)
        batches = _batches(rng.permutation(len(test)), count)

        def make_eval(rows: np.ndarray, data: Any = test) -> None:
            naive.collate_eval([data[int(row)] for row in rows])

        figures.append(_batch_rate(context, _eval_case(length), make_eval, batches))
    return figures


def _batches(order: np.ndarray, count: int) -> list[np.ndarray]:
    size = min(BATCH, len(order))
    wrapped = np.resize(order, max(count * size, size))
    return list(wrapped[: count * size].reshape(count, size))


def _batch_rate(
    context: Context,
    case: str,
    collate: Callable[[np.ndarray], Any],
    batches: Sequence[np.ndarray],
) -> Figure:
    def run() -> None:
        for rows in batches:
            collate(rows)

    for rows in batches[:2]:  # warm up
        collate(rows)
    return Figure(case, "batches/s", context.rates(run, len(batches)), f"{len(batches)} batches")


def _train_case(length: int, drawn: int) -> str:
    negatives = f"{drawn} drawn negatives a row" if drawn else "in-batch negatives"
    return f"train collate, L {length}, {negatives}"


def _eval_case(length: int) -> str:
    return f"eval collate, L {length}"


# --- items --------------------------------------------------------------------------------------


def _demo_encoder(layers: int | None) -> Any:
    # transformers takes seconds to import and only the demo's stages need it.
    from transformers import AutoTokenizer

    from hsft.encoding.item_llm import ItemEncoder
    from hsft.model.backbone import load_decoder

    _need(DEMO_LLM / "model.safetensors", DEMO_TEXTS)
    model = load_decoder(
        DEMO_LLM, dtype=torch.float32, attention="sdpa", layers=layers, keep_token_embedding=True
    )
    tokenizer = AutoTokenizer.from_pretrained(DEMO_LLM, local_files_only=True)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return ItemEncoder(model, tokenizer, None, 64)


def _demo_texts(context: Context) -> list[str]:
    from hsft.data.item_text import read_item_texts

    prompt = "Compress the following sentence into embedding: "
    texts = read_item_texts(DEMO_TEXTS, ("title", "tag", "description"), prompt).texts
    return list(texts[:24] if context.quick else texts[::4])


def _items_setup(context: Context) -> tuple[Any, list[str], int, str]:
    encoder = _demo_encoder(1 if context.quick else None)
    texts = _demo_texts(context)
    tokens = sum(len(ids) for ids in encoder.tokenize(texts))
    return encoder, texts, tokens, f"{len(texts)} items, {tokens} tokens without padding"


def items_hsft(context: Context) -> list[Figure]:
    """Encode the demo's items by length within a token budget, their common beginning once."""
    from hsft.encoding.item_llm import length_batches
    from hsft.encoding.tokens import tokenize_in_memory
    from hsft.inputs.cache_items import BATCH_TOKENS

    encoder, texts, tokens, note = _items_setup(context)

    def run() -> None:
        ids = tokenize_in_memory(encoder.tokenize, texts)
        encoder.share_prefix(ids.common_prefix())
        for rows in length_batches(ids.lengths, BATCH_TOKENS["cpu"]):
            encoder.encode([ids[int(row)] for row in rows])

    return [Figure("item encoding", "tokens/s", context.rates(run, tokens), note)]


def items_naive(context: Context, fixed_width: bool = False) -> list[Figure]:
    """Encode the demo's items 64 at a time in file order, padded to the longest of each batch."""
    encoder, texts, tokens, note = _items_setup(context)

    def run() -> None:
        naive.encode_texts(encoder.model, encoder.tokenizer, texts, 64, fixed_width=fixed_width)

    return [Figure("item encoding", "tokens/s", context.rates(run, tokens), note)]


# --- train --------------------------------------------------------------------------------------

TRAIN_LENGTH = 50
TRAIN_BATCH = 16


def _demo_decoder(seed: int) -> Any:
    from hsft.model.backbone import LoraSettings, add_lora, load_decoder

    _need(DEMO_LLM / "model.safetensors", DEMO_INTERACTIONS, DEMO_CACHE)
    torch.manual_seed(seed)
    lora = LoraSettings(
        rank=8,
        alpha=16,
        dropout=0.0,
        target_modules=("q_proj", "v_proj"),
        quant_type="none",
        compute_dtype=torch.float32,
        double_quant=False,
    )
    decoder = load_decoder(
        DEMO_LLM,
        dtype=torch.float32,
        attention="sdpa",
        layers=2,
        lora=lora,
        device=torch.device("cpu"),
    )
    return add_lora(decoder, lora, False).train()


def train_hsft(context: Context) -> list[Figure]:
    """Train the demo's UserLLM (2 layers of SmolLM2) on HSFT's batches."""
    from hsft.model.user_llm import UserLLM

    decoder = _demo_decoder(context.seed)
    cache = open_cache(DEMO_CACHE)
    split = leave_one_out(read_interactions(DEMO_INTERACTIONS))
    table = ItemTable(table_from_cache(cache, split.interactions.item_ids))
    settings = LossSettings("bce", "in_batch", 0.99, 1 << 28, "dot")
    model = Recommender(UserLLM(decoder, table), settings)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    data = CachedEmbeddingTrainDataset(split, TRAIN_LENGTH)
    collate = TrainCollate(data, seed=context.seed)
    batches = _train_batches(context, len(data))
    tokens = sum(int(data.lengths[rows].sum()) for rows in batches)

    def run() -> None:
        for rows in batches:
            loss = model(collate(rows))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    positions = int(sum(collate(rows).loss_mask.sum() for rows in batches))
    return _train_figures(context, run, tokens, positions, len(batches))


def train_naive(context: Context) -> list[Figure]:
    """Train the same model on fixed-length batches, one position a sequence."""
    decoder = _demo_decoder(context.seed)
    native = open_cache(DEMO_CACHE)
    cache = dict(zip(native.item_ids, native.embeddings.unbind(), strict=True))
    data = naive.TrainDataset(naive.load_tuned(DEMO_INTERACTIONS), cache, TRAIN_LENGTH)
    optimizer = torch.optim.AdamW([p for p in decoder.parameters() if p.requires_grad], lr=1e-4)
    batches = _train_batches(context, len(data))
    tokens = sum(len(data.samples[int(row)][1]) - 1 for rows in batches for row in rows)

    def run() -> None:
        for rows in batches:
            batch = naive.collate_train([data[int(row)] for row in rows])
            naive.train_step(decoder, batch, optimizer)

    return _train_figures(context, run, tokens, TRAIN_BATCH * len(batches), len(batches))


def _train_batches(context: Context, samples: int) -> list[np.ndarray]:
    order = np.random.default_rng(context.seed).permutation(samples)
    count = 1 if context.quick else 12
    return list(order[: count * TRAIN_BATCH].reshape(count, TRAIN_BATCH))


def _train_figures(
    context: Context, run: Callable[[], None], tokens: int, positions: int, batches: int
) -> list[Figure]:
    seconds = context.seconds(run)
    note = f"{batches} batches of {TRAIN_BATCH} x {TRAIN_LENGTH}, {tokens} items without padding"
    return [
        Figure("training, items read", "tokens/s", [tokens / s for s in seconds], note),
        Figure(
            "training, positions trained", "positions/s", [positions / s for s in seconds], note
        ),
    ]


# --- rank ---------------------------------------------------------------------------------------


class LastItem(SequenceEncoder):
    """A user is the last item: leaves only the ranking to be measured."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.items = ItemTable(table)

    def forward(self, history: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the items' own vectors: int64 [B, T] -> float32 [B, T, D]."""
        return self.items(history)


def last_item_scorer(table: Tensor) -> Recommender:
    """Return a recommender that scores by the cosine to the last item, from a half-precision table."""
    settings = LossSettings("nce", "in_batch", 0.99, 1 << 28, "cosine")
    return Recommender(LastItem(table), settings).eval()


def _rank_dims(context: Context) -> tuple[int, ...]:
    return (context.size.dim,) if context.quick else (context.size.dim, 128)


def _rank_users(context: Context, side: str, users: int) -> int:
    most = {"hsft": 1024, "bare": 1024, "naive": 32}[side]
    return min(users, 40 if context.quick else most)


def rank_case(dim: int, items: int) -> str:
    """Name a ranking measurement."""
    return f"full ranking, {items:,} items, D {dim}"


def rank_hsft(context: Context) -> list[Figure]:
    """Rank users' targets among all items with HSFT's evaluator."""
    split = leave_one_out(read_interactions(context.csv))
    figures = []
    for dim in _rank_dims(context):
        cache = _cache_of_dim(context, split, dim)
        scorer = last_item_scorer(table_from_cache(cache, split.interactions.item_ids))
        count = _rank_users(context, "hsft", split.interactions.num_users)
        evaluator = some_users(split, count)
        evaluation = evaluator.run(scorer, torch.device("cpu"))
        naive_count = _rank_users(context, "naive", split.interactions.num_users)
        context.extra[f"ranks, D {dim}"] = evaluation.ranks[:naive_count].tolist()

        def run(evaluator: Evaluator = evaluator, scorer: Recommender = scorer) -> None:
            evaluator.run(scorer, torch.device("cpu"))

        case = rank_case(dim, split.interactions.num_items)
        figures.append(Figure(case, "users/s", context.rates(run, count), f"{count} users"))
    return figures


def some_users(split: Split, count: int, batch_size: int = 256) -> Evaluator:
    """Return an evaluator of the first `count` test users, HSFT's default protocol."""
    dataset = CachedEmbeddingEvalDataset(split, "test", 50)
    segments = dataset.segments
    dataset.segments = type(segments)(
        segments.users[:count], segments.starts[:count], segments.ends[:count]
    )
    protocol = EvalProtocol("full", (5, 10, 20), ("Recall", "NDCG"))
    return Evaluator(dataset, protocol, batch_size=batch_size)


def _cache_of_dim(context: Context, split: Split, dim: int) -> ItemCache:
    if dim == context.size.dim:
        return open_cache(native_cache_path(context))
    ids = [str(item) for item in split.interactions.item_ids[1:]]
    return ItemCache(ids, synthetic.random_embeddings(len(ids), dim, context.seed))


def rank_naive(context: Context) -> list[Figure]:
    """Rank users' targets one user at a time."""
    histories = naive.load_tuned(context.csv)
    split = leave_one_out(read_interactions(context.csv))
    figures = []
    for dim in _rank_dims(context):
        native = _cache_of_dim(context, split, dim)
        cache = dict(zip(native.item_ids, native.embeddings.unbind(), strict=True))
        matrix = naive.item_matrix(cache, histories.items)
        data = naive.EvalDataset(histories, cache, 50)
        # The same users in the same order as HSFT's first ones.
        order = [str(user) for user in split.interactions.user_ids]
        data.histories = [histories.full[user] for user in order if len(histories.full[user]) >= 2]
        users = range(_rank_users(context, "naive", len(data)))

        def vector(history: Tensor, length: int) -> Tensor:
            return F.normalize(history[length - 1], dim=-1)

        def run(data: Any = data, matrix: Tensor = matrix, users: Any = users) -> list[int]:
            return naive.rank_users(data, users, matrix, vector)

        context.extra[f"ranks, D {dim}"] = run()
        case = rank_case(dim, len(histories.items))
        rates = context.rates(run, len(users))
        figures.append(Figure(case, "users/s", rates, f"{len(users)} users"))
    return figures


def rank_bare(context: Context) -> list[Figure]:
    """Time `torch.topk(U @ V.T)` on float32 vectors that are ready: the least that ranking takes."""
    split = leave_one_out(read_interactions(context.csv))
    items = split.interactions.num_items
    figures = []
    for dim in _rank_dims(context):
        generator = torch.Generator().manual_seed(context.seed)
        vectors = normalize(synthetic.random_embeddings(items, dim, context.seed))
        count = _rank_users(context, "bare", split.interactions.num_users)
        users = normalize(torch.randn(count, dim, generator=generator))

        def run(users: Tensor = users, vectors: Tensor = vectors) -> None:
            for start in range(0, len(users), 256):
                torch.topk(users[start : start + 256] @ vectors.T, min(TOPK, len(vectors)))

        with torch.inference_mode():
            figures.append(
                Figure(
                    rank_case(dim, items), "users/s", context.rates(run, count), f"{count} users"
                )
            )
    return figures


# --- rank memory --------------------------------------------------------------------------------


def memory_hsft(context: Context) -> list[Figure]:
    """Measure what an evaluation adds to memory at several catalogue sizes, the table not counted."""
    figures = []
    # Users enough to fill the budget at the smallest catalogue.
    dim, users = (32, 64) if context.quick else (128, 3500)
    for items in (200, 400) if context.quick else (20_000, 96_282, 400_000):
        split = leave_one_out(_random_histories(users, items, context.seed))
        scorer = last_item_scorer(synthetic.random_embeddings(items + 1, dim, context.seed))
        # Tried once before, so that what libraries allocate for good is not counted.
        some_users(split, 8).run(scorer, torch.device("cpu"))
        evaluator = some_users(split, users)
        with _peak() as added:
            evaluator.run(scorer, torch.device("cpu"))
        figures.append(
            Figure(
                f"memory added by full ranking, {items:,} items, D {dim}",
                "MB",
                [added[0]],
                f"{users} users; the item table itself takes {(items + 1) * dim * 2 / 1e6:,.0f} MB",
            )
        )
    return figures


def _random_histories(users: int, items: int, seed: int) -> Interactions:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 60, size=users)
    return Interactions(
        user_ids=np.arange(users).astype(str).astype(object),
        item_ids=np.array(["[PAD]", *map(str, range(items))], dtype=object),
        items=rng.integers(1, items + 1, size=lengths.sum()).astype(np.int32),
        timestamps=np.arange(lengths.sum()),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
    )


@contextlib.contextmanager
def _peak() -> Iterator[list[float]]:
    """Give a list whose one entry becomes the block's peak memory above its beginning, in MB."""
    reset = Path("/proc/self/clear_refs")
    try:
        # 5 resets the high-water mark of resident memory (proc(5)).
        reset.write_text("5")
    except OSError as error:
        raise Skipped("/proc/self/clear_refs cannot be written") from error
    before = _status("VmRSS")
    grown = [0.0]
    yield grown
    grown[0] = (_status("VmHWM") - before) * 1024 / 1e6


def peak_rss_mb() -> float:
    """Return this process's peak resident memory in MB."""
    if Path("/proc/self/status").is_file():
        # Not ru_maxrss: on Linux a new process inherits the peak of the one that started it.
        return _status("VmHWM") * 1024 / 1e6
    # ru_maxrss is in KiB, but in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise Skipped(f"/proc/self/status has no {name}")


def _need(*files: Path) -> None:
    for file in files:
        if not file.is_file():
            raise Skipped(f"{file.relative_to(ROOT)} is not there; make demo prepares it")


Side = Callable[[Context], list[Figure]]
STAGES: dict[str, dict[str, Side]] = {
    "load": {"hsft": load_hsft, "naive": load_naive, "tuned pandas": load_tuned},
    "cache": {"hsft": cache_hsft, "naive": cache_naive},
    "collate": {"hsft": collate_hsft, "naive": collate_naive},
    "items": {
        "hsft": items_hsft,
        "naive": items_naive,
        "naive, width 64": lambda context: items_naive(context, fixed_width=True),
    },
    "train": {"hsft": train_hsft, "naive": train_naive},
    "rank": {"hsft": rank_hsft, "naive": rank_naive, "topk(U @ V.T)": rank_bare},
    "memory": {"hsft": memory_hsft},
}
# Stages that read the naive cache file: a second copy of all embeddings, made when one is chosen.
SYNTHETIC_STAGES = tuple(itertools.filterfalse({"items", "train", "memory"}.__contains__, STAGES))
