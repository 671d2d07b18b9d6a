"""Full: W' is a trained copy of W. For a new head, biases, norms: whatever is trained whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.method import Adapter, Method, NewBase, Shape, Shared, register
from veneer.methods.options import as_dtype


@register("full")
@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Train the whole weight. The base keeps its bits; the copy is what is trained and saved.

    dtype: of the copy; None = fp32 over a 16-bit base, else the base's. Naming a module covers its bias too.
    """

    dtype: torch.dtype | None = None
    covers_bias = True
    additive = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", as_dtype("Full", self.dtype))

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> FullAdapter:
        return FullAdapter(shape, self.dtype or dtype)

    def refusal(self, shape: Shape) -> str | None:
        return None


class FullAdapter(Adapter):
    """weight (*batch, out, in): starts as a copy of W."""

    needs_weight = True

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape)
        self.weight = nn.Parameter(torch.empty(shape.matrix, dtype=dtype))

    def reset_parameters(self) -> None:
        self.weight.zero_()

    def start(self, weight: Tensor) -> NewBase | None:
        self.weight.copy_(weight)
        return None

    def new_weight(self, weight: Tensor) -> Tensor:
        return self.weight
