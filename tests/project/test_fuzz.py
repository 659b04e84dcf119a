"""Every reader on mutated input for a bounded time: success or `InputError`, nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz.harness import Target, fuzz, mutate
from tests.fuzz.targets import targets

NAMES = [
    *("interactions", "information", "yaml", "command-line", "native-cache", "pt-cache"),
    *("model-config", "model-index", "model-weights", "model-extra", "result", "ranks"),
]
# By default the number of inputs ends a target, so that every run tries the same ones.
SECONDS = float(os.environ.get("HSFT_FUZZ_SECONDS", "0"))
SEED = int(os.environ.get("HSFT_FUZZ_SEED", "0"))
INPUTS = {
    **{"interactions": 600, "information": 1000, "yaml": 150, "command-line": 700},
    **{"native-cache": 700, "pt-cache": 800, "model-config": 300, "model-index": 250},
    **{"model-weights": 250, "model-extra": 250, "result": 400, "ranks": 250},
}


@pytest.fixture(scope="module")
def all_targets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Target]]:
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, {target.name: target for target in targets(folder)}


def test_every_target_is_listed(all_targets: tuple[Path, dict[str, Target]]) -> None:
    assert list(all_targets[1]) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_reader_survives_mutated_input(
    all_targets: tuple[Path, dict[str, Target]], name: str
) -> None:
    folder, known = all_targets
    most = None if SECONDS else INPUTS[name]
    actual = fuzz(known[name], folder, seconds=SECONDS or 60, seed=SEED, most=most)
    # Neither reader nor harness is asleep: some inputs are good and some are not.
    assert actual.accepted
    assert actual.refused
    assert actual.accepted + actual.refused == actual.inputs


def test_mutations_depend_on_the_seed_alone() -> None:
    import random

    def some(seed: int) -> list[bytes]:
        rng = random.Random(seed)
        return [mutate(rng, [b"abc", b"0123456789"], [b"X"]) for _ in range(50)]

    assert some(1) == some(1)
    assert some(1) != some(2)


def test_the_harness_reports_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.fuzz.harness.ROOT", tmp_path)

    def read(_: Path, data: bytes) -> None:
        if b"\xff" in data:
            raise KeyError("odd")

    with pytest.raises(AssertionError, match=r"KeyError: 'odd'"):
        fuzz(Target("toy", [b"abc"], read), tmp_path, seconds=10, most=5000)
    assert [path for path in (tmp_path / ".fuzz").iterdir() if b"\xff" in path.read_bytes()]
