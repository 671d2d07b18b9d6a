"""The statistic "covariance": XᵀX of a layer's inputs X (n, in), the mean not taken off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.method import without_autocast


@dataclass(frozen=True)
class Covariance:
    """XᵀX (in, in) in fp32 of all rows so far. Never changed: `add` gives a new one."""

    matrix: Tensor
    seen: int = 0

    @classmethod
    def empty(cls, in_: int, device: torch.device | str = "cpu") -> Covariance:
        return cls(torch.zeros(in_, in_, dtype=torch.float32, device=device))

    def add(self, rows: Tensor) -> Covariance:
        """With rows (n, in) more; a plain sum, so that it is all the same how they are cut into batches."""
        with without_autocast(rows):  # the hooks run inside the model's own, which would make 16-bit products of this
            if rows.device != self.matrix.device:
                return Covariance(self.matrix + (rows.mT @ rows).to(self.matrix.device), self.seen + len(rows))
            return Covariance(torch.addmm(self.matrix, rows.mT, rows), self.seen + len(rows))

    def evidence(self) -> dict[str, Tensor]:
        """covariance (in, in), count (); on the CPU."""
        return {"covariance": self.matrix.cpu(), "count": torch.tensor(self.seen)}


def merged(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The sum, in the order given."""
    matrix, count = parts[0]["covariance"], parts[0]["count"]
    for part in parts[1:]:
        matrix, count = matrix + part["covariance"], count + part["count"]
    return {"covariance": matrix, "count": count}
