"""A row gain over an activation t (m, n): y = g ∘ t + shift, with g and shift (n,) in fp32 or wider.

A 16-bit g close to 1 has steps of 0.4 to 0.8%, which would round away what the gain was trained for, and
widening t would double its size. On a CPU, batch normalisation with mean 0 and variance 1 is exactly this
function with wide parameters over 16-bit data, in one pass each way; elsewhere it is t + t·(g − 1).
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_gain(added: Tensor, base: Tensor, bias: Tensor | None, gain: Tensor) -> Tensor:
    """g·(z + a) − z for base = z + bias, in base's dtype; bias and gain are shaped to multiply base.

    As a + (g − 1)·(z + a): a 16-bit g near 1 would lose what it was trained for.
    """
    plain = base if bias is None else base - bias.to(base.dtype)
    added = added.to(base.dtype)
    return added + (plain + added) * (gain - 1).to(base.dtype)


def forward(t: Tensor, gain: Tensor, shift: Tensor | None) -> Tensor:
    """g ∘ t + shift, in t's dtype; has t's bits where g is 1 and the shift 0 or None."""
    if _by_batch_norm(t, gain):
        zero, one = torch.zeros_like(gain), torch.ones_like(gain)
        return torch.ops.aten.native_batch_norm(t, gain, shift, zero, one, False, 0.0, 0.0)[0]
    y = torch.addcmul(t, t, (gain - 1).to(t.dtype))
    return y if shift is None else y.add_(shift.to(t.dtype))


def backward(dy: Tensor, t: Tensor, gain: Tensor, need_gain: bool) -> tuple[Tensor, Tensor | None]:
    """(g ∘ dy, Σ dy ∘ t over the rows of the batch in gain's dtype)."""
    if _by_batch_norm(t, gain):
        zero, one = torch.zeros_like(gain), torch.ones_like(gain)
        d_t, d_gain, _ = torch.ops.aten.native_batch_norm_backward(
            dy, t, gain, zero, one, None, None, False, 0.0, [True, need_gain, False])
        return d_t, d_gain if need_gain else None
    product = d_gain = None
    if need_gain:
        product = dy * t
        # Not sum(dtype=…), which would widen the whole product first; the sum accumulates wide anyway.
        d_gain = product.sum(0).to(gain.dtype)
    return torch.addcmul(dy, dy, (gain - 1).to(dy.dtype), out=product), d_gain


def _by_batch_norm(t: Tensor, gain: Tensor) -> bool:
    half = t.dtype in (torch.bfloat16, torch.float16)
    return half and gain.dtype == torch.float32 and t.device.type == "cpu" and t.numel() > 0
