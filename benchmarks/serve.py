"""Load on a served run: requests a second and latencies of POST /recommend, by number of clients.

    python benchmarks/serve.py --run saved/Pixel200K-qlora        10 seconds for each number of clients
    python benchmarks/serve.py --tiny True                        a run made for it, a second, in one process

The server is a process of its own, started as `recommend.py --serve`. Each client is a thread of this
process with one connection, which sends a request when it has the answer to the last one: a user of the
data drawn at random, 10 items, the run's last model. Clients and server share the machine's cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, chdir, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "code"))

import numpy as np

from hsft.config.options import add_flag
from hsft.finished.open_run import open_run
from hsft.finished.serve import make_server
from hsft.programs.train import main as train
from hsft.utils.environment import versions
from hsft.utils.files import write_json, write_text
from hsft.utils.program import run_program

ROOT = Path(__file__).resolve().parents[1]
HEADERS = {"Content-Type": "application/json"}


@contextmanager
def serving(run: Path) -> Iterator[tuple[str, int]]:
    """Start `recommend.py --serve` on a free port and yield host and port once it answers.

    Args:
        run: the run's folder; paths in its configuration are relative to the current folder.

    Raises:
        RuntimeError: the server ended.
    """
    command = [sys.executable, str(ROOT / "code/recommend.py"), "--run", str(run), "--serve", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            line = server.stdout.readline()
            if " at http://" not in line:
                raise RuntimeError(f"the server of {run} did not start; it says why above.")
            host, _, port = line.split(" at http://")[1].partition("/")[0].partition(":")
            yield host, int(port)
        finally:
            server.terminate()


@contextmanager
def serving_here(run: Path) -> Iterator[tuple[str, int]]:
    """Serve a run in a thread of this process and yield host and port once it answers."""
    server = make_server(open_run(run), 0)
    thread = threading.Thread(target=server.serve_until_signal)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield "127.0.0.1", server.port
    finally:
        server.should_exit = True
        thread.join()
        server.api.close(5)


def ask(connection: http.client.HTTPConnection, path: str, request: Any = None) -> Any:
    """Send a request and return what its answer holds.

    Raises:
        RuntimeError: it was refused.
    """
    if request is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, json.dumps(request), HEADERS)
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        raise RuntimeError(f"{path} was answered with {answer.status}: {body[:200]!r}")
    return json.loads(body) if path != "/metrics" else body.decode()


def load(address: tuple[str, int], clients: int, seconds: float) -> dict[str, Any]:
    """Send requests from several clients for some seconds.

    Args:
        address: host and port.
        clients: connections, each with one request under way.
        seconds: how long.

    Returns:
        `clients`, `requests`, `requests_per_s`, `p50_ms`, `p99_ms` and `requests_per_batch`.

    Raises:
        RuntimeError: a request failed.
    """
    probe = http.client.HTTPConnection(*address, timeout=60)
    info = ask(probe, "/info")
    drawn = random.Random(0)
    users = [ask(probe, "/random_user")["user_id"] for _ in range(100)]
    before = _batches(ask(probe, "/metrics"))
    # The server closes idle connections; the next request opens it again.
    probe.close()
    ends = time.perf_counter() + seconds
    taken: list[list[float]] = [[] for _ in range(clients)]
    failures: list[BaseException] = []

    def send(seconds_taken: list[float], order: random.Random) -> None:
        connection = http.client.HTTPConnection(*address, timeout=60)
        try:
            while (began := time.perf_counter()) < ends:
                request = {"user": order.choice(users), "topk": 10, "model": info["models"][-1]}
                ask(connection, "/recommend", request)
                seconds_taken.append(time.perf_counter() - began)
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            failures.append(error)
        finally:
            connection.close()

    threads = [
        threading.Thread(target=send, args=(each, random.Random(drawn.random()))) for each in taken
    ]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - began
    if failures:
        raise RuntimeError(f"{len(failures)} of {clients} clients failed") from failures[0]
    batches, requests = (
        a - b for a, b in zip(_batches(ask(probe, "/metrics")), before, strict=True)
    )
    probe.close()
    latencies = np.concatenate([np.array(each) for each in taken])
    return {
        "clients": clients,
        "requests": len(latencies),
        "requests_per_s": len(latencies) / wall,
        "p50_ms": 1e3 * float(np.percentile(latencies, 50)),
        "p99_ms": 1e3 * float(np.percentile(latencies, 99)),
        "requests_per_batch": requests / max(batches, 1),
    }


def _batches(metrics: str) -> tuple[float, float]:
    """Return the number of batches and of the requests in them."""
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line[:1] != "#")
    names = ("hsft_batch_requests_count", "hsft_batch_requests_sum")
    return float(values[names[0]]), float(values[names[1]])


def make_tiny_run(folder: Path) -> Path:
    """Make a run of the most frequent items, of 500 items and 200 users, which takes seconds."""
    drawn = np.random.default_rng(0).integers(500, size=(200, 20))
    rows = [
        f"{item},{user},{step}"
        for user, items in enumerate(drawn)
        for step, item in enumerate(items)
    ]
    (folder / "dataset").mkdir()
    write_text(folder / "dataset" / "load.csv", "\n".join(["item_id,user_id,timestamp", *rows, ""]))
    arguments = [
        *("--config_file", str(ROOT / "code/overall/LLM_ddp.yaml"), "--dataset", "load"),
        *("--model", "pop", "--run_name", "run", "--show_progress", "False"),
    ]
    if run_program(train, arguments):
        raise RuntimeError("the small run failed; it says why above.")
    return folder / "saved" / "run"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Write the rows as Markdown."""
    lines = [
        "| clients | requests/s | p50 ms | p99 ms | requests a batch |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['clients']} | {row['requests_per_s']:.1f} | {row['p50_ms']:.1f} | "
            f"{row['p99_ms']:.1f} | {row['requests_per_batch']:.1f} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="folder of a finished run")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], metavar="N")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of clients")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    add_flag(parser, "--tiny", "make a small run and load it for a second")
    options = parser.parse_args(argv)
    if options.run is None and not options.tiny:
        parser.error("name a run with --run, or take --tiny True")
    with ExitStack() as stack:
        if options.tiny:
            options.seconds = 1.0
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stack.enter_context(chdir(folder))
            address = stack.enter_context(serving_here(make_tiny_run(folder)))
        else:
            address = stack.enter_context(serving(options.run))
        load(address, 1, min(1.0, options.seconds))  # warm
        rows = [load(address, clients, options.seconds) for clients in options.clients]
    about = {"run": str(options.run or "tiny"), "cores": os.cpu_count(), "versions": versions()}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "serve.json", {**about, "seconds": options.seconds, "rows": rows})
    write_text(options.out / "serve.md", table(rows))
    sys.stdout.write(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
