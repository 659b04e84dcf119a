"""Dockerfile and compose file: linters pass, what they name exists, the server takes its options."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from hsft.finished.serve import KEY_VARIABLE
from hsft.programs import recommend
from tests.helpers import ROOT


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
