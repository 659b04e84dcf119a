"""What a key is searched over: a list of values, or a range of numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from hsft.config.help import describe_type
from hsft.config.loader import flat_fields, suggest_key
from hsft.utils.errors import InputError, one_line

MAX_POINTS = 100_000


class Choice(BaseModel):
    """One of several values.

    Attributes:
        values: what the key takes.
    """

    model_config = ConfigDict(frozen=True)

    values: tuple[Any, ...]

    def corners(self) -> tuple[Any, ...]:
        """Return the values to try before a sweep starts."""
        return self.values

    def points(self) -> tuple[Any, ...] | None:
        """Return every value."""
        return self.values

    def describe(self) -> Any:
        """Return it as plain data."""
        return list(self.values)


class Range(BaseModel):
    """A number between two bounds, both included.

    Attributes:
        low, high: the bounds; integers for a key that takes integers, which are then drawn.
        log: drawn evenly on a logarithmic scale.
        step: distance of the values from `low` on; None: 1 for integers, any value otherwise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low ({self.low}) must be less than high ({self.high})")
        if self.step is not None and not 0 < self.step <= self.high - self.low:
            raise ValueError("step must be above 0 and within the range")
        if self.whole and isinstance(self.step, float):
            raise ValueError("step must be an integer, as low and high are")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs a low above 0 and no step")
        return self

    @property
    def whole(self) -> bool:
        """Whether integers are drawn."""
        return isinstance(self.low, int)

    def corners(self) -> tuple[Any, ...]:
        """Return the values to try before a sweep starts."""
        return (self.low, self.high)

    def points(self) -> tuple[Any, ...] | None:
        """Return every value, None where there is no end of them."""
        step = self.step or (1 if self.whole else None)
        if step is None:
            return None
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        if count > MAX_POINTS:
            return None
        return tuple(self.low + number * step for number in range(count))

    def describe(self) -> Any:
        """Return it as plain data."""
        return self.model_dump()


def read_axis(path: Path, key: str, spec: Any) -> Choice | Range:
    """Read what one key is searched over.

    Args:
        path: the file it stands in.
        key: `key` or `section.key`.
        spec: a list of values, or a mapping with `low` and `high`.

    Raises:
        InputError: the key is unknown, or it does not take these values.
    """
    where = f"{path}: search key '{one_line(key, 60)}'"
    info = flat_fields().get(key)
    if info is None:
        end = suggest_key(key) or "; see python code/main.py --help for all keys."
        raise InputError(f"{path}: unknown search key '{one_line(key, 60)}'{end}")
    if isinstance(spec, list):
        if len({json.dumps(value) for value in spec}) != len(spec) or not spec:
            raise InputError(f"{where}: a list needs one value or more, each once.")
        return Choice(values=tuple(_value(where, info, value) for value in spec))
    if isinstance(spec, dict):
        return _range(where, info, spec)
    raise InputError(f"{where} is {spec!r}; write a list of values, or low and high.")


def _range(where: str, info: Any, spec: Mapping[str, Any]) -> Range:
    if describe_type(info.annotation).partition(" ")[0] not in ("integer", "number"):
        raise InputError(f"{where} takes no numbers; write a list of values.")
    bounds = {name: _value(where, info, spec[name]) for name in ("low", "high") if name in spec}
    try:
        return Range.model_validate({**spec, **bounds})
    except ValidationError as error:
        problem = error.errors()[0]
        name = "".join(f"{part}: " for part in problem["loc"][:1])
        raise InputError(
            f"{where}: {name}{_reason(problem)}; write {{low: A, high: B}}, and log: True or step: C "
            f"as needed."
        ) from error


def _value(where: str, info: Any, value: Any) -> Any:
    """Check one value against its key and return it as the key's type."""
    kind: Any = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        reason = _reason(error.errors()[0])
        raise InputError(f"{where}: {one_line(repr(value), 60)}: {reason}.") from error


def _reason(problem: Any) -> str:
    said = str(problem["msg"]).removeprefix("Value error, ")
    return f"{said[:1].lower()}{said[1:]}"
