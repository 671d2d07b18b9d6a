"""The fused op: the base product and the adapter's of one linear layer in one autograd Function.

What makes it cheap is in `sides`: the adapter's small products are written first and the large product
accumulates on them, forward and backward. Around that, here: the gain over the outputs, the gradients of
bias and weight, and the promise of first derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from veneer.method import VeneerError
from veneer.ops import gain as row_gain
from veneer.ops.sides import Run, Side


class FusedLinear(torch.autograd.Function):
    """y = g ∘ (x Wᵀ + s·drop(x) ΔWᵀ) + bias.

    x (m, in), weight (out, in), bias (out,) or None, gain (out,) in fp32 or wider or None; `side` knows ΔW by
    `tensors`. again: reads a frozen weight anew for the backward, so that it is not kept until then; None keeps it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, side: Side, run: Run,
                again: Callable[[], Tensor] | None, *tensors: Tensor | None) -> Tensor:
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[7:])
        y, kept = side.forward(run, needs, x, weight, bias, *tensors)
        total = None
        if gain is not None:
            total = y
            y = row_gain.forward(total, gain, None if bias is None else bias.to(gain.dtype) * (1 - gain))
        ctx.side, ctx.run, ctx.needs, ctx.again = side, run, needs, again
        ctx.save_for_backward(x, None if again else weight, bias, gain, total, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise VeneerError("the fused linear op has first derivatives only, and create_graph=True asks for "
                              "more; run the forward inside `with veneer.ops.use('reference'):`")
        x, weight, bias, gain, total, *kept = ctx.saved_tensors
        _, need_weight, need_bias, need_gain = ctx.needs_input_grad[:4]
        dy = grads[0]
        d_gain: Tensor | None = None
        d_bias: Tensor | None = None
        if need_bias or (need_gain and bias is not None):
            d_bias = dy.sum(0)
        if gain is not None:
            dy, d_gain = row_gain.backward(dy, total, gain, need_gain)
            if d_gain is not None and bias is not None:
                d_gain -= d_bias * bias
        if ctx.again is not None and ctx.needs[0]:
            weight = ctx.again()
        d_x, small = ctx.side.backward(ctx.run, ctx.needs, dy, x, weight, *kept)
        d_weight = (dy.mT @ x).to(weight.dtype) if need_weight else None
        d_bias = d_bias.to(bias.dtype) if need_bias and d_bias is not None else None
        return d_x, d_weight, d_bias, d_gain, None, None, None, *small
