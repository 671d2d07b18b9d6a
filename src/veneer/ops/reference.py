"""The eager reference: the sum of the terms as written, in plain differentiable operations.

It is the truth the fused op is tested against, and what runs where plain operations are wanted: under
`torch.compile` (the compiler fuses them itself) and for derivatives of derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from veneer.ops.gain import with_gain
from veneer.ops.term import Term


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
    """x (…, in), weight (out, in), bias (out,) → (…, out)."""
    base = F.linear(x, weight, bias)
    out = base
    for term in terms:
        out = out + contribution(x, base, bias, term)
    return out


def contribution(x: Tensor, base: Tensor, bias: Tensor | None, term: Term) -> Tensor:
    """What one term adds to `base` = x Wᵀ + bias; exactly zero where ΔW is zero and the gain is one."""
    inner = F.dropout(x, term.dropout) if term.dropout else x
    added = term.form.apply(inner)
    if term.keep is not None:
        added = added * term.keep.to(added.dtype)
    if term.out_dropout:
        added = F.dropout(added, term.out_dropout)
    if term.gain is not None:
        added = with_gain(added, base, bias, term.gain)
    if term.bias is not None:
        added = added + term.bias.to(added.dtype)
    if term.rows is not None:
        added = added * row_factor(term.rows, added)
    return added


def row_factor(rows: Tensor, like: Tensor) -> Tensor:
    """`rows` (batch,) spread over the leading dimension of `like` and shaped to multiply it."""
    repeat = like.shape[0] // rows.shape[0]
    spread = rows if repeat == 1 else rows.repeat_interleave(repeat)
    return spread.to(like.dtype).reshape(-1, *([1] * (like.dim() - 1)))
