"""`hsft train` and `hsft evaluate`: code/main.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hsft.config.program import program_config
from hsft.config.schema import Config
from hsft.run.preflight import missing_for_run
from hsft.utils.distributed import is_rank_zero
from hsft.utils.errors import EXIT_OK, refuse

_FILES = "--config_file code/overall/LLM_ddp.yaml code/HLLM/HLLM.yaml --dataset Pixel200K"
_USER_LLM = "--user_pretrain_dir model_checkpoints/UserLLM_complete"
EXAMPLES = (
    f"train {_FILES} {_USER_LLM} --val_only True",
    f"train {_FILES} {_USER_LLM} --use_qlora True --optim_args.learning_rate 2e-4",
    f"train {_FILES} {_USER_LLM} --use_qlora True --check True",
    f"train {_FILES} {_USER_LLM} --use_qlora True --dry_run True",
    "train --config_file code/overall/LLM_ddp.yaml --dataset Pixel200K --model pop",
)
EVALUATE_EXAMPLES = (
    f"evaluate {_FILES} {_USER_LLM}",
    "evaluate --config_file code/overall/LLM_ddp.yaml --dataset Pixel200K --model pop",
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    return _run(program_config(argv, "train", EXAMPLES))


def evaluate(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    given = any(word.partition("=")[0] == "--val_only" for word in argv)
    more = () if given else ("--val_only", "True")
    return _run(program_config([*argv, *more], "evaluate", EVALUATE_EXAMPLES))


def _run(config: Config | None) -> int:
    if config is None:
        return EXIT_OK
    if config.check or config.dry_run:
        return _look_ahead(config)
    refuse(missing_for_run(config))
    # Imported here, so that nothing above waits for torch.
    from hsft.run.check import quick_problems
    from hsft.utils.environment import set_threads

    set_threads(config.num_threads)
    refuse(quick_problems(config))
    # Imported here, so that nothing above waits for Lightning and peft.
    from hsft.run.next_step import commands_after_run
    from hsft.run.train_and_rank import train_and_rank

    folder = train_and_rank(config)
    sys.stdout.write(commands_after_run(config, folder) if is_rank_zero() else "")
    return EXIT_OK


def _look_ahead(config: Config) -> int:
    # Imported here: each takes seconds that the other program need not wait for.
    if config.check:
        from hsft.run.check import check_run

        check_run(config)
    else:
        from hsft.run.dry_run import dry_run

        dry_run(config)
    return EXIT_OK
