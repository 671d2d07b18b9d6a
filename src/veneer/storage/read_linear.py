"""A linear layer of ours whose weight is read from what holds it: the forward that such layers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Self = TypeVar("Self", bound="ReadLinear")


class ReadLinear(nn.Linear):
    """y = x Wᵀ + bias with W (out, in) frozen, read anew in the forward and in the backward, and never kept.

    `packed_dtype` is what W is read as; it follows casts of the model.
    """

    packed_dtype: torch.dtype

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out, in), a fresh tensor, in `dtype` or in `packed_dtype`."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        # Autocast looks at the dtypes of a product's parts, and what holds W is no part of one.
        dtype = input.dtype
        if torch.is_autocast_enabled(input.device.type) and dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return read_linear(input, self.bias, self.read)

    def _apply(self: Self, fn: Callable, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.packed_dtype = fn(torch.empty(0, dtype=self.packed_dtype, device=self.weight.device)).dtype
        return self


def read_linear(x: Tensor, bias: Tensor | None, read: Callable[[torch.dtype], Tensor],
                weight: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias in x's dtype; `read` gives W (out, in) in a dtype, once here and once in the backward.

    weight: W, where it has been read in x's dtype just now."""
    bias = None if bias is None else bias.to(x.dtype)
    weight = read(x.dtype) if weight is None else weight
    if torch.compiler.is_compiling():  # which would break its graph at a call of `read`; it orders reads as it likes
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _ReadLinear.apply(x, weight, bias, read)
    return F.linear(x, weight, bias)


class _ReadLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, read: Callable[[torch.dtype], Tensor]
                ) -> Tensor:
        ctx.read, ctx.dtype = read, x.dtype
        ctx.rows = x.shape[:-1].numel()
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dy = grads[0]
        d_bias = dy.reshape(ctx.rows, -1).sum(0) if ctx.needs_input_grad[2] else None
        return (dy @ ctx.read(ctx.dtype) if ctx.needs_input_grad[0] else None), None, d_bias, None
