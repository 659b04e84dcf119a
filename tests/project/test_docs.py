"""The documentation pages: commands that the programs accept, links that resolve, two languages."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import runpy
import shlex
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import hsft
from hsft.api import Run
from hsft.cli import run_command
from hsft.config import program
from hsft.config.loader import flat_fields, load_config, parse_command_line
from hsft.utils.errors import InputError
from hsft.utils.program import PROGRAMS
from tests.helpers import ROOT
from tests.pages import PAGES, TRANSLATED, anchors, read_page

BASE = [Path("code/overall/LLM_ddp.yaml"), Path("code/HLLM/HLLM.yaml")]
# Programs that are not this project's: their options are not looked at.
OTHERS = {"curl", "docker", "git", "cd", ".", "hf", "tensorboard", "mkdocs", "pip-audit", "export"}
# Flags of other programs, and placeholders for a flag.
OTHER_FLAGS = {
    *("key", "section.key", "help", "config_file", "print_config", "version"),
    *("build-arg", "profile", "nproc_per_node", "nnodes", "node_rank", "install", "dest"),
    "no-build-isolation",
}


PACKAGES = [path.name for path in (ROOT / "code" / "hsft").iterdir() if path.is_dir()]


class Parsed(Exception):
    """A program has read its command line."""


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture
def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make programs end when their command line is read, before they do anything."""

    def then_stop(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> None:
            function(*args, **kwargs)
            raise Parsed

        return wrapper

    parse = argparse.ArgumentParser.parse_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", then_stop(parse))
    monkeypatch.setattr(program, "load_config", then_stop(load_config))
    monkeypatch.chdir(ROOT)


def check_settings(words: list[str]) -> None:
    """Have the configuration read settings that a page shows without a program.

    Raises:
        InputError: it refuses them.
    """
    load_config(BASE, parse_command_line(words).overrides)


def parse(words: list[str]) -> None:
    """Have the real program read a command line.

    Raises:
        InputError, SystemExit: the program refuses it.
        AssertionError: what it names does not exist.
    """
    tool, *words = words
    if tool in OTHERS:
        return
    if tool.startswith("--"):
        check_settings([tool, *words])
        return
    if tool == "hsft":
        with pytest.raises(Parsed):
            run_command(words)
    elif tool == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
    elif tool == "pip":
        for flag, value in pairwise(words):
            assert flag != "-r" or (ROOT / value).is_file(), value
    elif tool == "torchrun":
        script = next(n for n, word in enumerate(words) if word.endswith(".py"))
        parse(["python", *words[script:]])
    elif words[:2] == ["-m", "pytest"]:
        assert all((ROOT / word).exists() for word in words[2:] if not word.startswith("-"))
    elif words[:2] in (["-m", "venv"], ["-m", "pip"]):
        pass
    elif words[0] == "-c":
        compile(words[1], "-c", "exec")
    else:
        assert tool in ("python", "python3"), f"unknown program {tool}"
        module = words[0] == "-m"
        run = runpy.run_module if module else runpy.run_path
        main = run(words[module], run_name="page")["main"]
        rest = words[1 + module :]
        with pytest.raises(Parsed):
            main(rest[:-1] if rest[-1:] == ["..."] else rest)


@pytest.mark.usefixtures("stop_after_parsing")
@pytest.mark.parametrize("path", PAGES, ids=name)
def test_programs_accept_the_commands_shown(path: Path) -> None:
    for words in read_page(path).commands:
        try:
            parse(words)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{name(path)}: {shlex.join(words)}: {error!r}")


@pytest.mark.usefixtures("stop_after_parsing")
@pytest.mark.parametrize("command", ["code/main.py --epoch 3", "code/compare.py", "code/none.py"])
def test_a_command_that_is_refused_is_noticed(command: str) -> None:
    with pytest.raises((InputError, OSError)):
        parse(["python", *command.split()])


def flags_of_programs(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the options of all programs that use argparse, and all configuration keys."""
    flags = set(flat_fields())
    add = argparse._ActionsContainer.add_argument

    def noting(self: Any, *names: str, **settings: Any) -> Any:
        flags.update(word.lstrip("-") for word in names)
        return add(self, *names, **settings)

    monkeypatch.setattr(argparse._ActionsContainer, "add_argument", noting)
    scripts = [*ROOT.glob("*.py"), *(ROOT / "code").glob("*.py"), *(ROOT / "demo").glob("*.py")]
    scripts += [*(ROOT / "benchmarks").glob("*.py"), ROOT / "tests" / "fuzz" / "harness.py"]
    for script in scripts:
        main = runpy.run_path(str(script), run_name="page").get("main")
        if main is not None:
            with pytest.raises((Parsed, Exception, SystemExit)):
                main(["--no_such_option"])
    return flags


@pytest.mark.usefixtures("stop_after_parsing")
def test_flags_in_the_text_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    known = flags_of_programs(monkeypatch) | OTHER_FLAGS
    unknown = [
        f"{name(path)}: `{code}`"
        for path in PAGES
        for code in read_page(path).inline_code
        for flag in re.findall(r"(?:^| )--([A-Za-z][\w.-]*)", code)
        # `--qlora_` is the beginning of one.
        if flag not in known and not flag.endswith("_")
    ]
    assert unknown == []


def test_settings_in_the_text_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    checked = 0
    for path in PAGES:
        for code in read_page(path).inline_code:
            flags = re.findall(r"(?:^| )--([A-Za-z][\w.]*)", code)
            words = shlex.split(code) if code.startswith("--") else []
            if set(flags) <= set(flat_fields()) and len(words) > len(flags) and "N" not in words:
                check_settings(words)
                checked += 1
    assert checked > 30


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read_page(path).prose):
        file, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{name(path)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name(path)} links to {target}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_python_on_pages_names_what_there_is(path: Path) -> None:
    for block in read_page(path).python:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("hsft"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), block
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owners = {"hsft": hsft.__all__, "run": [*dir(Run), *Run.__annotations__]}
                assert node.attr in owners.get(node.value.id, [node.attr]), node.attr


def test_names_of_hsft_in_the_text_exist() -> None:
    named = {
        match[1]
        for path in PAGES
        for code in read_page(path).inline_code
        if (match := re.fullmatch(r"hsft\.(\w+)(?:\(.*\))?", code))
    }
    assert {"train", "UserLLM"} <= named <= {*hsft.__all__, *map(str, PACKAGES)}


@pytest.mark.parametrize("page", ["docs/programs.md", "docs/zh/programs.md"])
def test_the_page_of_programs_has_every_command(page: str) -> None:
    codes = read_page(ROOT / page).inline_code
    assert {code[5:] for code in codes if re.fullmatch(r"hsft [a-z][a-z-]+", code)} == {*PROGRAMS}


@pytest.mark.parametrize("english", TRANSLATED, ids=name)
def test_both_languages_have_the_same_commands_and_code(english: Path) -> None:
    ours, theirs = read_page(english), read_page(TRANSLATED[english])
    assert ours.commands == theirs.commands
    assert ours.python == theirs.python
    headings = [len(re.findall(r"^#+ ", page.prose, re.MULTILINE)) for page in (ours, theirs)]
    assert headings[0] == headings[1]
    numbers = [sorted(re.findall(r"\d\.\d{3,}", page.prose)) for page in (ours, theirs)]
    assert numbers[0] == numbers[1]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == pages


@pytest.mark.parametrize(
    ("tour", "most"), [("a training step", 10), ("an evaluation", 8), ("an item cache", 8)]
)
def test_reading_tours_are_short_and_their_names_exist(tour: str, most: int) -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition(f"### A tour: {tour}\n")[2].partition("\n#")[0]
    stops = re.findall(r"^\d+\. `([^`]+)`(.*)$", section, re.MULTILINE)
    assert 3 <= len(stops) <= most
    for file, about in stops:
        source = (ROOT / file).read_text(encoding="utf-8")
        for named in re.findall(r"`([\w.]+)`", about):
            if not named.endswith(".json"):
                assert re.search(rf"(def|class) {named.rpartition('.')[2]}\b", source), named
