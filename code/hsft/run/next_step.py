"""The commands that go on from a finished item cache or run."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsft.config import Config, load_config
from hsft.config.schema import TRAINED_MODELS
from hsft.data.files import cache_path, default_cache_path, has_interactions
from hsft.hub.manifest import MANIFEST_FILE
from hsft.utils.files import is_file
from hsft.utils.program import command, command_line

_FILES = ("code/overall/LLM_ddp.yaml", "code/HLLM/HLLM.yaml")
_USER_LLM = "model_checkpoints/UserLLM_complete/"
# What a run has to be told as the caching was: which data, and what it compares with the cache.
_KEYS = (
    *("dataset", "data_path", "text_path"),
    *("text_keys", "encoder", "item_prompt", "MAX_TEXT_LENGTH", "item_emb_token_n"),
    *("device", "trust_remote_code", "user_pretrain_dir", "load_pretrain"),
)


def command_after_caching(config: Config, files: Sequence[Path]) -> str | None:
    """Return the command that goes on from the cache just written, on one line.

    It evaluates the UserLLM that belongs to the ItemLLM. A sentence encoder has no such UserLLM, so
    for its vectors the command trains one with a projection.

    Args:
        config: of the caching.
        files: the configuration files it was given; without any, the repo's two are named.

    Returns:
        A command for a shell in the repo's root; None where there are no interactions to go on
        with, or a value does not fit on a line.
    """
    if not has_interactions(config):
        return None
    plain, _ = load_config(files or _FILES)
    words = ["--config_file", *map(str, files or _FILES)]
    for key in _KEYS:
        value = getattr(config, key)
        if key == "user_pretrain_dir":
            value = value or _user_llm(config)
        # The name is what a reader looks for.
        if key == "dataset" or value != getattr(plain, key):
            words += _option(key, value)
    target = cache_path(config).with_suffix(".safetensors")
    if target != _found_without(config, plain):
        words += _option("item_cache_path", str(target))
    if not plain.use_item_cache:
        words += _option("use_item_cache", True)
    if config.encoder is None:
        words += _option("val_only", True)
    else:
        if plain.item_adapter == "none":
            words += _option("item_adapter", "linear")
        words += _option("use_qlora", True)
    line = command_line(f"train {shlex.join(words)}")
    return line if line.isprintable() else None


def _user_llm(config: Config) -> str:
    """Return the UserLLM's folder where the configuration names none."""
    if config.encoder is not None:
        return "USER_LLM_FOLDER"
    # A decoder that is not a half of HLLM's checkpoint serves on both sides.
    if config.item_pretrain_dir and not is_file(Path(config.item_pretrain_dir) / MANIFEST_FILE):
        return config.item_pretrain_dir
    return _USER_LLM


def commands_after_run(config: Config, folder: Path) -> str:
    """Return what to do with a finished run: a line a command."""
    run_dir = shlex.quote(str(folder))
    lines = [
        f"intervals and paired tests: {command('compare')} {run_dir}",
        f"a page to look at: {command('report')} {run_dir}",
    ]
    if config.trains and config.model in TRAINED_MODELS:
        # A history that is put together on the page has times of now, a user's has its own.
        how = "--user ID" if config.use_timestamps else "--serve 8000"
        lines.append(f"recommendations: {command('recommend')} --run {run_dir} {how}")
    return "\n".join(lines) + "\n"


def _found_without(config: Config, plain: Config) -> Path:
    """Return the cache that a run reads when the command names none."""
    if plain.item_cache_path:
        return Path(plain.item_cache_path).with_suffix(".safetensors")
    return default_cache_path(config.data_path, config.dataset)


def _option(key: str, value: Any) -> list[str]:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
    return [f"--{key}={text}"] if text.startswith("--") else [f"--{key}", text]
