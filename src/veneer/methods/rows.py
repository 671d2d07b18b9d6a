"""Rows: some rows of W are trained, the rest stay. For new tokens in an embedding and its tied head."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.method import Adapter, Method, NewBase, Shape, Shared, VeneerError, register
from veneer.methods.options import as_dtype


@register("rows")
@dataclass(frozen=True, kw_only=True)
class Rows(Method):
    """Train the rows `ids` of a weight (token ids of an embedding); the other rows are untouched.

    ids: distinct row numbers, at least 0. dtype: as for LoRA.
    """

    additive = False
    ids: tuple[int, ...]
    dtype: torch.dtype | None = None

    def __init__(self, ids: Iterable[int], *, dtype: torch.dtype | str | None = None) -> None:
        object.__setattr__(self, "ids", _row_numbers(ids))
        object.__setattr__(self, "dtype", as_dtype("Rows", dtype))

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> RowsAdapter:
        return RowsAdapter(self, shape, self.dtype or dtype)

    def refusal(self, shape: Shape) -> str | None:
        if shape.batch or shape.kernel:
            return "Rows trains rows of a matrix, such as an embedding"
        if max(self.ids) >= shape.out:
            return f"row {max(self.ids)} does not exist: the weight has {shape.out} rows"
        return None


def _row_numbers(ids: Any) -> tuple[int, ...]:
    """`ids` as ints; whatever Python itself would take as an index counts as one, so no fractions and no text."""
    truths = False  # Python takes True for 1, but a list of them is a mask
    try:
        found = list(ids)
        rows = tuple(operator.index(i) for i in found)
        truths = any(isinstance(i, bool) or (isinstance(i, Tensor) and i.dtype == torch.bool) for i in found)
    except TypeError:
        rows = ()
    if not rows or truths or len(set(rows)) != len(rows) or min(rows) < 0:
        raise VeneerError("Rows: ids must be distinct row numbers (whole, at least 0) such as Rows([17, 18]), "
                          f"got {ids!r}")
    return rows


class RowsAdapter(Adapter):
    """rows (len(ids), in): start as copies of W's."""

    needs_weight = True

    def __init__(self, method: Rows, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape)
        self.ids = method.ids
        self.rows = nn.Parameter(torch.empty(len(method.ids), shape.in_, dtype=dtype))

    def reset_parameters(self) -> None:
        self.rows.zero_()

    def start(self, weight: Tensor) -> NewBase | None:
        self.rows.copy_(weight[list(self.ids)])
        return None

    def new_weight(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, torch.tensor(self.ids, device=weight.device), self.rows.to(weight.dtype))

    def row_values(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.ids, device=self.rows.device), self.rows
