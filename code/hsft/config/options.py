"""Command lines of the programs that have options of their own, rather than configuration keys."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from hsft import __version__
from hsft.config.completion import answer_shell
from hsft.utils.errors import InputError
from hsft.utils.program import PROGRAMS, command, command_line

_TRUTH = {"true": True, "false": False}

# Keys of a run's configuration that say where things are; they do not enter its numbers.
LOCATION_KEYS = {
    "data_path": "folder of the interaction files",
    "text_path": "folder of the item information, or its file",
    "item_cache_path": "item cache",
    "item_pretrain_dir": "model folder of the ItemLLM",
    "encoder": "folder of the sentence encoder",
    "user_pretrain_dir": "model folder of the UserLLM",
    "device": "auto, cpu, cuda, xpu or mps",
    "num_threads": "CPU threads of torch",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are this project's, one line and exit code 2, and whose help has examples.

    Args:
        name: of the program, in `PROGRAMS`.
        examples: whole command lines, as `command_line` takes them.
        prog: how it is called, where that is more than `command(name)`.
        summary: what it does, where that is not what `PROGRAMS` says.
        more: paragraphs after the summary, kept as they are.
    """

    def __init__(
        self,
        name: str,
        examples: Sequence[str],
        *,
        prog: str | None = None,
        summary: str | None = None,
        more: str = "",
    ) -> None:
        width = max(40, shutil.get_terminal_size().columns - 2)
        about = textwrap.fill(summary or PROGRAMS[name].summary, width)
        super().__init__(
            prog=prog or command(name),
            description=f"{about}\n\n{more}" if more else about,
            # Not wrapped: a command is copied as a line.
            epilog="\n".join(["examples:", *(f"  {command_line(line)}" for line in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"hsft {__version__}")

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parse as argparse does, or answer a shell that asks how a word could end."""
        answer_shell(lambda: self)
        return super().parse_args(args, namespace)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse as argparse does; a flag takes the word after it only where that is a truth value."""
        words = list(sys.argv[1:] if args is None else args)
        flags = {
            word
            for action in self._actions
            if action.type is true_or_false
            for word in action.option_strings
        }
        joined: list[str] = []
        for word in words:
            if joined and joined[-1] in flags:
                if word.lower() in _TRUTH:
                    joined[-1] += f"={word}"
                    continue
                joined[-1] += "=True"
            joined.append(word)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message}; see {self.prog} --help.")


def add_flag(
    parser: argparse._ActionsContainer, flag: str, help: str, *, default: bool = False
) -> None:
    """Add an option that is written `--flag`, `--flag True` or `--flag False`, as keys are."""
    parser.add_argument(
        flag,
        type=true_or_false,
        nargs="?",
        const=True,
        default=default,
        metavar="True|False",
        help=f"{help} (default: %(default)s)",
    )


def add_location_options(parser: argparse.ArgumentParser) -> None:
    """Add options for what has moved since a run: `--data_path`, `--user_pretrain_dir`, ..."""
    group = parser.add_argument_group(
        "where things are, when they moved since the run (default: as in its config.yaml)"
    )
    for key, meaning in LOCATION_KEYS.items():
        kind = int if key == "num_threads" else str
        group.add_argument(f"--{key}", metavar="VALUE", type=kind, help=meaning)


def location_overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of `add_location_options`' options that were given, by key."""
    given = {key: getattr(options, key) for key in LOCATION_KEYS}
    return {key: value for key, value in given.items() if value is not None}


def true_or_false(text: str) -> bool:
    """Read a value of an option that is written as in YAML: `--exclude_seen True`.

    Raises:
        argparse.ArgumentTypeError: it is neither True nor False.
    """
    if text.lower() not in _TRUTH:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return _TRUTH[text.lower()]
