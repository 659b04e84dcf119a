"""The programs: how each is called, and how they end: exit codes, one line instead of a traceback.

Nothing but the standard library is imported here, so that a missing package is one line too.
"""

from __future__ import annotations

import os
import re
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Program:
    """One program: a sub-command of `hsft` and, in the repository, a script.

    Attributes:
        script: path of the script in the repository; empty where there is none.
        summary: what it does, one sentence.
        module: in `hsft.programs`.
        function: of the module; takes the arguments and returns an exit code.
    """

    script: str
    summary: str
    module: str
    function: str = "main"


PROGRAMS = {
    "prepare": Program(
        "prepare_data.py",
        "Make HSFT's two files of a data set from PixelRec, Amazon Reviews or MovieLens as "
        "downloaded.",
        "prepare",
    ),
    "download-itemllm": Program(
        "download_itemllm.py",
        "Fetch HLLM's pretrained checkpoint and write its ItemLLM as a transformers model folder.",
        "download",
        "download_itemllm",
    ),
    "download-userllm": Program(
        "download_userllm.py",
        "Fetch HLLM's pretrained checkpoint and write its UserLLM as a transformers model folder.",
        "download",
        "download_userllm",
    ),
    "cache": Program(
        "item_caching.py",
        "Encode a dataset's items once with the ItemLLM and write the item cache.",
        "cache",
    ),
    "train": Program(
        "code/main.py",
        "Evaluate or fine-tune the UserLLM, or a reference model, on cached item embeddings.",
        "train",
    ),
    "evaluate": Program(
        "",
        "Score the UserLLM as it is, or a reference model, without training: train --val_only.",
        "train",
        "evaluate",
    ),
    "compare": Program(
        "code/compare.py",
        "Print and save the table of several runs, with intervals and paired tests.",
        "compare",
    ),
    "report": Program(
        "code/report.py",
        "Write the report of one or more finished runs: one HTML page that needs nothing beside it.",
        "report",
    ),
    "recommend": Program(
        "code/recommend.py",
        "Recommend items with a finished run: to a user, for a history, and new items too.",
        "recommend",
    ),
    "serve": Program(
        "",
        "Serve a page on which to try a finished run's models side by side: recommend --serve.",
        "recommend",
        "serve",
    ),
    "export": Program(
        "code/export.py",
        "Export a fine-tuned UserLLM: a plain model folder, or the adapter, with a model card.",
        "export",
    ),
    "cold-start": Program(
        "code/cold_start.py",
        "Measure how a finished run ranks items that were held out from its data.",
        "cold_start",
    ),
    "sweep": Program(
        "code/sweep.py",
        "Search configuration keys with Optuna, on the validation users only.",
        "sweep",
    ),
}
# Packages that not every installation has -> the extra of pyproject.toml that brings them.
_EXTRAS = {
    "argcomplete": "completion",
    "deepspeed": "deepspeed",
    "fastapi": "serve",
    "gguf": "demo",
    "mlflow": "mlflow",
    "optuna": "sweep",
    "uvicorn": "serve",
    "wandb": "wandb",
}


def command(name: str) -> str:
    """Return how a program is called here.

    Args:
        name: of `PROGRAMS`.

    Returns:
        `python SCRIPT` in the repository; `hsft NAME` where HSFT is installed without the scripts,
        the running program was started as `hsft`, or there is no script.
    """
    script = PROGRAMS[name].script
    return f"python {script}" if script and _calls_scripts() else f"hsft {name}"


def command_line(line: str) -> str:
    """Return a whole command as it is typed here.

    Args:
        line: the program's name and its arguments, for example
            `train --config_file code/overall/LLM_ddp.yaml`.
    """
    name, blank, arguments = line.partition(" ")
    if not _calls_scripts():
        # Names of the files that come with HSFT, which are not under code/ where it is installed.
        arguments = re.sub(r"(?<!\S)code/(?=(HLLM|IDNet|baselines|overall)/)", "", arguments)
    return f"{command(name)}{blank}{arguments}"


def _calls_scripts() -> bool:
    started = Path(sys.argv[0])
    as_hsft = started.stem == "hsft" or started.parts[-2:] == ("hsft", "__main__.py")
    return not as_hsft and (_PACKAGE.parent / "main.py").is_file()


def install_command(package: str) -> str:
    """Return the pip command that brings a package that is missing."""
    extra = _EXTRAS.get(package)
    if not (_PACKAGE.parent / "main.py").is_file():
        return f"pip install 'hsft[{extra}]'" if extra else "pip install hsft"
    if extra:
        return f"pip install -c constraints.txt -e '.[{extra}]'"
    return "pip install -r requirements.txt"


def run_program(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a program's `main` and turn what ends it into an exit code.

    Args:
        main: takes the arguments after the program's name and returns an exit code.
        argv: the arguments; `sys.argv[1:]` when None.

    Under torchrun a message that every process has is printed once.

    Returns:
        What `main` returned; 2 for an `InputError`, a package that is not installed or a file that
        the user has no right to; 130 or 143 for an interruption; 1 when another process of the run
        has gone; 141 when whoever read standard output, such as `head`, has. Any other exception is
        a defect of the program and keeps its traceback.
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
    if not hasattr(select, "poll"):
        return True  # Windows, where it is by far the likeliest broken pipe
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
        package = error.name.partition(".")[0]
        print_once(
            f"error: the package {package} is missing in {sys.executable}; activate the virtual "
            f"environment (. .venv/bin/activate) or run {install_command(package)}."
        )
        return EXIT_BAD_INPUT
    except PermissionError as error:
        if error.filename is None:
            raise
        print_once(
            f"error: {one_line(error.filename)} cannot be used: {error.strerror}; give this user the "
            f"right to it, or name another file or folder."
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
