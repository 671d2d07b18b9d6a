"""A packed weight encoded anew with a change in it, and how much of that change is left in what is read then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from veneer.storage.base import Storage


@dataclass(frozen=True)
class Requantised:
    """held: what `Storage.encode` gave for W + ΔW, if that is finite. change: ‖ΔW‖² (Frobenius). lost:
    ‖(W′ − W) − ΔW‖², with W and W′ what is read before and after."""

    held: Any
    change: float
    lost: float


def requantise(storage: Storage, module: nn.Module, base: Tensor, new: Tensor) -> Requantised:
    """Encode `new` (out, in) as the module's weight, which is read as `base` now; both fp32 or wider. The module is
    not changed. Raises `VeneerError` where the storage cannot be written."""
    change = new - base
    wanted = _square(change)
    if not math.isfinite(wanted):
        return Requantised(None, wanted, math.nan)
    held = storage.encode(module, new)
    after = storage.decode(module, held, base.dtype)
    return Requantised(held, wanted, _square(after.sub_(base).sub_(change)))


def surviving(change: float, lost: float) -> float:
    """The share of a change that is left: 1 where all of it is, below 0 where more than it went wrong."""
    if change:
        return 1 - lost / change
    return 1.0 if not lost else -float("inf")


def _square(matrix: Tensor) -> float:
    return float(matrix.double().square().sum())
