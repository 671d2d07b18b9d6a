"""The fused op: base product and low-rank product of one linear layer in one autograd Function.

What makes it cheap: the rank-r product is written first and the large product accumulates on it, forward
and backward, so no full-size addition or scaling happens anywhere; S = s·x Aᵀ (rows × r) is the only
activation saved besides x, which the base layer's own backward would not need but A's gradient does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.method import VeneerError
from veneer.ops import gain as row_gain
from veneer.ops.dropout import Dropped


class FusedLinear(torch.autograd.Function):
    """y = g ∘ (x Wᵀ + mask(s·drop(x) Aᵀ) Bᵀ) + bias.

    x (m, in), weight (out, in), bias (out,) or None, A (r, in), B (out, r), gain (out,) in fp32 or wider or
    None, row_mask (m, r) or None, dropped or None, scale s. All of it runs in x's dtype: the other tensors are
    cast here, forward and backward, so that neither a cast copy of W nor one of the adapter is ever kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                gain: Tensor | None, row_mask: Tensor | None, dropped: Dropped | None, scale: float) -> Tensor:
        inner = x if dropped is None else dropped.apply(x)
        S = inner @ A.to(x.dtype).mT
        del inner  # its memory serves y: on a CPU, fresh pages cost more than the small products
        if scale != 1:
            S.mul_(scale)
        if row_mask is not None:
            S.mul_(row_mask)
        low = B.to(x.dtype).mT
        y = S @ low if bias is None else torch.addmm(bias.to(x.dtype), S, low)
        y.addmm_(x, weight.to(x.dtype).mT)
        total = None
        if gain is not None:
            total = y
            y = row_gain.forward(total, gain, None if bias is None else bias.to(gain.dtype) * (1 - gain))
        ctx.dropped, ctx.scale = dropped, scale
        ctx.save_for_backward(x, weight, bias, A, B, S, gain, row_mask, total)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise VeneerError("the fused linear op has first derivatives only, and create_graph=True asks for "
                              "more; run the forward inside `with veneer.ops.use('reference'):`")
        x, weight, bias, A, B, S, gain, row_mask, total = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B, need_gain = ctx.needs_input_grad[:6]
        dy = grads[0]
        d_gain: Tensor | None = None
        d_bias: Tensor | None = None
        d_x: Tensor | None = None
        d_A = d_B = d_weight = None
        if need_bias or (need_gain and bias is not None):
            d_bias = dy.sum(0)
        if gain is not None:
            dy, d_gain = row_gain.backward(dy, total, gain, need_gain)
            if d_gain is not None and bias is not None:
                d_gain -= d_bias * bias
        if need_x or need_A:
            d_x, d_A = _small_side(ctx, dy, x, A, B, row_mask, need_x, need_A)
        if d_x is not None:
            d_x.addmm_(dy, weight.to(dy.dtype))
        if need_B:
            d_B = (S.mT @ dy).mT.to(B.dtype)
        if need_weight:
            d_weight = (dy.mT @ x).to(weight.dtype)
        d_bias = d_bias.to(bias.dtype) if need_bias and d_bias is not None else None
        return d_x, d_weight, d_bias, d_A, d_B, d_gain, None, None, None


def _small_side(ctx: Any, dy: Tensor, x: Tensor, A: Tensor, B: Tensor, row_mask: Tensor | None,
                need_x: bool, need_A: bool) -> tuple[Tensor | None, Tensor | None]:
    """The adapter's part of dx (on which the base's accumulates), and dA."""
    dropped: Dropped | None = ctx.dropped
    dS = dy @ B.to(dy.dtype)
    if ctx.scale != 1:
        dS.mul_(ctx.scale)
    if row_mask is not None:
        dS.mul_(row_mask)
    d_x = d_A = inner = None
    if need_A:
        inner = x if dropped is None else dropped.apply(x)
        d_A = (dS.mT @ inner).to(A.dtype)
    if need_x:
        d_x = torch.mm(dS, A.to(dy.dtype), out=None if dropped is None else inner)
        if dropped is not None:
            dropped.zero_(d_x)
    return d_x, d_A
