"""CorDA (Yang et al. 2024, arXiv:2406.05223): the part of a weight that matters most, or least, for inputs like those
seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.inits.base import Evidence, Started, register_init
from veneer.inits.data import FromData, above, check_number
from veneer.inits.random import check_choice
from veneer.leading import wide
from veneer.method import Shape, VeneerError, without_autocast


@register_init("corda")
@dataclass(frozen=True, kw_only=True)
class CorDA(FromData):
    """s·B·A = the part of W that belongs to some singular values of W·C, with C = XᵀX of the weight's inputs.

    mode: "ipm", the r largest (instruction-previewed: learn what such inputs call for), or "kpm", the r smallest
    (knowledge-preserved: leave alone what such inputs need).
    damping: C gets this share of the mean of its diagonal added to its diagonal.
    """

    needs = "covariance"
    from_weight = True
    moves = True
    mode: str = "ipm"
    damping: float = 0.01

    def __post_init__(self) -> None:
        check_choice("init 'corda'", "mode", self.mode, ("ipm", "kpm"))
        check_number("init 'corda'", "damping", self.damping, 0)
        if self.damping == 0:
            raise VeneerError("init 'corda': damping must be above 0: the covariance of few tokens has no inverse")

    def refusal(self, shape: Shape, rank: int) -> str | None:
        return super().refusal(shape, rank) or above(self.key, rank, rank, shape)

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        (covariance,) = self.given(evidence, "covariance")
        assert weight is not None
        return Started(*oriented_pair(weight, covariance, rank, scale, self.damping, self.mode == "ipm"))


def oriented_pair(weight: Tensor, covariance: Tensor, rank: int, scale: float, damping: float = 0.01,
                  largest: bool = True) -> tuple[Tensor, Tensor]:
    """A (r, in), B (out, r) in fp32 with s·B·A = U_r S_r V_rᵀ C⁻¹, where U S Vᵀ = W C, for W (out, in) and C (in, in)
    damped; the r largest or smallest singular values, half of each on either side. With all of them, s·B·A = W.

    Raises `VeneerError` where C, W or s is zero.
    """
    W, C = wide(weight), wide(covariance.to(weight.device))
    level = float(C.diagonal().mean())
    if not level > 0 or not bool(W.any()):
        raise VeneerError(f"init='corda': the {'weight' if level > 0 else 'covariance of the inputs'} is zero")
    if scale == 0:
        raise VeneerError("init='corda': the scale s is 0, so that no pair gives a part of the weight")
    # Only the ratio of C's entries matters to U and V; the mean of its diagonal as unit keeps S in W's range.
    C = C / level
    C.diagonal().add_(damping)
    with without_autocast(W):
        M = W @ C
        tall = M.shape[0] > M.shape[1]
        # In increasing order. Of the eigenvectors of the smaller Gram matrix one set is exactly orthonormal, and it is
        # all that the product s·B·A depends on: U_r S_r V_rᵀ C⁻¹ = U_r U_rᵀ W = W C V_r V_rᵀ C⁻¹.
        vectors = torch.linalg.eigh(M.mT @ M if tall else M @ M.mT).eigenvectors
        chosen = vectors.flip(1)[:, :rank] if largest else vectors[:, :rank]
        if tall:
            B, A = M @ chosen, torch.linalg.solve(C, chosen).mT
            values = B.norm(dim=0)
        else:
            A = chosen.mT @ W
            values, B = (chosen.mT @ M).norm(dim=1), chosen
        values = values.clamp_min(1e-12 * float(values.max()))
        root = values.sqrt()
        A, B = (A * root.unsqueeze(1), B / root) if tall else (A / root.unsqueeze(1), B * root)
    half = math.sqrt(abs(scale))
    A, B = A / half, B / math.copysign(half, scale)
    return A.to(weight.device, torch.float32), B.to(weight.device, torch.float32)
