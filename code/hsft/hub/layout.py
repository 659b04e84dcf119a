"""The keys of an HLLM checkpoint: which belong to a side, and which shapes they must have.

An HLLM checkpoint is one torch state dict that holds both LLMs: `item_llm.model.*`,
`user_llm.model.*`, their unused `lm_head.weight`, `logit_scale` [] and, unless HLLM was trained with
mean pooling (`item_emb_token_n: 0`), `item_emb_tokens` [1, 1, D]. It has neither configuration nor
tokenizer; those come from the base model that HLLM started from.
"""

from __future__ import annotations

import copy
import math
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hsft.model.backbone import load_model_config
from hsft.utils.errors import InputError, brief
from hsft.utils.files import is_file

Side = Literal["item", "user"]
Shape = tuple[int, ...]

CONFIG_FILE = "config.json"
EMBEDDING = "embed_tokens.weight"
EMB_TOKEN = "item_emb_tokens"
EXTRAS = (EMB_TOKEN, "logit_scale")

# What trainers wrap a state dict in: DeepSpeed's "module", Lightning's "state_dict", Fabric's "model".
_WRAPPERS = ("state_dict", "module", "model")
_PREFIX = "module."
# Computed from the configuration; old transformers versions saved it with the weights.
_DERIVED = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Layout:
    """What the base model's configuration says about one side's weights.

    Attributes:
        side: `item` or `user`.
        config: the configuration to write.
        shapes: name -> shape of every weight to write, by their names in transformers' LlamaModel.
        dim: D, the hidden size.
    """

    side: Side
    config: Any
    shapes: dict[str, Shape]
    dim: int

    @property
    def stored_shapes(self) -> dict[str, Shape]:
        """Name -> shape of what a checkpoint has, the two extras included.

        The user side's token embedding is not among them: it is not used, and some checkpoints
        have none.
        """
        side = {
            name: shape
            for name, shape in self.shapes.items()
            if self.side == "item" or name != EMBEDDING
        }
        return side | {EMB_TOKEN: (1, 1, self.dim), "logit_scale": ()}

    def key(self, name: str) -> str:
        """Return a weight's key in the checkpoint."""
        return name if name in EXTRAS else f"{self.side}_llm.model.{name}"

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Return the size of the weights to write."""
        return sum(map(math.prod, self.shapes.values())) * dtype.itemsize


def read_layout(base: Path, side: Side) -> Layout:
    """Derive names and shapes of one side's weights from the base model's configuration.

    The result is a `LlamaModel`: a decoder without output head, which no HLLM uses. The user
    side's token embedding shrinks to one row of zeros, so that transformers finds every weight.

    Args:
        base: a folder with the base model's config.json.
        side: which LLM.

    Raises:
        InputError: the configuration is unreadable or not a Llama's.
    """
    from transformers import AutoModel

    config = copy.deepcopy(load_model_config(base))
    if config.model_type != "llama":
        raise InputError(
            f"{base / CONFIG_FILE} describes a '{config.model_type}' model, but HLLM checkpoints "
            f"are imported as Llama; name HLLM's base model."
        )
    if side == "user":
        config.vocab_size = 1
        config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers and torch refuse odd values in many ways
        raise InputError(
            f"{base / CONFIG_FILE} does not describe a model that can be built: {brief(error)}."
        ) from error
    config.architectures = [type(model).__name__]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return Layout(side, config, shapes, int(config.hidden_size))


def refuse_no_checkpoint(path: Path) -> None:
    """Refuse a file that is not in torch's zip format, from its table of contents alone.

    Raises:
        InputError: the file is missing, or of another format.
    """
    if not is_file(path):
        raise InputError(f"--from_file {path} is not a file.")
    try:
        with zipfile.ZipFile(path) as archive:
            has_pickle = any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        has_pickle = False
    if not has_pickle:
        raise _other_format(path)


def open_side(path: Path, side: Side) -> dict[str, Tensor]:
    """Map a checkpoint into memory, without reading its tensors, and keep one side.

    Returns:
        Tensors by their names in transformers' LlamaModel, and the two extras.

    Raises:
        InputError: the file is no torch checkpoint of tensors alone, is cut short, has no such
            side, or has a key that HLLM checkpoints do not have.
    """
    return select_side(_unwrap(_load(path)), side, path)


def select_side(state: Mapping[Any, Any], side: Side, path: Path) -> dict[str, Tensor]:
    """Pick one side of a state dict; see `open_side`."""
    prefix, other = f"{side}_llm.", "user_llm." if side == "item" else "item_llm."
    keys = [key for key in state if isinstance(key, str)]
    if not any(key.startswith(prefix) for key in keys):
        example = f" (its first key is '{keys[0]}')" if keys else ""
        raise InputError(f"{path} has no weights {prefix}*{example}; name an HLLM checkpoint.")
    unexpected = [str(key) for key in state if not _known(key, prefix, other)]
    if unexpected:
        raise InputError(
            f"{path} has unexpected keys: {_first(unexpected)}; name an HLLM checkpoint, which has "
            f"item_llm.model.*, user_llm.model.*, item_emb_tokens and logit_scale."
        )
    return {
        key.removeprefix(f"{prefix}model."): state[key]
        for key in keys
        if not (key.startswith(other) or key.endswith(_DERIVED) or key == f"{prefix}lm_head.weight")
        and not (side == "user" and key == f"{prefix}model.{EMBEDDING}")
    }


def check_tensors(stored: Mapping[str, Any], layout: Layout, path: Path) -> None:
    """Compare names, shapes and kinds of tensors with what the configuration implies.

    Args:
        stored: what `open_side` returned.
        layout: what it must be.
        path: the checkpoint, for messages.

    Raises:
        InputError: a key other than `item_emb_tokens` is missing, one is unexpected, or a tensor
            has another shape or no floats.
    """
    shapes = layout.stored_shapes
    missing = [layout.key(name) for name in shapes if name not in stored and name != EMB_TOKEN]
    if missing:
        raise InputError(
            f"{path} lacks keys that the base model's config.json implies: {_first(missing)}; "
            f"check the checkpoint and the base model."
        )
    unexpected = [layout.key(name) for name in stored if name not in shapes]
    if unexpected:
        raise InputError(
            f"{path} has unexpected keys, which the base model's config.json does not imply: "
            f"{_first(unexpected)}; check the base model."
        )
    for name, value in stored.items():
        where = f"{path}: '{layout.key(name)}'"
        if not isinstance(value, Tensor) or not _is_plain(value):
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"{where} is no dense tensor of floats ({kind}); check the file.")
        # Some trainers save a scalar as one element.
        shape = () if name == "logit_scale" and value.numel() == 1 else tuple(value.shape)
        if shape != shapes[name]:
            raise InputError(
                f"{where} has shape {list(shape)}, the base model's config.json implies "
                f"{list(shapes[name])}; check the checkpoint and the base model."
            )


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own text advises weights_only=False, which would run what the file holds.
        raise InputError(
            f"{path} holds something other than tensors, or is damaged; it was not loaded, because "
            f"that could run code from the file: fetch it again from a source that you trust."
        ) from error
    except Exception as error:  # zip, pickle and torch raise many kinds for damaged files
        if "mmap can only be used" in str(error):
            raise _other_format(path) from error
        raise InputError(
            f"{path} is not a readable torch checkpoint (cut short?): {brief(error)}; fetch it "
            f"again."
        ) from error


def _other_format(path: Path) -> InputError:
    return InputError(
        f"{path} is no checkpoint in torch's zip format (or is cut short); name HLLM's "
        f"pytorch_model.bin, fetch it again, or load and save it with torch 1.6 or later."
    )


def _unwrap(state: Any) -> Mapping[Any, Any]:
    """Take a state dict out of what trainers wrap it in, and its keys out of a common prefix."""
    for _ in range(2):
        inner = [
            state[name]
            for name in _WRAPPERS
            if isinstance(state, dict) and isinstance(state.get(name), dict)
        ]
        state = inner[0] if inner else state
    if not isinstance(state, dict):
        return {}
    if state and all(isinstance(key, str) and key.startswith(_PREFIX) for key in state):
        return {key.removeprefix(_PREFIX): value for key, value in state.items()}
    return state


def _known(key: Any, prefix: str, other: str) -> bool:
    if not isinstance(key, str):
        return False
    return (
        key in EXTRAS
        or key.startswith((other, f"{prefix}model."))
        or key == f"{prefix}lm_head.weight"
        or key.endswith(_DERIVED)
    )


def _first(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return shown if len(keys) <= 3 else f"{shown} and {len(keys) - 3} more"


def _is_plain(value: Tensor) -> bool:
    return (
        value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and not value.is_nested
    )
