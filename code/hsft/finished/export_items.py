"""Export the ItemLLM that a run trained: a model folder that encodes items as the run did."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hsft.config import Config
from hsft.data.files import item_llm_folder
from hsft.data.item_text import ItemTexts
from hsft.encoding.item_tower import ITEM_CACHE_FILE, ITEM_WEIGHTS_FILE
from hsft.encoding.sentence_encoder import is_sentence_encoder
from hsft.hub.manifest import MANIFEST_FILE
from hsft.inputs.load_tower import load_item_tower
from hsft.model.backbone import load_model_config, read_extra
from hsft.model.folder import EXTRA_FILE
from hsft.report.model_card import Format
from hsft.trainer.checkpoint import BEST_DIR
from hsft.utils.errors import InputError
from hsft.utils.files import is_file

log = logging.getLogger(__name__)

ITEM_LLM_DIR = "item_llm"
# Ends of the names of files that tell of a model folder's weights; the others are the tokenizer's.
_OF_WEIGHTS = (".safetensors", ".bin", ".index.json", "config.json", MANIFEST_FILE, ".md")
_TOKENIZER_CONFIG = "tokenizer_config.json"


def refuse_overflow(model: nn.Module, dtype: str, part: str = "") -> None:
    """Refuse merged weights that do not fit in their number type.

    Args:
        model: in that type.
        dtype: its name.
        part: whose weights they are, for the message.

    Raises:
        InputError: a weight is not finite.
    """
    for name, value in model.named_parameters():
        if not value.isfinite().all():
            raise InputError(
                f"weight {name}{part} is not finite in {dtype}; use --dtype bfloat16 or float32."
            )


def export_items(
    run: Path, config: Config, folder: Path, dtype: torch.dtype, format: Format
) -> None:
    """Write what a run's trained ItemLLM made, and the ItemLLM itself.

    `item_cache.safetensors` holds the catalogue's vectors. `merged` has the ItemLLM in `item_llm`, a
    folder for `item_pretrain_dir`; `adapter` its trained weights as the run keeps them; `onnx` neither.
    A fixed map of the vectors (`item_embedding_transform`) is not a part of any model, so that the
    ItemLLM is left out then, and sentence encoders are.

    Args:
        run: the run's folder.
        config: its configuration.
        folder: what is exported.
        dtype: number type of merged weights.
        format: of the export.

    Raises:
        InputError: a file or the ItemLLM's folder is missing.
    """
    best = run / BEST_DIR
    files = [ITEM_CACHE_FILE, *([ITEM_WEIGHTS_FILE] if format == "adapter" else [])]
    for name in files:
        if not is_file(best / name):
            raise InputError(f"{best / name} does not exist; the run has no trained ItemLLM.")
        shutil.copyfile(best / name, folder / name)
    if format != "merged":
        return
    base = item_llm_folder(config)
    obstacle = None
    if config.item_embedding_transform != "none":
        obstacle = (
            f"its vectors pass through item_embedding_transform: {config.item_embedding_transform}"
        )
    elif is_sentence_encoder(base, config.trust_remote_code):
        obstacle = "it is a sentence encoder"
    if obstacle is not None:
        log.warning(
            "the trained ItemLLM is not exported, since %s; the export holds the vectors of the "
            "run's items.",
            obstacle,
        )
        return
    _write_item_llm(config, best, base, folder / ITEM_LLM_DIR, dtype)


def _write_item_llm(
    config: Config, best: Path, base: Path, folder: Path, dtype: torch.dtype
) -> None:
    log.info("loading %s in float32.", base)
    # Every model has eager attention, and nothing is computed.
    plain = config.model_copy(update={"precision": "32-true", "attn_implementation": "eager"})
    tower, _ = load_item_tower(plain, ItemTexts([], [], ""), torch.device("cpu"), plain=True)
    tower.load(best)
    model: Any = tower.model
    if config.trains_item_lora:
        model = model.merge_and_unload()
    # Turned off for training alone.
    model.config.use_cache = getattr(load_model_config(base), "use_cache", True)
    model.to(dtype)
    refuse_overflow(model, str(dtype), " of the ItemLLM")
    model.save_pretrained(folder)
    for path in base.iterdir():
        of_tokenizer = path.name == _TOKENIZER_CONFIG or not path.name.endswith(_OF_WEIGHTS)
        if path.is_file() and of_tokenizer:
            shutil.copyfile(path, folder / path.name)
    extra = read_extra(base) if config.loads_item_llm else {}
    if tower.emb_token is not None:
        extra["item_emb_tokens"] = tower.emb_token.detach().reshape(1, 1, -1).contiguous()
    if extra:
        save_file(extra, folder / EXTRA_FILE, metadata={"format": "pt"})
