"""The singular values of a change ΔW, and the nearest pair of factors of a rank: pure linear algebra.

Where ΔW has a form it is never spread out: two factors go through QR and the SVD of the small product of their
triangles, a Kronecker product through the SVDs of its two sides, whose products are the triplets of the whole.
All of it is in fp64, or fp32 on a device that has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.forms import Factors, Form, Kronecker
from veneer.method import seeded_generator

#: a form, or ΔW itself (*batch, out, in)
Change = Form | Tensor

#: above so many singular values, a quarter of them or fewer is found by a randomised SVD
EXACT_UP_TO = 1024
_OVERSAMPLED, _PASSES = 16, 4


@dataclass(frozen=True)
class Spectrum:
    """Singular values (*batch, k), descending, and `square` = ‖ΔW‖², over the whole batch.

    vectors(r) gives the first r on each side, U (*batch, out, r) and Vᵀ (*batch, r, in). `complete`: no others exist.
    """

    values: Tensor
    square: float
    vectors: Callable[[int], tuple[Tensor, Tensor]]
    complete: bool = True

    def tails(self) -> list[float]:
        """What each rank 0 … k leaves out of `square`."""
        own = self.values.square().reshape(-1, self.values.shape[-1]).sum(0)
        beyond = own.new_tensor(0.0 if self.complete else self.square) - (0.0 if self.complete else own.sum())
        sums = own.flip(0).cumsum(0).flip(0) + beyond.clamp_min(0)
        return [*sums.tolist(), float(beyond.clamp_min(0))]

    def leaving(self, share: float) -> int:
        """The smallest rank, at least 1, that leaves out no more than this share of `square`."""
        tails = self.tails()
        fits = (rank for rank, tail in enumerate(tails) if tail <= share * self.square)
        return max(1, next(fits, len(tails) - 1))

    def pair(self, rank: int) -> tuple[Tensor, Tensor]:
        """The nearest B (*batch, out, r) and A (*batch, r, in), each with half of every singular value."""
        U, Vh = self.vectors(rank)
        root = self.values[..., :rank].sqrt()
        # Where the value is zero only B is: a pair of zeros has no gradient.
        return U * root.unsqueeze(-2), Vh * torch.where(root > 0, root, torch.ones_like(root)).unsqueeze(-1)


def rank_for(spectrum: Spectrum, wanted: int | float | str | None, eps: float) -> int:
    """The rank that is wanted: at most an int, at least a share of `square` (a float), or exact (None, "exact").

    eps: of the arithmetic that ΔW comes from; what is below four of it, relative to ‖ΔW‖, is its noise.
    """
    if isinstance(wanted, float):
        return spectrum.leaving(1 - wanted)
    exact = spectrum.leaving((4 * eps) ** 2)
    return min(wanted, exact) if isinstance(wanted, int) else exact


def widened(change: Change) -> Change:
    """The same in the dtype that everything here computes in."""
    device = change.device if isinstance(change, Tensor) else change[0].device
    return change.detach().to(torch.float32 if device.type == "mps" else torch.float64)


def spectrum_of(change: Change, most: int | None = None) -> Spectrum:
    """The spectrum of a `widened` change. most: no higher rank will be asked for; None = any."""
    if isinstance(change, Kronecker):
        return _of_kronecker(change)
    if isinstance(change, Tensor):
        count = min(change.shape[-2:])
    else:
        change = change.folded()
        count = min(change.B.shape[-2], change.A.shape[-1], change.A.shape[-2])
    if most is not None and count > EXACT_UP_TO and 4 * most <= count:
        return _randomised(change, most)
    return _of_matrix(change) if isinstance(change, Tensor) else _of_factors(change)


def sum_of(changes: list[tuple[float, Change]]) -> Change:
    """Σ weight · change of `widened` changes: one keeps its form, several become longer factors, or dense."""
    if len(changes) == 1:
        weight, one = changes[0]
        return weight * one if isinstance(one, Tensor) else one._replace(scale=weight * one.scale)
    if all(isinstance(change, (Factors, Kronecker)) for _, change in changes):
        pairs = [as_factors(change) for _, change in changes]
        B = [weight * scale * B for (weight, _), (_, B, scale, *_) in zip(changes, pairs, strict=True)]
        return Factors(torch.cat([pair.A for pair in pairs], -2), torch.cat(B, -1))
    return sum((weight * dense(change) for weight, change in changes[1:]), changes[0][0] * dense(changes[0][1]))


def as_factors(change: Change) -> Factors:
    """An equal pair of factors: those that are there, else as many as there are singular values that are not zero."""
    if isinstance(change, Factors):
        return change.folded()
    spectrum = spectrum_of(change)
    B, A = spectrum.pair(rank_for(spectrum, None, torch.finfo(spectrum.values.dtype).eps))
    return Factors(A, B)


def dense(change: Change) -> Tensor:
    """ΔW (*batch, out, in)."""
    return change if isinstance(change, Tensor) else change.dense()


def moved(pair: tuple[Tensor, Tensor], stored: tuple[Tensor, Tensor]) -> float:
    """‖BA − B̂Â‖² for B, A and the same rounded, without the difference of two nearly equal products."""
    B, A = pair
    B_, A_ = (tensor.to(B.dtype) for tensor in stored)
    left, right = torch.cat([B - B_, B_], -1), torch.cat([A, A - A_], -2)
    return max(0.0, float(((left.mT @ left) * (right @ right.mT)).sum()))


def _of_matrix(matrix: Tensor) -> Spectrum:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return Spectrum(S, float(S.square().sum()), lambda r: (U[..., :r], Vh[..., :r, :]))


def _of_factors(pair: Factors) -> Spectrum:
    left, down = torch.linalg.qr(pair.scale * pair.B)
    right, across = torch.linalg.qr(pair.A.mT)
    U, S, Vh = torch.linalg.svd(down @ across.mT, full_matrices=False)
    return Spectrum(S, float(S.square().sum()), lambda r: (left @ U[..., :r], Vh[..., :r, :] @ right.mT))


def _of_kronecker(form: Kronecker) -> Spectrum:
    U1, S1, V1 = torch.linalg.svd(form.scale * form.left, full_matrices=False)
    U2, S2, V2 = torch.linalg.svd(form.right, full_matrices=False)
    values, order = (S1.unsqueeze(-1) * S2.unsqueeze(-2)).flatten(-2).sort(dim=-1, descending=True, stable=True)

    def vectors(rank: int) -> tuple[Tensor, Tensor]:
        first, second = order[..., :rank] // S2.shape[-1], order[..., :rank] % S2.shape[-1]
        u1, u2 = (torch.take_along_dim(U, i.unsqueeze(-2), -1) for U, i in ((U1, first), (U2, second)))
        v1, v2 = (torch.take_along_dim(V, i.unsqueeze(-1), -2) for V, i in ((V1, first), (V2, second)))
        U = (u1.unsqueeze(-2) * u2.unsqueeze(-3)).flatten(-3, -2)
        return U, (v1.unsqueeze(-1) * v2.unsqueeze(-2)).flatten(-2)

    return Spectrum(values, float(values.square().sum()), vectors)


def _randomised(change: Factors | Tensor, most: int) -> Spectrum:
    """By subspace iteration (Halko, Martinsson and Tropp 2011, arXiv:0909.4061), from a fixed seed."""
    B, A = (change, None) if isinstance(change, Tensor) else (change.scale * change.B, change.A)
    columns = B.shape[-1] if A is None else A.shape[-1]

    def times(x: Tensor) -> Tensor:
        return B @ (x if A is None else A @ x)

    def turned_times(x: Tensor) -> Tensor:
        return B.mT @ x if A is None else A.mT @ (B.mT @ x)

    start = torch.randn(columns, most + _OVERSAMPLED, generator=seeded_generator("low rank"), dtype=torch.float64,
                        device="cpu")
    Q = torch.linalg.qr(times(start.to(B.dtype).to(B.device))).Q
    for _ in range(_PASSES):
        Q = torch.linalg.qr(times(torch.linalg.qr(turned_times(Q)).Q)).Q
    U, S, Vh = torch.linalg.svd(turned_times(Q).mT, full_matrices=False)
    square = B.square().sum() if A is None else ((B.mT @ B) * (A @ A.mT)).sum()
    return Spectrum(S, float(square), lambda r: (Q @ U[..., :r], Vh[..., :r, :]), complete=False)
