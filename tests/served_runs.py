"""A run to serve that needs no training."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hsft.finished.open_run import OpenRun, open_run
from hsft.finished.serve_app import RunServer
from hsft.utils.program import run_program
from main import main
from tests.helpers import ROOT


@contextmanager
def knn_run(root: Path) -> Iterator[OpenRun]:
    """Make `root` the current directory, with a run of item_knn: scores are cosines to the last item.

    Args:
        root: with the data set `tiny` and its item cache.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        arguments = ["--config_file", f"{ROOT}/code/overall/LLM_ddp.yaml", "--dataset", "tiny"]
        arguments += ["--model", "item_knn", "--run_name", "run", "--show_progress", "False"]
        assert run_program(main, arguments) == 0
        logging.basicConfig(handlers=[logging.NullHandler()], force=True)
        yield open_run("saved/run")


@contextmanager
def listening(server: RunServer) -> Iterator[RunServer]:
    """Let a server answer in a thread of its own."""
    thread = threading.Thread(target=server.serve_until_signal)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server
    finally:
        server.should_exit = True
        thread.join()
