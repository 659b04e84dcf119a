"""Command lines of the programs that have options of their own, rather than configuration keys."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from hsft.config.completion import answer_shell
from hsft.utils.errors import InputError

# Keys of a run's configuration that say where things are; they do not enter its numbers.
PLACES = {
    "data_path": "folder of the interaction files",
    "text_path": "folder of the item information, or its file",
    "item_cache_path": "item cache",
    "item_pretrain_dir": "model folder of the ItemLLM",
    "user_pretrain_dir": "model folder of the UserLLM",
    "device": "auto, cpu or cuda",
    "num_threads": "CPU threads of torch",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are this project's, one line and exit code 2, and whose help has examples.

    Args:
        program: the command, for example `python code/compare.py`.
        summary: one sentence on what it does.
        examples: whole command lines.
    """

    def __init__(self, program: str, summary: str, examples: Sequence[str]) -> None:
        super().__init__(
            prog=program,
            description=summary,
            epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parse as argparse does, or answer a shell that asks how a word could end."""
        answer_shell(lambda: self)
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            InputError: always.
        """
        raise InputError(f"{message}; see {self.prog} --help.")


def add_places(parser: argparse.ArgumentParser) -> None:
    """Add options for what has moved since a run: `--data_path`, `--user_pretrain_dir`, ..."""
    group = parser.add_argument_group(
        "where things are, when they moved since the run (default: as in its config.yaml)"
    )
    for key, meaning in PLACES.items():
        kind = int if key == "num_threads" else str
        group.add_argument(f"--{key}", metavar="VALUE", type=kind, help=meaning)


def places(options: argparse.Namespace) -> dict[str, Any]:
    """Return the values of `add_places`' options that were given, by key."""
    given = {key: getattr(options, key) for key in PLACES}
    return {key: value for key, value in given.items() if value is not None}


def true_or_false(text: str) -> bool:
    """Read a value of an option that is written as in YAML: `--exclude_seen True`.

    Raises:
        argparse.ArgumentTypeError: it is neither True nor False.
    """
    known = {"true": True, "false": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"'{text}' is neither True nor False")
    return known[text.lower()]
