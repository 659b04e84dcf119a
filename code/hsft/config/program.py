"""What the programs with configuration keys do first: read the command line, make the configuration."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from hsft import __version__
from hsft.config.completion import answer_shell, key_parser
from hsft.config.help import dump_config, help_text, key_values
from hsft.config.loader import CommandLine, load_config, parse_command_line
from hsft.config.schema import Config
from hsft.utils.distributed import is_rank_zero
from hsft.utils.logs import set_up_logging
from hsft.utils.program import command

log = logging.getLogger(__name__)


def program_config(
    argv: Sequence[str], name: str, examples: Sequence[str], keys: Sequence[str] = ()
) -> Config | None:
    """Return a program's configuration, or None when it only had to print something.

    Args:
        argv: the arguments after the program's name.
        name: of the program, in `PROGRAMS`.
        examples: whole command lines for `--help`.
        keys: the keys that `--help` shows and the shell is offered; all of them when empty.

    Raises:
        InputError: the command line or a YAML file is not a valid configuration.
    """
    answer_shell(lambda: key_parser(command(name), key_values(keys)))
    line = parse_command_line(argv)
    is_first = is_rank_zero()
    text = _text(line, name, examples, keys)
    if text is not None:
        sys.stdout.write(text if is_first else "")
        return None
    config, warnings = load_config(line.config_files, line.overrides)
    if line.print_config:
        sys.stdout.write(dump_config(config) if is_first else "")
        return None
    set_up_logging(quiet=not is_first)
    for warning in warnings:
        log.warning(warning)
    return config


def _text(line: CommandLine, name: str, examples: Sequence[str], keys: Sequence[str]) -> str | None:
    if line.show_help:
        return help_text(name, examples, keys=keys)
    return f"hsft {__version__}\n" if line.show_version else None
