"""Checks of a model folder that do not load its weights: files, shards, shapes, kind of model."""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from hsft.model.structure import DecoderStructure, ModelKind
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import is_file, read_json

EXTRA_FILE = "hllm_extra.safetensors"
# Trained id vectors of items, beside an exported UserLLM; an item cache (`data/cache.py`).
ID_FILE = "item_id_vectors.safetensors"
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Layers of decoders, and of encoders such as BERT.
_LAYER = re.compile(r"\b(?:layers?|h)\.(\d+)\.")
# Parts of the names of token embeddings, and with the output head of all weights of the vocabulary's
# size: the UserLLM loads none of them.
EMBEDDING_KEYS = ("embed_tokens", "wte", "word_embeddings", "embed_in")
# Parts of the names of output heads: of language models, classifiers and reward models.
HEAD_KEYS = ("lm_head", "embed_out", "score", "classifier", "v_head")
_VOCABULARY = (*EMBEDDING_KEYS, "lm_head", "embed_out")
# Keys of config.json that say where a model came from, not what it computes.
_ORIGIN_KEYS = ("_name_or_path", "transformers_version")
# The format's own limit.
_MOST_HEADER_BYTES = 100_000_000
_READ_WHOLE = 1 << 16
_SAMPLES, _SAMPLE_BYTES = 4, 4096


@dataclass(frozen=True)
class Weights:
    """The tensors that a folder's safetensors headers list.

    Attributes:
        shapes: name -> shape; empty when the folder holds only `pytorch_model*.bin`.
    """

    shapes: dict[str, tuple[int, ...]]

    def count(self, layers: int | None = None, vocabulary: bool = True) -> int:
        """Return the number of weights.

        Args:
            layers: of the first N decoder layers only.
            vocabulary: with the token embedding and the output head.
        """
        total = 0
        for name, shape in self.shapes.items():
            if layers is not None and (layer_number(name) or 0) >= layers:
                continue
            if vocabulary or not any(part in name for part in _VOCABULARY):
                total += math.prod(shape)
        return total


def config_digest(folder: Path) -> str | None:
    """Return the SHA-256 of a folder's `config.json`.

    Returns:
        None where transformers would not go by this file alone, or would refuse it.
    """
    path = folder / "config.json"
    if not is_file(path):
        return None
    try:
        config = read_json(path)
        content = path.read_bytes()
    except (InputError, OSError):
        return None
    # Without a type, transformers guesses one from the folder's name; `configuration_files` leads to
    # other files.
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        return None
    return None if "configuration_files" in config else hashlib.sha256(content).hexdigest()


def weights_digest(folder: Path) -> str:
    """Return a SHA-256 of the headers of a folder's safetensors files, and of its indexes.

    Raises:
        InputError: as `check_files`.
        OSError, ValueError: a file cannot be read.
    """
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    for path in [*files, *(folder / name for name in _INDEXES if is_file(folder / name))]:
        digest.update(f"{path.name}\0".encode())
        with path.open("rb") as file:
            if path.suffix == ".json":
                digest.update(file.read())
            else:
                digest.update(_header(file, path.name))
    return digest.hexdigest()


def check_files(folder: Path) -> Weights:
    """Check a model folder's files and read the headers of its weights.

    Raises:
        InputError: it holds no weights, a pipe or device, an adapter's configuration, an index that
            leads out of the folder, or a shard that is missing or damaged.
    """
    for entry in folder.iterdir():
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise InputError(
                f"model folder {folder} holds {entry.name}, a pipe or device; remove it."
            )
    if is_file(folder / "adapter_config.json"):
        # transformers would follow the adapter's configuration to whatever base model it names.
        raise InputError(
            f"model folder {folder} holds an adapter (adapter_config.json), not a whole model; name "
            f"the folder of its base model."
        )
    shards, listed = _weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in sorted(shards):
        shapes |= _read_shapes(folder / shard)
    for tensor, shard in listed.items():
        if shard in shards and tensor not in shapes:
            raise InputError(
                f"model folder {folder}: its index places the weight {one_line(tensor, 80)} in "
                f"{shard}, which lacks it; fetch the model again."
            )
    return Weights(shapes)


def _weight_files(folder: Path) -> tuple[set[str], dict[str, str]]:
    """Return the safetensors files that transformers reads, and the tensors listed by the indexes.

    Without safetensors files the set is empty: the weights are in `pytorch_model*.bin`.

    Raises:
        InputError: there are no weights, or an index is damaged or leads out of the folder.
    """
    shards = {file.name for file in folder.glob("*.safetensors")} - {EXTRA_FILE, ID_FILE}
    listed: dict[str, str] = {}
    for name in _INDEXES:
        if is_file(folder / name):
            listed |= _read_index(folder, name)
    if not shards and not any(folder.glob("pytorch_model*.bin")):
        raise InputError(f"model folder {folder} holds no weights (*.safetensors); fetch it again.")
    if is_file(folder / "model.safetensors"):
        shards = {"model.safetensors"}
    elif any(shard.endswith(".safetensors") for shard in listed.values()):
        shards = {shard for shard in listed.values() if shard.endswith(".safetensors")}
    return shards, listed


def _read_index(folder: Path, name: str) -> dict[str, str]:
    path = folder / name
    content = read_json(path)
    placed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise InputError(f"{path} has no weight_map; fetch the model again.")
    for shard in sorted({str(shard) for shard in placed.values()}):
        if Path(shard).name != shard or "\\" in shard or "\0" in shard:
            raise InputError(
                f"{path} points outside its folder ('{one_line(shard, 80)}'); do not use it."
            )
        if not is_file(folder / shard):
            raise InputError(
                f"model folder {folder} lacks the shard {one_line(shard, 80)}; fetch it again."
            )
    return {str(tensor): str(shard) for tensor, shard in placed.items()}


def _read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError, RuntimeError, ValueError, struct.error) as error:
        raise InputError(
            f"{path} is damaged ({one_line(error, 120)}); fetch the model again."
        ) from error


def check_decoder(kind: ModelKind, folder: Path, layers: int | None = None) -> None:
    """Refuse a model that is no decoder reading vectors from left to right.

    An encoder would run, but every position would see the items that it has to predict.

    Raises:
        InputError: says what is wrong with the kind of model, its weights are quantised, or
            `layers` are more than it has.
    """
    check_unquantised(kind, folder)
    name = one_line(kind.model_type, 40)
    remedy = "name the folder of a decoder such as Llama, Qwen or Mistral"
    for key in ("hidden_size", "num_hidden_layers"):
        if getattr(kind, key) is None:
            raise InputError(
                f"{folder / 'config.json'} describes a model of type {name} without {key}, which "
                f"is no text decoder; {remedy}."
            )
    if kind.looks_ahead:
        raise InputError(
            f"the model in {folder} is of type {name}, an encoder whose positions see later ones; "
            f"{remedy}."
        )
    if not kind.takes_vectors:
        raise InputError(
            f"the model in {folder} is of type {name}, which takes no vectors (inputs_embeds); {remedy}."
        )
    if layers is not None and layers > (kind.num_hidden_layers or 0):
        raise InputError(
            f"user_llm_layers is {layers}, but the model in {folder} has only "
            f"{kind.num_hidden_layers} layers; lower it."
        )


def check_embeddings(width: int, hidden: int, folder: Path) -> None:
    """Refuse a decoder that reads vectors of another width than it gives (OPT-350m).

    Args:
        width: of the vectors that it reads.
        hidden: of those that it gives.
        folder: its folder, for the message.

    Raises:
        InputError: they differ.
    """
    if width != hidden:
        raise InputError(
            f"the model in {folder} reads vectors of {width} numbers into layers of {hidden}; name "
            f"the folder of a decoder whose token embeddings are as wide as its layers."
        )


def check_positions(decoder: DecoderStructure, length: int, folder: Path, key: str) -> None:
    """Refuse rows longer than a table of learned positions (GPT-2, OPT); rotary ones have no end.

    Args:
        decoder: the decoder.
        length: of the longest row.
        folder: its folder, for the message.
        key: the configuration key that says the length.

    Raises:
        InputError: there are fewer positions.
    """
    most = decoder.learned_positions
    if most is not None and most < length:
        raise InputError(
            f"the model in {folder} has learned {most} positions, {key} asks for {length}; lower {key}."
        )


def check_shapes(config: Any, weights: Weights, folder: Path) -> None:
    """Compare the weights' shapes with config.json where the names say what they are.

    Raises:
        InputError: the hidden size differs, or there are fewer layers than the configuration says.
    """
    for name, shape in weights.shapes.items():
        if name.endswith(".input_layernorm.weight") and shape != (config.hidden_size,):
            raise InputError(
                f"model folder {folder}: weight {name} does not have the shape that its config.json "
                f"says (hidden size {config.hidden_size}, stored {list(shape)}); fetch it again."
            )
    numbers = [number for number in map(layer_number, weights.shapes) if number is not None]
    if numbers and max(numbers) + 1 < config.num_hidden_layers:
        raise InputError(
            f"model folder {folder} holds the weights of {max(numbers) + 1} layers, its config.json "
            f"says {config.num_hidden_layers}; fetch it again."
        )


def layer_number(weight: str) -> int | None:
    """Return which layer a weight of this name belongs to, from 0; None for the others."""
    match = _LAYER.search(weight)
    return int(match.group(1)) if match else None


def check_unquantised(kind: ModelKind, folder: Path) -> None:
    """Refuse a model that was saved quantised: it can be neither cut, retrained nor merged here.

    Args:
        kind: of the model.
        folder: its folder, for the message.

    Raises:
        InputError: `config.json` has a `quantization_config`.
    """
    settings = kind.quantization
    if settings is None:
        return
    method = one_line(settings.get("quant_method") or "unknown", 40)
    remedy = "name the folder of the original, unquantised model"
    if method == "bitsandbytes":
        method += " 8-bit" if settings.get("load_in_8bit") else " 4-bit"
        remedy += (
            f", or write one with transformers: AutoModelForCausalLM.from_pretrained({str(folder)!r})"
            f".dequantize().save_pretrained('NEW_FOLDER')"
        )
    raise InputError(
        f"the weights in {folder} are quantised already ({method}); {remedy}; use_qlora quantises a "
        f"UserLLM by itself."
    )


def fingerprint(folder: str | Path) -> str:
    """Return a SHA-256 that tells a model folder's content from others, whatever its name or shards.

    It covers `config.json` without the keys that only say where the model came from, and every
    tensor of the weights and of `hllm_extra.safetensors`: name, number type, shape and content.
    Tensors of up to 64 KiB are read whole, larger ones at four places of 4 KiB each, so that
    gigabytes are not read: any training of a matrix is seen, a few numbers edited by hand may not
    be. `pytorch_model*.bin` files count with their size and 64 such places.

    Args:
        folder: a model folder.

    Raises:
        InputError: the folder has no readable config.json or weights.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if isinstance(config, dict):
        config = {name: value for name, value in config.items() if name not in _ORIGIN_KEYS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    shards, _ = _weight_files(folder)
    files = [folder / shard for shard in shards]
    if is_file(folder / EXTRA_FILE):
        files.append(folder / EXTRA_FILE)
    try:
        tensors = [(name, path, *entry) for path in files for name, entry in _layout(path)]
        for name, path, kind, start, size in sorted(tensors):
            digest.update(f"{name}\0{kind}\0{size}\0".encode())
            with path.open("rb") as file:
                _sample(digest, file, start, size, _SAMPLES)
        for path in [] if shards else sorted(folder.glob("pytorch_model*.bin")):
            size = path.stat().st_size
            digest.update(f"{size}\0".encode())
            with path.open("rb") as file:
                _sample(digest, file, 0, size, 64)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise InputError(
            f"the weights in {folder} cannot be read ({one_line(error, 120)}); fetch the model again."
        ) from error
    return digest.hexdigest()


def _layout(path: Path) -> Iterator[tuple[str, tuple[str, int, int]]]:
    """Read a safetensors header: yield each tensor's name, and (type and shape, first byte, bytes)."""
    with path.open("rb") as file:
        encoded = _header(file, path.name)
    for name, entry in json.loads(encoded).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            first = 8 + len(encoded) + start
            yield name, (f"{entry['dtype']} {entry['shape']}", first, end - start)


def _header(file: BinaryIO, name: str) -> bytes:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MOST_HEADER_BYTES:
        raise ValueError(f"{name} has a header of {length} bytes")
    return file.read(length)


def _sample(digest: Any, file: BinaryIO, start: int, size: int, samples: int) -> None:
    """Add bytes to a digest: all of them when few, else pages from the first to the last."""
    if size <= max(_READ_WHOLE, samples * _SAMPLE_BYTES):
        file.seek(start)
        digest.update(file.read(size))
        return
    for number in range(samples):
        file.seek(start + (size - _SAMPLE_BYTES) * number // (samples - 1))
        digest.update(file.read(_SAMPLE_BYTES))
