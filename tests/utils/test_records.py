"""Records in the user's cache folder: kept, made again when anything about them has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hsft.utils import records
from hsft.utils.records import records_folder, remember


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of records."""
    monkeypatch.setattr(records.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hsft"


class Maker:
    """Counts how often it makes its value."""

    def __init__(self, value: Any) -> None:
        self.value, self.calls = value, 0

    def __call__(self) -> Any:
        self.calls += 1
        return self.value


def test_a_record_is_made_once_for_what_it_depends_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Maker({"sizes": (1, 2)})
    for _ in range(2):
        # A tuple reads as a list, the first time too.
        assert remember("sizes", {"layers": 2}, make) == {"sizes": [1, 2]}
    assert make.calls == 1
    remember("sizes", {"layers": 3}, make)
    remember("widths", {"layers": 2}, make)
    assert make.calls == 3
    monkeypatch.setattr(records, "_version", lambda package: "99")
    remember("sizes", {"layers": 2}, make)
    monkeypatch.setattr(records, "_code", lambda: "other")
    remember("sizes", {"layers": 2}, make)
    assert make.calls == 5
    assert len(list(folder.iterdir())) == 5


def test_nothing_is_kept_of_what_depends_on_something_unknown(folder: Path) -> None:
    make = Maker(1)
    assert [remember("sizes", None, make) for _ in range(2)] == [1, 1]
    assert make.calls == 2
    assert not folder.exists()


def test_nothing_is_kept_of_a_refusal(folder: Path) -> None:
    def refuse() -> None:
        raise ValueError("no such layer")

    for _ in range(2):
        with pytest.raises(ValueError, match="no such layer"):
            remember("sizes", {}, refuse)
    assert not folder.exists()


def rewrite(**changes: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


SPOILT: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "a list": lambda path: path.write_text("[]"),
    "another value": rewrite(value=2),
    "another's": rewrite(key={}),
    "a pickle": lambda path: path.write_bytes(b"cbuiltins\nexec\n(S'raise SystemExit'\ntR."),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_file_is_made_again(folder: Path, case: str) -> None:
    make = Maker(1)
    remember("sizes", {}, make)
    (path,) = folder.iterdir()
    SPOILT[case](path)
    assert [remember("sizes", {}, make) for _ in range(2)] == [1, 1]
    assert make.calls == 2


def test_a_folder_that_cannot_be_written_is_no_error(folder: Path) -> None:
    folder.write_text("a file in the folder's place")
    make = Maker(1)
    assert [remember("sizes", {}, make) for _ in range(2)] == [1, 1]
    assert make.calls == 2


def test_where_records_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(records.sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert records_folder() == Path("/cache/hsft")
    # By the specification a relative path is none.
    for value in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert records_folder() == tmp_path / ".cache" / "hsft"
    monkeypatch.setattr(records.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert records_folder() == Path("/local/hsft")
