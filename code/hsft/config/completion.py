"""Shell completion, where the shell asks for it and argcomplete is installed."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

# argcomplete's protocol: the shell sets this variable in the program that it runs for its answers.
_ASKED = "_ARGCOMPLETE"


def answer_shell(make_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Write what may stand at the cursor and end the program, when a shell asks; else do nothing.

    Args:
        make_parser: gives the parser that knows the options; called only when a shell asks.

    A program that takes part carries the words PYTHON_ARGCOMPLETE_OK near its top.
    """
    if _ASKED not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:
        return
    argcomplete.autocomplete(make_parser())


def key_parser(program: str, keys: Sequence[tuple[str, Sequence[str]]]) -> argparse.ArgumentParser:
    """Return a parser that knows a configuration's keys: for completion, not for parsing.

    Args:
        program: the command.
        keys: key and the values that it may have, none when there are too many to list.
    """
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False)
    parser.add_argument("--config_file", nargs="+", metavar="FILE.yaml")
    parser.add_argument("--print_config", choices=("True", "False"))
    for key, values in keys:
        parser.add_argument(f"--{key}", choices=values or None)
    return parser
