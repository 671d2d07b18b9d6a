"""Random bases scaled by trained vectors, with a backward that keeps nothing large (RandLoRA)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class ScaledBases(torch.autograd.Function):
    """Rows ρ·n + j: λ[ρ,j]·A[ρ] ∘ γ[j], rounded to `dtype`. Its backward keeps the three small tensors and nothing of
    the result's size. Large ones are made base by base, which stays in a cache; both directions."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, lambda_: Tensor, gamma: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(A, lambda_, gamma)
        A = A.to(gamma.dtype)
        out = gamma.new_empty((*lambda_.shape, gamma.shape[-1]), dtype=dtype)
        for i in _slices(A, out):
            out[..., i, :, :] = (gamma.unsqueeze(-3) * A[i].unsqueeze(-2)).mul_(lambda_[..., i, :].unsqueeze(-1))
        return out.flatten(-3, -2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, Tensor, None]:
        A, lambda_, gamma = ctx.saved_tensors
        A = A.to(gamma.dtype)
        rows = grads[0].unflatten(-2, lambda_.shape[-2:])
        d_gamma, d_lambda = torch.zeros_like(gamma), []
        for i in _slices(A, rows):
            part = rows[..., i, :, :] * A[i].unsqueeze(-2)
            d_gamma = d_gamma + (lambda_[..., i, :].unsqueeze(-1) * part).sum(-3)
            d_lambda.append((part * gamma.unsqueeze(-3)).sum(-1))
        return None, torch.cat(d_lambda, dim=-2), d_gamma, None


def _slices(A: Tensor, whole: Tensor) -> list[slice]:
    """Bases to take at a time: parts of about 2¹⁸ numbers."""
    step = max(1, A.shape[0] * 2**18 // max(whole.numel(), 1))
    return [slice(i, i + step) for i in range(0, A.shape[0], step)]
