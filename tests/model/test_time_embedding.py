"""`use_timestamps`: the UserLLM reads when items were interacted with."""

from __future__ import annotations

import json
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import hsft
from cold_start import main as cold_start_main
from compare import main as compare_main
from export import main as export_main
from hsft.data.cache import save_cache
from hsft.data.dataset import TrainCollate
from hsft.data.dataset.packing import Buckets
from hsft.data.dataset.trainset import CachedEmbeddingTrainDataset
from hsft.data.time_fields import FIELD_SIZES, item_times
from hsft.finished.open_run import open_run
from hsft.model.attention import VARLEN
from hsft.model.backbone import load_decoder
from hsft.model.time_embedding import TimeEmbedding
from hsft.report.result import read_ranks, read_result
from hsft.run.setup import build_user_llm, load_data
from hsft.trainer import loop
from hsft.trainer.fabric import make_fabric
from hsft.trainer.micro_batch import split_batch, unpack
from recommend import main as recommend_main
from report import main as report_main
from tests.conftest import Project
from tests.training_runs import at_step, send

DAY = 86_400
USERS = 40
TRAIN = (
    *("--epochs", "1", "--use_qlora", "False", "--negatives", "catalogue"),
    *("--optim_args.learning_rate", "5e-3", "--eval_baseline", "False"),
)
TIMES = ("--use_timestamps", "True")


def write_weekdays(root: Path, *, in_milliseconds: bool = False) -> None:
    """Write data in which an item of day d is taken on that day of the week, at irregular gaps.

    Items 10 d .. 10 d + 9 belong to day d; a user takes no item twice.
    """
    rng = np.random.default_rng(0)
    start = int(datetime(2020, 1, 6, tzinfo=UTC).timestamp())
    rows = ["item_id,user_id,timestamp"]
    for user in range(USERS):
        day = int(rng.integers(0, 300))
        left = {weekday: list(rng.permutation(10)) for weekday in range(7)}
        for _ in range(10):
            day += int(rng.integers(1, 14))
            time = (start + day * DAY + int(rng.integers(0, DAY))) * (
                1000 if in_milliseconds else 1
            )
            rows.append(f"i{10 * (day % 7) + left[day % 7].pop()},u{user},{time}")
    (root / "dataset/tiny.csv").write_text("\n".join(rows) + "\n")
    generator = torch.Generator().manual_seed(0)
    days = torch.randn(7, 64, generator=generator).repeat_interleave(10, dim=0)
    # Small, so that a few steps make the times heard beside them.
    vectors = 0.1 * (days + torch.randn(70, 64, generator=generator))
    path = root / "dataset/tiny_item_embeddings.safetensors"
    save_cache(path, [f"i{n}" for n in range(70)], vectors, {})


def test_fields_are_embedded_as_their_sum_and_begin_at_zero() -> None:
    embedding = TimeEmbedding(3, of_next=True)
    fields = torch.tensor([[[50, 3, 30, 6, 23, 33] * 2, [0] * 12]], dtype=torch.uint8)
    assert embedding(fields).abs().max() == 0
    table = np.random.default_rng(0).normal(size=(2 * sum(FIELD_SIZES), 3))
    with torch.no_grad():
        embedding.weight.copy_(torch.from_numpy(table))
    expected = np.zeros((1, 2, 3))
    for position in range(2):
        for number, value in enumerate(fields[0, position].tolist()):
            before = sum((FIELD_SIZES * 2)[:number])
            expected[0, position] += table[before + value]
    np.testing.assert_allclose(embedding(fields).detach().numpy(), expected, atol=1e-5)
    embedding(fields).sum().backward()
    assert embedding.weight.grad is not None
    # Every field of every position has one vector with a gradient.
    assert embedding.weight.grad[:, 0].sum() == 2 * 12


@pytest.mark.usefixtures("emulated_varlen")
def test_packed_and_split_batches_have_the_gradients_of_padded_ones(project: Project) -> None:
    write_weekdays(project.root)
    config = hsft.load_config(
        model="HLLM", dataset="tiny", user_pretrain_dir=str(project.llama), precision="32-true",
        use_timestamps=True, predict_at="target", negatives="catalogue", device="cpu",
        MAX_ITEM_LIST_LENGTH=8, fix_temp=True,
    )  # fmt: skip
    data = load_data(config, need_cache=True)
    model = build_user_llm(config, data, make_fabric(config), train=True).eval()
    embedding = model.encoder.times
    assert isinstance(embedding, TimeEmbedding)
    with torch.no_grad():
        embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    sequences = CachedEmbeddingTrainDataset(data.split, 8, item_times(config, data.interactions))
    numbers = np.arange(6)
    padded = TrainCollate(sequences)(numbers)
    packed = TrainCollate(sequences, row_length=16, pack_below=2)(numbers)
    assert len(packed.history) < len(padded.history)
    parts = split_batch(packed, 2, model.settings)
    assert unpack(packed).times.shape == padded.times.shape
    results = []
    # The last is in one row and padded to a bucket, as batches of CUDA graphs are.
    row = TrainCollate(sequences, single_row=True, buckets=Buckets(16, 7, 8))(numbers)
    batches_of = [[(padded, 1.0)], [(packed, 1.0)], [(p.batch, p.weight) for p in parts]]
    for batches in (*batches_of, [(row, 1.0)]):
        if batches[0][0] is row:
            model.encoder.decoder = load_decoder(
                project.llama, dtype=torch.float32, attention=VARLEN
            ).eval()
        model.zero_grad()
        losses = [model(batch) * weight for batch, weight in batches]
        sum(losses).backward()
        assert embedding.weight.grad is not None
        results.append((sum(losses).item(), embedding.weight.grad.clone()))
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="times are given to a model that reads them"):
        model.user_vectors(padded.history, torch.full((6,), 7))


def test_the_time_of_the_target_is_worth_something_and_only_where_given(project: Project) -> None:
    write_weekdays(project.root, in_milliseconds=True)
    recall = {}
    for name, more in {
        "without": (),
        "unknown": TIMES,
        "target": (*TIMES, "--predict_at", "target"),
    }.items():
        code, _, err = project.run(*TRAIN, *more, "--epochs", "12", "--run_name", name)
        assert code == 0, err
        result = json.loads(Path(f"saved/{name}/result.json").read_text())
        recall[name] = result["rows"][-1]["metrics"]["Recall@10"]
    # Without the day of the request one in seven is a matter of luck.
    assert recall["target"] > 0.6
    assert max(recall["without"], recall["unknown"]) < 0.4
    # The run is opened as it was scored, and what it recommends is what it ranked.
    run = open_run("saved/target")
    segments = run.data.split.eval_segments("test")
    items, seconds = run.data.interactions.items, run.data.interactions.timestamps // 1000
    ranges = list(zip(segments.starts, segments.ends, strict=True))
    best = run.recommend(
        run.build("fine-tuned"),
        [items[start : end - 1] for start, end in ranges],
        5,
        times=[seconds[start:end] for start, end in ranges],
    )
    _, ranks = read_ranks("saved/target", "fine-tuned")
    for row, (_, end) in enumerate(ranges):
        if ranks[row] <= 5:
            assert best.items[row, ranks[row] - 1] == items[end - 1]
    assert (ranks <= 5).any()
    # A Monday and a Saturday, in the data's unit and as a date.
    monday = int(datetime(2021, 3, 1, 12, tzinfo=UTC).timestamp()) * 1000
    ids = run.data.interactions.item_ids
    for at, weekday in ((str(monday), 0), ("2021-03-06T12:00", 5)):
        argv = [
            "--run",
            "saved/target",
            "--user",
            "u3",
            "--predict_at",
            at,
            "--topk",
            "3",
            "--json",
        ]
        code, out, err = project.call(recommend_main, argv)
        assert code == 0, err
        listed = [entry["item_id"] for entry in json.loads(out)["recommendations"]]
        assert sum(int(item[1:]) // 10 == weekday for item in listed) >= 2
        assert set(listed) <= set(ids)
    # Seconds among milliseconds are 1970, as are the digits of a date.
    for at in (str(monday // 1000), "20210301", "1970-01-01", "2150-01-01"):
        code, out, err = project.call(recommend_main, [*argv[:-5], "--predict_at", at])
        assert (code, out) == (2, "")
        assert f"--predict_at '{at}' is no time of 1990 to 2099; write a date" in err
    frame = hsft.open_run("saved/target").recommend(user="u3", predict_at=monday, topk=3)
    assert len(frame) == 3
    code, _, err = project.call(
        report_main, ["saved/unknown", "saved/target", "--out", "page.html", "--examples", "2"]
    )
    assert code == 0, err
    page = Path("page.html").read_text()
    code, out, err = project.call(compare_main, ["saved/unknown", "saved/target"])
    assert code == 0, err
    told = "target is told the time of the held-out item (predict_at: target), and the others"
    assert f"\n{told} are not: that is another task" in out
    assert told in page
    code, out, err = project.call(compare_main, ["saved/unknown"])
    assert code == 0, err
    assert "another task" not in out
    assert "ranks computed now differ" not in page
    assert page.count("Rank of the held-out item: ") == 4


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_a_stopped_run_goes_on_with_its_time_embedding(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weekdays(project.root)
    more = (*TIMES, "--predict_at", "target", "--epochs", "2", "--run_name")
    assert project.run(*TRAIN, *more, "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(3, send(signal.SIGTERM)))
        assert project.run(*TRAIN, *more, "stopped")[0] == 143
    # The same items in the same order, at other times.
    path = project.root / "dataset" / "tiny.csv"
    text = path.read_text()
    head, *rows = [line.rsplit(",", 1) for line in text.splitlines()]
    later = [",".join(head), *(f"{row},{int(time) + 86_400}" for row, time in rows)]
    path.write_text("\n".join(later) + "\n")
    code, _, err = project.run(*TRAIN, *more, "stopped", "--auto_resume", "True")
    assert code == 2
    assert "was trained on other data" in err
    path.write_text(text)
    code, _, err = project.run(*TRAIN, *more, "stopped", "--auto_resume", "True")
    assert code == 0, err
    results = [read_result(f"saved/{name}") for name in ("whole", "stopped")]
    whole, again = ([row["metrics"] for row in result["rows"]] for result in results)
    assert whole == again
    whole, again = (
        load_file(f"saved/{run}/best/trained.safetensors") for run in ("whole", "stopped")
    )
    assert whole["encoder.times.weight"].abs().max() > 0
    assert torch.equal(whole["encoder.times.weight"], again["encoder.times.weight"])


def test_what_has_no_times_is_refused(project: Project) -> None:
    code, _, err = project.run(*TRAIN, *TIMES, "--run_name", "run")
    assert code == 2
    assert "the timestamps of tiny are no dates" in err
    write_weekdays(project.root)
    for more, sentence in {
        (
            *TIMES,
            "--model",
            "sasrec",
        ): "use_timestamps belongs to models HLLM, hstu, llm_id, not to sasrec",
        (*TIMES, "--val_only", "True"): "use_timestamps adds what is trained",
        ("--predict_at", "target"): "predict_at needs use_timestamps: True",
    }.items():
        code, _, err = project.run(*more)
        assert code == 2
        assert sentence in err
    code, out, err = project.run(*TRAIN, *TIMES, "--epochs", "1", "--run_name", "run")
    assert code == 0, err
    assert out.endswith("--run saved/run --user ID\n")
    assert project.run("--model", "pop", "--run_name", "pop")[0] == 0
    run = ["--run", "saved/run"]
    for program, argv, sentence in (
        (export_main, run, "saved/run was trained with use_timestamps"),
        (recommend_main, [*run, "--history", "i1,i2"], "so a history needs the times of its items"),
        (recommend_main, [*run, "--user", "u1", "--predict_at", "2020-01-01"], "has no meaning"),
        (
            recommend_main,
            [*run, "--history", "i1", "--predict_at", "2020-01-01"],
            "--predict_at has no meaning with --history",
        ),
    ):
        code, out, err = project.call(program, argv)
        assert (code, out) == (2, ""), err
        assert sentence in err
    code, _, err = project.run("--model", "ensemble", "--runs", "saved/run", "saved/pop")
    assert code == 2
    assert "saved/run reads timestamps, which an ensemble does not hand on" in err


def test_cold_items_are_ranked_with_their_times(project: Project) -> None:
    write_weekdays(project.root)
    lines = (project.root / "dataset/tiny.csv").read_text().splitlines()
    cold = tuple(f"i{10 * weekday + 9}," for weekday in range(7))
    warm = [line for line in lines if not line.startswith(cold)]
    (project.root / "dataset/warm.csv").write_text("\n".join(warm) + "\n")
    cache = ("--item_cache_path", "dataset/tiny_item_embeddings.safetensors")
    more = (*TIMES, "--predict_at", "target", "--run_name", "run")
    assert project.run(*TRAIN, *more, "--dataset", "warm", *cache)[0] == 0
    argv = ["--run", "saved/run", "--dataset", "tiny", *cache]
    code, out, err = project.call(cold_start_main, argv)
    assert code == 0, err
    # Among all items and among the seven cold ones.
    assert out.count("fine-tuned") == 2
