"""`model.quantize`: a base whose linear weights are held in fewer bits, in the training command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

import veneer
from veneer.method import VeneerError, nearest
from veneer.quantize import schemes
from veneer.storage.recent import RECENT, keep_dense
from veneer.train.console import size
from veneer.train.schema import ConfigError

#: the blocks of a GGUF file, kept as they are; no scheme of `veneer.quantize`, which knows of no file
GGUF = "gguf"
_KEY = "model.quantize"


def parse(value: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(scheme, its options) of the setting. Raises `ConfigError` for an unknown scheme."""
    options = {"scheme": value} if isinstance(value, str) else dict(value)
    scheme = options.pop("scheme", None)
    known = [*schemes(), GGUF]
    if not isinstance(scheme, str):
        raise ConfigError(f"{_KEY} as a mapping needs the key 'scheme', one of {', '.join(known)}; got {value!r}")
    if scheme not in known:
        raise ConfigError(f"{_KEY} is {scheme!r}; possible: {', '.join(known)}{nearest(scheme, known)}")
    if scheme == GGUF and options:
        raise ConfigError(f"{_KEY}: 'gguf' keeps what the file has and takes no options, got {', '.join(options)}")
    return scheme, options


def check(value: str | Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an unknown scheme or option, or a missing library, before a model is loaded."""
    scheme, options = parse(value)
    if scheme == GGUF:
        return
    try:
        schemes()[scheme].check(scheme, options)
    except VeneerError as error:
        raise ConfigError(f"{_KEY}: {error}") from None


def hold(model: nn.Module, value: str | Mapping[str, Any]) -> tuple[str, ...]:
    """Hold the linear weights as the setting says; returns what to tell the user."""
    scheme, options = parse(value)
    return notes(veneer.quantize(model, scheme, **options))


def notes(report: Any) -> tuple[str, ...]:
    """A `QuantizeReport` in sentences; one for all that was left as it was."""
    first = (f"{report.weights} weights held as {report.scheme}: {size(report.bytes_before)} as numbers, "
             f"{size(report.bytes_after)} so")
    rest = f" and {len(report.skipped) - 1} more" if len(report.skipped) > 1 else ""
    return (first, *(f"left as it is: {text}{rest}" for text in report.skipped[:1]))


def schemas() -> list[dict[str, Any]]:
    """The setting's alternatives as JSON schemas."""
    names = {"enum": [*schemes(), GGUF]}
    mapping = {"type": "object", "required": ["scheme"], "properties": {"scheme": names}}
    return [names, mapping, {"type": "null"}]


@contextlib.contextmanager
def dense_kept(megabytes: float) -> Iterator[None]:
    """`veneer.storage.recent.keep_dense` for the time of a run."""
    before = RECENT.limit
    keep_dense(megabytes)
    try:
        yield
    finally:
        keep_dense(before / 2**20)
