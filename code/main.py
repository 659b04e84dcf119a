# PYTHON_ARGCOMPLETE_OK
"""Evaluate or fine-tune the UserLLM, or a reference model, on cached item embeddings."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from hsft.config.program import program_config
from hsft.utils.distributed import is_rank_zero
from hsft.utils.errors import EXIT_OK, refuse
from hsft.utils.program import run_program

_START = (
    "python code/main.py --config_file code/overall/LLM_ddp.yaml code/HLLM/HLLM.yaml"
    " --dataset Pixel200K --user_pretrain_dir model_checkpoints/UserLLM_complete"
)
EXAMPLES = (
    f"{_START} --val_only True",
    f"{_START} --use_qlora True --optim_args.learning_rate 2e-4",
    f"{_START} --use_qlora True --check True",
    f"{_START} --use_qlora True --dry_run True",
    "python code/main.py --config_file code/overall/LLM_ddp.yaml --dataset Pixel200K --model pop",
)


def main(argv: Sequence[str]) -> int:
    """Run the program with its arguments and return the exit code."""
    config = program_config(argv, "python code/main.py", __doc__ or "", EXAMPLES)
    if config is None:
        return EXIT_OK
    # Imported here, so that --help and a mistyped option need not wait for torch.
    from hsft.run.check import check_run, quick_problems
    from hsft.run.dry_run import dry_run
    from hsft.run.next_step import commands_after_run
    from hsft.run.train_and_rank import train_and_rank

    if config.check:
        check_run(config)
    elif config.dry_run:
        dry_run(config)
    else:
        refuse(quick_problems(config))
        folder = train_and_rank(config)
        sys.stdout.write(commands_after_run(config, folder) if is_rank_zero() else "")
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_program(main))
