"""The one exception that means "the user can mend this", and how programs end on it."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable, Sequence

from REC.utils.torchrun import say_once

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_SIGINT = 130
EXIT_SIGPIPE = 141
EXIT_SIGTERM = 143


class InputError(Exception):
    """Bad input: a file, row, key or value that the user has to change.

    The message is one sentence that says what is wrong, where (file, row, key) and how to mend
    it. Programs print it without a traceback and exit with code 2.
    """


class InputErrors(InputError):
    """Several things to change, one sentence each; programs print one line each.

    Attributes:
        problems: the sentences, at least one.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(" ".join(problems))
        self.problems = list(problems)


def problems_of(error: InputError) -> list[str]:
    """Return the sentences of an error: one, or those of an `InputErrors`."""
    return error.problems if isinstance(error, InputErrors) else [str(error)]


def refuse(problems: Sequence[str]) -> None:
    """Raise the problems found, if any.

    Raises:
        InputError: there is one problem; `InputErrors` when there are more.
    """
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputErrors(problems)


def one_line(text: object, limit: int = 1000) -> str:
    """Write anything as one printable line: other characters are escaped, a long middle is cut out.

    File content reaches error messages; a line break or a terminal's control code must not.
    """
    given = str(text)
    if len(given) > limit:
        given = f"{given[: limit - limit // 3]} ... {given[-(limit // 3) :]}"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in given
    )


def brief(error: object, limit: int = 200) -> str:
    """Write a library's error as part of a sentence: one line, not too long, no full stop."""
    return one_line(" ".join(str(error).split()) or type(error).__name__, limit).rstrip(".")


class Interrupted(BaseException):
    """The run was asked to stop (SIGINT or SIGTERM) and has saved what it had.

    Like KeyboardInterrupt it is no `Exception`: a handler for a library's errors must not take it
    for one.

    Attributes:
        exit_code: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, message: str, exit_code: int = EXIT_SIGINT) -> None:
        super().__init__(message)
        self.exit_code = exit_code


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
            say_once(f"error: {one_line(problem)}")
        return EXIT_BAD_INPUT
    except Interrupted as stop:
        say_once(f"interrupted: {stop}")
        return stop.exit_code
    except KeyboardInterrupt:
        say_once("interrupted")
        return EXIT_SIGINT
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "REC":
            raise
        say_once(
            f"error: the package {error.name.partition('.')[0]} is missing in {sys.executable}; "
            f"activate the virtual environment (. .venv/bin/activate) or run pip install -r "
            f"requirements.txt."
        )
        return EXIT_BAD_INPUT
    except RuntimeError as error:
        from REC.utils.processes import is_lost_process

        if not is_lost_process(error):
            raise
        say_once(
            "error: another process of this run has ended or does not answer, so the run stops; "
            "the lines above or torchrun's summary below say which one and why.",
            at_once=True,
        )
        return EXIT_FAILURE
