"""Save and load what training changed: the LoRA adapter in peft's format, the rest beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hsft.model.folder import EMBEDDING_KEYS
from hsft.model.recommender import Recommender
from hsft.utils.errors import InputError, one_line
from hsft.utils.files import atomic_path

ADAPTER_DIR = "adapter"
REST_FILE = "trained.safetensors"
# Keys of `ItemTable.fitted_to`, worded for an error.
ITEM_ORDER, ITEM_SET = "item order", "set of items"
# What the names of a trained ItemLLM's weights in a `Recommender` begin with.
ITEM_LLM = "item_llm."


def save_trained(
    model: Recommender, folder: str | Path, save_items: Callable[[Path], None] | None = None
) -> None:
    """Write every trained weight to `folder`, atomically.

    `adapter/` is a peft folder that `PeftModel.from_pretrained` reads; `trained.safetensors` holds
    the other trained weights (logit_scale, item adapter, or the whole decoder when all of it is
    trained) by their names in the `Recommender`, with `ItemTable.fitted_to` as metadata.
    `save_items` writes what belongs to a trained ItemLLM beside them.
    """
    peft_model = _peft_model(model)
    with atomic_path(folder) as temporary:
        temporary.mkdir(parents=True)
        if peft_model is not None:
            peft_model.save_pretrained(temporary / ADAPTER_DIR, save_embedding_layers=False)
        # Of no tensors and empty metadata safetensors writes a file that it does not read.
        metadata = dict(model.encoder.items.fitted_to) or None
        save_file(rest_state(model), temporary / REST_FILE, metadata=metadata)
        if save_items is not None:
            save_items(temporary)


def load_trained(model: Recommender, folder: str | Path) -> None:
    """Load what `save_trained` wrote into a model built with the same configuration.

    Raises:
        InputError: a file is missing, damaged, or belongs to another configuration or catalogue.
    """
    folder = Path(folder)
    refuse_other_catalogue(folder, model.encoder.items.fitted_to)
    peft_model = _peft_model(model)
    if peft_model is not None:
        from peft import set_peft_model_state_dict

        state = read_weights(folder / ADAPTER_DIR / "adapter_model.safetensors")
        _refuse_other_shapes(folder, set_peft_model_state_dict, peft_model, state)
    rest = read_rest(folder)
    parameters = dict(model.named_parameters())
    expected = rest_state(model)
    if rest.keys() != expected.keys():
        odd = sorted(rest.keys() ^ expected.keys())
        raise InputError(
            f"{folder} was trained with another configuration: it differs in {odd[0]} "
            f"({len(odd)} weights in all); use the run's own config.yaml."
        )
    with torch.no_grad():
        for name, value in rest.items():
            if parameters[name].shape != value.shape:
                raise InputError(
                    f"{folder}: weight {name} has shape {tuple(value.shape)}, this configuration "
                    f"needs {tuple(parameters[name].shape)}."
                )
            parameters[name].copy_(value)


def read_rest(folder: str | Path) -> dict[str, Tensor]:
    """Read the trained weights outside the LoRA adapter, by name, as `save_trained` wrote them.

    Raises:
        InputError: the file is missing or damaged.
    """
    return read_weights(Path(folder) / REST_FILE)


def refuse_other_catalogue(folder: str | Path, fitted_to: Mapping[str, str]) -> None:
    """Refuse weights of other items than those that there are now.

    Weights of single items are stored in the order of the items' numbers. Weights of an earlier
    version do not say what they were fitted to.

    Args:
        folder: as `save_trained` wrote it.
        fitted_to: as `ItemTable.fitted_to`.

    Raises:
        InputError: the items, or their order, are others; or the file is missing or damaged.
    """
    path = Path(folder) / REST_FILE
    try:
        with safe_open(path, framework="pt") as file:
            recorded = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    for what, fingerprint in fitted_to.items():
        if recorded.get(what, fingerprint) != fingerprint:
            raise InputError(
                f"{folder} was trained on a catalogue with another {what}: the interactions, item_data or "
                f"the item cache have changed since, and its weights do not fit the items as they are "
                f"now; put the old files back, or say where they are with --data_path."
            )


def rest_state(model: Recommender) -> dict[str, Tensor]:
    """Return the trained weights outside the LoRA adapter and the ItemLLM, by name."""
    return {
        name: value.detach().cpu().contiguous()
        for name, value in model.named_parameters()
        if value.requires_grad and "lora_" not in name and not name.startswith(ITEM_LLM)
    }


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Return every trainable weight by name: what a resumable checkpoint holds."""
    return {
        name: value.detach().cpu()
        for name, value in model.named_parameters()
        if value.requires_grad
    }


def describe_trainable(model: nn.Module) -> str:
    """Return how many weights are trained, of how many, and what the others are.

    Quantised weights count as the numbers that they stand for.
    """
    trained, frozen = 0, dict[str, int]()
    for name, weight in model.named_parameters():
        # bitsandbytes packs two 4-bit numbers into a byte.
        state = getattr(weight, "quant_state", None)
        count = math.prod(weight.shape if state is None else state.shape)
        if weight.requires_grad:
            trained += count
            continue
        kind = _frozen_kind(name)
        frozen[kind] = frozen.get(kind, 0) + count
    text = f"{trained:,} of {trained + sum(frozen.values()):,} weights"
    if frozen:
        text += f" (frozen: {', '.join(f'{count:,} in {kind}' for kind, count in frozen.items())})"
    return text


def _frozen_kind(name: str) -> str:
    if name.endswith("logit_scale"):
        return "logit_scale"
    if name.startswith("encoder.items."):
        return "the item table"
    if name.startswith(ITEM_LLM):
        return "the ItemLLM"
    if any(key in name for key in EMBEDDING_KEYS):
        return "the token embedding, which is not used"
    return "the UserLLM"


def _peft_model(model: Recommender) -> Any | None:
    decoder = getattr(model.encoder, "decoder", None)
    return decoder if hasattr(decoder, "peft_config") else None


def read_weights(
    path: Path, lacking: str = "the run has no trained model there"
) -> dict[str, Tensor]:
    """Read a file of weights by name.

    Args:
        path: a safetensors file of a run.
        lacking: what it means where there is no such file.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error, lacking) from error


def _unreadable(
    path: Path, error: Exception, lacking: str = "the run has no trained model there"
) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(f"{path} does not exist; {lacking}.")
    return InputError(f"{path} is damaged: {one_line(error, 120)}.")


def _refuse_other_shapes(folder: Path, load: Any, model: Any, state: dict[str, Tensor]) -> None:
    try:
        outcome = load(model, state)
    except RuntimeError as error:
        raise InputError(
            f"the adapter in {folder} does not fit this UserLLM and LoRA rank; use the run's own "
            f"config.yaml."
        ) from error
    missing = [key for key in outcome.missing_keys if "lora_" in key]
    if missing or outcome.unexpected_keys:
        odd = (missing or list(outcome.unexpected_keys))[0]
        raise InputError(f"the adapter in {folder} does not fit this UserLLM: {odd} differs.")
