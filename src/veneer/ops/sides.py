"""How one form runs beside the base product of a linear layer, forward and backward, inside the fused op.

Each side writes its own small part first and lets the large product accumulate on it, so that no full-size
addition or scaling happens anywhere. All of it runs in x's dtype: other tensors are cast here, and neither a
cast copy of W nor one of the adapter is ever kept. Of activations only what is tiny is kept; the rest is
computed again.

A side is two functions: `forward(run, needs, x, weight, bias, *tensors) → (y, kept)`, with y (m, out) the whole
output before a gain and `kept` what its backward will want, and `backward(run, needs, dy, x, weight, *kept) → (dx or
None, gradients of tensors)`. `needs` says for x and then for each tensor whether its gradient is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.ops.dropout import Dropped

#: rows of the batch that the backward of a Kronecker product takes at a time: its scratch space stays small
_ROWS = 256

Gradients = tuple[Tensor | None, ...]
Kept = tuple[Tensor | None, ...]


@dataclass(eq=False)
class Run:
    """One call: the factor s of ΔW, dropout on x, (m, r) or (m, 1) of 0/1 for routed rows, and dropout on what a pair
    puts out."""

    scale: float
    dropped: Dropped | None = None
    row_mask: Tensor | None = None
    out_dropped: Dropped | None = None

    def inner(self, x: Tensor) -> Tensor:
        """What the adapter sees of x, unscaled."""
        return x if self.dropped is None else self.dropped.apply(x)

    def on_small(self, small: Tensor) -> Tensor:
        """Scale and row mask, in place."""
        if self.scale != 1:
            small.mul_(self.scale)
        return small if self.row_mask is None else small.mul_(self.row_mask)


def _start(bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if bias is None else torch.addmm(bias.to(a.dtype), a, b)


class LowRank:
    """A pair: tensors are A (r, in), B (out, r), mid (r,) or None, out (out,) or None. Kept beside them are S = x Aᵀ
    (m, r) where B or mid is trained and, where `out` is, what it multiplies (m, out)."""

    @staticmethod
    def forward(run: Run, needs: Sequence[bool], x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor,
                mid: Tensor | None, out: Tensor | None) -> tuple[Tensor, Kept]:
        S = run.inner(x) @ A.to(x.dtype).mT
        scaled = run.on_small(S if mid is None else S * mid.to(x.dtype))
        if run.out_dropped is not None:
            y, low = LowRank._dropped(run.out_dropped, scaled, bias, B, out)
        elif out is None:
            y, low = _start(bias, scaled, B.to(x.dtype).mT), None
        else:
            low, factor = scaled @ B.to(x.dtype).mT, out.to(x.dtype)
            y = low * factor if bias is None else torch.addcmul(bias.to(x.dtype), low, factor)
        _, _, need_B, need_mid, need_out = needs
        kept = (A, B, mid, out, S if need_B or need_mid else None, low if need_out else None)
        return y.addmm_(x, weight.to(x.dtype).mT), kept

    @staticmethod
    def _dropped(dropped: Dropped, scaled: Tensor, bias: Tensor | None, B: Tensor,
                 out: Tensor | None) -> tuple[Tensor, Tensor | None]:
        low = scaled @ B.to(scaled.dtype).mT
        y = dropped.zero_(low if out is None else low * out.to(low.dtype))
        return y if bias is None else y.add_(bias.to(y.dtype)), None if out is None else low

    @staticmethod
    def backward(run: Run, needs: Sequence[bool], dy: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor,
                 mid: Tensor | None, out: Tensor | None, S: Any, low: Any) -> tuple[Tensor | None, Gradients]:
        need_x, need_A, need_B, need_mid, need_out = needs
        d_A = d_B = d_mid = d_out = d_x = inner = None
        whole, dy = dy, dy if run.out_dropped is None else run.out_dropped.apply(dy)
        if need_out and out is not None:
            d_out = _column_dots(dy, low).to(out.dtype)
        if need_B:
            scaled = S if mid is None else run.on_small(S * mid.to(S.dtype))
            d_B = (scaled.mT @ (dy if out is None else dy * out.to(dy.dtype))).mT.to(B.dtype)
        if need_x or need_A or need_mid:
            dS = run.on_small(dy @ B.to(dy.dtype) if out is None else _through(dy, B, out))
            if mid is not None:
                if need_mid:
                    d_mid = (dS * S).sum(0).to(mid.dtype)
                dS.mul_(mid.to(dS.dtype))
            if need_A:
                inner = run.inner(x)
                d_A = (dS.mT @ inner).to(A.dtype)
            if need_x:
                d_x = torch.mm(dS, A.to(dy.dtype), out=None if run.dropped is None else inner)
        if d_x is not None:
            if run.dropped is not None:
                run.dropped.zero_(d_x)
            d_x.addmm_(whole, weight.to(dy.dtype))
        return d_x, (d_A, d_B, d_mid, d_out)


def _column_dots(a: Tensor, b: Tensor) -> Tensor:
    """Σ over the rows of a ∘ b, (m, n) → (n,), in fp32 or wider; the product is never there whole."""
    wide = torch.promote_types(a.dtype, torch.float32)
    total = torch.zeros(a.shape[1], dtype=wide, device=a.device)
    for start in range(0, len(a), _ROWS):
        part = slice(start, start + _ROWS)
        total += (a[part] * b[part]).sum(0, dtype=wide)
    return total


def _through(dy: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """dy diag(out) B, with `out` multiplied into the smaller of the two."""
    if B.numel() < dy.numel():
        return dy @ (out.unsqueeze(-1) * B).to(dy.dtype)
    return (dy * out.to(dy.dtype)) @ B.to(dy.dtype)


class Dense:
    """The pair spread out over the weight: for a rank so high that two products per row cost more than one with
    W' = W + s·B·A, which is kept. Gradients of A and B still go the low-rank way. No dropout, no row mask."""

    @staticmethod
    def forward(run: Run, needs: Sequence[bool], x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor,
                B: Tensor) -> tuple[Tensor, Kept]:
        whole = torch.addmm(weight.to(x.dtype), B.to(x.dtype), A.to(x.dtype), alpha=run.scale)
        _, need_A, need_B = needs
        # Each factor is wanted for the other's gradient alone: a large trained one beside a frozen one is let go.
        return _start(bias, x, whole.mT), (whole, A if need_B else None, B if need_A else None)

    @staticmethod
    def backward(run: Run, needs: Sequence[bool], dy: Tensor, x: Tensor, weight: Tensor, whole: Tensor,
                 A: Tensor | None, B: Tensor | None) -> tuple[Tensor | None, Gradients]:
        d_A = d_B = None
        if A is not None:
            d_B = (run.on_small(x @ A.to(x.dtype).mT).mT @ dy).mT
        if B is not None:
            d_A = run.on_small(dy @ B.to(dy.dtype)).mT @ x
        return dy @ whole if needs[0] else None, (d_A, d_B)


class Product:
    """A Kronecker product: tensors are left (o₁, i₁), right (o₂, i₂). X rightᵀ (m, i₁, o₂) is kept where left is
    trained: as large as x, and a quarter of the cost to compute again. Row mask (m, 1)."""

    @staticmethod
    def forward(run: Run, needs: Sequence[bool], x: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor,
                right: Tensor) -> tuple[Tensor, Kept]:
        half = _right(run, run.inner(x), left, right)
        scaled = (left * run.scale).to(x.dtype).expand(len(x), -1, -1)
        if bias is None:
            y = torch.bmm(scaled, half)
        else:
            y = torch.baddbmm(bias.to(x.dtype).view(1, left.shape[0], right.shape[0]), scaled, half)
        y = y.view(len(x), left.shape[0] * right.shape[0])
        return y.addmm_(x, weight.to(x.dtype).mT), (left, right, half if needs[1] else None)

    @staticmethod
    def backward(run: Run, needs: Sequence[bool], dy: Tensor, x: Tensor, weight: Tensor, left: Tensor, right: Tensor,
                 half: Any) -> tuple[Tensor | None, Gradients]:
        need_x, need_left, need_right = needs
        wide = torch.promote_types(dy.dtype, torch.float32)
        d_left = torch.zeros(left.shape, dtype=wide, device=dy.device) if need_left else None
        d_right = torch.zeros(right.shape, dtype=wide, device=dy.device) if need_right else None
        d_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None  # blocks of it are views
        inner = run.inner(x)
        for start in range(0, len(x), _ROWS):
            part = slice(start, start + _ROWS)
            some = Run(run.scale, None, None if run.row_mask is None else run.row_mask[part])
            if d_left is not None:
                grid = dy[part].reshape(-1, left.shape[0], right.shape[0])
                d_left.add_(torch.bmm(grid, half[part].mT).sum(0), alpha=run.scale)
            if d_right is not None or d_x is not None:
                _product_rows(some, dy[part], inner[part], left, right, d_right, None if d_x is None else d_x[part])
        if d_x is not None:
            if run.dropped is not None:
                run.dropped.zero_(d_x)
            d_x.addmm_(dy, weight.to(dy.dtype))
        return d_x, (None if d_left is None else d_left.to(left.dtype),
                     None if d_right is None else d_right.to(right.dtype))


def _right(run: Run, inner: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """X rightᵀ for every row: (m, i₁, o₂)."""
    half = inner.reshape(-1, right.shape[1]) @ right.to(inner.dtype).mT
    half = half.view(len(inner), left.shape[1], right.shape[0])
    return half if run.row_mask is None else half.mul_(run.row_mask.unsqueeze(-1))


def _product_rows(run: Run, dy: Tensor, inner: Tensor, left: Tensor, right: Tensor, d_right: Tensor | None,
                  d_x: Tensor | None) -> None:
    """For some rows of the batch: the gradient of right, added to d_right, and of x, written into d_x."""
    grid = dy.reshape(len(dy), left.shape[0], right.shape[0])
    back = torch.bmm((left * run.scale).to(dy.dtype).mT.expand(len(dy), -1, -1), grid)
    if run.row_mask is not None:
        back.mul_(run.row_mask.unsqueeze(-1))
    back = back.view(-1, right.shape[0])
    if d_right is not None:
        d_right.add_(back.mT @ inner.reshape(-1, right.shape[1]))
    if d_x is not None:
        torch.mm(back, right.to(dy.dtype), out=d_x.view(-1, right.shape[1]))


Side: Any = type[LowRank] | type[Dense] | type[Product]
