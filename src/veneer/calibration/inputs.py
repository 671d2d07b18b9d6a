"""The statistic "inputs": the leading principal components of a layer's inputs, by incremental SVD (Ross, Lim, Lin and
Yang 2008, "Incremental learning for robust visual tracking").

What is kept of all inputs so far is their mean and their k strongest directions, with singular values, around it. New
rows, their own mean taken off, are stacked under these directions, together with one row for the distance of the two
means, and the strongest directions of the stack are the new ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from veneer.leading import leading_directions, wide
from veneer.method import VeneerError

#: rows of one step: the eigenvectors of so many are found in no time
_STEP = 128


def _kept(most: int) -> int:
    """How many directions are carried along, of which the weakest take up most of what is cut off at every step: on
    inputs of a language model the 16 first of 32 + 16 come nearer to those of an SVD of all than with six times the
    rows in a step."""
    return most + max(most // 2, 8)


@dataclass(frozen=True)
class Inputs:
    """All inputs (n, in) seen so far, as `most` components and some spare ones. Never changed: `add` gives a new one.

    components: (k, in), orthonormal rows, fp32, the strongest first. singular: (k,), fp64. mean: (in,), fp64.
    total: Σ‖x − mean‖².
    pending: rows that wait until there are `most` of them, as fewer would change little and look like convergence.
    similar: |cosine| of each component with what it was before the last rows came in.
    """

    most: int
    components: Tensor
    singular: Tensor
    mean: Tensor
    total: float = 0.0
    count: int = 0
    pending: tuple[Tensor, ...] = field(default=(), repr=False)
    similar: Tensor | None = None

    @classmethod
    def empty(cls, in_: int, most: int, device: torch.device | str = "cpu") -> Inputs:
        device = "cpu" if torch.device(device).type == "mps" else device
        mean = torch.zeros(in_, dtype=torch.float64, device=device)
        return cls(min(most, in_), mean.new_zeros(0, in_).float(), mean.new_zeros(0), mean)

    @property
    def seen(self) -> int:
        """How many rows were given, those that wait included."""
        return self.count + sum(map(len, self.pending))

    def add(self, rows: Tensor) -> Inputs:
        """With rows (n, in) more."""
        waiting = replace(self, pending=(*self.pending, rows)) if len(rows) else self
        return waiting if waiting.seen - self.count < self.most else waiting.flushed()

    def flushed(self) -> Inputs:
        """With the rows that wait taken in."""
        if not self.pending:
            return self
        rows = torch.cat(self.pending)
        # Pieces of equal size: a last one of few rows would cost as much and say little.
        new = replace(self, pending=())
        for piece in rows.tensor_split(math.ceil(len(rows) / _STEP)):
            new = new._with(wide(piece).to(self.mean.device))
        return replace(new, similar=_similarity(self.components, new.components))

    def _with(self, rows: Tensor) -> Inputs:
        centre = rows.mean(0)
        return self._joined(rows - centre, centre, float((rows - centre).square().sum()), len(rows))

    def _joined(self, around: Tensor, centre: Tensor, total: float, count: int) -> Inputs:
        """With `count` rows more whose mean is `centre`, whose directions are `around` it and sum up to `total`."""
        shift = (self.mean - centre) * math.sqrt(self.count * count / (self.count + count))
        own = self.singular.unsqueeze(-1) * self.components.double()
        singular, components = leading_directions(torch.cat([own, around, shift.unsqueeze(0)]), _kept(self.most))
        mean = self.mean + (centre - self.mean) * (count / (self.count + count))
        total += self.total + float(shift.square().sum())
        return replace(self, components=components.float(), singular=singular, mean=mean, total=total,
                       count=self.count + count)

    def settled(self, used: int, tau: float) -> bool:
        """The first `used` components hardly moved when the last rows came in: every cosine is above `tau`."""
        if used == 0:
            return True
        return self.similar is not None and len(self.similar) >= used and bool((self.similar[:used] > tau).all())

    def full(self) -> bool:
        """It has as many components as were asked for."""
        return len(self.singular) >= self.most

    def evidence(self) -> dict[str, Tensor]:
        """components (k, in), singular (k,), mean (in,), total (), count (), and how many were `sought` (); on the
        CPU."""
        return {name: tensor.cpu() for name, tensor in self.flushed().current().items()}

    def current(self) -> dict[str, Tensor]:
        """The same without the rows that wait, where it is."""
        return {"components": self.components[:self.most], "singular": self.singular[:self.most].float(),
                "mean": self.mean.float(), "total": torch.tensor(self.total, dtype=torch.float32),
                "count": torch.tensor(self.count), "sought": torch.tensor(self.most)}


def _similarity(before: Tensor, after: Tensor) -> Tensor | None:
    if not len(before):
        return None
    # As many as both have; one that has just appeared has moved.
    short = min(len(before), len(after))
    similar = after.new_zeros(len(after))
    similar[:short] = (before[:short] * after[:short]).sum(1).abs()
    return similar


def merged(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The inputs behind several of these statistics as one, in the order given."""
    whole = _restored(parts[0])
    for part in parts[1:]:
        other = _restored(part)
        if other.most != whole.most:
            raise VeneerError(f"statistics of {whole.most} and of {other.most} components cannot be merged; calibrate "
                              "with the same rules everywhere")
        around = other.singular.unsqueeze(-1) * other.components.double()
        whole = whole._joined(around, other.mean, other.total, other.count)
    return whole.evidence()


def _restored(evidence: dict[str, Tensor]) -> Inputs:
    return Inputs(int(evidence["sought"]), evidence["components"], evidence["singular"].double(),
                  evidence["mean"].double(), float(evidence["total"]), int(evidence["count"]))
