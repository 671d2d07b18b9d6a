"""The shortcuts that a change ΔW may have: a pair of factors, or a Kronecker product.

A form is ΔW in few numbers, differentiable. It can be spread out (`dense`), applied to rows of inputs without
being spread out (`apply`), and tell how it changes the lengths of a weight's rows (`added_square`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Factors(NamedTuple):
    """ΔW = scale · diag(out) · B · diag(mid) · A, with A (*batch, r, in), B (*batch, out, r); mid (*batch, r) and out
    (*batch, out), or None for ones, stay apart where A and B are frozen and only they are trained."""

    A: Tensor
    B: Tensor
    scale: float = 1.0
    mid: Tensor | None = None
    out: Tensor | None = None

    def folded(self) -> Factors:
        """The same as two factors of one dtype: mid goes into A, out into B."""
        A = self.A if self.mid is None else self.mid.unsqueeze(-1) * self.A
        B = self.B if self.out is None else self.out.unsqueeze(-1) * self.B
        dtype = torch.promote_types(A.dtype, B.dtype)
        return Factors(A.to(dtype), B.to(dtype), self.scale)

    def dense(self) -> Tensor:
        """ΔW (*batch, out, in)."""
        A, B, scale, *_ = self.folded()
        return scale * (B @ A)

    def apply(self, x: Tensor) -> Tensor:
        """x ΔWᵀ in x's dtype, for x (…, in) and no batch."""
        low = F.linear(x, self.A.to(x.dtype))
        if self.mid is not None:
            low = low * self.mid.to(x.dtype)
        B = self.B if self.out is None else self.out.unsqueeze(-1) * self.B
        return F.linear(low, (self.scale * B).to(x.dtype))

    def turned(self) -> Factors:
        """ΔWᵀ."""
        A, B, scale, *_ = self.folded()
        return Factors(B.mT, A.mT, scale)

    def to(self, dtype: torch.dtype) -> Factors:
        mid, out = (None if t is None else t.to(dtype) for t in (self.mid, self.out))
        return Factors(self.A.to(dtype), self.B.to(dtype), self.scale, mid, out)

    def detach(self) -> Factors:
        mid, out = (None if t is None else t.detach() for t in (self.mid, self.out))
        return Factors(self.A.detach(), self.B.detach(), self.scale, mid, out)

    def added_square(self, weight: Tensor, wide: torch.dtype) -> Tensor:
        """‖W + ΔW‖² − ‖W‖² of every row, in `wide`, for W (*batch, out, in): 2s·rowsum(B ∘ (W Aᵀ)) +
        s²·rowsum((B (A Aᵀ)) ∘ B), with no product of W's size."""
        A, B, scale, *_ = self.detach().to(wide).folded()
        # The product with W runs in W's dtype (a fast matmul with wide accumulators); the sums are wide.
        cross = (weight @ A.to(weight.dtype).mT).to(wide)
        inner = B @ (A @ A.mT)
        # Not add_(cross, alpha=…): torch 2.13's inductor turns the sum of two products into one kernel without alpha.
        inner.mul_(scale**2).add_(cross.mul_(2 * scale))
        return inner.mul_(B).sum(-1)


class Kronecker(NamedTuple):
    """ΔW = scale · left ⊗ right, with left (*batch, o₁, i₁), right (*batch, o₂, i₂), out = o₁·o₂, in = i₁·i₂.

    With x as a matrix X (i₁, i₂), ΔW x is left · X · rightᵀ as (o₁, o₂): two small products.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    def dense(self) -> Tensor:
        """ΔW (*batch, out, in)."""
        left, right = self.left[..., :, None, :, None], self.right[..., None, :, None, :]
        out, in_ = self.left.shape[-2] * self.right.shape[-2], self.left.shape[-1] * self.right.shape[-1]
        return self.scale * (left * right).reshape(*self.left.shape[:-2], out, in_)

    def apply(self, x: Tensor) -> Tensor:
        """x ΔWᵀ in x's dtype, for x (…, in) and no batch."""
        inner = x.unflatten(-1, (self.left.shape[-1], self.right.shape[-1]))
        half = F.linear(inner, self.right.to(x.dtype))
        return torch.matmul((self.scale * self.left).to(x.dtype), half).flatten(-2)

    def turned(self) -> Kronecker:
        """ΔWᵀ."""
        return Kronecker(self.left.mT, self.right.mT, self.scale)

    def to(self, dtype: torch.dtype) -> Kronecker:
        return Kronecker(self.left.to(dtype), self.right.to(dtype), self.scale)

    def detach(self) -> Kronecker:
        return Kronecker(self.left.detach(), self.right.detach(), self.scale)

    def added_square(self, weight: Tensor, wide: torch.dtype) -> Tensor:
        """‖W + ΔW‖² − ‖W‖² of every row, in `wide`, for W (*batch, out, in); W is read once, ΔW never formed."""
        left, right, scale = self.detach().to(wide)
        sizes = (left.shape[-2], right.shape[-2], left.shape[-1], right.shape[-1])
        rows = weight.reshape(*weight.shape[:-2], *sizes)
        half = (rows @ right.to(weight.dtype)[..., None, :, :, None]).squeeze(-1).to(wide)
        cross = (half * left.unsqueeze(-2)).sum(-1)
        own = left.square().sum(-1).unsqueeze(-1) * right.square().sum(-1).unsqueeze(-2)
        return (own * scale**2 + cross * (2 * scale)).flatten(-2)


Form = Factors | Kronecker
