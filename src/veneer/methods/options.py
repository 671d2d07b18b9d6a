"""Checks of a method's options, shared by the methods: what is wrong is said when the method is written down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from veneer.method import Shape, VeneerError, parse_dtype

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_bool(owner: str, field: str, value: Any, hint: str = "") -> None:
    """Raise `VeneerError` unless `value` is True or False; `hint` is added to the message."""
    if not isinstance(value, bool):
        raise VeneerError(f"{owner}: {field} must be True or False, got {value!r}{hint}")


def check_number(owner: str, field: str, value: Any, also: str = "") -> None:
    """Raise `VeneerError` unless `value` is a finite int or float; `also` says what else was possible."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise VeneerError(f"{owner}: {field} must be a finite number{also}, got {value!r}")


def as_dtype(owner: str, value: Any) -> torch.dtype | None:
    """The dtype of an adapter's parameters from a dtype, its name or None; raises `VeneerError` on another."""
    if isinstance(value, str):
        value = parse_dtype(value)
    if value is not None and value not in _DTYPES:
        raise VeneerError(f"{owner}: dtype must be float32, bfloat16, float16, float64 or None, got {value!r}")
    return value


def check_seed(owner: str, value: Any) -> None:
    """Raise `VeneerError` unless `value` can seed torch's generator."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise VeneerError(f"{owner}: seed must be a whole number of at least 0, got {value!r}")


def check_bases(owner: str, value: Any) -> tuple[int, int] | None:
    """The size (out, in) of shared bases as a tuple, or None; raises `VeneerError` on anything else."""
    if value is None:
        return None
    found = tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(found) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in found):
        raise VeneerError(f"{owner}: bases must be two whole numbers (out, in) or None, got {value!r}")
    return found


def largest(shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """The largest out and the largest in among some weights."""
    return max(s.out for s in shapes.values()), max(s.in_ for s in shapes.values())
