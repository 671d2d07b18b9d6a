"""Circulant: W' = W + C(c), every row of C the row above shifted by one: C[i, j] = c[(j − i) mod in].

A toy, after the idea of C3A (Chen et al. 2024, arXiv:2407.19342) without its blocks: in numbers train a
full-rank change. `docs/adding-a-method.md` walks through this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.method import Adapter, Method, Shape, Shared, register


@register("circulant")
@dataclass(frozen=True, kw_only=True)
class Circulant(Method):
    """scale: what the trained vector is multiplied by."""

    scale: float = 1.0

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> Adapter:
        return CirculantAdapter(self, shape, dtype)


class CirculantAdapter(Adapter):
    """c (*batch, in): starts at zero, so W' = W."""

    def __init__(self, method: Circulant, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape)
        self.scale = method.scale
        self.c = nn.Parameter(torch.empty(*shape.batch, shape.in_, dtype=dtype))

    def reset_parameters(self) -> None:
        self.c.zero_()

    def delta(self) -> Tensor:
        rows = torch.arange(self.shape.out, device=self.c.device)
        columns = torch.arange(self.shape.in_, device=self.c.device)
        return self.scale * self.c[..., (columns - rows[:, None]) % self.shape.in_]
