"""AdaLoRA's orthogonality term, which keeps triplets comparable: weight · the mean over all A and B of ‖P Pᵀ − I‖
(Frobenius), P being A or Bᵀ. Its gradient in closed form, added to what a backward pass has left.

In the paper the term is part of the loss; here it is in no loss that is shown, and clipping by norm does not see it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from veneer.budget.arithmetic import wide
from veneer.budget.member import Member
from veneer.budget.steps import Token, same


def add_orthogonality(adapters: Sequence[Member], held: set[int], weight: float, scale: Tensor | None,
                      done: Token | None) -> Token | None:
    """Add the term's gradient to those of the A and B whose ids are in `held`.

    scale: what gradients will still be divided by. done: what the last call returned; where these gradients have the
    term already (a step that failed and is tried again, a step within another), nothing happens.
    """
    sides = [(p, p is adapter.B) for adapter in adapters for p in (adapter.A, adapter.B) if p.requires_grad]
    mine = [(p, p.grad, turned) for p, turned in sides if id(p) in held and p.grad is not None]
    if not mine or not weight or same(done, (mine[0][1], mine[0][1]._version)):
        return done
    matrices = sum(p.numel() // (p.shape[-2] * p.shape[-1]) for p, _ in sides)
    terms = gradients([p.mT if turned else p for p, _, turned in mine], weight / matrices, scale)
    for (_, grad, turned), term in zip(mine, terms, strict=True):
        grad.add_(term.mT if turned else term)
    return mine[0][1], mine[0][1]._version


def gradients(rows: Sequence[Tensor], weight: float, scale: Tensor | None = None) -> list[Tensor]:
    """Of scale · weight · ‖P Pᵀ − I‖ by every P (*batch, r, n): 2 (P Pᵀ − I) P / ‖P Pᵀ − I‖, zero where the norm is.

    Matrices of one shape are taken together.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, P in enumerate(rows):
        groups[P.shape, P.dtype, P.device].append(i)
    found: list[Tensor] = list(rows)
    for members in groups.values():
        P = torch.stack([rows[i].detach() for i in members])
        P = P.to(wide(P))
        off = P @ P.mT
        off.diagonal(dim1=-2, dim2=-1).sub_(1)
        norm = torch.linalg.matrix_norm(off, keepdim=True).clamp_min_(1e-30)
        off.mul_(2 * weight / norm)
        for i, term in zip(members, off @ P, strict=True):
            found[i] = term if scale is None else term * scale.to(term)
    return found
