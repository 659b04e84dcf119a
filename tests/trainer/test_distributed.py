"""Several processes: the loss, the order of samples, and real torchrun launches on the CPU (gloo)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hsft.data.dataset import TrainBatch
from hsft.model import recommender
from hsft.model.item_table import ItemTable
from hsft.model.proposal import Proposal
from hsft.model.recommender import LossSettings, Recommender, SequenceEncoder
from hsft.utils.program import run_program
from item_caching import main as cache_main
from main import main
from tests.conftest import last_wins
from tests.helpers import ROOT, free_port, make_cache, make_dataset

# --- the loss, with the other process played by a second pass in this one


class Toy(SequenceEncoder):
    """A trainable map of item vectors, each position for itself."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.items = ItemTable(torch.randn(13, 6, generator=generator), "linear")
        self.map = torch.nn.Linear(6, 6)

    def forward(self, history: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.map(self.items(history))


def toy(settings: LossSettings) -> Recommender:
    torch.manual_seed(1)
    model = Recommender(Toy(), settings)
    with torch.no_grad():
        model.encoder.items.adapter.weight.normal_(std=0.3)  # type: ignore[union-attr, operator]
    return model


def make_batch(rows: int) -> TrainBatch:
    generator = torch.Generator().manual_seed(2)
    # Every second row is short, and so is every second process's share.
    lengths = torch.tensor([5, 1, 4, 2, 5, 1, 3])[:rows]
    mask = torch.arange(5) < lengths[:, None]
    draw = [torch.randint(1, 13, (rows, n), generator=generator) for n in (5, 5, 3)]
    return TrainBatch(draw[0] * mask, mask, draw[1] * mask, mask, draw[2])


def share(batch: TrainBatch, rank: int, size: int) -> TrainBatch:
    return TrainBatch(*(part[rank::size] for part in batch))


@contextmanager
def playing(ids: Tensor | None, all_reduce: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Make the loss one of two processes, which receive `ids` and what `all_reduce` returns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recommender, "world_size", lambda: 2)
        patch.setattr(recommender, "all_reduce", all_reduce)
        patch.setattr(recommender, "all_gather_ids", lambda sent: sent if ids is None else ids)
        yield


def both_ranks(
    settings: LossSettings, batch: TrainBatch
) -> list[tuple[float, dict[str, Tensor], list[int]]]:
    """Loss, gradients and counts of negatives in each of two processes.

    A first pass notes what a process would send, a second one gets what both would receive.
    """
    parts = [share(batch, rank, 2) for rank in range(2)]
    sampled = settings.negatives == "sampled"
    ids = torch.cat([p.negatives.reshape(-1) if sampled else p.targets[p.loss_mask] for p in parts])
    sent: list[Tensor] = []

    def note(values: Tensor) -> Tensor:
        sent.append(values)
        return values

    with playing(ids, note):
        for part in parts:
            toy(settings)(part)
    summed = sent[0] + sent[1]
    actual = []
    with playing(ids, lambda values: summed):
        for part in parts:
            model = toy(settings)
            loss = model(part)
            loss.backward()
            counts = model.take_negative_counts().tolist()
            actual.append((loss.item(), gradients(model), counts))
    return actual


def gradients(model: Recommender) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


LOSSES = [
    ("nce", "in_batch", "cosine"),
    ("nce", "sampled", "cosine"),
    ("nce", "catalogue", "cosine"),
    ("nce", "catalogue", "dot"),
    ("bce", "in_batch", "dot"),
    ("bce", "sampled", "dot"),
]


@pytest.mark.parametrize(("loss", "negatives", "similarity"), LOSSES)
def test_two_processes_have_the_loss_and_gradients_of_one(
    loss: Any, negatives: Any, similarity: Any
) -> None:
    settings = LossSettings(loss, negatives, 0.99, 1 << 20, similarity)
    batch = make_batch(7)
    counts = [int(share(batch, rank, 2).loss_mask.sum()) for rank in range(2)]
    assert counts[0] != counts[1]
    model = toy(settings)
    whole = model(batch)
    whole.backward()
    expected = gradients(model)
    assert any("adapter" in name for name in expected)
    (first, one, counted), (second, two, counted_too) = both_ranks(settings, batch)
    assert first == second == pytest.approx(whole.item(), rel=1e-5)
    assert counted == counted_too == model.take_negative_counts().tolist()
    for name, value in expected.items():
        # What DDP does: the average over processes.
        torch.testing.assert_close((one[name] + two[name]) / 2, value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("loss", "negatives", "similarity"), LOSSES)
def test_processes_weigh_the_same_where_batches_do(
    loss: Any, negatives: Any, similarity: Any
) -> None:
    settings = LossSettings(loss, negatives, 0.99, 1 << 20, similarity, mean="batches")
    batch = make_batch(7)
    (first, one, _), (second, two, _) = both_ranks(settings, batch)
    parts = [share(batch, rank, 2) for rank in range(2)]
    sampled = negatives == "sampled"
    ids = torch.cat([p.negatives.reshape(-1) if sampled else p.targets[p.loss_mask] for p in parts])
    means, alone = [], []
    # Each process's own mean, with the candidates of both.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recommender, "all_gather_ids", lambda sent: ids)
        for part in parts:
            model = toy(settings)
            value = model(part)
            value.backward()
            means.append(value.item())
            alone.append(gradients(model))
    assert first == second == pytest.approx(sum(means) / 2, rel=1e-5)
    whole = toy(settings)(batch).item()
    assert abs(first - whole) > 1e-4
    for name in one:
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close((one[name] + two[name]) / 2, mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("negatives", ["in_batch", "sampled"])
def test_corrected_negatives_are_one_sample_over_all_processes(negatives: Any) -> None:
    settings = LossSettings("nce", negatives, 1.01, 1 << 20, "cosine")
    batch = make_batch(7)
    parts = [share(batch, rank, 2) for rank in range(2)]
    targets = torch.cat([part.targets[part.loss_mask] for part in parts])
    drawn = torch.cat([part.negatives.reshape(-1) for part in parts])
    shares = np.random.default_rng(0).dirichlet(np.ones(13), size=2)

    def corrected() -> Recommender:
        model = toy(settings)
        model.proposal = Proposal(*shares)
        return model

    def gather(given: Tensor) -> Tensor:
        return drawn if any(given.equal(part.negatives.reshape(-1)) for part in parts) else targets

    whole = corrected()
    loss = whole(batch)
    loss.backward()
    sent: list[Tensor] = []

    def note(values: Tensor) -> Tensor:
        sent.append(values)
        return values

    models = [corrected(), corrected()]
    with pytest.MonkeyPatch.context() as patch, playing(None, note):
        patch.setattr(recommender, "all_gather_ids", gather)
        for part in parts:
            corrected()(part)
        patch.setattr(recommender, "all_reduce", lambda values: sent[0] + sent[1])
        for model, part in zip(models, parts, strict=True):
            value = model(part)
            value.backward()
            assert value.item() == pytest.approx(loss.item(), rel=1e-5)
    one, two = map(gradients, models)
    for name, expected in gradients(whole).items():
        torch.testing.assert_close((one[name] + two[name]) / 2, expected, rtol=1e-4, atol=1e-6)


def test_a_nan_in_one_process_reaches_all() -> None:
    model = toy(LossSettings("nce", "catalogue", 0.99, 1 << 20, "dot"))

    def add_nan(values: Tensor) -> Tensor:
        other = torch.zeros_like(values)
        other[:2] = torch.tensor([torch.nan, 3.0])
        return values + other

    with playing(None, add_nan):
        assert model(make_batch(2)).isnan()


# --- real launches

COMMON = ("--MAX_ITEM_LIST_LENGTH", "8", "--precision", "32-true", "--show_progress", "False")
TRAIN = (
    *("--epochs", "2", "--optim_args.learning_rate", "1e-2", "--qlora_dropout", "0"),
    # Two processes do not draw what one draws.
    *("--eval_baseline", "False", "--negatives", "in_batch"),
)
QLORA = ("--use_qlora", "True", "--item_adapter", "linear", "--gradient_accumulation_steps", "2")
ITEMS = (
    *("--train_item_llm", "lora", "--item_lora_dropout", "0", "--item_chunk_tokens", "64"),
    *("--use_item_cache", "False", "--item_cache_dtype", "float32", "--nce_thres", "1.01"),
    # The tiny Llama's items are nearly alike: larger steps would make ties of rounding.
    *("--item_pretrain_epochs", "1", "--optim_args.learning_rate", "1e-3"),
)
# 31 users and as many sequences: neither 2 processes nor batches of 8 divide them evenly.
RUNS: dict[str, tuple[str, ...]] = {
    "evaluation": ("--val_only", "True"),
    "sampled": ("--val_only", "True", "--eval_protocol", "sampled", "--eval_neg_sample_num", "7"),
    "in_memory": ("--val_only", "True", "--use_item_cache", "False"),
    "qlora": (*TRAIN, *QLORA),
    "bce": (*TRAIN, "--loss", "bce", "--gradient_checkpointing", "True"),
    "catalogue": (*TRAIN, "--use_qlora", "True", "--negatives", "catalogue"),
    "items": (*TRAIN, *QLORA, *ITEMS),
    "sasrec": (*TRAIN, "--model", "sasrec", "--sasrec.dropout", "0"),
    "zero2": (*TRAIN, *QLORA, "--strategy", "deepspeed", "--stage", "2"),
    "zero3": (*TRAIN, *QLORA, "--strategy", "deepspeed", "--stage", "3"),
}
# In two processes alone: with what `negatives: auto` draws.
DRAWN: dict[str, tuple[str, ...]] = {
    f"drawn{suffix}": (*TRAIN, *QLORA, "--negatives", "auto", "--epochs", "1", *more)
    for suffix, more in (("", ()), ("_zero3", ("--strategy", "deepspeed", "--stage", "3")))
}
ALL_RUNS = {**RUNS, **DRAWN}


@dataclass
class Launch:
    """What torchrun left behind: its folder, exit code, output, and the folder of one process."""

    root: Path
    alone: Path
    code: int
    out: str
    err: str


def arguments(llama: Path, run: str, batch: int) -> list[str]:
    return last_wins(
        [
            *("--config_file", f"{ROOT}/code/overall/LLM_ddp.yaml", f"{ROOT}/code/HLLM/HLLM.yaml"),
            *("--dataset", "tiny", "--user_pretrain_dir", str(llama), *COMMON),
            *("--item_pretrain_dir", str(llama), "--num_threads", "1"),
            *("--run_name", run, "--train_batch_size", str(batch)),
            *("--item_pretrain_batch_size", str(5 * batch), *ALL_RUNS[run]),
        ]
    )


def caching(llama: Path, target: str) -> list[str]:
    return [
        *("--dataset", "tiny", "--item_pretrain_dir", str(llama), "--item_cache_path", target),
        *("--item_cache_dtype", "float32", "--item_batch_tokens", "16", "--num_threads", "1"),
        *("--precision", "32-true"),
    ]


def project_folder(root: Path) -> Path:
    make_dataset(root, users=31)
    make_cache(root / "dataset" / "tiny_item_embeddings.safetensors")
    return root


def torchrun(root: Path, commands: list[list[Any]], *more: str) -> subprocess.Popen[str]:
    """Start several_runs.py under torchrun in a folder, its output going to files there."""
    (root / "commands.json").write_text(json.dumps(commands))
    script = str(ROOT / "tests" / "several_runs.py")
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *more, script, "commands.json"],
        cwd=root,
        stdout=(root / "out.txt").open("w"),
        stderr=(root / "err.txt").open("w"),
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def finish(process: subprocess.Popen[str], seconds: float = 400) -> int:
    try:
        return process.wait(timeout=seconds)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Launch:
    """Every run in two processes, one launch for all; the same runs in one process beside them."""
    if sys.platform == "win32":
        pytest.skip("DeepSpeed does not run on Windows")
    root = project_folder(tmp_path_factory.mktemp("two"))
    commands: list[list[Any]] = [
        *(["main", arguments(llama, run, 4)] for run in ALL_RUNS),
        ["item_caching", caching(llama, "cache.safetensors")],
        ["main", ["--dataset", "Nowhere"]],
    ]
    code = finish(torchrun(root, commands, "--standalone", "--nproc_per_node", "2"))
    alone = project_folder(tmp_path_factory.mktemp("one"))
    before = Path.cwd()
    threads = torch.get_num_threads()
    os.chdir(alone)
    try:
        assert run_program(cache_main, caching(llama, "cache.safetensors")) == 0
        for run in RUNS:
            if not run.startswith("zero"):
                assert run_program(main, arguments(llama, run, 8)) == 0
    finally:
        os.chdir(before)
        torch.set_num_threads(threads)
    out, err = ((root / name).read_text() for name in ("out.txt", "err.txt"))
    return Launch(root, alone, code, out, err)


def read(folder: Path, run: str) -> dict[str, Any]:
    return json.loads((folder / "saved" / run / "result.json").read_text())


@pytest.mark.parametrize("run", RUNS)
def test_a_run_in_two_processes_equals_that_in_one(launch: Launch, run: str) -> None:
    reference = "qlora" if run.startswith("zero") else run
    assert (launch.root / "saved" / run / "result.json").is_file(), launch.err[-3000:]
    two, one = read(launch.root, run), read(launch.alone, reference)
    assert two["environment"]["processes"] == 2
    assert one["environment"]["processes"] == 1
    assert [row["users"] for row in two["rows"]] == [31] * len(one["rows"])
    ranks = [
        load_file(folder / "saved" / name / "ranks.safetensors")
        for folder, name in ((launch.root, run), (launch.alone, reference))
    ]
    assert ranks[0].keys() == ranks[1].keys()
    for name, value in ranks[0].items():
        assert torch.equal(value, ranks[1][name]), name
    assert [row["metrics"] for row in two["rows"]] == [row["metrics"] for row in one["rows"]]
    if one["training"] is None:
        return
    assert two["training"]["trainable_weights"] == one["training"]["trainable_weights"]
    histories = [actual["training"]["history"] for actual in (two, one)]
    assert [record["step"] for record in histories[0]] == [r["step"] for r in histories[1]]
    for key in ("loss", "learning_rate"):
        assert [record[key] for record in histories[0]] == pytest.approx(
            [record[key] for record in histories[1]], rel=1e-5
        )
    for path in sorted((launch.alone / "saved" / reference / "best").rglob("*.safetensors")):
        inside = path.relative_to(launch.alone / "saved" / reference)
        other = load_file(launch.root / "saved" / run / inside)
        for name, value in load_file(path).items():
            # AdamW's first steps are as large for a gradient of 1e-7 as for one of 1, so that
            # rounding of a nearly vanishing gradient shows in the weight.
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=2e-3)


def test_items_cached_by_two_processes_are_the_same_file(launch: Launch) -> None:
    two = (launch.root / "cache.safetensors").read_bytes()
    assert two == (launch.alone / "cache.safetensors").read_bytes()
    assert not list(launch.root.glob("*.parts"))


def test_drawn_negatives_of_two_processes(launch: Launch) -> None:
    plain, zero = (read(launch.root, run) for run in DRAWN)
    keys = ("negatives", "num_negatives", "negatives_logq")
    assert [plain["config"][key] for key in keys] == ["sampled", 512, True]
    histories = [actual["training"]["history"] for actual in (plain, zero)]
    assert [record["loss"] for record in histories[0]] == pytest.approx(
        [record["loss"] for record in histories[1]], rel=1e-5
    )
    assert plain["rows"][-1]["metrics"] == zero["rows"][-1]["metrics"]


def test_one_process_writes_and_speaks(launch: Launch) -> None:
    for run in ALL_RUNS:
        folder = launch.root / "saved" / run
        trained = "--val_only" not in ALL_RUNS[run]
        assert len(list(folder.glob("tensorboard/events*"))) == int(trained), run
        lines = (folder / "run.log").read_text().splitlines()
        assert sum("training " in line for line in lines) == int(trained), run
        assert launch.out.count(f"result: saved/{run}/result.json") == 1
    assert sorted(path.name for path in (launch.root / "saved").iterdir()) == sorted(ALL_RUNS)
    assert launch.err.count(" wrote cache.safetensors: 20 items") == 1
    assert launch.err.count("epoch 1: loss") == sum(
        "--val_only" not in run for run in ALL_RUNS.values()
    )


def test_an_error_that_every_process_has_is_said_once(launch: Launch) -> None:
    # torchrun's own exit code is 1, whatever its workers' are.
    assert "built successfully" not in launch.out  # DeepSpeed compiled nothing
    assert launch.code == 1
    assert launch.err.count("error: unknown dataset 'Nowhere'") == 1
    assert "[rank" not in launch.err


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 200
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
def test_a_killed_process_ends_the_run(tmp_path: Path, llama: Path) -> None:
    root = project_folder(tmp_path)
    endless = last_wins(
        [*arguments(llama, "sasrec", 4), "--epochs", "100000", "--stopping_step", "100000"]
    )
    process = torchrun(root, [["main", endless]], "--standalone", "--nproc_per_node", "2")
    wait_for(lambda: "epoch 3: loss" in (root / "err.txt").read_text(), process)
    victim = int((root / "process-1.pid").read_text())
    os.kill(victim, signal.SIGKILL)
    assert finish(process, 60) == 1
    err = (root / "err.txt").read_text()
    assert f"Signal 9 (SIGKILL) received by PID {victim}" in err
    # The other process may have been ended by torchrun before it noticed.
    assert err.count("error: another process of this run has ended") <= 1
    assert "[rank" not in err


def test_two_machines_share_item_caching(tmp_path: Path, llama: Path, launch: Launch) -> None:
    # Two launches stand for two machines. First into a folder that both see under one name, then
    # into one that is another folder for each.
    shared = tmp_path / "shared"
    shared.mkdir()
    commands = [
        ["item_caching", caching(llama, str(shared / "cache.safetensors"))],
        ["item_caching", caching(llama, "cache.safetensors")],
    ]
    where = ("--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}")
    more = ("--nnodes", "2", "--nproc_per_node", "1", "--local_addr", "127.0.0.1", *where)
    roots = [project_folder(tmp_path / f"machine{n}") for n in range(2)]
    processes = [torchrun(root, commands, *more) for root in roots]
    codes = [finish(process) for process in processes]
    errors = [(root / "err.txt").read_text() for root in roots]
    cache = shared / "cache.safetensors"
    assert cache.is_file(), errors
    assert cache.read_bytes() == (launch.alone / "cache.safetensors").read_bytes()
    assert codes == [1, 1]
    assert sum(err.count("is not the one that every process sees") for err in errors) == 1
    assert "[rank" not in "".join(errors)
    assert not any((root / "cache.safetensors").exists() for root in roots)


# --- what is refused


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--model", "sasrec", "--stage", "3"), "use --stage 2 or --strategy ddp"),
        (("--model", "sasrec", "--device", "cuda"), "torch finds no CUDA device"),
    ],
)
def test_deepspeed_refuses_what_it_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], words: str
) -> None:
    if "cuda" in more and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    project_folder(tmp_path)
    fixed = ["--dataset", "tiny", "--data_path", str(tmp_path / "dataset")]
    code = run_program(main, [*fixed, "--strategy", "deepspeed", *more])
    assert code == 2
    assert words in capsys.readouterr().err
