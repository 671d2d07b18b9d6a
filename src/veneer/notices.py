"""Warnings at the line that called into this library; most name the weights they are about."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence

from veneer.method import VeneerWarning

_SHOWN = 3


def tell(texts: Mapping[str, Sequence[str]]) -> None:
    """One `VeneerWarning` for each text (text → names of the weights), the first three names and a count before it."""
    for text, names in texts.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        warnings.warn(f"{', '.join(map(repr, names[:_SHOWN]))}{more}: {text}", VeneerWarning, stacklevel=_outside())


def say(text: str, kind: type[Warning] = VeneerWarning) -> None:
    """One warning of this kind."""
    warnings.warn(text, kind, stacklevel=_outside())


def _outside() -> int:
    """The stacklevel, for the function that asks, of the nearest caller that is no part of this library."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "veneer":
        level, frame = level + 1, frame.f_back
    return level
