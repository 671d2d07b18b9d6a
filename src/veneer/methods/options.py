"""Checks of a method's options, shared by the methods: what is wrong is said when the method is written down."""

from __future__ import annotations

import math
from typing import Any

import torch

from veneer.method import VeneerError, parse_dtype

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
