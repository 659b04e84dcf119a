"""The exceptions that mean "the user can fix this" and "a signal ended the run"."""

from __future__ import annotations

from collections.abc import Sequence

EXIT_OK = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_SIGINT = 130
EXIT_SIGPIPE = 141
EXIT_SIGTERM = 143


class InputError(Exception):
    """Bad input: a file, row, key or value that the user has to change.

    The message is one sentence that says what is wrong, where (file, row, key) and how to fix
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
    """Raise an error for problems, if there are any.

    Raises:
        InputError: there is one problem; `InputErrors` when there are more.
    """
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputErrors(problems)


def counted(number: int, unit: str) -> str:
    """Write a number with its unit: `1 item`, `1,200 items`."""
    return f"{number:,} {unit}" if number == 1 else f"{number:,} {unit}s"


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
    """SIGINT or SIGTERM ended the run, after it saved what it had.

    Like KeyboardInterrupt it is no `Exception`: a handler for a library's errors must not take it
    for one.

    Attributes:
        exit_code: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, message: str, exit_code: int = EXIT_SIGINT) -> None:
        super().__init__(message)
        self.exit_code = exit_code
