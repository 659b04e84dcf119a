"""Merge YAML files and command-line overrides into a `Config`, with errors a user can act on."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from hsft.config.hllm_keys import HLLM_KEYS, HLLM_MODELS, SHAPES
from hsft.config.schema import Config
from hsft.utils.errors import InputError, one_line, refuse
from hsft.utils.files import is_file, require_file

_PACKAGE = Path(__file__).resolve().parents[1]
# Folders of the YAML files that come with HSFT: beside the package in the repository, inside it where
# it is installed.
_SHIPPED = (("HLLM",), ("IDNet",), ("baselines",), ("overall",))
MAX_YAML_BYTES = 256 << 10
MAX_DEPTH = 20


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line, before any file is read.

    Attributes:
        config_files: YAML files in the order given; later ones win.
        overrides: flat `key` or `section.key` -> value with YAML typing.
        print_config: print the merged configuration and stop.
        show_help: print the help and stop.
        show_version: print the version and stop.
    """

    config_files: tuple[Path, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    print_config: bool = False
    show_help: bool = False
    show_version: bool = False


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers and booleans; no repeated keys, no aliases, no tags.

    YAML 1.1, PyYAML's dialect, reads `1e-4` as text, `010` as eight and `yes` as a boolean.
    Aliases are refused because nested ones expand without bound, and so is nesting without end.
    """

    open_collections = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(
                problem="anchors and aliases are not accepted here", problem_mark=event.start_mark
            )
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"the tag {event.tag} is not accepted here", problem_mark=event.start_mark
            )
        if not isinstance(event, yaml.CollectionStartEvent):
            return super().compose_node(parent, index)
        # The composer calls itself for every level.
        if self.open_collections == MAX_DEPTH:
            mark: Any = event.start_mark
            raise yaml.MarkedYAMLError(
                problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark
            )
        self.open_collections += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.open_collections -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be plain text", problem_mark=key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key_node.value}' is given twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# Tag, pattern and possible first characters of the loader's numbers.
NUMBERS = (
    (
        "tag:yaml.org,2002:int",
        re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"),
        list("-+0123456789"),
    ),
    # A point or an exponent makes a float: `010` is neither an integer nor one, but text.
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
            r"|[-+]?\.inf|\.nan)$"
        ),
        list("-+0123456789."),
    ),
)
for _tag, _pattern, _first in NUMBERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = loader.construct_scalar(node).lower()
    if text.endswith(".inf"):
        return -math.inf if text.startswith("-") else math.inf
    return math.nan if text == ".nan" else float(text)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > 40:
        raise yaml.MarkedYAMLError(problem="the number is too long", problem_mark=node.start_mark)
    return int(text)


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def read_yaml_text(text: str, where: str) -> Any:
    """Parse YAML text.

    Args:
        text: the YAML document.
        where: what to call its source in an error.

    Raises:
        InputError: it is not YAML, repeats a key, uses an alias or is nested too deeply.
    """
    try:
        # The loader derives from SafeLoader: it builds plain data only.
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(
            f"{where}{line}: {error.problem or error}; correct the YAML there."
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{where} is not readable YAML: {reason}.") from error


def config_file(name: str | Path) -> Path:
    """Return the file that a configuration file's name stands for.

    Args:
        name: a path, or the name of a file that comes with HSFT, such as `overall/LLM_ddp.yaml` or
            `code/overall/LLM_ddp.yaml`; a file of this name in the working directory comes first.
    """
    path = Path(name)
    words = path.parts[1:] if path.parts[:1] == ("code",) else path.parts
    if words[:1] in _SHIPPED and not is_file(path):
        for folder in (_PACKAGE / "presets", _PACKAGE.parent):
            if is_file(folder.joinpath(*words)):
                return folder.joinpath(*words)
    return path


def read_yaml_file(path: str | Path) -> dict[str, Any]:
    """Read one configuration file: a mapping of keys, or an empty file.

    Raises:
        InputError: the file is missing, too large, not UTF-8, not YAML or not a mapping.
    """
    path = require_file(
        config_file(path),
        str(path),
        "check --config_file, which takes every word up to the next --key",
    )
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            limit = f"{MAX_YAML_BYTES >> 10} KiB"
            raise InputError(f"{path} is larger than {limit}; it is not a configuration file.")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    value = read_yaml_text(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold 'key: value' lines, not a {_kind(value)}.")
    return value


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Split `--config_file A B --key value --section.key value` into its parts.

    Values are read as YAML (`True`, `3`, `1e-4`, `[a, b]`). A key with several values is a list,
    a key without one is True.

    Args:
        argv: the arguments after the program's name.

    Raises:
        InputError: a value stands without a key, or a key is given twice.
    """
    files: list[Path] = []
    overrides: dict[str, Any] = {}
    for key, values in _split_flags(argv):
        if key in ("help", "h"):
            return CommandLine(show_help=True)
        if key == "version":
            return CommandLine(show_version=True)
        if key == "config_file":
            if not values:
                raise InputError("--config_file needs at least one YAML file after it.")
            files.extend(Path(value) for value in values)
            continue
        if key in overrides:
            raise InputError(f"--{key} is given twice; keep one.")
        overrides[key] = _command_value(key, values)
    print_config = overrides.pop("print_config", False)
    if not isinstance(print_config, bool):
        raise InputError(f"--print_config must be True or False, not {print_config!r}.")
    return CommandLine(tuple(files), overrides, print_config)


def _split_flags(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word == "-h":
            flags.append(("h", []))
        elif word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            flags.append((key, [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            raise InputError(f"'{word}' stands before any --key; write --key value.")
    return flags


def _command_value(key: str, values: list[str]) -> Any:
    if not values:
        return True
    if _is_text_key(key) and len(values) == 1:
        # `--dataset 010` names the dataset 010, not the number.
        return None if values[0] in ("null", "None", "~") else values[0]
    parsed = [_scalar(value, key) for value in values]
    return parsed[0] if len(parsed) == 1 else parsed


def _scalar(text: str, key: str) -> Any:
    # HLLM's documented commands escape the quotes of lists: '[\"title\", \"tag\"]'.
    cleaned = text.replace('\\"', '"')
    if cleaned == "None":
        return None
    try:
        return read_yaml_text(cleaned, f"--{key}")
    except InputError as error:
        if not cleaned.startswith(("[", "{")):
            return text
        if cleaned.endswith(("]", "}")):
            raise
        raise InputError(
            f"--{key}: '{one_line(text, 40)}' is the beginning of a list or mapping only; put quotes "
            f"around one that has spaces: --{key} '[a, b]'."
        ) from error


def _is_text_key(key: str) -> bool:
    info = flat_fields().get(key)
    return info is not None and _may_be_text(info.annotation)


def _may_be_text(annotation: Any) -> bool:
    """Say whether a key takes one text: `str`, or it among optional and annotated types."""
    if get_origin(annotation) in (list, Literal):
        return False
    return annotation is str or any(_may_be_text(part) for part in get_args(annotation))


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def load_config(
    files: Sequence[str | Path] = (),
    overrides: Mapping[str, Any] | None = None,
    where: str = "the command line",
) -> tuple[Config, list[str]]:
    """Merge files and overrides, later ones winning key by key, and check the result.

    Args:
        files: YAML files.
        overrides: `key` or `section.key` -> value, applied after the files.
        where: what to call the overrides' source in an error.

    Returns:
        The configuration, and warnings about accepted keys that have no effect.

    Raises:
        InputError: an unknown key (with the nearest known one), a wrong type or a value out of
            range; `InputErrors` with one sentence each when there are several.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for file in files:
        _merge(merged, origin, _take_split(read_yaml_file(file), str(file)), str(file))
    for key, value in _take_split(overrides or {}, where).items():
        if key.count(".") > MAX_DEPTH:
            raise InputError(f"unknown key '{one_line(key, 40)}' in {where}.")
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(merged, origin, nested, where)
    _rename_old_keys(merged, origin)
    warnings, problems = _take_hllm_keys(merged, origin)
    warnings += _drawn_after_all(merged, origin)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        refuse([*problems, *_explain(error, origin)])
        raise
    refuse(problems)
    return config, warnings


def _take_split(source: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Take `data_split: global_time` or `leave_one_out` for `split`.

    `data_split` is HLLM's key and a boolean, which an earlier file may have set and which stays so.

    Args:
        source: keys of one file or of the command line.
        where: what to call it in an error.

    Raises:
        InputError: the two keys name different splits.
    """
    named = source.get("data_split")
    if named not in get_args(Config.model_fields["split"].annotation):
        return dict(source)
    if source.get("split", named) != named:
        raise InputError(
            f"data_split: {named} and split: {one_line(source['split'], 40)} in {where} contradict "
            f"each other; keep split."
        )
    return {**{key: value for key, value in source.items() if key != "data_split"}, "split": named}


def _rename_old_keys(merged: dict[str, Any], origin: dict[str, str]) -> None:
    """Give keys of the configurations of earlier runs their present names."""
    section = merged.get("llm_id")
    if isinstance(section, dict) and "pretrained" in section:
        pretrained = section.pop("pretrained")
        # Other models stored it too, where it said nothing of their LLM.
        if merged.get("model") == "llm_id":
            merged.setdefault("user_llm_init", pretrained)
            origin.setdefault("user_llm_init", origin.get("llm_id.pretrained", ""))


def _take_hllm_keys(
    merged: dict[str, Any], origin: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Take out the keys of HLLM that are no keys here.

    Returns:
        Warnings of those that change nothing, and a sentence for each that is refused.
    """
    warnings, problems = [], []
    for name in [*HLLM_KEYS, *SHAPES]:
        section, _, key = name.rpartition(".")
        values = merged.get(section) if section else merged
        if not isinstance(values, dict) or key not in values:
            continue
        value, where = values.pop(key), origin[name]
        known = HLLM_KEYS.get(name)
        if value is None or (known is not None and known.accepts(value)):
            why = f": {known.why}" if known is not None and known.why else ""
            warnings.append(f"{name} (from {where}) is a key of HLLM that has no effect here{why}.")
            continue
        instead = _shape_keys(name) if known is None else known.instead
        shown = one_line(repr(value), 40)
        problems.append(
            f"key '{name}' in {where} is one of HLLM's and cannot be {shown} here: {instead}."
        )
    model = merged.get("model")
    if isinstance(model, str) and model in HLLM_MODELS:
        del merged["model"]
        name = HLLM_MODELS[model]
        problems.append(
            f"model: {model} in {origin['model']} is HLLM's name: use model: {name}, with its shape in "
            f"the section {name}."
        )
    return warnings, problems


def _drawn_after_all(merged: Mapping[str, Any], origin: Mapping[str, str]) -> list[str]:
    """Warn where `negatives: in_batch` meets another file's `num_negatives`, which wins."""
    number = merged.get("num_negatives")
    if merged.get("negatives") != "in_batch" or number is None:
        return []
    where, other = origin["negatives"], origin["num_negatives"]
    if where == other:
        return []
    return [
        f"negatives: in_batch (from {where}) has no effect beside num_negatives: "
        f"{one_line(number, 40)} (from {other}), which draws them; set num_negatives: null for the "
        f"batch's targets alone."
    ]


def _shape_keys(name: str) -> str:
    """Say which keys stand for one of the shape of HLLM's models on item ids."""
    keys = [key for key in flat_fields() if key.partition(".")[2] in SHAPES[name]]
    if keys:
        return f"use {' or '.join(keys)}"
    return "it is fixed; the section of the model, such as sasrec, has what can be chosen"


def _merge(
    target: dict[str, Any],
    origin: dict[str, str],
    source: dict[Any, Any],
    where: str,
    above: str = "",
) -> None:
    for key, value in source.items():
        name = f"{above}{key}"
        if not isinstance(key, str):
            raise InputError(f"{where}: key {key!r} must be text; see --help for all keys.")
        if isinstance(value, dict) and isinstance(target.get(key), dict):
            _merge(target[key], origin, value, where, f"{name}.")
        elif isinstance(value, dict):
            target[key] = {}
            origin[name] = where
            _merge(target[key], origin, value, where, f"{name}.")
        else:
            target[key] = value
        origin[name] = where


def _explain(error: ValidationError, origin: Mapping[str, str]) -> list[str]:
    """Return one sentence a problem."""
    problems = []
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        name = ".".join(part for part in path if not part.isdigit() or part != path[-1])
        where = next(
            (
                origin[".".join(path[:n])]
                for n in range(len(path), 0, -1)
                if ".".join(path[:n]) in origin
            ),
            "the configuration",
        )
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            # Options such as --config_file are written beside the keys on the command line only.
            flags = ("config_file", "print_config") if where == "the command line" else ()
            problems.append(f"unknown key '{name}' in {where}{suggest_key(name, flags)}")
        elif not path:
            problems.append(message)
        else:
            message = message[:1].lower() + message[1:]
            if item["type"] == "list_type":
                message = "must be a list, written as '[a, b]'"
            given = item["input"]
            shown = (
                repr(given)
                if len(repr(given)) < 60
                else f"a {_kind(given)} that is too long to show"
            )
            problems.append(f"key '{name}' in {where}: {message}, but it is {shown}")
    return [
        f"{text}{'' if text.endswith('?') else '.'} See --help for all keys."
        for text in dict.fromkeys(problems)
    ]


def suggest_key(name: str, flags: Sequence[str] = ()) -> str:
    """Return `; did you mean 'x'?` for the known key nearest to `name`, or an empty string.

    Args:
        name: an unknown key.
        flags: further names that would have been accepted.
    """
    names = [*flat_fields(), *flags]
    lowered = {known.lower(): known for known in names}
    for known in names:
        lowered.setdefault(known.rpartition(".")[2].lower(), known)
    close = difflib.get_close_matches(name.lower().replace("-", "_"), lowered, n=1, cutoff=0.6)
    return f"; did you mean '{lowered[close[0]]}'?" if close else ""


def flat_fields() -> dict[str, Any]:
    """Return every key of the schema, sections flattened to `section.key` -> pydantic field."""
    flat: dict[str, Any] = {}
    for name, info in Config.model_fields.items():
        if _is_section(info.annotation):
            for inner, inner_info in info.annotation.model_fields.items():  # type: ignore[union-attr]
                flat[f"{name}.{inner}"] = inner_info
        else:
            flat[name] = info
    return flat


def flat_values(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return a dumped configuration's values by `key` or `section.key`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        flat.update(flat_values(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def _kind(value: Any) -> str:
    names = {dict: "mapping", list: "list", str: "text", bool: "boolean", int: "number"}
    return names.get(type(value), type(value).__name__)
