"""What is shown while a run trains, evaluates and caches."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from hsft.utils import progress
from hsft.utils.progress import Meter
from item_caching import main as caching
from tests.conftest import Project

QLORA = (
    *("--use_qlora", "True", "--qlora_quant_type", "none", "--epochs", "1", "--run_name", "run"),
    *("--num_threads", "1"),
)


def spy(monkeypatch: pytest.MonkeyPatch) -> list[Meter]:
    """Show a line at every step, and keep the meters."""
    actual: list[Meter] = []
    leave = Meter.__exit__

    def leaving(self: Meter, *error: Any) -> bool | None:
        actual.append(self)
        return leave(self, *error)

    monkeypatch.setattr(Meter, "__exit__", leaving)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    return actual


MEMORY = r"(memory [\d.]+ [GM]iB \(peak [\d.]+ [GM]iB\)|peak memory [\d.]+ [GM]iB)"


@pytest.mark.parametrize("positions", ["all", "random_split"])
def test_training_and_evaluation_show_what_they_do(
    project: Project, monkeypatch: pytest.MonkeyPatch, positions: str
) -> None:
    meters = spy(monkeypatch)
    more = ("--show_progress", "True", "--train_positions", positions, "--epochs", "2")
    code, _, err = project.run(*QLORA, *more, "--gradient_accumulation_steps", "3")
    assert code == 0, err
    # 30 sequences in 4 batches, 3 of them to a step.
    steps = [line[9:] for line in err.splitlines() if re.match(r"[\d:]{8} epoch \d of", line)]
    # A step's loss is known in the next one.
    first, later = r"step \d of 4, ", r"step \d of 4, loss [\d.]+, "
    rate, left = r"learning rate \d\.\d\de-\d\d, ", r"all epochs in at most \d+s, "
    facts = r"[\d,.]+ sequences/s, [\d,]+ tokens/s, " + MEMORY
    patterns = [
        rf"epoch 1 of 2: 24 of 30 sequences, ETA \d+s, {first}{rate}{left}{facts}",
        rf"epoch 1 of 2: 30 of 30 sequences, ETA 0s, {later}{rate}{left}{facts}",
        rf"epoch 2 of 2: 24 of 30 sequences, ETA \d+s, {first}{rate}{facts}",
        rf"epoch 2 of 2: 30 of 30 sequences, ETA 0s, {later}{rate}{facts}",
    ]
    assert len(steps) == len(patterns)
    for line, pattern in zip(steps, patterns, strict=True):
        assert re.fullmatch(pattern, line), line
    assert re.search(rf"evaluation: 30 of 30 users, ETA 0s, [\d,.]+ users/s, {MEMORY}\n", err)
    assert re.search(rf"validation: 30 of 30 users, ETA 0s, [\d,.]+ users/s, {MEMORY}\n", err)
    # Users have 12, 11 or 10 items, two of which are held out; the UserLLM reads at most 8 and
    # predicts from all but the last: no packing or padding changes that, nor what the loss counts.
    actual = json.loads((project.root / "saved" / "run" / "result.json").read_text())
    real = actual["training"]["transitions_per_epoch"]
    assert real == 10 * (8 + 8 + 7)
    epochs = [bar for bar in meters if bar.unit == "sequences"]
    assert [(bar.done, bar.tokens_done) for bar in epochs] == [(30, real)] * 2


def test_caching_shows_items_and_tokens(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    meters = spy(monkeypatch)
    argv = [
        *("--dataset", "tiny", "--item_pretrain_dir", str(project.llama)),
        *("--item_cache_path", "made.safetensors", "--precision", "32-true"),
        *("--item_batch_tokens", "64"),
    ]
    code, _, err = project.call(caching, argv)
    assert code == 0, err
    rows = [line[9:] for line in err.splitlines() if "encoding items:" in line]
    assert len(rows) > 1
    for line in rows:
        assert re.fullmatch(
            r"encoding items: \d+ of 20 items, ETA \d+s, [\d,.]+ items/s, [\d,]+ tokens/s, "
            + MEMORY,
            line,
        )
    (bar,) = (bar for bar in meters if bar.task == "encoding items")
    assert bar.tokens_done == bar.tokens
    assert bar.done == 20
    lengths = [len(f"title: item {n} tag: {n % 4} description: {n % 7}".split()) for n in range(20)]
    assert bar.tokens_done >= sum(lengths)
