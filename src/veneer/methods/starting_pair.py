"""s·(B·A − B₀·A₀) as one pair of twice the rank, and back."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def doubled(A: Tensor, B: Tensor, start_A: Tensor, start_B: Tensor) -> tuple[Tensor, Tensor]:
    """A' (*batch, 2r, in) = [A − A₀; A₀] and B' (*batch, out, 2r) = [B, B − B₀], with B'A' = BA − B₀A₀."""
    return torch.cat([A - start_A, start_A], -2), torch.cat([B, B - start_B], -1)


def halved(A: Tensor, B: Tensor, start_A: Tensor, start_B: Tensor) -> tuple[Tensor, Tensor] | None:
    """A, B out of A', B', where the halves of these that hold the start are those of A₀, B₀; else None.

    B has its bits; A is rounded once, where it has become much smaller than A₀.
    """
    rank = start_A.shape[-2]
    if A.shape[-2] != 2 * rank or B.shape[-1] != 2 * rank or not torch.equal(A[..., rank:, :], start_A.to(A)):
        return None
    first, moved = B.split(rank, dim=-1)
    same = torch.equal(first - start_B.to(B), moved)
    return (A[..., :rank, :] + start_A.to(A), first) if same else None


def doubled_alpha(rank: int, scale: float, alpha: float | None, stabilized: bool) -> tuple[float | None, bool]:
    """The alpha, and whether it is rank-stabilised, by which a pair of twice the rank has the very same scale."""
    if not stabilized:
        return None if alpha is None else 2 * alpha, False
    for divisor, kind in ((math.sqrt(2 * rank), True), (2 * rank, False)):
        middle = scale * divisor
        for found in (middle, math.nextafter(middle, math.inf), math.nextafter(middle, -math.inf)):
            if found / divisor == scale:
                return found, kind
    return scale * math.sqrt(2 * rank), True
