"""The card of exported item and user vectors: what they are, how to read them, what an index loses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from huggingface_hub import ModelCardData

from hsft.config import Config
from hsft.report.compare import Comparison
from hsft.report.comparison_files import markdown
from hsft.report.model_card import TAGS, card, plain_text

_KINDS = {
    "flat": "It compares all items (`flat`), so it returns what exact search does.",
    "hnsw": "It is a graph of near items (`hnsw`), searched with {settings}.",
    "ivf": "It compares the items of the nearest cells (`ivf`), searched with {settings}.",
}


@dataclass(frozen=True)
class MeasuredIndex:
    """An index and what was measured on it.

    Attributes:
        kind: `flat`, `hnsw` or `ivf`.
        settings: how widely it searches, under FAISS's names.
        recall: share of the 10 items of exact search that it returns, mean over users.
        users: number of these.
        build_seconds: wall time.
        megabytes: size of the file, in units of 10^6 bytes.
    """

    kind: str
    settings: Mapping[str, int]
    recall: float
    users: int
    build_seconds: float
    megabytes: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for a JSON file, the recall under its metric's name."""
        fields = asdict(self)
        return {"kind": fields.pop("kind"), "recall@10": fields.pop("recall"), **fields}


@dataclass(frozen=True)
class ExportedEmbeddings:
    """What a card tells of.

    Attributes:
        name: the run's name.
        model: which of its models the vectors are of.
        config: the run's configuration.
        table: the rows of the run's `result.json`.
        similarity: `cosine` or `dot`.
        files: `safetensors` or `parquet`.
        dtype: number type of the vectors.
        items, users: numbers of vectors.
        dim: D.
        index: of the items, None without one.
    """

    name: str
    model: str
    config: Config
    table: Comparison
    similarity: str
    files: str
    dtype: str
    items: int
    users: int
    dim: int
    index: MeasuredIndex | None


def embeddings_card(exported: ExportedEmbeddings) -> str:
    """Return a `README.md`: YAML header, results, index, how to read the files, limits."""
    metadata = ModelCardData(tags=[*TAGS, "embeddings"], datasets=[str(exported.config.dataset)])
    results = (
        f"{markdown(exported.table)}\nThese were measured in the run by exact search over all items, with "
        f"each user's held-out item left out of the history.\n"
    )
    return card(
        metadata,
        f"{plain_text(exported.name)}: embeddings",
        _summary(exported),
        {
            "Results": results,
            "Index": "" if exported.index is None else f"{_index(exported.index)}\n",
            "Loading": f"```python\n{_code(exported)}```\n",
            "Limits": _limits(exported),
        },
    )


def _summary(exported: ExportedEmbeddings) -> str:
    unit = ", both of unit length" if exported.similarity == "cosine" else ""
    return (
        f"Vectors of {exported.items} items and {exported.users} users of "
        f"{plain_text(exported.config.dataset)}, of {exported.dim} dimensions in {exported.dtype}, by "
        f"the model {exported.model} of this run. The inner product of a user's vector and an item's "
        f"is the model's score{unit}."
    )


def _index(index: MeasuredIndex) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in index.settings.items())
    return (
        f"`items.faiss` is a FAISS index over the items' vectors, in float32; its row r is row r of "
        f"the items. {_KINDS[index.kind].format(settings=settings)} Of the 10 items of exact search it "
        f"returns {index.recall:.4f} (recall@10, {index.users} users of the run). It was made in "
        f"{index.build_seconds:.1f} s and has {index.megabytes:.1f} MB."
    )


def _code(exported: ExportedEmbeddings) -> str:
    if exported.files == "parquet":
        lines = [
            "import numpy as np",
            "import pyarrow.parquet as pq",
            "",
            "",
            "def read(name):",
            '    table = pq.read_table(f"{name}s.parquet")',
            '    flat = table["embedding"].combine_chunks().flatten().to_numpy()',
            '    ids = table[f"{name}_id"].to_pylist()',
            "    return ids, flat.reshape(len(ids), -1)",
        ]
    else:
        lines = [
            "import json",
            "",
            "import numpy as np",
            "from safetensors.numpy import load_file",
            "",
            "",
            "def read(name):",
            '    tensors = load_file(f"{name}s.safetensors")',
            '    return json.loads(tensors[f"{name}_ids"].tobytes()), tensors["embeddings"]',
        ]
    lines += [
        "",
        "",
        'item_ids, items = read("item")',
        'user_ids, users = read("user")',
        "user = users[0].astype(np.float32)",
        "best = np.argsort(-(items.astype(np.float32) @ user))[:10]",
        "print(user_ids[0], [item_ids[row] for row in best])",
    ]
    if exported.index is not None:
        lines += [
            "",
            "import faiss",
            "",
            'index = faiss.read_index("items.faiss")',
            "scores, rows = index.search(user[None], 10)",
            "print(user_ids[0], [item_ids[row] for row in rows[0]])",
        ]
    return "".join(f"{line}\n" for line in lines)


def _limits(exported: ExportedEmbeddings) -> str:
    lines = [
        "A user's vector is of all the user's items, those included that were held out to measure the "
        "model: to measure again with these vectors would leak.",
        "Items of the history are among a user's nearest; leave them out after the search.",
        "New interactions change a user's vector, and training the model again changes all of them.",
    ]
    if exported.dtype != "float32":
        lines.append("The rounding of float16 can swap items of nearly equal scores.")
    return "".join(f"- {line}\n" for line in lines)
