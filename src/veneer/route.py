"""Which adapters are live, for the whole model or for each row of the batch: one object all hosts share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RowNames:
    """One adapter name or None (base only) for each row of the batch."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.distinct: tuple[str | None, ...] = tuple(dict.fromkeys(self.names))

    def mask(self, name: str, device: torch.device) -> Tensor:
        """(rows,) of 0/1 in fp32: which rows go through `name`."""
        return torch.tensor([float(n == name) for n in self.names], device=device)

    def index(self, name: str | None, size: int, device: torch.device) -> Tensor:
        """Positions along a dimension of `size` (a multiple of the rows) that belong to `name`."""
        repeat = size // len(self.names)
        rows = [i * repeat + j for i, n in enumerate(self.names) if n == name for j in range(repeat)]
        return torch.tensor(rows, dtype=torch.int64, device=device)


class Route:
    """`live` names apply to every row unless `rows` is set; `disabled` counts open `disabled()` contexts."""

    def __init__(self) -> None:
        self.live: tuple[str, ...] = ()
        self.rows: RowNames | None = None
        self.disabled = 0
        #: base parameters that were trainable before the first attach, to be given back at the last detach
        self.thawed: list[torch.nn.Parameter] = []

    @property
    def signature(self) -> tuple:
        """Equal for two moments at which every host would do the same."""
        return (self.live, self.rows and self.rows.names, bool(self.disabled))
