"""Item caching: killed anywhere and continued, damaged parts, signals, stale caches."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hsft.config.loader import load_config, parse_command_line
from hsft.data.cache import open_cache, save_cache
from hsft.encoding import build_cache
from hsft.encoding.build_cache import share_out
from hsft.encoding.item_llm import ItemEncoder
from hsft.encoding.parts import Batches, Parts, PartWriter
from hsft.run.next_step import command_after_caching
from item_caching import main as cache_main
from main import main as run_main
from tests.conftest import Project
from tests.helpers import ROOT, ForkServer, make_dataset

ITEMS = 400
KILLS = 12


class Runner:
    """One item caching, run again and again in children of a fork server."""

    def __init__(self, root: Path, llama: Path) -> None:
        self.root = root
        self.target = root / "cache.safetensors"
        self.parts = root / "cache.safetensors.parts"
        self.log = root / "log.txt"
        self.argv = [
            *("--dataset", "many", "--item_pretrain_dir", str(llama)),
            *("--item_cache_path", str(self.target), "--item_batch_tokens", "64"),
            *("--precision", "32-true", "--show_progress", "False", "--num_threads", "1"),
        ]
        self.server = ForkServer("item_caching")

    def run(self, **plan: Any) -> tuple[int, float]:
        """Run the command once: exit code and seconds."""
        answer = self.server.run(self.argv, self.root, self.log, **plan)
        return answer["code"], answer["seconds"]

    @property
    def encoded(self) -> int:
        """Items that the last command encoded."""
        return sum(map(int, Path(f"{self.log}.encoded").read_text().split()))

    def whole_parts(self) -> int:
        """Items in the parts that are on disk."""
        return sum(len(load_file(path)["rows"]) for path in self.parts.glob("part-*"))


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Iterator[Runner]:
    if sys.platform == "win32":
        pytest.skip("needs POSIX processes")
    root = make_dataset(tmp_path_factory.mktemp("kills"), "many", items=ITEMS)
    made = Runner(root, llama)
    yield made
    made.server.close()


@pytest.fixture(scope="module")
def uninterrupted(runner: Runner) -> tuple[bytes, float]:
    """The bytes of a file written without interruption, and the seconds it took."""
    code, seconds = runner.run()
    assert code == 0, runner.log.read_text()
    assert runner.encoded == ITEMS
    assert not runner.parts.exists()
    return runner.target.read_bytes(), seconds


def test_killed_at_random_moments_the_file_is_the_same(
    runner: Runner, uninterrupted: tuple[bytes, float]
) -> None:
    expected, seconds = uninterrupted
    rng = np.random.default_rng(0)
    kill = {"signal": int(signal.SIGKILL)}
    runner.target.unlink()
    for batch in rng.integers(1, 7, size=KILLS):
        assert runner.run(batch=int(batch), **kill)[0] == -signal.SIGKILL
        assert not runner.target.exists()
    # By the clock too, wherever that hits: on a fast machine the run may be over before.
    for delay in rng.uniform(0.05, 0.5, size=4) * seconds:
        runner.run(delay=float(delay), **kill)
        if runner.target.exists():
            assert runner.target.read_bytes() == expected
            runner.target.unlink()
    before = runner.whole_parts() if runner.parts.exists() else 0
    code, _ = runner.run()
    assert code == 0, runner.log.read_text()
    assert runner.encoded == ITEMS - before
    assert runner.target.read_bytes() == expected
    assert not runner.parts.exists()
    assert [path.name for path in runner.root.glob(".*")] == []


@pytest.mark.parametrize(
    ("trap", "count"), [("part", 1), ("part", 9), ("file", 1), ("remove", 1)], ids=str
)
def test_killed_while_writing(
    runner: Runner, uninterrupted: tuple[bytes, float], trap: str, count: int
) -> None:
    runner.target.unlink(missing_ok=True)
    code, _ = runner.run(trap=trap, count=count)
    assert code == -signal.SIGKILL
    before = runner.whole_parts()
    assert before == (ITEMS if trap in ("file", "remove") else before)
    assert runner.target.exists() == (trap == "remove")
    code, _ = runner.run()
    assert code == 0, runner.log.read_text()
    assert runner.encoded == ITEMS - before
    assert runner.target.read_bytes() == uninterrupted[0]
    assert not runner.parts.exists()


def test_damaged_parts_are_encoded_again(
    runner: Runner, uninterrupted: tuple[bytes, float]
) -> None:
    runner.target.unlink(missing_ok=True)
    assert runner.run(trap="file")[0] == -signal.SIGKILL
    first, second, third, *_ = sorted(runner.parts.glob("part-*"))
    lost = sum(len(load_file(path)["rows"]) for path in (first, second, third))
    flipped = bytearray(first.read_bytes())
    flipped[-1] ^= 1
    first.write_bytes(flipped)
    second.write_bytes(second.read_bytes()[:-5])
    third.write_bytes(b"")
    code, _ = runner.run()
    assert code == 0, runner.log.read_text()
    assert runner.encoded == lost
    assert runner.log.read_text().count("encoded again") == 3
    assert runner.target.read_bytes() == uninterrupted[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_one_line_and_keeps_the_parts(
    runner: Runner, uninterrupted: tuple[bytes, float], number: signal.Signals
) -> None:
    runner.target.unlink(missing_ok=True)
    code, _ = runner.run(batch=12, signal=int(number))
    assert code == 128 + number
    log = runner.log.read_text()
    assert log.splitlines()[-1].startswith(
        f"interrupted: stopped by {number.name}; what is encoded"
    )
    assert "Traceback" not in log
    before = runner.whole_parts()
    assert before
    assert runner.run()[0] == 0
    assert runner.encoded == ITEMS - before
    assert runner.target.read_bytes() == uninterrupted[0]


def test_what_is_encoded_before_a_signal_is_kept_however_little(
    runner: Runner, uninterrupted: tuple[bytes, float]
) -> None:
    runner.target.unlink(missing_ok=True)
    kept = 0
    # The parts are of more items than there are, and each stop leaves one of another size. A Ctrl-C
    # under torchrun is two signals.
    for batch, more in ((5, {}), (2, {"again": signal.SIGTERM}), (7, {"again": signal.SIGINT})):
        code, _ = runner.run(batch=batch, signal=int(signal.SIGINT), items_per_part=2048, **more)
        assert code == 128 + signal.SIGINT, runner.log.read_text()
        kept += runner.encoded
        assert 0 < runner.encoded < ITEMS
        assert runner.whole_parts() == kept
        last = runner.log.read_text().splitlines()[-1]
        assert f"; what is encoded is kept ({kept} of {ITEMS} items), and" in last
    assert len(list(runner.parts.glob("part-*"))) == 3
    assert runner.run()[0] == 0
    assert runner.encoded == ITEMS - kept
    assert runner.target.read_bytes() == uninterrupted[0]


@pytest.mark.parametrize("old", [True, False])
def test_what_is_older_than_a_part_may_be_outlives_a_kill(
    runner: Runner, uninterrupted: tuple[bytes, float], old: bool
) -> None:
    runner.target.unlink(missing_ok=True)
    limits = {"items_per_part": 2048, "seconds_per_part": 0 if old else 1e9}
    assert runner.run(batch=6, signal=int(signal.SIGKILL), **limits)[0] == -signal.SIGKILL
    kept = runner.whole_parts()
    assert kept == (runner.encoded if old else 0)
    assert runner.encoded > 0
    assert runner.run()[0] == 0
    assert runner.encoded == ITEMS - kept
    assert runner.target.read_bytes() == uninterrupted[0]


def test_a_part_is_written_when_it_is_full_old_or_followed_by_a_gap(tmp_path: Path) -> None:
    now = 0.0
    batches = Batches([np.array(rows) for rows in ([4, 0], [1], [5, 2], [3], [6, 7, 8])])
    parts = Parts(tmp_path, 2, torch.float32)
    values = torch.arange(18.0).reshape(9, 2)
    writer = PartWriter(parts, batches, items=5, seconds=60, clock=lambda: now)

    def add(number: int, seconds: float) -> list[range]:
        nonlocal now
        now += seconds
        writer.add(number, values[torch.from_numpy(batches.all[number])])
        return list(writer.written.values())

    with writer.writing_rest():
        assert add(0, 59) == []
        assert add(1, 1) == [range(2)]
        assert add(2, 59.9) == [range(2)]
        # A gap: another process has, or an earlier run had, what lies between.
        assert add(4, 0) == [range(2), range(2, 3)]
    assert list(writer.written.values()) == [range(2), range(2, 3), range(4, 5)]
    assert writer.items == 8
    actual = parts.find(batches)
    assert actual == writer.written
    for name, numbers in actual.items():
        rows = batches.rows(numbers)
        read = parts.read(name, rows)
        assert read is not None
        assert torch.equal(read, values[torch.from_numpy(rows)])
        assert parts.read(name, rows[::-1].copy()) is None or len(rows) == 1
    writer = PartWriter(parts, batches, items=3, seconds=60, clock=lambda: now)
    assert add(2, 0) == []
    assert add(3, 0) == [range(2, 4)]
    # Parts that do not hold whole batches of the job are of another one.
    other = Batches([np.array([4, 0, 1]), np.array([5]), np.array([2, 3, 6, 7, 8])])
    assert parts.find(other) == {"part-00000000.safetensors": range(1)}
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000000.safetensors"]


def test_groups_are_of_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_cache, "ITEMS_PER_PART", 3)
    batches = Batches([np.array([n, n + 10]) for n in range(10)])
    expected = [range(0, 2), range(2, 3), range(5, 7), range(8, 9)]
    assert build_cache.group_batches(batches, [0, 1, 2, 5, 6, 8]) == expected


def test_a_finished_file_is_left_and_other_texts_are_not_taken_for_it(
    runner: Runner, uninterrupted: tuple[bytes, float]
) -> None:
    if not runner.target.exists():
        runner.run()
    assert runner.run()[0] == 0
    assert runner.encoded == 0
    assert "left as it is" in runner.log.read_text()
    information = runner.root / "information" / "many.csv"
    plain = information.read_text()
    runner.target.unlink()
    assert runner.run(trap="file")[0] == -signal.SIGKILL
    information.write_text(plain.replace("item 7,", "item 8,", 1))
    assert runner.run()[0] == 0
    assert runner.encoded == ITEMS
    assert runner.target.read_bytes() != uninterrupted[0]
    information.write_text(plain)
    assert runner.run()[0] == 0
    assert runner.encoded == ITEMS
    assert runner.target.read_bytes() == uninterrupted[0]


def test_the_written_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        matrix = torch.randn(7, 5).to(dtype)
        path = tmp_path / "cache.safetensors"
        save_cache(path, [f"ä{n}" for n in range(7)], matrix, {"prompt": "é\n", "model": "m"})
        assert torch.equal(load_file(path)["embeddings"], matrix)
        cache = open_cache(path)
        assert cache.item_ids == [f"ä{n}" for n in range(7)]
        assert cache.metadata["prompt"] == "é\n"
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_work_is_dealt_out_evenly_and_once() -> None:
    rng = np.random.default_rng(1)
    costs = rng.integers(1, 100, size=50).tolist()
    owners = share_out(costs, 4)
    loads = [sum(np.array(costs)[owners == rank]) for rank in range(4)]
    assert sum(loads) == sum(costs)
    # Longest first is within a third of the best split (Graham 1969); with many pieces much nearer.
    assert max(loads) - min(loads) <= max(costs)
    assert share_out([], 3).tolist() == []


def make_item_cache(project: Project, *more: str) -> None:
    (project.root / "dataset" / "tiny_item_embeddings.safetensors").unlink(missing_ok=True)
    where = ("--item_pretrain_dir", str(project.llama))
    code, _, err = project.call(cache_main, [*project.arguments, *where, *more])
    assert code == 0, err


WARNING = "was not made with this configuration's"


def test_a_cache_of_this_configuration_gives_no_warning(project: Project) -> None:
    make_item_cache(project)
    code, _, err = project.run("--val_only", "True")
    assert code == 0
    assert WARNING not in err


def test_a_cache_of_more_items_than_the_data_has_gives_no_warning(project: Project) -> None:
    make_item_cache(project)
    for folder in ("dataset", "information"):
        lines = (project.root / folder / "tiny.csv").read_text().splitlines()
        kept = [line for line in lines if not line.startswith("i7,")]
        (project.root / folder / "part.csv").write_text("\n".join(kept) + "\n")
    more = ("--dataset", "part", "--item_cache_path", "dataset/tiny_item_embeddings.safetensors")
    code, _, err = project.run("--val_only", "True", *more)
    assert code == 0, err
    assert WARNING not in err


@pytest.mark.parametrize(
    ("made", "used", "named"),
    [
        (("--item_prompt", "x: "), (), "item_prompt"),
        (("--text_keys", "[title]"), (), "text_keys"),
        (("--MAX_TEXT_LENGTH", "3"), (), "MAX_TEXT_LENGTH"),
    ],
)
def test_a_cache_of_other_settings_gives_a_warning(
    project: Project, made: tuple[str, ...], used: tuple[str, ...], named: str
) -> None:
    make_item_cache(project, *made)
    code, _, err = project.run("--val_only", "True", *used)
    assert code == 0
    assert f"{WARNING} {named};" in err


def test_a_cache_of_other_texts_or_another_model_gives_a_warning(
    project: Project, tmp_path: Path
) -> None:
    make_item_cache(project)
    information = project.root / "information" / "tiny.csv"
    plain = information.read_text()
    information.write_text(plain.replace("item 3", "item 4"))
    _, _, err = project.run("--val_only", "True")
    assert f"{WARNING} text_path;" in err
    information.write_text("item_id\nbroken,\n")
    code, _, err = project.run("--val_only", "True")
    assert code == 0
    assert WARNING not in err
    information.write_text(plain)
    other = tmp_path / "other"
    other.mkdir()
    for path in project.llama.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    _, _, err = project.run("--val_only", "True", "--item_pretrain_dir", str(other))
    assert f"{WARNING} item_pretrain_dir;" in err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["i0,,,", "i1,,nan,"], ["none of the 20 items", "title, tag, description;"]),
        (["x1,item 1,,", "x2,,,"], ["none of the 20 items", "others, for example 'x1';"]),
    ],
    ids=["empty", "other items"],
)
def test_a_catalogue_without_any_text_is_refused(
    project: Project, rows: list[str], words: list[str]
) -> None:
    information = project.root / "information" / "tiny.csv"
    information.write_text("\n".join(["item_id,title,tag,description", *rows]) + "\n")
    (project.root / "dataset" / "tiny_item_embeddings.safetensors").unlink()
    where = ("--item_pretrain_dir", str(project.llama))
    before = set(project.root.rglob("*"))
    for more in ((), ("--check", "True")):
        code, out, err = project.call(cache_main, [*project.arguments, *where, *more])
        assert (code, out) == (2, "")
        last = err.splitlines()[-1]
        assert last.startswith("error: ")
        for word in (*words, "information/tiny.csv", "--text_path"):
            assert word in last
    for more in (("--val_only", "True"), ("--check", "True")):
        code, _, err = project.run(*where, "--use_item_cache", "False", *more)
        assert code == 2
        assert words[0] in err.splitlines()[-1]
    after = {path for path in project.root.rglob("*") if "saved" not in path.parts}
    assert after == before


def test_the_next_command_is_said_once_and_works(project: Project) -> None:
    default = project.root / "dataset" / "tiny_item_embeddings.safetensors"
    plain = ("--item_pretrain_dir", str(project.llama))
    for more, words in (
        ((), []),
        (
            ("--item_cache_path", "my items.safetensors", "--text_keys", "[title]"),
            ["--text_keys", '["title"]', "--item_cache_path", "my items.safetensors"],
        ),
    ):
        default.unlink(missing_ok=True)
        code, out, err = project.call(cache_main, [*project.arguments, *plain, *more])
        assert code == 0, err
        assert err.count("no trained emb token") == 1
        command = out.removeprefix("\nnext: ").removesuffix("\n")
        python, program, *arguments = shlex.split(command)
        assert (python, program) == ("python", "code/main.py")
        files = arguments[1:3]
        assert arguments == [
            *("--config_file", *files, "--dataset", "tiny"),
            *words[:2],
            *("--user_pretrain_dir", str(project.llama)),
            *words[2:],
            *("--val_only", "True"),
        ]
        code, out, err = project.call(run_main, [*arguments, "--precision", "32-true"])
        assert code == 0, err
        assert WARNING not in err
        assert "Recall@10" in out


def test_the_next_command_follows_the_configuration(project: Project) -> None:
    (project.root / "my.yaml").write_text(
        "dataset: tiny\nitem_cache_path: a.pt\nuse_item_cache: False\nitem_prompt: '--p: '\n"
    )
    files = [Path("my.yaml")]
    given = {"text_path": "information/tiny.csv", "item_prompt": "--q "}
    config, _ = load_config(files, given)
    assert command_after_caching(config, files) == (
        "python code/main.py --config_file my.yaml --dataset tiny --text_path information/tiny.csv "
        "'--item_prompt=--q ' --user_pretrain_dir model_checkpoints/UserLLM_complete/ "
        "--use_item_cache True --val_only True"
    )
    config, _ = load_config([], {"dataset": "tiny", "item_cache_path": "a.pt"})
    words = shlex.split(command_after_caching(config, []) or "")
    files = [ROOT / name for name in words[3:5]]
    line = parse_command_line(words[5:])
    again, _ = load_config(files, line.overrides)
    assert again.item_cache_path == "a.safetensors"
    for key in ("dataset", "text_keys", "item_prompt", "MAX_TEXT_LENGTH", "item_emb_token_n"):
        assert getattr(again, key) == getattr(config, key)
    # A decoder that HLLM's checkpoint was not imported to serves on both sides.
    both, _ = load_config([], {"dataset": "tiny", "item_pretrain_dir": "SmolLM2"})
    assert "--user_pretrain_dir SmolLM2 --val_only True" in str(command_after_caching(both, []))
    (project.root / "ItemLLM").mkdir()
    (project.root / "ItemLLM" / "import.json").write_text("{}")
    half, _ = load_config([], {"dataset": "tiny", "item_pretrain_dir": "ItemLLM"})
    assert "UserLLM_complete/ --val_only True" in str(command_after_caching(half, []))
    # An encoder's vectors need a projection, which is trained.
    encoded, _ = load_config([], {"dataset": "tiny", "encoder": "MiniLM"})
    assert str(command_after_caching(encoded, [])).endswith(
        "--encoder MiniLM --user_pretrain_dir USER_LLM_FOLDER --item_adapter linear --use_qlora True"
    )
    # Nothing to go on with, or nothing that fits on a line.
    config, _ = load_config([], {"dataset": "nowhere"})
    assert command_after_caching(config, []) is None
    config, _ = load_config([], {"dataset": "tiny", "item_prompt": "a\nb"})
    assert command_after_caching(config, []) is None


def test_a_full_disk_is_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (project.root / "dataset" / "tiny_item_embeddings.safetensors").unlink()
    monkeypatch.setattr("hsft.data.cache.os.posix_fallocate", full)
    where = ("--item_pretrain_dir", str(project.llama))
    code, out, err = project.call(cache_main, [*project.arguments, *where])
    assert code == 2
    assert out == ""
    assert "No space left on device" in err.splitlines()[-1]
    assert "Traceback" not in err
    monkeypatch.undo()
    monkeypatch.chdir(project.root)
    monkeypatch.setattr(ItemEncoder, "encode", None)
    code, _, err = project.call(cache_main, [*project.arguments, *where])
    assert code == 0, err
