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
from veneer.sharding import spread_like, whole


def add_orthogonality(adapters: Sequence[Member], held: set[int], weight: float, scale: Tensor | None,
                      done: Token | None) -> Token | None:
    """Add the term's gradient to those of the A and B whose ids are in `held`.

    scale: what gradients will still be divided by. done: what the last call returned; where these gradients have the
    term already (a step that failed and is tried again, a step within another), nothing happens.
    """
    sides = [(p, p is adapter.B) for adapter in adapters for p in (adapter.A, adapter.B) if p.requires_grad]
    mine = [(p, p.grad, columns) for p, columns in sides if id(p) in held and p.grad is not None]
    if not mine or not weight or same(done, (mine[0][1], mine[0][1]._version)):
        return done
    matrices = sum(p.numel() // (p.shape[-2] * p.shape[-1]) for p, _ in sides)
    terms = gradients([(whole(p.detach()), columns) for p, _, columns in mine], weight / matrices, scale)
    for (_, grad, _), term in zip(mine, terms, strict=True):
        grad.add_(spread_like(term.to(grad.dtype), grad))
    return mine[0][1], mine[0][1]._version


def gradients(matrices: Sequence[tuple[Tensor, bool]], weight: float, scale: Tensor | None = None) -> list[Tensor]:
    """Of scale · weight · ‖P Pᵀ − I‖ by every P (*batch, r, n), or of ‖Pᵀ P − I‖ by P (*batch, n, r) where it comes
    with True: 2 (P Pᵀ − I) P / ‖P Pᵀ − I‖, and zero where the norm is.

    Matrices of one shape are taken together.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, (P, columns) in enumerate(matrices):
        groups[P.shape, P.dtype, P.device, columns].append(i)
    found = [P for P, _ in matrices]
    for (*_, columns), members in groups.items():
        P = torch.stack([matrices[i][0] for i in members])
        P = P.to(wide(P))
        off = P.mT @ P if columns else P @ P.mT
        off.diagonal(dim1=-2, dim2=-1).sub_(1)
        norm = torch.linalg.matrix_norm(off, keepdim=True).clamp_min_(1e-30)
        off.mul_(2 * weight / norm)
        for i, term in zip(members, P @ off if columns else off @ P, strict=True):
            found[i] = term if scale is None else term * scale.to(term)
    return found
