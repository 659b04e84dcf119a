"""The FAQ: each answer has symptom, cause and command, and its commands do what they say on small data."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from compare import main as compare_main
from export import main as export_main
from hsft.utils.program import run_program
from item_caching import main as cache_main
from main import main as train_main
from tests.helpers import ROOT, make_dataset
from tests.pages import read_page

LABELS = {
    "docs/faq.md": ("**Symptom.**", "**Cause.**", "**Command.**"),
    "docs/zh/faq.md": ("**现象。**", "**原因。**", "**命令。**"),
}
# What issue threads of HLLM ask, by a word of each heading.
QUESTIONS = (
    *("loss fall to 0", "in percent", "resume", "export embeddings", "timestamps", "another LLM"),
    *("both sides", "negatives", "evaluation slow", "NCCL", "V100", "Do both LLMs", "test items"),
)
PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "item_caching.py": cache_main,
    "code/main.py": train_main,
    "code/export.py": export_main,
    "code/compare.py": compare_main,
}
# They need a hub, or set the shell up.
NOT_RUN = ("download_userllm.py", "export")
SMALL = ("--device", "cpu", "--show_progress", "False")


@pytest.mark.parametrize("page", LABELS)
def test_every_answer_has_symptom_cause_and_command(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    answers = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(answers) == len(QUESTIONS)
    for number, answer in enumerate(answers):
        heading = answer.partition("\n")[0]
        places = [answer.find(f"\n{label}") for label in LABELS[page]]
        assert -1 < places[0] < places[1] < places[2], heading
        assert [answer.count(label) for label in LABELS[page]] == [1, 1, 1], heading
        assert re.search(r"^    (python|torchrun) ", answer[places[2] :], re.MULTILINE), heading
        assert page != "docs/faq.md" or QUESTIONS[number] in heading


@pytest.fixture
def root(tmp_path: Path, llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder laid out as the repo's root, with a toy LLM in the place of each LLM."""
    (tmp_path / "code").symlink_to(ROOT / "code")
    (tmp_path / "model_checkpoints").mkdir()
    for name in ("ItemLLM_complete", "UserLLM_complete", "SmolLM2-135M-Instruct"):
        (tmp_path / "model_checkpoints" / name).symlink_to(llama)
    make_dataset(tmp_path, "Pixel200K")
    data = tmp_path / "dataset" / "Pixel200K.csv"
    # Dates, which use_timestamps wants.
    data.write_text(re.sub(r",(\d{4})$", r",150000\1", data.read_text(), flags=re.MULTILINE))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_run_on_small_data(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ("--config_file", "code/overall/LLM_ddp.yaml", "code/HLLM/HLLM.yaml", *SMALL)
    given = (*files, "--dataset", "Pixel200K")
    folder = "model_checkpoints/ItemLLM_complete"
    assert run_program(cache_main, [*given, "--item_pretrain_dir", folder]) == 0
    short = (*given, "--user_pretrain_dir", folder, "--epochs", "1", "--nce_thres", "1.0")
    for model in (("--use_qlora", "True"), ("--model", "sasrec")):
        name = f"Pixel200K-{'qlora' if '--use_qlora' in model else 'sasrec'}"
        assert run_program(train_main, [*short, *model, "--run_name", name]) == 0
    done = set()
    for _, *words in read_page(ROOT / "docs" / "faq.md").commands:
        script = next((n for n, word in enumerate(words) if word.endswith(".py")), None)
        if script is None or words[script] in NOT_RUN or tuple(words) in done:
            continue
        done.add(tuple(words))
        program, rest = PROGRAMS[words[script]], words[script + 1 :]
        if program is train_main:
            # Vectors of a random LLM are nearly parallel. What is estimated is a GPU's, on any machine.
            half = "16-mixed" in rest
            look = ["--dry_run", "True"] if half else ["--check", "True", "--nce_thres", "1.0"]
            plain = [] if half else SMALL
            rest = [*without(rest, "--check"), *plain, *look]
        elif program is cache_main:
            rest += [*SMALL, "--overwrite", "True"]
        capsys.readouterr()
        assert run_program(program, rest) == 0, (shlex.join(words), capsys.readouterr().err)
    assert len(done) > 12
    assert (root / "saved/Pixel200K-qlora/export-embeddings").is_dir()


def without(words: list[str], key: str) -> list[str]:
    """Leave a key and its value out."""
    if key not in words:
        return words
    place = words.index(key)
    return [*words[:place], *words[place + 2 :]]
