"""The global split by time: who is trained and scored on what, by hand, and in runs of the programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from cold_start import main as cold_start_main
from compare import main as compare_main
from hsft.config import load_config
from hsft.config.loader import parse_command_line
from hsft.data.dataset import CachedEmbeddingEvalDataset, CachedEmbeddingTrainDataset
from hsft.data.interactions import Interactions, load_interactions, read_interactions
from hsft.data.negatives import NegativeSampler
from hsft.data.split import (
    Phase,
    Split,
    TimeCuts,
    global_time,
    leave_one_out,
    make_split,
    time_cuts,
    train_item_counts,
)
from hsft.evaluator.evaluator import EvalProtocol
from hsft.evaluator.fingerprint import differing_parts, evaluation_fingerprint
from hsft.finished.open_run import open_run
from hsft.report.result import read_ranks, read_result
from hsft.trainer import loop
from hsft.utils.errors import InputError
from recommend import main as recommend_main
from report import main as report_main
from tests.bad_input import CSV, expect_refusal
from tests.conftest import Project
from tests.training_runs import Crash, at_step, crash

HEADER = "item_id,user_id,timestamp"
# u6 comes first, so that e, which is first seen late, has the lowest number.
HISTORIES = {
    "u6": "e88 a99",
    "u1": "a10 b20 c60 e90 d95",
    "u2": "b15 d30 a70 c85",
    "u3": "c40",
    "u4": "a82 b92",
    "u5": "d60 a65 b85",
}
CUTS = TimeCuts(valid=50, test=80)


def write(path: Path, histories: dict[str, str]) -> Path:
    rows = [
        f"{event[0]},{user},{event[1:]}"
        for user, events in histories.items()
        for event in events.split()
    ]
    path.write_text("\n".join([HEADER, *rows, ""]))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Interactions:
    return read_interactions(write(tmp_path / "data.csv", HISTORIES))


def evaluated(split: Split, phase: Phase) -> dict[str, str]:
    """User -> history and target, as in `HISTORIES` without the times."""
    dataset = CachedEmbeddingEvalDataset(split, phase, 9)
    ids = split.interactions.item_ids
    return {
        str(split.interactions.user_ids[user]): "".join(ids[dataset[row]])
        for row, user in enumerate(dataset.segments.users)
    }


def trained(split: Split) -> dict[str, str]:
    dataset = CachedEmbeddingTrainDataset(split, 9)
    ids = split.interactions.item_ids
    return {dataset.users_of([row])[0]: "".join(ids[dataset[row]]) for row in range(len(dataset))}


def test_what_is_first_seen_later_is_left_out(data: Interactions) -> None:
    split = global_time(data, CUTS)
    assert split.interactions.item_ids.tolist() == ["[PAD]", "a", "b", "c", "d"]
    assert trained(split) == {"u1": "ab", "u2": "bd"}
    assert evaluated(split, "valid") == {"u1": "abc", "u2": "bda"}
    assert evaluated(split, "test") == {"u1": "abcd", "u2": "bdac", "u5": "dab"}
    assert train_item_counts(split).tolist() == [0, 1, 2, 1, 1]
    assert split.too_short == {"train": 4, "valid": 4, "test": 3}
    assert split.held_out.tolist() == [1, 2, 2, 0, 2, 3]
    time = split.time
    assert time is not None
    assert time.interactions == {"train": 5, "valid": 4, "test": 8}
    assert (time.active_users, time.new_users) == ({"valid": 3, "test": 5}, {"valid": 1, "test": 2})
    assert time.scored_users == {"valid": 2, "test": 3}
    assert (time.cold_items, time.cold_interactions) == (1, 2)
    assert time.sentences() == [
        "split: global_time: training before 50, 5 interactions (29.4%); validation from then until "
        "80, 4 interactions (23.5%); test from then on, 8 interactions (47.1%).",
        "valid: 2 of 3 users with an interaction in the period are scored; users first seen in it: 1.",
        "test: 3 of 5 users with an interaction in the period are scored; users first seen in it: 2.",
        "items first seen after training: 1, left out with their 2 interactions.",
    ]


def test_what_is_first_seen_later_is_ranked(data: Interactions) -> None:
    split = global_time(data, CUTS, "rank")
    # e has the last number: negatives are drawn from the items before it.
    assert split.interactions.item_ids.tolist() == ["[PAD]", "a", "b", "c", "d", "e"]
    assert split.train_items == 4
    assert trained(split) == {"u1": "ab", "u2": "bd"}
    # Who is first seen in a period is scored on the second item in it.
    assert evaluated(split, "valid") == {"u1": "abc", "u2": "bda", "u5": "da"}
    assert evaluated(split, "test") == {
        "u6": "ea",
        "u1": "abce",
        "u2": "bdac",
        "u4": "ab",
        "u5": "dab",
    }
    assert split.time is not None
    assert split.time.cold_targets == {"valid": 0, "test": 1}
    assert "4 of 5" not in split.time.sentences()[2]
    assert split.time.sentences()[2].startswith(
        "test: 5 of 5 users with an interaction in the period are scored, 1 of them on an item that "
        "training has not seen; users first seen in it: 2"
    )
    sampler = NegativeSampler(split.interactions, held_out=split.held_out, items=split.train_items)
    users = np.arange(6)
    assert sampler.available.tolist() == [4, 2, 2, 3, 4, 4]
    drawn = sampler.draw(users, 200, np.random.default_rng(0))
    items = split.interactions.item_ids[drawn]
    expected = ["abcd", "cd", "ac", "abd", "abcd", "abcd"]
    assert ["".join(sorted(set(row))) for row in items] == expected
    shares = sampler.shares(np.array([1, 2]))
    assert shares.tolist() == [0, 0.25, 0, 0.5, 0.25, 0]


def naive(
    histories: dict[str, list[tuple[str, int]]], cuts: TimeCuts, cold: str
) -> tuple[dict[str, list[str]], dict[str, dict[str, list[str]]]]:
    """Training items and, by phase, history and target of each user, one event at a time."""
    known = {item for events in histories.values() for item, time in events if time < cuts.valid}
    train: dict[str, list[str]] = {}
    scored: dict[str, dict[str, list[str]]] = {"valid": {}, "test": {}}
    for user, events in histories.items():
        if cold == "leave_out":
            events = [(item, time) for item, time in events if item in known]
        train[user] = [item for item, time in events if time < cuts.valid]
        for phase, start, end in (("valid", cuts.valid, cuts.test), ("test", cuts.test, 10**9)):
            for number, (_, time) in enumerate(events):
                if start <= time < end and (number > 0 or cold == "leave_out"):
                    if number > 0:
                        scored[phase][user] = [item for item, _ in events[: number + 1]]
                    break
    return {user: items for user, items in train.items() if len(items) > 1}, scored


@pytest.mark.parametrize("cold", ["leave_out", "rank"])
@pytest.mark.parametrize("seed", range(8))
def test_against_one_event_at_a_time(
    tmp_path: Path, seed: int, cold: Literal["leave_out", "rank"]
) -> None:
    rng = np.random.default_rng(seed)
    histories = {
        f"u{user}": sorted(
            (
                (str(rng.choice(list("abcdefgh"))), int(rng.integers(10, 40)))
                for _ in range(rng.integers(1, 9))
            ),
            key=lambda event: event[1],
        )
        for user in range(12)
    }
    texts = {user: " ".join(f"{i}{t}" for i, t in events) for user, events in histories.items()}
    data = read_interactions(write(tmp_path / "data.csv", texts))
    cuts = TimeCuts(20, 30)
    split = global_time(data, cuts, cold)
    expected_train, expected_scored = naive(histories, cuts, cold)
    assert trained(split) == {user: "".join(items) for user, items in expected_train.items()}
    for phase in ("valid", "test"):
        expected = {user: "".join(items) for user, items in expected_scored[phase].items()}
        assert evaluated(split, phase) == expected
    # Nothing that is trained on is as late as the first cut.
    segments = CachedEmbeddingTrainDataset(split, 3).segments
    if len(segments):
        assert split.interactions.timestamps[segments.ends - 1].max() < cuts.valid


def test_shares_and_dates_are_times(data: Interactions) -> None:
    # 17 times: 10 15 20 30 40 60 60 65 70 82 85 85 88 90 92 95 99.
    assert time_cuts(data, "0.8") == TimeCuts(82, 90)  # the 14th; as many before it as from it on
    # 85 has the shares from 10/17 to 12/17, and all its interactions are in the test period.
    assert time_cuts(data, "0.6").test == time_cuts(data, ".7").test == 85
    assert time_cuts(data, "0.6").valid == 30
    assert time_cuts(data, "0.8", "0.5") == TimeCuts(70, 90)
    assert time_cuts(data, "88", "61") == TimeCuts(61, 88)
    # A double's product would be 28.999999999999996.
    hundred = _at_times(data, np.arange(100))
    assert time_cuts(hundred, "0.29", "5").test == 29


def _at_times(data: Interactions, times: np.ndarray) -> Interactions:
    return Interactions(
        data.user_ids[:1],
        data.item_ids,
        np.ones(len(times), dtype=np.int32),
        times.astype(np.int64),
        np.array([0, len(times)]),
    )


@pytest.mark.parametrize("scale", [1, 1000])
def test_dates_are_utc(data: Interactions, scale: int) -> None:
    day = 86_400 * scale
    first = 18_262 * day  # 2020-01-01
    dated = _at_times(data, first + day * np.arange(31))
    cuts = time_cuts(dated, "2020-01-21", "2020-01-10T12:00+02:00")
    assert cuts.test == first + 20 * day
    assert cuts.valid == first + 9 * day + day * 10 // 24
    assert (cuts.shown("test"), cuts.shown("valid")) == ("2020-01-21", "2020-01-10 10:00:00 UTC")


BAD_TIMES = {
    "nothing later": (("100",), "no interaction is at 100 or later"),
    "nothing before": (("5",), "nothing is left to train on"),
    "as much after as before": (("0.5",), "nothing is left to train on"),
    "valid nothing before": (("90", "10"), "nothing is left to train on"),
    "the wrong way round": (("80", "90"), "(90) is not before split_time (80)"),
    "a date of counters": (("2020-01-01",), "are no dates of 1990 to 2099; name a share"),
    "no time": (("soon",), "split_time 'soon' is no share between 0 and 1"),
}


@pytest.mark.parametrize("case", BAD_TIMES)
def test_times_that_leave_nothing_are_refused(data: Interactions, case: str) -> None:
    (test, *valid), message = BAD_TIMES[case]
    with pytest.raises(InputError) as refusal:
        time_cuts(data, test, valid[0] if valid else None, "tiny")
    assert message in str(refusal.value)


BAD_KEYS = {
    "no time": (["--split_time", "soon"], ["key 'split_time'", "a share between 0 and 1"]),
    "none": (["--split_time", "0.0"], ["key 'split_time'", "a share between 0 and 1"]),
    "without the split": (
        ["--split", "leave_one_out", "--split_valid_time", "0.8"],
        ["split_valid_time belongs to split: global_time"],
    ),
    "HLLM's key": (["--data_split", "by_time"], ["key 'data_split'", "is split: leave_one_out or"]),
    "both keys": (["--data_split", "leave_one_out"], ["contradict each other; keep split"]),
    "two catalogues": (["--item_data", "all"], ["item_data names the catalogue"]),
    "late": (["--split_time", "2000"], ["no interaction is at 2000 or later", "1000 to 1011"]),
    "every item": (
        ["--model", "HLLM", "--negatives", "catalogue", "--split_cold", "rank"],
        ["use negatives: in_batch"],
    ),
}


@pytest.mark.parametrize("check", [(), ("--check", "True")])
@pytest.mark.parametrize("case", BAD_KEYS)
def test_bad_keys_are_one_line(project: Project, case: str, check: tuple[str, ...]) -> None:
    more, words = BAD_KEYS[case]
    argv = ("--split", "global_time", "--model", "pop", *more, *check)
    expect_refusal(project, lambda: project.run(*argv), words)


def test_data_split_may_name_the_split(tmp_path: Path) -> None:
    """HLLM's boolean of that name, which another file set, stays."""
    by_time, hllm = tmp_path / "by_time.yaml", tmp_path / "hllm.yaml"
    by_time.write_text("data_split: global_time\nsplit_time: 0.8\n")
    hllm.write_text("data_split: false\n")
    for files in ([by_time, hllm], [hllm, by_time]):
        config, warnings = load_config(files)
        assert (config.split, config.split_time, config.data_split) == ("global_time", "0.8", False)
        assert warnings == []
    config, _ = load_config([hllm], parse_command_line(["--data_split", "global_time"]).overrides)
    assert (config.split, config.data_split) == ("global_time", False)
    # The last one counts, by either name.
    config, _ = load_config([hllm, by_time], {"split": "leave_one_out", "split_time": None})
    assert config.split == "leave_one_out"
    config, _ = load_config([], {"data_split": "leave_one_out"})
    assert (config.split, config.data_split) == ("leave_one_out", True)


def test_fingerprints_tell_splits_apart(data: Interactions) -> None:
    splits = [
        leave_one_out(data),
        global_time(data, CUTS),
        # Same users, targets, histories and catalogue; training ends earlier.
        global_time(data, TimeCuts(45, 80)),
    ]
    protocol = EvalProtocol("full", (5,), ("Recall",))
    prints = [
        evaluation_fingerprint(CachedEmbeddingEvalDataset(split, "test", 9), protocol)
        for split in splits
    ]
    assert "split" in differing_parts(prints[0], prints[1])
    assert differing_parts(prints[1], prints[2]) == ["split"]


def test_long_histories_are_cut_or_not(tmp_path: Path) -> None:
    path = write(
        tmp_path / "long.csv", {"u": " ".join(f"{item}{n}" for n, item in enumerate("abcdefghij"))}
    )
    for whole, expected in ((True, ["cde", "fgh"]), (False, ["fgh"])):
        config, _ = load_config(
            [], {"data_path": str(tmp_path), "dataset": "long", "data_split": whole}
        )
        split = make_split(config, load_interactions(config))
        dataset = CachedEmbeddingTrainDataset(split, 2)
        ids = split.interactions.item_ids
        assert ["".join(ids[dataset[row]]) for row in range(len(dataset))] == expected
    assert path.exists()


# --- runs


def walks() -> dict[str, list[str]]:
    """Users who walk along i0 to i15, four of them by way of i16 or i17; and one who comes late."""
    return {
        f"u{user}": [
            *(f"i{(user + step) % 16}" for step in range(9)),
            f"i{16 + user % 2}" if user < 4 else f"i{(user + 9) % 16}",
            f"i{(user + 10) % 16}",
        ]
        for user in range(12)
    }


TIMES = ("--split", "global_time", "--split_time", "1009", "--split_valid_time", "1007")
TRAIN = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--epochs", "1", "--num_threads", "1"),
    *("--num_negatives", "16", "--eval_baseline", "False"),
)


@pytest.fixture
def walking(project: Project) -> Project:
    rows = [
        f"{item},{user},{1000 + time}"
        for user, items in walks().items()
        for time, item in enumerate(items)
    ]
    rows += [f"i{3 + time},late,{1009 + time}" for time in range(3)]
    (project.root / CSV).write_text("\n".join([HEADER, *rows, ""]))
    return project


def expected_lists(cold: str) -> dict[str, list[str]]:
    """User -> history and test target."""
    users = walks()
    lists = {}
    for user, items in users.items():
        if cold == "leave_out":
            items = [item for item in items if item not in ("i16", "i17")]
        lists[user] = items[:10]
    if cold == "rank":
        lists["late"] = ["i3", "i4"]
    return lists


def run(project: Project, name: str, *more: str) -> dict[str, Any]:
    code, _, err = project.run("--run_name", name, *more)
    assert code == 0, err
    return read_result(project.root / "saved" / name)


@pytest.mark.parametrize("cold", ["leave_out", "rank"])
def test_popularity_by_hand(walking: Project, cold: str) -> None:
    result = run(walking, "pop", *TIMES, "--split_cold", cold, "--model", "pop")
    # Training has each user's first seven items.
    counts = dict.fromkeys((f"i{n}" for n in range(16 if cold == "leave_out" else 18)), 0)
    for items in walks().values():
        for item in items[:7]:
            counts[item] += 1
    expected = []
    for *history, target in expected_lists(cold).values():
        rivals = [item for item in counts if item not in history and item != target]
        expected.append(1 + sum(counts[item] >= counts[target] for item in rivals))
    ranks = read_ranks(walking.root / "saved/pop", "pop")[1]
    assert ranks.tolist() == expected
    assert result["data"]["items"] == len(counts)
    split = result["data"]["split"]
    assert (split["valid_from"], split["test_from"], split["cold"]) == (1007, 1009, cold)
    assert (split["cold_items"], split["cold_interactions"]) == (2, 4)
    assert split["cold_targets"] == {"valid": 0, "test": 4 if cold == "rank" else 0}
    assert split["new_users"] == {"valid": 0, "test": 1}


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("item_knn", ("--knn_history", "mean")),
        ("tfidf", ()),
        ("random", ()),
        ("sasrec", ("--epochs", "1", "--sasrec.hidden_size", "8")),
        ("sasrec", ("--epochs", "1", "--sasrec.hidden_size", "8", "--split_cold", "rank")),
        ("item_knn", ("--eval_protocol", "sampled", "--eval_neg_sample_num", "5")),
    ],
)
def test_the_reference_models(walking: Project, model: str, more: tuple[str, ...]) -> None:
    result = run(walking, "one", *TIMES, "--model", model, *more)
    assert result["rows"][0]["users"] == (13 if "rank" in more else 12)
    assert len(read_ranks(walking.root / "saved/one", model)[1]) == result["rows"][0]["users"]


def test_compare_refuses_to_mix_splits(walking: Project) -> None:
    run(walking, "loo", "--model", "pop")
    run(walking, "knn", "--model", "item_knn")
    result = run(walking, "time", "--model", "pop", "--data_split", "global_time")
    assert (result["config"]["split"], result["config"]["data_split"]) == ("global_time", True)
    for one, two in (("loo", "time"), ("time", "loo")):
        before = sorted(walking.root.rglob("*"))
        code, out, err = walking.call(compare_main, [f"saved/{one}", f"saved/{two}"])
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith(f"error: saved/{two} cannot be compared with saved/{one}: ")
        assert line.endswith("name runs on the same split.")
        assert line.count(". ") == 0
        assert sorted(walking.root.rglob("*")) == before
    assert walking.call(compare_main, ["saved/loo", "saved/knn"])[0] == 0


def test_a_fine_tuned_run_from_check_to_report(
    walking: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = walking.run(*TRAIN, *TIMES, "--check", "True")
    assert code == 0, err
    assert "training before 1007, 84 interactions (62.2%)" in out
    assert (
        "test: 12 of 13 users with an interaction in the period are scored; users first seen in it: 1"
        in out
    )
    assert "items first seen after training: 2, left out with their 4 interactions." in out
    assert "training: 12 sequences, 72 transitions a pass" in out
    code, out, err = walking.run(*TRAIN, *TIMES, "--dry_run", "True")
    assert code == 0, err
    assert out.startswith("split: global_time: training before 1007, 84 interactions")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", at_step(2, crash))
        with pytest.raises(Crash):
            walking.run(*TRAIN, *TIMES, "--run_name", "run", "--checkpoint_every", "1")
    other = ("--split", "global_time", "--split_time", "1008", "--split_valid_time", "1007")
    code, _, err = walking.run(*TRAIN, *other, "--run_name", "run", "--auto_resume", "True")
    assert code == 2
    assert "split_time '1009'" in err
    result = run(walking, "run", *TRAIN, *TIMES, "--auto_resume", "True")
    assert result["training"]["resumed_from"] == [1]
    assert result["data"]["items"] == 16
    opened = open_run(walking.root / "saved/run")
    dataset = CachedEmbeddingEvalDataset(opened.data.split, "test", 8)
    ids = opened.data.interactions.item_ids
    lists = {
        str(opened.data.interactions.user_ids[user]): ids[dataset[row]].tolist()
        for row, user in enumerate(dataset.segments.users)
    }
    assert lists == expected_lists("leave_out")
    code, out, err = walking.call(
        recommend_main, ["--run", "saved/run", "--user", "u0", "--topk", "3", "--json"]
    )
    assert code == 0, err
    assert len(json.loads(out)["recommendations"]) == 3
    # The items that were left out are cold ones of the same data.
    code, out, err = walking.call(
        cold_start_main, ["--run", "saved/run", "--dataset", "tiny", "--json"]
    )
    assert code == 0, err
    rows = json.loads(out)
    assert {row["users"] for row in rows} == {4}
    assert {row["items"] for row in rows} == {18, 2}
    run(walking, "loo", "--model", "pop")
    code, _, err = walking.call(report_main, ["saved/run", "--out", "page.html"])
    assert code == 0, err
    page = (walking.root / "page.html").read_text()
    assert "global time: training before 1007" in page
    assert "Rank of the held-out item" in page
    assert "ranks computed now differ" not in page
    assert "Left out, " not in page
    code, _, err = walking.call(report_main, ["saved/loo", "--out", "loo.html"])
    assert code == 0, err
    assert "of later times than" in (walking.root / "loo.html").read_text()


def test_a_fine_tuned_run_ranks_what_is_new(walking: Project) -> None:
    result = run(walking, "run", *TRAIN, *TIMES, "--split_cold", "rank")
    assert result["rows"][-1]["users"] == 13
    opened = open_run(walking.root / "saved/run")
    assert opened.data.interactions.item_ids[-2:].tolist() == ["i16", "i17"]
    assert opened.data.split.train_items == 16
