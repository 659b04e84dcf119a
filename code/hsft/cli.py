# PYTHON_ARGCOMPLETE_OK
"""`hsft`: one command with a sub-command for every program; the scripts of the repository call the same.

hsft train --config_file overall/LLM_ddp.yaml HLLM/HLLM.yaml --dataset Pixel200K
"""

from __future__ import annotations

import difflib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module

from hsft import __version__
from hsft.utils.errors import EXIT_OK, InputError, one_line
from hsft.utils.program import PROGRAMS, run_program


def main() -> int:
    """Run the `hsft` command with the process's arguments and return the exit code."""
    return run_program(run_command)


def run_command(argv: Sequence[str]) -> int:
    """Run the sub-command that the first argument names.

    Raises:
        InputError: there is no such sub-command.
    """
    name, *arguments = argv or ("",)
    if name in ("-h", "--help", "help"):
        sys.stdout.write(help_text())
        return EXIT_OK
    if name == "--version":
        sys.stdout.write(f"hsft {__version__}\n")
        return EXIT_OK
    if name in PROGRAMS:
        if "_ARGCOMPLETE" in os.environ:
            # argcomplete's number of the word that the program is: the sub-command is the next one.
            os.environ["_ARGCOMPLETE"] = str(int(os.environ["_ARGCOMPLETE"]) + 1)
        return program(name)(arguments)
    _complete_name()
    if not name:
        raise InputError("no command is given; hsft --help lists them.")
    near = difflib.get_close_matches(name, PROGRAMS, n=1)
    end = f"did you mean {near[0]}?" if near else "hsft --help lists them."
    raise InputError(f"hsft has no command '{one_line(name, 40)}'; {end}")


def program(name: str) -> Callable[[Sequence[str]], int]:
    """Return a program: it takes its arguments and returns an exit code.

    Its module is imported when it is called, so that a missing package is then one line.

    Args:
        name: of `PROGRAMS`.
    """

    def call(argv: Sequence[str]) -> int:
        module = import_module(f"hsft.programs.{PROGRAMS[name].module}")
        code: int = getattr(module, PROGRAMS[name].function)(argv)
        return code

    return call


def help_text() -> str:
    """Return the text of `hsft --help`."""
    width = max(40, min(shutil.get_terminal_size().columns, 100))
    lines = [
        "Fine-tune HLLM's UserLLM on cached item embeddings.",
        "",
        "usage: hsft COMMAND [options]; hsft COMMAND --help says more",
        "",
        "commands:",
    ]
    for name, about in PROGRAMS.items():
        lines += textwrap.wrap(
            about.summary,
            width,
            initial_indent=f"  {name:<18}",
            subsequent_indent=" " * 20,
        )
    return "\n".join([*lines, "", "hsft --version prints the version.", ""])


def _complete_name() -> None:
    """Offer the sub-commands to a shell that completes the first word."""
    if "_ARGCOMPLETE" in os.environ:
        import argparse

        from hsft.config.completion import answer_shell

        parser = argparse.ArgumentParser(prog="hsft")
        parser.add_argument("command", choices=list(PROGRAMS))
        answer_shell(lambda: parser)


if __name__ == "__main__":
    sys.exit(main())
