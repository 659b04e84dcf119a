"""How programs end: exit codes, and one line instead of a traceback."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence

from hsft.utils.distributed import is_lost_process, print_by_first_process, print_once
from hsft.utils.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    EXIT_SIGINT,
    EXIT_SIGPIPE,
    InputError,
    Interrupted,
    one_line,
    problems_of,
)


def run_program(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a program's `main` and turn what ends it into an exit code.

    Args:
        main: takes the arguments after the program's name and returns an exit code.
        argv: the arguments; `sys.argv[1:]` when None.

    Under torchrun a message that every process has is printed once.

    Returns:
        What `main` returned; 2 for an `InputError` or a package that is not installed; 130 or 143
        for an interruption; 1 when another process of the run has gone; 141 when whoever read
        standard output, such as `head`, has. Any other exception is a defect of the program and
        keeps its traceback.
    """
    try:
        try:
            code = _run(main, argv)
        except SystemExit:
            # argparse ends so after printing its help.
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads_stdout():
            raise
        # What is left in the buffer is flushed at the interpreter's end, and would fail again.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        return EXIT_SIGPIPE
    return code


def _nobody_reads_stdout() -> bool:
    """Say whether standard output is a pipe or socket whose other end is closed."""
    try:
        watched = select.poll()
        watched.register(sys.stdout.fileno(), 0)
        return bool(watched.poll(0))
    except (OSError, ValueError):
        return False


def _run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None) -> int:
    try:
        return main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        for problem in problems_of(error):
            print_once(f"error: {one_line(problem)}")
        return EXIT_BAD_INPUT
    except Interrupted as stop:
        print_once(f"interrupted: {stop}")
        return stop.exit_code
    except KeyboardInterrupt:
        print_once("interrupted")
        return EXIT_SIGINT
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "hsft":
            raise
        print_once(
            f"error: the package {error.name.partition('.')[0]} is missing in {sys.executable}; "
            f"activate the virtual environment (. .venv/bin/activate) or run pip install -r "
            f"requirements.txt."
        )
        return EXIT_BAD_INPUT
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        print_by_first_process(
            "error: another process of this run has ended or does not answer, so the run stops; "
            "the lines above or torchrun's summary below say which one and why."
        )
        return EXIT_FAILURE
