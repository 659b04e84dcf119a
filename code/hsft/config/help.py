"""The text of --help and the key table of docs/keys.md, both generated from the schema."""

from __future__ import annotations

import itertools
import shutil
import textwrap
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from hsft.config.loader import NUMBERS
from hsft.config.schema import Config
from hsft.utils.program import PROGRAMS, command, command_line

_OPEN_KINDS = {"text", "integer", "number"}


def describe_type(annotation: Any) -> str:
    """Say a field's type in words a user of YAML understands."""
    origin = get_origin(annotation)
    if origin is Literal:
        return " | ".join(str(value) for value in get_args(annotation))
    if origin is list:
        return f"list of {describe_type(get_args(annotation)[0])}"
    if origin in (Union, types.UnionType):
        kinds = [describe_type(part) for part in get_args(annotation)]
        return " | ".join("null" if kind == "NoneType" else kind for kind in kinds)
    if hasattr(annotation, "__metadata__"):
        return describe_type(get_args(annotation)[0])
    names = {str: "text", int: "integer", float: "number", bool: "True | False"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _keys_by_group() -> dict[str, list[tuple[str, str, str, str]]]:
    groups: dict[str, list[tuple[str, str, str, str]]] = {}
    for name, info in Config.model_fields.items():
        group = info.json_schema_extra["group"]  # type: ignore[index]
        rows = groups.setdefault(str(group), [])
        annotation = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            for inner, inner_info in annotation.model_fields.items():
                rows.append(_row(f"{name}.{inner}", inner_info))
        else:
            rows.append(_row(name, info))
    return groups


def _row(name: str, info: Any) -> tuple[str, str, str, str]:
    default = info.get_default(call_default_factory=True)
    shown = yaml.safe_dump(default, default_flow_style=True).replace("\n...", "").strip()
    return name, describe_type(info.annotation), shown, info.description or ""


def help_text(name: str, examples: Sequence[str], keys: Sequence[str] = ()) -> str:
    """Return the `--help` text of a program that takes configuration keys, as wide as the terminal.

    Args:
        name: of the program, in `PROGRAMS`.
        examples: whole command lines, as `command_line` takes them.
        keys: the keys that take part in the program; all of them when empty.
    """
    width = max(40, shutil.get_terminal_size().columns)

    def wrapped(text: str, indent: str = "") -> list[str]:
        return textwrap.wrap(
            text,
            width,
            initial_indent=indent,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )

    lines = wrapped(PROGRAMS[name].summary)
    lines += ["", f"usage: {command(name)} [--config_file FILE.yaml ...] [--key value ...]", ""]
    # Not wrapped: a command is copied as a line.
    lines += ["examples:", *(f"  {command_line(line)}" for line in examples), "", "flags:"]
    flags = {
        "config_file": "YAML files, later ones win; also names of those that come with HSFT, such as "
        "overall/LLM_ddp.yaml",
        "print_config": "print the merged configuration and stop",
        "version": "print the version and stop",
        "help": "show this text",
    }
    for flag, text in flags.items():
        first, *rest = wrapped(text, " " * 19)
        lines += [f"  --{flag:<14} {first.strip()}", *rest]
    lines += ["", "A key without a value is True."]
    if keys:
        every = (
            f"Every key of {command('train')} is accepted, so that both take the same YAML files."
        )
        lines += ["", *wrapped(f"{every} These have an effect here:")]
    for group, rows in _keys_by_group().items():
        shown = [row for row in rows if not keys or row[0] in keys]
        lines += ["", f"{group} keys:"] if shown else []
        for key, kind, default, description in shown:
            lines.append(f"  --{key}  ({kind}; default {default})")
            lines += wrapped(description, " " * 6)
    return "\n".join(lines) + "\n"


def key_values(keys: Sequence[str] = ()) -> list[tuple[str, list[str]]]:
    """Return keys with the values that each may have, none when they are not a short list.

    Args:
        keys: which ones; all of them when empty.
    """
    values = []
    for name, kind, _, _ in itertools.chain(*_keys_by_group().values()):
        if keys and name not in keys:
            continue
        words = [] if kind.startswith("list of ") else kind.split(" | ")
        listed = len(words) > 1 and not set(words) & _OPEN_KINDS
        values.append((name, words if listed else []))
    return values


def key_table() -> str:
    """Return the Markdown table of all keys, as it stands in docs/keys.md."""
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for group, rows in _keys_by_group().items():
        lines.append(f"| **{group}** | | | |")
        for cells in rows:
            name, kind, default, description = (cell.replace("|", "\\|") for cell in cells)
            lines.append(f"| `{name}` | {kind} | `{default}` | {description} |")
    return "\n".join(lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes what only the loader here takes for a number, such as `1e5`."""


for _tag, _pattern, _first in NUMBERS:
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def dump_config(config: Config) -> str:
    """Return the configuration as YAML text that `--config_file` reads back."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
