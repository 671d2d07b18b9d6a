"""Which adapters are live, for the whole model or for each row of the batch: one object all hosts share."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


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
    """`live` names apply to every row unless `rows` is set; `disabled` counts open `disabled()` contexts.

    It holds for the whole model and every thread that runs it. It knows its hosts weakly, so that a part of a
    model can be copied or pickled without the rest.
    """

    def __init__(self) -> None:
        self.live: tuple[str, ...] = ()
        self.rows: RowNames | None = None
        self.disabled = 0
        self.hosts: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        #: base parameters that were trainable before the first attach, by full name, with their modules
        self.thawed: dict[str, weakref.ref[nn.Module] | None] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "hosts": (), "thawed": dict.fromkeys(self.thawed)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.hosts = weakref.WeakSet()  # each host joins again as it is rebuilt

    @property
    def signature(self) -> tuple:
        """Equal for two moments at which every host would do the same."""
        return (self.live, self.rows and self.rows.names, bool(self.disabled))

    def thaw(self, model: nn.Module) -> None:
        """Make trainable again what was so before the first attach, as far as it is still there."""
        for name, owner in self.thawed.items():
            path, _, param = name.rpartition(".")
            module = owner() if owner is not None else dict(model.named_modules()).get(path)
            tensor = None if module is None else module._parameters.get(param)
            if tensor is not None:
                tensor.requires_grad_(True)
        self.thawed.clear()
