"""Rows: some rows of W are trained, the rest stay. For new tokens in an embedding and its tied head."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.method import Adapter, Method, Shape, VeneerError, register


@register("rows")
@dataclass(frozen=True, kw_only=True)
class Rows(Method):
    """Train the rows `ids` of a weight (token ids of an embedding); the other rows are untouched.

    ids: distinct row numbers, at least 0. dtype: as for LoRA.
    """

    additive = False
    ids: tuple[int, ...]
    dtype: torch.dtype | None = None

    def __init__(self, ids: Iterable[int], *, dtype: torch.dtype | None = None) -> None:
        rows = tuple(int(i) for i in ids)
        if not rows or len(set(rows)) != len(rows) or min(rows) < 0:
            raise VeneerError(f"Rows: ids must be distinct row numbers of at least 0, got {rows!r}")
        object.__setattr__(self, "ids", rows)
        object.__setattr__(self, "dtype", dtype)

    def build(self, shape: Shape, dtype: torch.dtype, shared: nn.Module | None = None) -> RowsAdapter:
        return RowsAdapter(self, shape, self.dtype or dtype)

    def refusal(self, shape: Shape) -> str | None:
        if shape.batch or shape.kernel:
            return "Rows trains rows of a matrix, such as an embedding"
        if max(self.ids) >= shape.out:
            return f"row {max(self.ids)} does not exist: the weight has {shape.out} rows"
        return None


class RowsAdapter(Adapter):
    """rows (len(ids), in): start as copies of W's."""

    needs_weight = True

    def __init__(self, method: Rows, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape)
        self.ids = method.ids
        self.rows = nn.Parameter(torch.empty(len(method.ids), shape.in_, dtype=dtype))

    def reset_parameters(self) -> None:
        self.rows.zero_()

    def start(self, weight: Tensor) -> None:
        self.rows.copy_(weight[list(self.ids)])

    def new_weight(self, weight: Tensor) -> Tensor:
        index = torch.tensor(self.ids, device=weight.device)
        return weight.index_copy(0, index, self.rows.to(weight.dtype))
