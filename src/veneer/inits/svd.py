"""Starts by a decomposition of the base weight W (out, in): its largest singular values, or the first columns of its QR
decomposition. Both take a part of W into the pair, s·BA, and leave the rest to the frozen base.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.inits.base import Evidence, Init, Started, register_init
from veneer.inits.random import Kaiming
from veneer.method import Shape, VeneerError

_NITER = re.compile(r"pissa_niter_(\d+)")
#: directions that the randomised decomposition follows beside those asked for (Halko et al. 2011, §4.2: 5 or 10)
_BESIDE = 10


@register_init("pissa")
@dataclass(frozen=True, kw_only=True)
class PiSSA(Init):
    """s·BA is the nearest matrix of rank r to W: A = S^½Vᵀ/√s, B = US^½/√s (Meng et al. 2024, arXiv:2404.02948).

    iterations: None for the exact singular value decomposition; a whole number for a randomised one with so many power
    iterations, which takes a small part of the time ("pissa_niter_4" is 4 of them). Its random numbers are the
    adapter's own. Raises `VeneerError` for a scale of zero, or a weight with NaN or infinite values.
    """

    iterations: int | None = None
    from_weight = True
    moves = True

    def __post_init__(self) -> None:
        n = self.iterations
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 0):
            raise VeneerError(f"init 'pissa': iterations must be None or a whole number of at least 0, got {n!r}")

    @classmethod
    def named(cls, name: str) -> Init | None:
        match = _NITER.fullmatch(name)
        return cls(iterations=int(match[1])) if match else super().named(name)

    def short(self) -> str | None:
        return "pissa" if self.iterations is None else f"pissa_niter_{self.iterations}"

    def refusal(self, shape: Shape, rank: int) -> str | None:
        return _too_many("pissa", shape, rank)

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        assert weight is not None
        _check("pissa", weight, scale)
        if self.iterations is None:
            U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
            U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
        else:
            U, S, Vh = randomised_svd(weight, rank, self.iterations, generator)
        return Started(*balanced(U, S, Vh, scale, generator))


@register_init("olora")
@dataclass(frozen=True, kw_only=True)
class OLoRA(Init):
    """B = Q[:, :r] with BᵀB = I and A = R[:r], of W = QR where R has a positive diagonal (Büyükakyüz 2024,
    arXiv:2406.01775).

    Raises `VeneerError` for a weight with NaN or infinite values.
    """

    from_weight = True
    moves = True

    def refusal(self, shape: Shape, rank: int) -> str | None:
        return _too_many("olora", shape, rank)

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        assert weight is not None
        _check("olora", weight, 1.0)
        # The first r columns of Q depend on the first r columns of W alone.
        Q, R = torch.linalg.qr(weight[:, :rank])
        Q = Q * _sign(R.diagonal())
        return Started(Q.mT @ weight, Q)


def randomised_svd(weight: Tensor, rank: int, iterations: int, generator: torch.Generator
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,) falling and Vᵀ (r, in) of about the largest singular values of W (out, in), on its device and
    in its dtype (Halko et al. 2011, arXiv:0909.4061, algorithms 4.4 and 5.1)."""
    width = min(rank + _BESIDE, *weight.shape)
    probe = torch.randn(weight.shape[1], width, generator=generator, dtype=torch.float32, device="cpu").to(weight)
    Q = torch.linalg.qr(weight @ probe).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(weight.mT @ Q).Q
        Q = torch.linalg.qr(weight @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ weight, full_matrices=False)
    return (Q @ U)[:, :rank], S[:rank], Vh[:rank]


def balanced(U: Tensor, S: Tensor, Vh: Tensor, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with s·BA = U·diag(S)·Vᵀ, the roots of S shared out evenly; the entry of largest
    magnitude in each row of A is positive, as a decomposition leaves signs open.

    Where a singular value is zero, A is drawn as "kaiming" does and B is zero, so that it can learn.
    """
    sign = _sign(Vh.gather(1, Vh.abs().argmax(1, keepdim=True)))
    root = (S / abs(scale)).sqrt()
    A = root.unsqueeze(1) * sign * Vh
    B = U * sign.squeeze(1) * (root * math.copysign(1, scale))
    nothing = S.max() * torch.finfo(S.dtype).eps >= S
    if nothing.any():
        A[nothing] = Kaiming().draw(A.shape, generator).to(A)[nothing]
        B[:, nothing] = 0
    return A, B


def _sign(tensor: Tensor) -> Tensor:
    return torch.copysign(torch.ones_like(tensor), tensor)


def _too_many(name: str, shape: Shape, rank: int) -> str | None:
    most = min(shape.out, shape.in_)
    return f"init={name!r} can give a matrix of {shape.out} × {shape.in_} a rank of {most} at most, and rank={rank}" \
        if rank > most else None


def _check(name: str, weight: Tensor, scale: float) -> None:
    if scale == 0:
        raise VeneerError(f"init={name!r} divides by the scale, which alpha=0 makes 0")
    if not weight.isfinite().all():
        raise VeneerError(f"init={name!r} cannot decompose a weight that holds NaN or infinite values")
