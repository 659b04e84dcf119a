"""Item caches from elsewhere: a NumPy matrix with an id list, and parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hsft.data.cache import open_cache
from hsft.utils.errors import InputError
from tests.conftest import Project

IDS = ["i3", "i0", "7"]
MATRIX = np.arange(12, dtype=np.float32).reshape(3, 4) / 7


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_matrix_and_its_ids(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "vectors.npy"
    np.save(path, MATRIX.astype(dtype))
    (tmp_path / "vectors.txt").write_text("\n".join(IDS) + "\n")
    cache = open_cache(path)
    assert cache.item_ids == IDS
    assert cache.dim == 4
    assert cache.embeddings.dtype == (torch.float16 if dtype == np.float16 else torch.float32)
    torch.testing.assert_close(
        cache.embeddings.float(), torch.from_numpy(MATRIX.astype(dtype)).float()
    )
    # A JSON list goes before lines; numbers are ids too.
    (tmp_path / "vectors.json").write_text(json.dumps(["a", "b", 7]))
    assert open_cache(path).item_ids == ["a", "b", "7"]


@pytest.mark.parametrize("end", [".txt", ".json"])
def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path: Path, end: str) -> None:
    path = tmp_path / "vectors.npy"
    np.save(path, MATRIX)
    text = "\r\n".join(IDS) + "\r\n" if end == ".txt" else json.dumps(IDS)
    path.with_suffix(end).write_bytes(text.encode("utf-8-sig"))
    assert open_cache(path).item_ids == IDS


@pytest.mark.parametrize(
    ("matrix", "ids", "sentence"),
    [
        (MATRIX, None, "one a line in vectors.txt, or a JSON list in vectors.json"),
        (MATRIX, "a\nb\n", "2 ids for a matrix of shape"),
        (MATRIX, "a\nb\na\n", "names the item 'a' twice"),
        (MATRIX.astype(int), "a\nb\nc\n", "holds int64"),
        (MATRIX[:, 0], "a\nb\nc\n", "for a matrix of shape"),
        (MATRIX + np.array([[0], [np.inf], [0]]), "a\nb\nc\n", "'b' holds NaN or infinity"),
        (np.array([object()]), "a\n", "is no NumPy file of numbers"),
    ],
)
def test_a_bad_matrix_is_refused(
    tmp_path: Path, matrix: np.ndarray, ids: str | None, sentence: str
) -> None:
    path = tmp_path / "vectors.npy"
    np.save(path, matrix, allow_pickle=True)
    if ids is not None:
        (tmp_path / "vectors.txt").write_text(ids)
    with pytest.raises(InputError, match=sentence):
        open_cache(path)


def write_parquet(path: Path, **columns: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    return path


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    for kind in (pa.list_(pa.float32()), pa.list_(pa.float64(), 4), pa.large_list(pa.float32())):
        vectors = pa.array(MATRIX.tolist(), kind)
        cache = open_cache(write_parquet(tmp_path / "a.parquet", item_id=IDS, vector=vectors))
        assert cache.item_ids == IDS
        torch.testing.assert_close(cache.embeddings, torch.from_numpy(MATRIX))
    numbered = open_cache(write_parquet(tmp_path / "b.parquet", vector=vectors, item=[1, 2, 3]))
    assert numbered.item_ids == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"item_id": IDS}, "it needs two"),
        ({"item_id": IDS, "v": [[1.0], [1.0, 2.0], [1.0]]}, "vectors of different lengths"),
        ({"item_id": IDS, "v": [[1.0], [None], [1.0]]}, "with gaps"),
        ({"item_id": ["a", None, "b"], "v": [[1.0], [2.0], [1.0]]}, "rows without an id"),
        ({"item_id": IDS, "v": [["x"], ["y"], ["z"]]}, "holds object"),
    ],
)
def test_bad_parquet_is_refused(tmp_path: Path, columns: dict[str, Any], sentence: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", **columns)
    with pytest.raises(InputError, match=sentence):
        open_cache(path)


def test_parquet_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and so on")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match="pip install pyarrow"):
        open_cache(path)


def test_a_matrix_of_any_width_is_trained_on(project: Project) -> None:
    rng = np.random.default_rng(0)
    np.save("vectors.npy", rng.standard_normal((20, 10)))
    Path("vectors.txt").write_text("".join(f"i{n}\n" for n in range(20)))
    code, _, err = project.run(
        *("--item_cache_path", "vectors.npy", "--item_adapter", "linear", "--epochs", "1"),
        *("--use_qlora", "True", "--qlora_quant_type", "none", "--run_name", "run"),
    )
    assert code == 0, err
    result = json.loads(Path("saved/run/result.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["untrained", "fine-tuned"]
