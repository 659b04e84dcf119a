"""`hsft cache`: item_caching.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hsft.config.loader import parse_command_line
from hsft.config.program import program_config
from hsft.run.preflight import missing_for_caching
from hsft.utils.distributed import is_rank_zero
from hsft.utils.errors import EXIT_OK, refuse

EXAMPLES = (
    "cache --dataset Pixel200K --item_pretrain_dir model_checkpoints/ItemLLM_complete",
    "cache --dataset Pixel200K --encoder model_checkpoints/all-MiniLM-L6-v2",
    "cache --config_file my.yaml --item_cache_path dataset/my_items.safetensors",
)
# The keys that --help shows: those that item caching reads.
KEYS = (
    *("check", "seed", "device", "num_threads", "show_progress", "trust_remote_code"),
    *("data_path", "dataset", "item_data", "text_path", "text_keys", "MAX_TEXT_LENGTH"),
    *("item_cache_path", "item_pretrain_dir", "encoder", "item_prompt", "text_format"),
    *("item_emb_token_n", "item_cache_dtype", "item_batch_tokens", "item_compile"),
    *("train_item_llm", "item_llm_init", "load_pretrain"),
    *("attn_implementation", "use_ft_flash_attn", "precision"),
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    config = program_config(argv, "cache", EXAMPLES, KEYS)
    if config is None:
        return EXIT_OK
    if not config.check:
        refuse(missing_for_caching(config))
    # Imported here, so that nothing above waits for torch.
    from hsft.inputs.cache_items import write_item_cache
    from hsft.run.check import check_caching, quick_caching_problems
    from hsft.run.next_step import command_after_caching
    from hsft.utils.environment import set_threads

    set_threads(config.num_threads)
    if config.check:
        check_caching(config)
    else:
        refuse(quick_caching_problems(config))
        write_item_cache(config)
        command = command_after_caching(config, parse_command_line(argv).config_files)
        if command and is_rank_zero():
            sys.stdout.write(f"\nnext: {command}\n")
    return EXIT_OK
