"""Checkpoints: what they hold comes back exactly, from files that are whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file

from hsft.trainer.checkpoint import (
    Checkpoints,
    DamagedError,
    read_state,
    restore_rng,
    rng_state,
    write_state,
)
from hsft.utils.errors import InputError
from tests.training_runs import (
    spoil,
)


def test_state_comes_back_with_its_types(tmp_path: Path) -> None:
    state = {
        "numbers": [1, 0.1, 1e-300, float("-inf"), True, None, "text"],
        "nested": {0: {"step": torch.tensor(3.0)}, 7: (torch.arange(3), (0.9, 0.999))},
    }
    write_state(tmp_path, state)
    actual = read_state(tmp_path)
    assert actual["numbers"] == state["numbers"]
    assert [type(value) for value in actual["numbers"]] == [type(v) for v in state["numbers"]]
    assert actual["nested"].keys() == {0, 7}
    assert torch.equal(actual["nested"][0]["step"], torch.tensor(3.0))
    numbers, betas = actual["nested"][7]
    assert torch.equal(numbers, torch.arange(3))
    assert betas == (0.9, 0.999)
    write_state(tmp_path, {"model": Path("anything but plain data")})
    with pytest.raises(DamagedError, match="state is unreadable"):
        read_state(tmp_path)


def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, 2)
    path = store.save(1, {"w": torch.ones(1)}, {"best": None})
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    with pytest.raises(InputError, match=r"another version of HSFT \(format 1, this one reads 2\)"):
        store.newest()
    assert path.is_dir()


def test_every_generator_comes_back(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> list[Any]:
        normal = np.random.standard_normal(3).tolist()  # noqa: NPY002
        return [random.gauss(0, 1), random.random(), normal, torch.rand(3).tolist()]

    device = torch.device("cpu")
    draw()  # leaves half a pair of normal deviates in Python's and numpy's generators
    write_state(tmp_path, rng_state(device))
    expected = draw()
    assert draw() != expected
    restore_rng(read_state(tmp_path), device)
    assert draw() == expected


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_an_optimizer_goes_on_as_if_never_stopped(tmp_path: Path, kind: str) -> None:
    def make() -> tuple[torch.nn.Parameter, Any]:
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 128))
        make_optimizer = torch.optim.AdamW if kind == "adamw" else bnb.optim.AdamW8bit
        return weight, make_optimizer([weight], lr=1e-2)

    def steps(weight: torch.nn.Parameter, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(number))
            optimizer.step()

    weight, optimizer = make()
    steps(weight, optimizer, range(3))
    write_state(tmp_path, {"optimizer": optimizer.state_dict()})
    middle = weight.detach().clone()
    steps(weight, optimizer, range(3, 6))
    if kind == "adamw8bit":
        assert optimizer.state[weight]["state1"].dtype == torch.uint8
    other, fresh = make()
    fresh.load_state_dict(read_state(tmp_path)["optimizer"])
    with torch.no_grad():
        other.copy_(middle)
    steps(other, fresh, range(3, 6))
    assert torch.equal(other, weight)


def test_going_back_takes_the_model_that_was_best_then(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints", 2)
    names = {}
    for step in (1, 2, 3, 4):
        if step in (1, 3, 4):
            text = f"best of {step}"

            def write(folder: Path, text: str = text) -> None:
                folder.mkdir()
                (folder / "model").write_text(text)

            best = store.save_best(step, write)
        names[step] = best
        store.save(step, {"w": torch.tensor([float(step)])}, {"best": best})
    assert [path.name for path in store.list()] == ["000003-step-3", "000004-step-4"]
    assert not store.best_path(names[1]).exists()
    spoil(store.best_path(names[4]) / "model")
    newest = store.newest()
    assert newest is not None
    assert newest.name == "000003-step-3"
    store.publish_best(store.load(newest).state["best"], tmp_path / "best")
    assert (tmp_path / "best" / "model").read_text() == "best of 3"
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["model"]
    assert load_file(newest / "weights.safetensors")["w"] == 3
