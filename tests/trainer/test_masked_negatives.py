"""Losses that cannot learn are named, and negatives are drawn as asked."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hsft.config import Config
from hsft.data.cache import save_cache
from hsft.data.interactions import read_interactions
from hsft.data.negatives import NegativeSampler
from hsft.run import train_and_rank
from hsft.trainer.masked_negatives import MaskedNegatives
from hsft.trainer.resume import TrainState
from hsft.utils.errors import InputError
from tests.bad_input import CACHE
from tests.conftest import Project

TRAIN = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--eval_baseline", "False"),
    *("--epochs", "2", "--run_name", "r", "--negatives", "in_batch"),
)


def write_clusters(path: Path, sizes: list[int]) -> None:
    """Write a cache in which the items of a cluster have one direction."""
    directions = torch.randn(len(sizes), 64, generator=torch.Generator().manual_seed(0))
    vectors = directions.repeat_interleave(torch.tensor(sizes), dim=0)
    save_cache(path, [f"i{n}" for n in range(len(vectors))], vectors, {})


def history(project: Project) -> list[dict[str, float]]:
    result = json.loads((project.root / "saved/r/result.json").read_text())
    return list(result["training"]["history"])


@pytest.mark.parametrize(("cluster", "warned"), [(1, False), (10, True)])
def test_the_masked_share_is_logged_and_warned_of_once(
    project: Project, cluster: int, warned: bool
) -> None:
    write_clusters(project.root / CACHE, [cluster] * (20 // cluster))
    code, _, err = project.run(*TRAIN)
    assert code == 0, err
    shares = [record["masked_negatives"] for record in history(project)]
    if warned:
        # Users walk along 20 items, of which 9 of 19 others are of the same cluster.
        assert all(0.3 < share < 0.7 for share in shares)
    else:
        assert shares == [0, 0]
    for share in shares:
        assert f"{share:.1%} of the negatives masked" in err
    assert err.count(" % of the negatives are masked, since") == warned


def test_a_full_softmax_masks_nothing(project: Project) -> None:
    code, _, err = project.run(*TRAIN, "--negatives", "catalogue")
    assert code == 0, err
    assert [record["masked_negatives"] for record in history(project)] == [None, None]
    assert "masked" not in err


def test_training_without_negatives_ends(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clusters(project.root / CACHE, [20])
    # Without the sample of cosines, which refuses such a cache at the start.
    monkeypatch.setattr(train_and_rank, "check_cosines", lambda *_: ("", None))
    code, out, err = project.run(*TRAIN)
    assert code == 2
    assert out == ""
    line = err.splitlines()[-1]
    # The epoch's last step is not read yet.
    assert re.match(r"error: (\d+) of \1 positions in epoch 1 have no negative left", line)
    assert "above nce_thres 0.99" in line
    assert not (project.root / "saved/r/result.json").exists()


def test_bce_on_one_item_ends(project: Project) -> None:
    rows = ["item_id,user_id,timestamp"]
    # The training items of everybody are i1; the held-out ones make the catalogue larger.
    for user in range(6):
        rows += [f"i1,u{user},{n}" for n in range(4)] + [f"i2,u{user},8", f"i3,u{user},9"]
    (project.root / "dataset/tiny.csv").write_text("\n".join(rows) + "\n")
    for loss in ("bce", "nce"):
        code, _, err = project.run(*TRAIN, "--loss", loss)
        assert code == 2
        assert "18 of 18 positions in epoch 1 have no negative left" in err.splitlines()[-1]


def test_when_training_is_judged(caplog: pytest.LogCaptureFixture) -> None:
    watch = MaskedNegatives(Config())
    # A single sequence at an epoch's end, a few positions at its beginning, no negatives at all.
    for counts in ([0, 99, 1, 400], [90, 100, 999, 999], [0, 0, 0, 0]):
        watch.check(TrainState(negatives=counts))
    watch.check(TrainState(negatives=[0, 99, 1, 400]), epoch_ends=True)
    watch.check(TrainState(negatives=[0, 0, 0, 0]), epoch_ends=True)
    assert not caplog.records
    watch.check(TrainState(negatives=[300, 1000, 500, 1000]))
    watch.check(TrainState(negatives=[300, 1000, 500, 1000]))
    assert [record.getMessage()[:34] for record in caplog.records] == [
        "30 % of the negatives are masked, "
    ]
    with pytest.raises(InputError, match="501 of 1,000 positions in epoch 3"):
        watch.check(TrainState(epoch=2, negatives=[0, 1000, 501, 1000]))


@pytest.mark.parametrize("exclude", ["history", "none"])
def test_negatives_per_sequence_train(
    project: Project, exclude: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[np.ndarray] = []
    draw = NegativeSampler.draw

    def record(self: NegativeSampler, users: np.ndarray, *more: object) -> np.ndarray:
        negatives = draw(self, users, *more)  # type: ignore[arg-type]
        drawn.append(np.column_stack([users, negatives]))
        return negatives

    monkeypatch.setattr(NegativeSampler, "draw", record)
    settings = ("--negatives", "per_sequence", "--negatives_exclude", exclude)
    code, _, err = project.run(*TRAIN, *settings, "--num_workers", "0")
    assert code == 0, err
    data = read_interactions(project.root / "dataset/tiny.csv")
    users, items = np.concatenate(drawn)[:, 0], np.concatenate(drawn)[:, 1:]
    # MAX_ITEM_LIST_LENGTH + 1, for every sequence of both epochs.
    assert items.shape == (2 * 30, 9)
    known = {
        (int(user), int(item))
        for user in range(data.num_users)
        for item in data.items[data.offsets[user] : data.offsets[user + 1] - 2]
    }
    met = [
        (int(user), int(item)) in known
        for user, row in zip(users, items, strict=True)
        for item in row
    ]
    assert any(met) == (exclude == "none")
