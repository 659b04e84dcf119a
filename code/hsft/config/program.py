"""What every program does first: read its command line, answer --help, make the configuration."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from hsft.config.completion import answer_shell, key_parser
from hsft.config.help import dump_config, help_text, key_values
from hsft.config.loader import load_config, parse_command_line
from hsft.config.schema import Config
from hsft.utils.distributed import is_rank_zero
from hsft.utils.logs import set_up_logging

log = logging.getLogger(__name__)


def program_config(
    argv: Sequence[str],
    program: str,
    summary: str,
    examples: Sequence[str],
    keys: Sequence[str] = (),
) -> Config | None:
    """Return a program's configuration, or None when it only had to print something.

    Args:
        argv: the arguments after the program's name.
        program, summary, examples: for `--help`.
        keys: the keys that `--help` shows and the shell is offered; all of them when empty.

    Raises:
        InputError: the command line or a YAML file is not a valid configuration.
    """
    answer_shell(lambda: key_parser(program, key_values(keys)))
    line = parse_command_line(argv)
    speaks = is_rank_zero()
    if line.show_help:
        sys.stdout.write(help_text(program, summary, examples, keys=keys) if speaks else "")
        return None
    config, warnings = load_config(line.config_files, line.overrides)
    if line.print_config:
        sys.stdout.write(dump_config(config) if speaks else "")
        return None
    set_up_logging(quiet=not speaks)
    for warning in warnings:
        log.warning(warning)
    if config.num_threads is not None:
        # Here, so that --help and a mistyped key need not wait for torch.
        import torch

        torch.set_num_threads(config.num_threads)
    return config
