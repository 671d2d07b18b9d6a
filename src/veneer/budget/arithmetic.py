"""The arithmetic of AdaLoRA's budget (Zhang et al. 2023, arXiv:2303.10512): how many triplets are left at each step,
how much each of them matters, and which are kept. Functions of numbers and tensors; who calls them is in `allocator`.

A triplet is one direction of ΔW = s·B·diag(E)·A: an element of E with its row of A and its column of B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.sharding import whole

#: running averages of one parameter: of its sensitivity, and of how far that strays from its average
Averages = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Schedule:
    """Steps are counted from 1 to `total`. Up to `start` all triplets are kept; from `end` on, the final ones; between
    them the budget falls with the cube of the way that is left, at every `every`-th step."""

    start: int
    end: int
    total: int
    every: int

    def allocates(self, step: int) -> bool:
        """Whether triplets are chosen anew at this step, `end` itself aside."""
        return self.start < step < self.end and step % self.every == 0

    def budget(self, step: int, first: int, last: int) -> int:
        """How many triplets of `first` are kept at this step, down to `last`."""
        if step <= self.start:
            return first
        if step >= self.end:
            return last
        left = 1 - (step - self.start) / (self.end - self.start)
        return int((first - last) * left**3 + last)


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which averages are kept: fp32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def observe(parameters: Sequence[Tensor], gradients: Sequence[Tensor], averages: Sequence[Averages], beta1: float,
            beta2: float) -> None:
    """Update running averages in place by the sensitivity |p · ∂L/∂p| of every element (eq. 8 to 10 of the paper)."""
    # Few kernels for all of them where launching is what costs; one by one where they then stay in the cache.
    at_once = 1 if all(p.is_cpu for p in parameters) else len(parameters)
    for start in range(0, len(parameters), at_once):
        some = slice(start, start + at_once)
        means, strays = ([pair[i] for pair in averages[some]] for i in range(2))
        now = torch._foreach_mul([p.detach().to(wide(p)) for p in parameters[some]],
                                 [g.to(wide(g)) for g in gradients[some]])
        torch._foreach_abs_(now)
        torch._foreach_lerp_(means, now, 1 - beta1)
        torch._foreach_sub_(now, means)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(strays, now, 1 - beta2)


def importance(E: Tensor, averages: Mapping[str, Averages]) -> Tensor:
    """How much each triplet matters (*batch, r): E's own score, the mean over A's row and that over B's column."""
    total = torch.zeros(E.shape, dtype=wide(E), device=E.device)
    for name, dim in (("E", None), ("A", -1), ("B", -2)):
        if name in averages:
            mean, stray = averages[name]
            score = mean * stray
            total += whole(score if dim is None else score.mean(dim))
    return total


def keep_best(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Masks of the scores' shapes with exactly `budget` elements True in all, those of the highest scores; of equal
    ones the earlier, so that every process chooses the same."""
    where = scores[0].device
    flat = torch.cat([score.flatten().to(where) for score in scores])
    best = torch.sort(flat, descending=True, stable=True).indices[:budget]
    kept = torch.zeros(flat.shape, dtype=torch.bool, device=where).index_fill_(0, best, True)
    parts = kept.split([score.numel() for score in scores])
    return [part.view(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)]
