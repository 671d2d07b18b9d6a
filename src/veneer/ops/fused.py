"""The fused op: base product and low-rank product of one linear layer in one autograd Function.

What makes it cheap: the rank-r product is written first and the large product accumulates on it, forward
and backward, so no full-size addition or scaling happens anywhere; S = x Aᵀ (rows × r) is the only
activation saved besides x, which the base layer's own backward would not need but A's gradient does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from veneer.method import VeneerError
from veneer.ops.dropout import Dropped


class FusedLinear(torch.autograd.Function):
    """y = g ∘ (x Wᵀ + mask(drop(x) Aᵀ) Bᵀ) + bias, with g = 1 + gain_1.

    x (m, in), weight (out, in), bias (out,) or None, A (r, in), B (out, r) with the scale already in it,
    gain_1 (out,) in fp32 or wider or None, row_mask (m, r) or None, dropped or None. Everything but gain_1
    and weight, bias under autocast has x's dtype; those are cast here, so no cast copy of W is ever saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                gain_1: Tensor | None, row_mask: Tensor | None, dropped: Dropped | None) -> Tensor:
        base = weight.to(x.dtype)
        inner = x if dropped is None else dropped.apply(x)
        S = inner @ A.mT
        del inner  # its memory serves y: on a CPU, fresh pages cost more than the small products
        if row_mask is not None:
            S.mul_(row_mask)
        if bias is None:
            y = S @ B.mT
        else:
            y = torch.addmm(bias.to(x.dtype), S, B.mT)
        y.addmm_(x, base.mT)
        total = None
        if gain_1 is not None:
            total = y
            factor = gain_1.to(x.dtype)
            # t + t·(g − 1): a 16-bit g close to 1 would round away what the gain was trained for.
            y = torch.addcmul(total, total, factor)
            if bias is not None:
                y.sub_(bias.to(x.dtype) * factor)
        ctx.dropped = dropped
        ctx.save_for_backward(x, weight, bias, A, B, S, gain_1, row_mask, total)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise VeneerError("the fused linear op has first derivatives only, and create_graph=True asks for "
                              "more; run the forward inside `with veneer.ops.use('reference'):`")
        x, weight, bias, A, B, S, gain_1, row_mask, total = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B, need_gain = ctx.needs_input_grad[:6]
        dy = grads[0]
        d_gain = d_bias = d_x = d_A = d_B = d_weight = product = None
        if need_bias or (need_gain and bias is not None):
            d_bias = dy.sum(0)
        if gain_1 is not None:
            if need_gain:
                # Not sum(dtype=…), which would widen the whole product first; the sum accumulates wide anyway.
                product = dy * total
                d_gain = product.sum(0).to(gain_1.dtype)
                if bias is not None:
                    d_gain -= d_bias * bias
            dy = torch.addcmul(dy, dy, gain_1.to(dy.dtype), out=product)
        dropped = ctx.dropped
        if need_x or need_A:
            dS = dy @ B
            if row_mask is not None:
                dS.mul_(row_mask)
            inner = None
            if need_A:
                inner = x if dropped is None else dropped.apply(x)
                d_A = dS.mT @ inner
            if need_x:
                d_x = torch.mm(dS, A, out=None if dropped is None else inner)
                if dropped is not None:
                    dropped.zero_(d_x)
                d_x.addmm_(dy, weight.to(dy.dtype))
        if need_B:
            d_B = (S.mT @ dy).mT
        if need_weight:
            d_weight = (dy.mT @ x).to(weight.dtype)
        return d_x, d_weight, d_bias if need_bias else None, d_A, d_B, d_gain, None, None
