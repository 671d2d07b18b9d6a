"""LoRA: W' = W + s·B·A, with s = α/r (Hu et al. 2021, arXiv:2106.09685) or, rank-stabilised, s = α/√r
(Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.forms import Factors
from veneer.inits.random import check_init, init_factors
from veneer.method import (
    Adapter,
    Method,
    Shape,
    Shared,
    check_positive_int,
    check_probability,
    register,
)
from veneer.methods.options import as_dtype, check_bool, check_number

_BIAS_HINT = '. To train the biases of the base, as PEFT\'s bias="all" does, add the rule {"*.bias": Full()}'


@register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation.

    rank: r, the inner width of the pair. A rank above min(out, in) only wastes parameters and is allowed.
    alpha: scale is alpha/rank; None means alpha = rank, a scale of 1.
    rank_stabilized: scale is alpha/√rank instead.
    dropout: probability of zeroing an input element on the adapter's path, in training mode only.
    dtype: of the adapter's parameters, or its name; None = fp32 over a 16-bit base, else the base's.
    init: "kaiming", "gaussian" or "xavier" for A; B starts at zero, so the model's output is unchanged.
    bias: also train an addition to the layer's bias (starts at zero).
    """

    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    dtype: torch.dtype | None = None
    init: str = "kaiming"
    bias: bool = False

    def __post_init__(self) -> None:
        check_positive_int("LoRA", "rank", self.rank)
        check_number("LoRA", "dropout", self.dropout)
        check_probability("LoRA", "dropout", self.dropout)
        check_init("LoRA", self.init)
        if self.alpha is not None:
            check_number("LoRA", "alpha", self.alpha, also=" or None")
        check_bool("LoRA", "rank_stabilized", self.rank_stabilized)
        check_bool("LoRA", "bias", self.bias, hint=_BIAS_HINT if isinstance(self.bias, str) else "")
        object.__setattr__(self, "dtype", as_dtype("LoRA", self.dtype))

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def uses_input(self) -> bool:
        return self.dropout > 0

    @property
    def adds_bias(self) -> bool:
        return self.bias

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> LoRAAdapter:
        return LoRAAdapter(self, shape, self.dtype or dtype)


class LoRAAdapter(Adapter):
    """A (*batch, r, in), B (*batch, out, r) and, if asked for, an additional bias (out,)."""

    def __init__(self, method: LoRA, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape, method.dropout)
        self.scale = method.scale
        self.init = method.init
        self.A = nn.Parameter(torch.empty(*shape.batch, method.rank, shape.in_, dtype=dtype))
        self.B = nn.Parameter(torch.empty(*shape.batch, shape.out, method.rank, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(*shape.batch, shape.out, dtype=dtype)) if method.bias else None

    def reset_parameters(self) -> None:
        init_factors(self.init, self.A, self.B, self.generator())
        if self.bias is not None:
            self.bias.zero_()

    def form(self, dtype: torch.dtype | None = None) -> Factors:
        return Factors(self.A, self.B, self.scale)

    def bias_delta(self) -> Tensor | None:
        return self.bias

    def fast_parameters(self) -> list[str]:
        return ["B"] if self.bias is None else ["B", "bias"]
