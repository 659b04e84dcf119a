"""Item caches: one matrix of embeddings and a list of ids, memory-mapped from disk.

The native file is safetensors: tensor `embeddings` [n, D] (float16, bfloat16 or float32), tensor
`item_ids` uint8 (the ids as a UTF-8 JSON list), and metadata saying how it was made. `.pt` files
holding `{item_id: tensor}`, as the published HSFT writes them, are read too, and so are a `.npy`
matrix with its ids in a `.txt` or `.json` file beside it, and parquet with an id and a vector a row.
"""

from __future__ import annotations

import json
import mmap
import os
import pickle
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from hsft.data.files import find_cache
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import atomic_path, is_file

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_SAFETENSORS_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
_NAMES_IN_FILES = {code: _DTYPE_NAMES[dtype] for dtype, code in _SAFETENSORS_NAMES.items()}
_BYTES_KEPT_MAPPED = 64 << 20
FORMAT = "hsft-item-cache-1"


@dataclass(frozen=True)
class ItemCache:
    """Embeddings of items.

    Attributes:
        item_ids: str [n].
        embeddings: [n, D] float16, bfloat16 or float32; row i belongs to `item_ids[i]`. A native
            file's matrix is a view of the memory-mapped file, shared by all processes.
        metadata: how the cache was made (model, text_keys, prompt, pooling, max_text_length,
            fingerprint of the texts); empty for `.pt` files.
        path: the file read, None for a cache made in memory.
    """

    item_ids: list[str]
    embeddings: torch.Tensor
    metadata: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    @property
    def dim(self) -> int:
        """Embedding dimension D."""
        return self.embeddings.shape[1]

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def settings(self) -> dict[str, str]:
        """The metadata without where the cache was made, on which no result depends."""
        places = ("model_folder", "information")
        return {name: text for name, text in self.metadata.items() if name not in places}

    def rows_of(self, item_ids: Sequence[str] | np.ndarray) -> np.ndarray:
        """Return the row of each id, -1 where the cache has none: int64 [len(item_ids)]."""
        rows = {item: row for row, item in enumerate(self.item_ids)}
        asked = (rows.get(item, -1) for item in item_ids)
        return np.fromiter(asked, dtype=np.int64, count=len(item_ids))


def is_native(path: Path) -> bool:
    """Say whether a file's first bytes are those of a native cache; else it is taken for a `.pt`.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(16)
    except OSError as error:
        raise InputError(
            f"item cache {path} cannot be read: {error.strerror}; change --item_cache_path."
        ) from error
    # A safetensors file begins with the length of its JSON header and then the header's brace.
    return len(head) >= 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < 1 << 30


def open_cache(path: str | Path) -> ItemCache:
    """Open a cache file: native, `.pt`, `.npy` or parquet, told apart by content.

    Raises:
        InputError: the file is missing, damaged, of another kind, or holds NaN or infinity.
    """
    path = find_cache(path)
    cache = _reader(path)(path)
    _refuse_bad_values(cache, path)
    return cache


def _reader(path: Path) -> Callable[[Path], ItemCache]:
    if is_native(path):
        return _open_native
    with path.open("rb") as stream:
        head = stream.read(6)
    if head == b"\x93NUMPY":
        return _open_npy
    return _open_parquet if head[:4] == b"PAR1" else _open_pt


def read_header(path: str | Path) -> tuple[int, int, str]:
    """Read a native cache's size without its numbers.

    Returns:
        (items n, dimensions D, name of the number type).

    Raises:
        InputError: the file is missing, damaged or no native cache.
    """
    path = find_cache(path)
    try:
        with safe_open(path, framework="pt") as file:
            part = file.get_slice("embeddings")
            items, dim = part.get_shape()
            dtype = _NAMES_IN_FILES[part.get_dtype()]
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"{path} is no native item cache ({one_line(error, 120)}); make it with item_caching.py."
        ) from error
    return items, dim, dtype


def save_cache(
    path: str | Path,
    item_ids: Sequence[str],
    embeddings: torch.Tensor,
    metadata: Mapping[str, str],
) -> None:
    """Write a native cache file atomically.

    Args:
        path: target; its name should end in `.safetensors`.
        item_ids: n ids, none repeated.
        embeddings: [n, D], float16, bfloat16 or float32, on the CPU.
        metadata: text -> text; `format` and `dtype` are added.
    """
    with atomic_path(path) as temporary:
        write_cache(
            temporary,
            item_ids,
            embeddings.shape[1],
            embeddings.dtype,
            metadata,
            [(np.arange(len(embeddings)), embeddings)],
        )


def write_cache(
    path: Path,
    item_ids: Sequence[str],
    dim: int,
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    blocks: Iterable[tuple[np.ndarray, torch.Tensor]],
    ids_name: str = "item_ids",
) -> None:
    """Write a native cache file block by block, so that the matrix is never in memory as a whole.

    The same content gives the same bytes, whatever the blocks (safetensors' own writer orders
    metadata at random).

    Args:
        path: file to write; the caller renames it when it is complete.
        item_ids: n ids, none repeated.
        dim: D.
        dtype: float16, bfloat16 or float32.
        metadata: text -> text; `format` and `dtype` are added.
        blocks: (rows int64 [b], embeddings [b, D] of `dtype` on the CPU), each row in one of them.
        ids_name: name of the ids in the file, another than `item_ids` for vectors of something else.

    Raises:
        OSError: the disk is full or the file cannot be written.
    """
    ids = encode_ids(item_ids).numpy().tobytes()
    matrix_bytes = len(item_ids) * dim * dtype.itemsize
    header = _file_header(len(item_ids), dim, dtype, len(ids), metadata, ids_name)
    start = len(header)
    with path.open("w+b") as file:
        file.write(header)
        file.flush()
        _allocate(file.fileno(), start + matrix_bytes)
        if matrix_bytes:
            _fill(file.fileno(), start, len(item_ids), dim, dtype, blocks)
        file.seek(start + matrix_bytes)
        file.write(ids)
        file.flush()
        os.fsync(file.fileno())


def _file_header(
    items: int,
    dim: int,
    dtype: torch.dtype,
    id_bytes: int,
    metadata: Mapping[str, str],
    ids_name: str,
) -> bytes:
    """Return a safetensors file's bytes before its data: a length, and JSON of that length."""
    matrix_bytes = items * dim * dtype.itemsize
    full = {**metadata, "format": FORMAT, "dtype": _DTYPE_NAMES[dtype]}
    header: dict[str, Any] = {
        "__metadata__": dict(sorted(full.items())),
        "embeddings": {
            "dtype": _SAFETENSORS_NAMES[dtype],
            "shape": [items, dim],
            "data_offsets": [0, matrix_bytes],
        },
        ids_name: {
            "dtype": "U8",
            "shape": [id_bytes],
            "data_offsets": [matrix_bytes, matrix_bytes + id_bytes],
        },
    }
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    # The format wants the data to begin at a multiple of 8 bytes.
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _allocate(file: int, size: int) -> None:
    # On a full disk, writing to a mapped file that has holes would kill the process.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _fill(
    file: int,
    start: int,
    count: int,
    dim: int,
    dtype: torch.dtype,
    blocks: Iterable[tuple[np.ndarray, torch.Tensor]],
) -> None:
    kind = {2: (np.int16, torch.int16), 4: (np.int32, torch.int32)}[dtype.itemsize]
    mapped = mmap.mmap(file, start + count * dim * dtype.itemsize)
    matrix = np.frombuffer(mapped, kind[0], count * dim, start).reshape(count, dim)
    written = 0
    for rows, embeddings in blocks:
        matrix[rows] = embeddings.contiguous().view(kind[1]).numpy()
        written += embeddings.nbytes
        if written >= _BYTES_KEPT_MAPPED:
            written = 0
            # Written pages stay with the system; this process need not hold them.
            mapped.madvise(mmap.MADV_DONTNEED)
    mapped.flush()
    del matrix
    mapped.close()


def encode_ids(item_ids: Sequence[str]) -> torch.Tensor:
    """Return the ids as the UTF-8 bytes of a JSON list: uint8 [bytes]."""
    encoded = json.dumps(list(item_ids), ensure_ascii=False).encode("utf-8")
    return torch.frombuffer(bytearray(encoded), dtype=torch.uint8)


def ids_fingerprint(item_ids: np.ndarray) -> str:
    """Return the SHA-256 of ids, str [n], in their order, in hexadecimal digits."""
    return sha256(encode_ids(item_ids.tolist()).numpy().tobytes()).hexdigest()


def _open_native(path: Path) -> ItemCache:
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            metadata = dict(file.metadata() or {})
            if not {"embeddings", "item_ids"} <= names:
                raise InputError(
                    f"{path} is a safetensors file but no item cache: it holds "
                    f"{', '.join(sorted(names)[:5]) or 'nothing'}; name a file that "
                    f"item_caching.py wrote."
                )
            embeddings = file.get_tensor("embeddings")
            encoded = file.get_tensor("item_ids")
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise InputError(
            f"item cache {path} is damaged ({one_line(error, 120)}); make it again with "
            f"item_caching.py."
        ) from error
    item_ids = _decode_ids(encoded, path)
    _check_shape(path, item_ids, embeddings)
    return ItemCache(item_ids, embeddings, metadata, path)


def _decode_ids(encoded: torch.Tensor, path: Path) -> list[str]:
    try:
        if encoded.dtype != torch.uint8:
            raise ValueError(f"stored as {encoded.dtype}")
        item_ids = json.loads(encoded.numpy().tobytes().decode("utf-8"))
        if not isinstance(item_ids, list) or not all(isinstance(item, str) for item in item_ids):
            raise ValueError("not a list of texts")
        # JSON can spell half a character; such text cannot be written anywhere.
        "".join(item_ids).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"item cache {path} has an unreadable id list ({one_line(error, 120)}); make it again "
            f"with item_caching.py."
        ) from error
    return item_ids


def _open_pt(path: Path) -> ItemCache:
    try:
        _refuse_compressed(path)
        with warnings.catch_warnings():
            # Old storage classes make torch print warnings that only its own developers can act on.
            warnings.simplefilter("ignore")
            # From a stream, since torch would go by the name's ending and not by the content.
            with path.open("rb") as stream:
                content = torch.load(stream, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # torch.load raises many kinds on damaged files
        reason = " ".join(str(error).split())
        if isinstance(error, pickle.UnpicklingError) and "global" in reason.lower():
            raise InputError(
                f"item cache {path} holds more than tensors and was not opened, since such a file "
                f"can run code; make it again with item_caching.py."
            ) from error
        raise InputError(
            f"item cache {path} is damaged or no cache at all ({one_line(reason, 120)}); make it "
            f"again with item_caching.py."
        ) from error
    if not isinstance(content, Mapping) or not content:
        raise InputError(
            f"item cache {path} must hold a dictionary of item id -> tensor, not "
            f"{'nothing' if content is None or content == {} else type(content).__name__}; make it "
            f"again with item_caching.py."
        )
    item_ids = []
    for key in content:
        if isinstance(key, bool) or not isinstance(key, str | int):
            raise InputError(
                f"item cache {path}: the key {one_line(repr(key), 40)} is no item id; make it again "
                f"with item_caching.py."
            )
        item_ids.append(str(key))
    vectors = list(content.values())
    _refuse_odd_vectors(path, item_ids, vectors)
    matrix = torch.stack([vector.detach().reshape(-1) for vector in vectors])
    if matrix.dtype not in _DTYPE_NAMES:
        matrix = matrix.float()
    _check_shape(path, item_ids, matrix)
    return ItemCache(item_ids, matrix, {}, path)


def _open_npy(path: Path) -> ItemCache:
    """Open a matrix [n, D] of a `.npy` file whose n ids are in `NAME.txt` or `NAME.json` beside it."""
    try:
        # Copied on write, since a tensor over a read-only map would warn.
        matrix = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"item cache {path} is no NumPy file of numbers ({one_line(error, 120)}); write it "
            f"again with numpy.save."
        ) from error
    return ItemCache(*_checked(path, _ids_beside(path), _numbers(path, matrix)), {}, path)


def _ids_beside(path: Path) -> list[str]:
    listed, lines = path.with_suffix(".json"), path.with_suffix(".txt")
    for file in (listed, lines):
        if not is_file(file):
            continue
        try:
            text = file.read_text(encoding="utf-8-sig")
            ids = json.loads(text) if file == listed else text.splitlines()
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{file} is no list of item ids ({one_line(error, 120)}); write one id a line into "
                f"{lines}, or a JSON list into {listed}."
            ) from error
        if not isinstance(ids, list) or not all(type(item) in (str, int) for item in ids):
            raise InputError(f"{file} is no list of item ids; write a JSON list of texts.")
        return [str(item) for item in ids]
    raise InputError(
        f"item cache {path} needs the ids of its rows beside it: one a line in {lines.name}, or a "
        f"JSON list in {listed.name}."
    )


def _open_parquet(path: Path) -> ItemCache:
    """Open a parquet file of two columns: the item id, and a list of numbers."""
    try:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq
    except ImportError as error:
        raise InputError(
            f"item cache {path} is a parquet file, which needs the package pyarrow; install it with "
            f"pip install pyarrow."
        ) from error
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"item cache {path} is damaged ({one_line(error, 120)}); write it again."
        ) from error
    vectors = [
        field.name
        for field in table.schema
        if pa.types.is_list(field.type)
        or pa.types.is_large_list(field.type)
        or pa.types.is_fixed_size_list(field.type)
    ]
    others = [name for name in table.column_names if name not in vectors]
    if len(vectors) != 1 or len(others) != 1:
        raise InputError(
            f"item cache {path} has the columns {', '.join(table.column_names[:8])}; it needs two, "
            f"the item id and a list of numbers."
        )
    ids, column = table.column(others[0]), table.column(vectors[0])
    if ids.null_count or column.null_count:
        raise InputError(f"item cache {path} has rows without an id or a vector; leave them out.")
    sizes = set(pc.list_value_length(column).to_pylist())
    flat = pc.list_flatten(column)
    if len(sizes) != 1 or flat.null_count:
        raise InputError(
            f"item cache {path} has vectors of different lengths, or with gaps; write lists of one "
            f"length."
        )
    matrix = flat.to_numpy().reshape(len(ids), -1)
    names = [str(item) for item in ids.to_pylist()]
    return ItemCache(*_checked(path, names, _numbers(path, matrix)), {}, path)


def _numbers(path: Path, matrix: np.ndarray) -> torch.Tensor:
    """Return a matrix of floating-point numbers as a tensor, float64 as float32."""
    if matrix.dtype.kind != "f" or matrix.dtype.itemsize > 8:
        raise InputError(
            f"item cache {path} holds {matrix.dtype}; it must be float16, float32 or float64."
        )
    if matrix.dtype not in (np.float16, np.float32):
        matrix = matrix.astype(np.float32)
    if not matrix.flags.writeable:
        matrix = matrix.copy()
    return torch.from_numpy(np.ascontiguousarray(matrix))


def _checked(
    path: Path, item_ids: list[str], embeddings: torch.Tensor
) -> tuple[list[str], torch.Tensor]:
    _check_shape(path, item_ids, embeddings)
    return item_ids, embeddings


def _refuse_odd_vectors(path: Path, item_ids: list[str], vectors: list[Any]) -> None:
    """Refuse values that are not plain vectors of one length and number type, held in the file."""
    first = vectors[0]
    total = 0
    for item, vector in zip(item_ids, vectors, strict=True):
        where = f"item cache {path}: item '{one_line(item, 40)}'"
        if not isinstance(vector, torch.Tensor) or not vector.is_floating_point():
            raise InputError(f"{where} is not a tensor of numbers; make it again.")
        if vector.layout != torch.strided or vector.device.type != "cpu":
            raise InputError(f"{where} is not a dense tensor of numbers; make it again.")
        if vector.numel() != first.numel():
            raise InputError(
                f"{where} has {vector.numel()} dimensions, others have {first.numel()}; make it "
                f"again with item_caching.py."
            )
        if vector.dtype != first.dtype:
            raise InputError(
                f"{where} is {vector.dtype}, others are {first.dtype}; make it again with "
                f"item_caching.py."
            )
        total += vector.numel() * vector.element_size()
    # A few bytes can describe a tensor of any size by repeating one number: stride 0.
    if total > path.stat().st_size:
        raise InputError(
            f"item cache {path} claims more numbers than it holds; make it again with item_caching.py."
        )


def _refuse_compressed(path: Path) -> None:
    """Refuse a compressed archive: torch writes none, and a small one can unpack to any size."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise InputError(
                f"item cache {path} is a compressed archive, which torch.save does not write; make "
                f"it again with item_caching.py."
            )


def _check_shape(path: Path, item_ids: list[str], embeddings: torch.Tensor) -> None:
    if embeddings.dtype not in _DTYPE_NAMES:
        raise InputError(
            f"item cache {path} holds {embeddings.dtype}; it must be float16, bfloat16 or float32."
        )
    if embeddings.ndim != 2 or embeddings.shape[0] != len(item_ids) or not embeddings.shape[1]:
        raise InputError(
            f"item cache {path} has {len(item_ids)} ids for a matrix of shape "
            f"{tuple(embeddings.shape)}; make it again with item_caching.py."
        )
    if not item_ids:
        raise InputError(f"item cache {path} holds no items; make it again with item_caching.py.")
    if len(set(item_ids)) != len(item_ids):
        twice = next(item for item, count in Counter(item_ids).items() if count > 1)
        raise InputError(
            f"item cache {path} names the item '{one_line(twice, 40)}' twice; make it again with "
            f"item_caching.py."
        )


def _refuse_bad_values(cache: ItemCache, path: Path, rows_at_a_time: int = 4096) -> None:
    # The extremes are NaN where any value is: one pass at the speed of memory, without a mask.
    extremes = torch.stack(torch.aminmax(cache.embeddings))
    if bool(extremes.isfinite().all()):
        return
    for start in range(0, len(cache), rows_at_a_time):
        good = cache.embeddings[start : start + rows_at_a_time].isfinite().all(dim=1)
        if not good.all():
            item = one_line(cache.item_ids[start + int((~good).nonzero()[0])], 40)
            raise InputError(
                f"item cache {path}: the embedding of item '{item}' holds NaN or infinity; make it "
                f"again with item_caching.py, with --item_cache_dtype float32 if it overflowed."
            )
