"""Dropout for the fused op: which elements fall out, kept as little as possible, applied in place.

A mask drawn element by element costs more than a rank-16 product on a CPU. Two cheaper ways to the same
distribution: for a small p, the gaps between dropped elements are geometric and only the dropped positions
are drawn; otherwise 16 random bits per element, four to a 64-bit draw (p is then a multiple of 1/65536).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SPARSE_BELOW = 0.15


class Dropped:
    """The dropped elements of a contiguous tensor of `shape`; `scale` is 1 / (probability of staying)."""

    def __init__(self, p: float, shape: torch.Size, device: torch.device) -> None:
        self.positions: Tensor | None = None
        self.keep: Tensor | None = None
        self.scale = 1 / (1 - p)
        if device.type != "cpu":
            self.keep = torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(1 - p)
        elif p < _SPARSE_BELOW:
            self.positions = _positions(p, math.prod(shape))
        else:
            self.keep, stays = _keep_mask(p, shape)
            self.scale = 1 / stays

    def zero_(self, tensor: Tensor) -> Tensor:
        """Set the dropped elements of `tensor` to zero in place; no scaling."""
        if self.positions is not None:
            tensor.view(-1).index_fill_(0, self.positions, 0)
        elif self.keep is not None:
            tensor.mul_(self.keep)
        return tensor

    def apply(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` with the dropped elements zero; no scaling."""
        if self.keep is not None:
            return tensor * self.keep
        return self.zero_(tensor.clone(memory_format=torch.contiguous_format))


def _positions(p: float, count: int) -> Tensor:
    """Sorted positions in range(count), each present with probability p, independently."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    blocks = []
    last = -1
    while last < count - 1:
        left = count - 1 - last
        draws = int(left * p + 4 * math.sqrt(left * p) + 16)
        # log(1 - u) with u in [0, 1) is finite; floor(log(1 - u) / log(1 - p)) is geometric from 0.
        uniform = torch.rand(draws, dtype=torch.float32, device="cpu")
        gaps = uniform.neg_().log1p_().div_(math.log1p(-p)).to(torch.int64).add_(1)
        block = gaps.cumsum(0).add_(last)
        blocks.append(block)
        last = int(block[-1])
    positions = torch.cat(blocks) if len(blocks) > 1 else blocks[0]
    return positions[: int(torch.searchsorted(positions, count))]


def _keep_mask(p: float, shape: torch.Size) -> tuple[Tensor, float]:
    count = math.prod(shape)
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device="cpu").random_(-(2**63), None)
    threshold = min(max(round(p * 65536), 1), 65535)
    keep = words.view(torch.int16)[:count].view(shape) >= threshold - 32768
    return keep, 1 - threshold / 65536
