"""What starts from data share: they are given the statistics that `veneer.calibrate` collects of a weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from veneer.inits.base import Evidence, Init
from veneer.method import Shape, VeneerError


@dataclass(frozen=True, kw_only=True)
class FromData(Init):
    """A start that needs a weight's inputs to have been seen."""

    def refusal(self, shape: Shape, rank: int) -> str | None:
        if shape.lookup or shape.batch or shape.is_vector:
            what = "an embedding looks rows up and is given no input" if shape.lookup else \
                "the inputs of fused experts pass no layer where they could be seen"
            return f"init={self.key!r} starts from a layer's inputs, and {what}; use another start for it"
        return None

    def given(self, evidence: Evidence | None, *names: str) -> list[Tensor]:
        missing = [name for name in names if name not in (evidence or {})]
        if missing or evidence is None:
            raise VeneerError(f"init={self.key!r} starts from the statistic {self.needs!r} of veneer.calibrate, and "
                              f"there is no {' and no '.join(missing or names)} here; found: "
                              f"{', '.join(evidence or {}) or 'nothing'}")
        return [evidence[name] for name in names]


def above(key: str, wanted: int, rank: int, shape: Shape) -> str | None:
    """Why a start of `rank` cannot take `wanted` singular vectors of a matrix of `shape`, or None."""
    if wanted <= min(shape.out, shape.in_):
        return None
    return (f"init={key!r} at rank {rank} takes {wanted} singular vectors of a matrix ({shape.out}, {shape.in_}), which"
            f" has {min(shape.out, shape.in_)}; take a smaller rank")


def check_number(owner: str, name: str, value: object, least: float, most: float = math.inf) -> None:
    """Raise `VeneerError` unless `value` is a finite number from `least` to `most`."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not least <= value <= most:  # type: ignore[operator]
        upper = "" if math.isinf(most) else f" and at most {most:g}"
        raise VeneerError(f"{owner}: {name} must be a number of at least {least:g}{upper}, got {value!r}")
