"""Properties of the readers, on inputs that hypothesis makes up."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save as save_tensors

from hsft.config.help import dump_config
from hsft.config.loader import load_config, parse_command_line, read_yaml_file, read_yaml_text
from hsft.config.schema import Config
from hsft.data.cache import encode_ids, open_cache, save_cache
from hsft.data.interactions import read_interactions
from hsft.data.item_text import read_item_texts
from hsft.utils.errors import InputError, one_line

# The same examples every time; the fuzz targets look for new ones.
quick = settings(
    derandomize=True,
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

printable = st.characters(exclude_categories=["Cc", "Cs"])
ids = st.one_of(
    st.integers(0, 30).map(str),
    st.integers(0, 30).map("0{}".format),
    st.text(printable, min_size=1, max_size=6).filter(lambda text: text == text.strip()),
)
# Within one unit of time, or where there is none: see the refusal of mixed units.
times = st.one_of(
    st.lists(st.integers(-50, 50), min_size=1, max_size=40),
    st.lists(st.integers(-(2**63), 900_000_000), min_size=1, max_size=40),
    st.lists(st.integers(1_600_000_000_000, 1_600_000_000_009), min_size=1, max_size=40),
    st.lists(st.integers(5 * 10**18, 2**63 - 1), min_size=1, max_size=40),
)


@st.composite
def interaction_rows(draw: st.DrawFn) -> list[tuple[str, str, int]]:
    stamps = draw(times)
    size = len(stamps)
    items = draw(st.lists(ids, min_size=size, max_size=size))
    users = draw(st.lists(st.one_of(st.just("u"), ids), min_size=size, max_size=size))
    return list(zip(items, users, stamps, strict=True))


def write_csv(
    path: Path, header: list[str], rows: list[list[str]], quoting: Any, end: str, mark: bool
) -> None:
    buffer = io.StringIO()
    writer = csv.writer(buffer, quoting=quoting, lineterminator=end)
    writer.writerow(header)
    writer.writerows(rows)
    path.write_bytes(buffer.getvalue().encode("utf-8-sig" if mark else "utf-8"))


styles = st.tuples(
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)


@quick
@given(
    rows=interaction_rows(),
    style=styles,
    columns=st.permutations(["item_id", "user_id", "timestamp", "other"]),
    extra=st.booleans(),
)
def test_interactions_are_grouped_and_sorted_as_plain_python_does(
    tmp_path: Path,
    rows: list[tuple[str, str, int]],
    style: tuple[Any, str, bool],
    columns: list[str],
    extra: bool,
) -> None:
    header = [name for name in columns if extra or name != "other"]
    written = [
        [{"item_id": i, "user_id": u, "timestamp": str(t), "other": "é,x"}[name] for name in header]
        for i, u, t in rows
    ]
    write_csv(tmp_path / "d.csv", header, written, *style)
    read = read_interactions(tmp_path / "d.csv")

    expected: dict[str, list[tuple[str, int]]] = {}
    for item, user, stamp in rows:
        expected.setdefault(user, []).append((item, stamp))
    assert list(read.user_ids) == list(expected)
    assert list(read.item_ids[1:]) == list(dict.fromkeys(item for item, _, _ in rows))
    for number, history in enumerate(expected.values()):
        owned = slice(read.offsets[number], read.offsets[number + 1])
        actual = zip(read.item_ids[read.items[owned]], read.timestamps[owned].tolist(), strict=True)
        assert list(actual) == sorted(history, key=lambda pair: pair[1])


@quick
@given(
    names=st.lists(ids, min_size=1, max_size=8, unique=True),
    texts=st.lists(
        # Python 3.11's csv.writer leaves a carriage return unquoted.
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r")),
        min_size=8,
    ),
    style=styles,
)
def test_item_texts_come_back(
    tmp_path: Path, names: list[str], texts: list[str], style: tuple[Any, str, bool]
) -> None:
    rows = [[name, text] for name, text in zip(names, texts, strict=False)]
    write_csv(tmp_path / "i.csv", ["item_id", "title"], rows, *style)
    read = read_item_texts(tmp_path / "i.csv", ["title"], "P ")
    assert read.item_ids == names
    assert read.texts == [
        f"P title: {text}" if text and text.lower() != "nan" else "" for _, text in rows
    ]


READERS: dict[str, tuple[Callable[[Path], object], bytes]] = {
    "interactions": (
        read_interactions,
        b"item_id,user_id,timestamp\n" + b"".join(b"i%d,u1,%d\n" % (n, n) for n in range(9)),
    ),
    "information": (
        lambda path: read_item_texts(path, ["title"], ""),
        b'item_id,title\ni1,A film\ni2,"Another, longer"\n',
    ),
    "yaml": (read_yaml_file, b"epochs: 3\ntopk: [5, 10]  # two\ndataset: 'name'\n"),
    "cache": (
        open_cache,
        save_tensors({"embeddings": torch.ones(2, 99), "item_ids": encode_ids(["a", "b"])}),
    ),
}


@pytest.mark.parametrize("kind", READERS)
def test_any_bytes_in_a_file_are_read_or_refused(tmp_path: Path, kind: str) -> None:
    read, whole = READERS[kind]
    path = tmp_path / "file.safetensors"
    outcomes: Counter[str] = Counter()

    @quick
    @given(
        at=st.integers(0, len(whole)), piece=st.binary(max_size=9), overwritten=st.integers(0, 9)
    )
    def change(at: int, piece: bytes, overwritten: int) -> None:
        path.write_bytes(whole[:at] + piece + whole[at + overwritten :])
        try:
            read(path)
        except InputError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1

    change()
    # Otherwise it would only ever meet one of them.
    assert set(outcomes) == {"read", "refused"}


@quick
@given(text=st.text(max_size=200))
def test_any_text_is_yaml_or_refused(text: str) -> None:
    with suppress(InputError):
        read_yaml_text(text, "here")


yamlish = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner)
    ),
    max_leaves=8,
)


@quick
@given(values=st.dictionaries(st.sampled_from(sorted(Config.model_fields)), yamlish, max_size=5))
def test_any_values_are_a_configuration_or_refused(values: dict[str, Any]) -> None:
    with suppress(InputError):
        load_config((), values)


words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(sorted(Config.model_fields)).map("--{}".format),
    st.sampled_from(["--optim_args.learning_rate", "--=", "--.", "[1, 2", "1e-4", "None", "-h"]),
)


@quick
@given(argv=st.lists(words, max_size=8))
def test_any_command_line_is_read_or_refused(argv: list[str]) -> None:
    with suppress(InputError):
        line = parse_command_line(argv)
        load_config((), line.overrides)


plain_text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
good_values: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**31 - 1),
    "dataset": st.one_of(
        st.none(), st.sampled_from(["010", "1e5", "true", "null", "é", "a b", "~"])
    ),
    "checkpoint_dir": plain_text,
    "item_prompt": plain_text,
    "run_name": st.one_of(st.none(), plain_text),
    "text_keys": st.lists(plain_text, min_size=1, max_size=4, unique=True),
    "use_qlora": st.booleans(),
    "qlora_dropout": st.floats(0, 0.999),
    "clip_grad_norm": st.floats(0, 1e300),
    "optim_args": st.fixed_dictionaries({"learning_rate": st.floats(1e-300, 10)}),
    "sasrec": st.fixed_dictionaries({"dropout": st.floats(0, 0.99)}),
    "epochs": st.integers(1, 100_000),
}
configurations = st.fixed_dictionaries({}, optional=good_values)


@quick
@given(values=configurations)
def test_a_dumped_configuration_reads_back_the_same(tmp_path: Path, values: dict[str, Any]) -> None:
    config, _ = load_config((), values)
    (tmp_path / "c.yaml").write_text(dump_config(config), encoding="utf-8", newline="")
    again, warnings = load_config([tmp_path / "c.yaml"])
    assert again == config
    assert not warnings


@quick
@given(values=configurations)
def test_text_given_on_the_command_line_is_taken_as_it_is(values: dict[str, Any]) -> None:
    texts = {
        key: value
        for key, value in values.items()
        if isinstance(value, str) and value not in ("null", "None", "~")
    }
    line = parse_command_line([f"--{key}={value}" for key, value in texts.items()])
    config, _ = load_config((), line.overrides)
    assert {key: getattr(config, key) for key in texts} == texts


@quick
@given(
    names=st.lists(
        st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=9, unique=True
    ),
    dim=st.integers(1, 5),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    data=st.data(),
)
def test_a_saved_cache_opens_the_same(
    tmp_path: Path, names: list[str], dim: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    values = data.draw(
        arrays.arrays(np.float32, (len(names), dim), elements=st.floats(-60000, 60000, width=32))
    )
    matrix = torch.from_numpy(values).to(dtype)
    save_cache(tmp_path / "c.safetensors", names, matrix, {"model": "é"})
    cache = open_cache(tmp_path / "c.safetensors")
    assert cache.item_ids == names
    assert torch.equal(cache.embeddings, matrix)
    assert cache.metadata["model"] == "é"
    assert cache.rows_of(names[::-1]).tolist() == list(range(len(names)))[::-1]


@pytest.fixture(scope="module")
def cache_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("caches")
    save_cache(folder / "n", ["a", "b"], torch.ones(2, 3), {})
    torch.save({"a": torch.ones(3), "b": torch.ones(3)}, folder / "z")
    torch.save({"a": torch.ones(3)}, folder / "o", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(quick, max_examples=400)
@given(
    kind=st.sampled_from(["n", "z", "o"]),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
    cut=st.one_of(st.none(), st.integers(0, 10**6)),
)
def test_a_cache_with_changed_bytes_is_read_or_refused(
    tmp_path: Path,
    cache_files: dict[str, bytes],
    kind: str,
    edits: list[tuple[int, int]],
    cut: int | None,
) -> None:
    content = bytearray(cache_files[kind])
    for position, value in edits:
        content[position % len(content)] = value
    path = tmp_path / "c.pt"
    path.write_bytes(bytes(content if cut is None else content[: cut % len(content)]))
    with suppress(InputError):
        cache = open_cache(path)
        assert cache.embeddings.shape[0] == len(cache.item_ids)
        assert cache.embeddings.isfinite().all()


@quick
@given(text=st.text(), limit=st.integers(10, 60))
def test_messages_are_one_printable_line(text: str, limit: int) -> None:
    line = one_line(text, limit)
    assert line.isprintable()
    line.encode("utf-8")
    if text.isprintable() and len(text) <= limit:
        assert line == text
