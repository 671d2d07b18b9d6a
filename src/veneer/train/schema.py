"""Dataclasses as a config schema: checked values, overrides and JSON schema from the annotations alone.

A field is declared with `option(default, help, minimum=…)`. Supported annotations: bool, int, float, str, `X | None`,
`Literal`, `list[X]`, `dict[str, Any]` and nested dataclasses.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from veneer.method import VeneerError, nearest

T = TypeVar("T")


class ConfigError(VeneerError):
    """A config that cannot be used: the message names the key, the value and what was possible."""


def option(default: Any, help: str, minimum: float | None = None, maximum: float | None = None) -> Any:
    """A dataclass field with its documentation and, for numbers, its bounds (both included)."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum}
    if isinstance(default, (type, types.FunctionType)):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def build(cls: type[T], values: Any, where: str = "") -> T:
    """An instance of the dataclass `cls` from plain data.

    `where` is the dotted place of `values` in the config, used in messages. Raises `ConfigError` for an unknown key
    (with the nearest known one), a value of the wrong type, or a number out of bounds.
    """
    place = where or "the config"
    if not isinstance(values, Mapping):
        raise ConfigError(f"{place} must be a mapping of keys to values, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in fields:
            hint = nearest(str(key), fields) or "."
            raise ConfigError(f"unknown key {key!r} in {place}{hint} Known keys: {', '.join(fields)}")
    parsed = {}
    for key, value in values.items():
        full = f"{where}.{key}" if where else key
        parsed[key] = convert(hints[key], value, full)
        _check_bounds(fields[key], parsed[key], full)
    return cls(**parsed)


def convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`; `ConfigError` naming `where` if it is something else."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is Literal:
        if value in arguments:
            return value
        names = ", ".join(map(repr, arguments))
        raise ConfigError(f"{where} is {value!r}; possible: {names}{nearest(str(value), map(str, arguments))}")
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return [convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping, got {value!r}")
        return dict(value)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast("type[Any]", kind), value, where)
    return _convert_scalar(kind, value, where)


def _convert_union(arguments: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    kinds = [kind for kind in arguments if kind is not type(None)]
    for kind in kinds:  # several kinds: the first that fits the value as it was written
        if len(kinds) == 1 or _fits(kind, value):
            return convert(kind, value, where)
    names = " or ".join(describe(kind) for kind in kinds)
    raise ConfigError(f"{where} must be {names}, got {value!r}")


def _fits(kind: Any, value: Any) -> bool:
    origin = get_origin(kind) or kind
    if origin is dict or dataclasses.is_dataclass(origin):
        return isinstance(value, Mapping)
    return isinstance(value, origin) if isinstance(origin, type) else False


def _convert_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return _finite(float(value), where)
    raise ConfigError(f"{where} must be {describe(kind)}, got {value!r}")


def _finite(value: float, where: str) -> float:
    if not math.isfinite(value):
        raise ConfigError(f"{where} must be a finite number, got {value!r}")
    return value


def _check_bounds(field: dataclasses.Field, value: Any, where: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
    if low is not None and value < low:
        raise ConfigError(f"{where} must be at least {low}, got {value!r}")
    if high is not None and value > high:
        raise ConfigError(f"{where} must be at most {high}, got {value!r}")


def describe(kind: Any) -> str:
    """A type in words, for messages."""
    origin = get_origin(kind) or kind
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return words.get(origin, "a mapping")


def override(config: dict[str, Any], assignment: str, parse: Any) -> None:
    """Apply one `a.b=value` to the plain config in place; `parse` turns the text of the value into data."""
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set needs KEY=VALUE with a dotted key, got {assignment!r}")
    *parents, last = path.strip().split(".")
    here = config
    for step in parents:
        below = here.setdefault(step, {})
        if not isinstance(below, dict):
            raise ConfigError(f"--set {path.strip()}: {step!r} holds {below!r}, which has no keys of its own")
        here = below
    here[last] = parse(text)


def json_schema(cls: Any) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a dataclass declared with `option`."""
    hints = typing.get_type_hints(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        entry = _schema_of(hints[field.name])
        entry |= {k: field.metadata[k] for k in ("minimum", "maximum") if field.metadata.get(k) is not None}
        if field.metadata.get("help"):
            entry["description"] = field.metadata["help"]
        if field.default is not dataclasses.MISSING:
            entry["default"] = field.default
        properties[field.name] = entry
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _schema_of(kind: Any) -> dict[str, Any]:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema_of(argument) for argument in arguments]}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": _schema_of(arguments[0])}
    if dataclasses.is_dataclass(kind):
        return json_schema(kind)
    names = {bool: "boolean", int: "integer", float: "number", str: "string", type(None): "null"}
    if kind in names:
        return {"type": names[kind]}
    return {"type": "object"} if origin is dict else {}
