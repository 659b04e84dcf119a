"""Dockerfile and compose file: linters pass, what they name exists, the server serves so confined."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from hsft.finished.serve import KEY_VARIABLE
from hsft.programs import recommend
from tests.conftest import Project
from tests.container import missing_tool, start
from tests.helpers import ROOT, free_port

KEY = "a-key-of-sixteen-characters"


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines if line.strip()]


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "compose.yaml").read_text()))


@pytest.mark.parametrize(
    "command",
    [
        ["hadolint", "Dockerfile"],
        ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml"],
    ],
    ids=lambda command: str(command[0]),
)
def test_linters_find_nothing(command: list[str]) -> None:
    program = Path(sys.executable).with_name(command[0])
    if not program.exists():
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_copies_what_there_is_and_what_is_not_ignored() -> None:
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = [words.split()[:-1] for name, words in instructions() if name == "COPY"]
    sources = {source for words in copied for source in words}
    assert sources == kept
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_does_not_run_as_root_and_names_the_server(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM"
    assert set(names) <= {
        *("FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK"),
        "ENTRYPOINT",
    }
    by_name = dict(instructions())
    assert by_name["USER"] == "1000"
    assert any("useradd" in words and "--uid 1000" in words for _, words in instructions())
    assert names.index("USER") < names.index("ENTRYPOINT")
    hsft, serve, *options = json.loads(by_name["ENTRYPOINT"])
    assert (hsft, serve) == ("hsft", "serve")
    assert by_name["EXPOSE"] in options
    assert f":{by_name['EXPOSE']}/health" in by_name["HEALTHCHECK"]
    with pytest.raises(SystemExit):
        recommend.serve(["--help"])
    described = capsys.readouterr().out
    names = [option for option in options if option.startswith("--")]
    assert names == ["--host", "--port"]
    assert all(f"  {name} " in described for name in names)


def test_the_compose_file_wants_a_key_and_stays_on_this_machine() -> None:
    services = compose()["services"]
    assert set(services) == {"serve", "serve-cuda"}
    arguments = {name for name, words in instructions() if name == "ARG"}
    assert arguments == {"ARG"}
    (argument,) = [words.partition("=")[0] for name, words in instructions() if name == "ARG"]
    assert set(services["serve-cuda"]["build"]["args"]) == {argument}
    for service in services.values():
        assert service["environment"][KEY_VARIABLE].startswith(f"${{{KEY_VARIABLE}:?")
        assert service["ports"] == ["127.0.0.1:8000:8000"]
        assert service["volumes"] == [".:/data:ro"]
        assert service["command"][0] == "--run"
        assert service["read_only"]


def in_compose(text: str, **values: str) -> str:
    """Fill in `${NAME:-default}` and `${NAME:?error}`, as compose does."""
    return re.sub(
        r"\$\{(\w+):([-?])([^}]*)\}",
        lambda found: values.get(found[1]) or (found[3] if found[2] == "-" else ""),
        text,
    )


def ask(port: int, path: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_the_server_serves_as_compose_confines_it(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Read-only root and data, uid 1000, no capability: recommend, encode a new item, stop."""
    lacking = missing_tool()
    if lacking:
        pytest.skip(lacking)
    shutil.copytree(project.llama, project.root / "llm")
    llms = ("--user_pretrain_dir", "llm", "--item_pretrain_dir", "llm")
    code, _, err = project.run("--val_only", "True", "--run_name", "run", *llms)
    assert code == 0, err
    for path in (project.root, *project.root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    files = sorted(project.root.rglob("*"))

    by_name = dict(instructions())
    service, port = compose()["services"]["serve"], free_port()
    assert service["volumes"] == [f".:{by_name['WORKDIR']}:ro"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    given = {"RUN": "saved/run", KEY_VARIABLE: KEY}
    images = [words.split() for name, words in instructions() if name == "ENV"]
    environment = dict(pair.split("=", 1) for words in images for pair in words)
    environment |= {k: in_compose(v, **given) for k, v in service["environment"].items()}
    environment |= {"PYTHONPATH": str(ROOT / "code"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
    listen = by_name["EXPOSE"], str(port)
    words = [str(port) if word == listen[0] else word for word in json.loads(by_name["ENTRYPOINT"])]
    words = [sys.executable, "-m", *words, *(in_compose(w, **given) for w in service["command"])]
    confined = {
        "root": tmp_path_factory.mktemp("root"),
        "volumes": {by_name["WORKDIR"]: project.root},
        "tmpfs": service["tmpfs"],
        "environment": environment,
        "folder": by_name["WORKDIR"],
        "user": in_compose(service["user"]),
        "log": tmp_path_factory.mktemp("log") / "log.txt",
    }
    log: Path = confined["log"]
    writable = "test $(id -u) = 1000; ! touch /x /data/x; touch /tmp/x $HOME/x"
    assert start(["sh", "-ec", writable], **confined).wait(60) == 0, log.read_text()

    server = start(words, **confined)
    try:
        health = json.loads(by_name["HEALTHCHECK"].partition("CMD ")[2])
        health = [sys.executable, *health[1:-1], health[-1].replace(*map(":{}/".format, listen))]
        while subprocess.run(health, capture_output=True).returncode:
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        (model,) = ask(port, "/recommend", {"history": ["i1", "i2"], "topk": 3})["models"]
        assert len(model["items"]) == 3
        new = {"item_id": "n1", "text": {"title": "item 3", "tag": "1"}}
        assert ask(port, "/items", {"items": [new]}) == {"added": 1, "items": 21}
        psutil.Process(server.pid).children()[0].send_signal(signal.SIGTERM)
        assert server.wait(60) == 143
    finally:
        server.kill()
        server.wait()
    shown = log.read_text()
    assert "Traceback" not in shown
    assert "Permission denied" not in shown
    assert "Read-only" not in shown
    assert sorted(project.root.rglob("*")) == files
