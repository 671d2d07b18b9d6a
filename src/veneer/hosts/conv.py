"""Convolutions of one to three dimensions, with any stride, padding, dilation and groups.

ΔW = s·B·A, with W flattened to (out, in/groups · kernel), is a convolution by A's r kernels followed by a
1×1 convolution by B; with groups, A's kernels are repeated for every group, since B's rows of each group
read that group's own r channels. A Kronecker product is a convolution of every block of channels by `right`,
and a mixture of the blocks by `left`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.forms import Factors, Form, Kronecker
from veneer.hosts.base import Layout
from veneer.hosts.tensor_host import TensorHost, finish_term
from veneer.ops import Term
from veneer.ops.reference import row_factor

_CONVS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class ConvHost(TensorHost):
    """y = conv(x, W) + bias."""

    @classmethod
    def claims(cls, module: nn.Module, kind: type[nn.Module]) -> dict[str, Layout]:
        base = next((k for k in _CONVS if issubclass(kind, k)), None)
        weight = module._parameters.get("weight")
        if base is None or kind.forward is not base.forward or weight is None:
            return {}
        found = {"weight": Layout.of(weight, kernel=weight.shape[2:])}
        bias = module._parameters.get("bias")
        return found if bias is None else {**found, "bias": Layout.of(bias)}

    def batched_dims(self) -> int:
        return len(cast(Any, self).kernel_size) + 2

    def with_terms(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
        conv = cast(Any, self)
        y = base = conv._conv_forward(x, weight, bias)
        spread = (-1, *([1] * (weight.dim() - 2)))
        base_bias = None if bias is None else bias.reshape(spread)
        for term in terms:
            added = self._small(x, weight, term)
            if term.keep is not None:
                added = added * term.keep.to(added.dtype).reshape(spread)
            if term.out_dropout:
                added = F.dropout(added, term.out_dropout)
            gain = None if term.gain is None else term.gain.reshape(spread)
            added = finish_term(added.to(base.dtype), base, base_bias, term, gain)
            if term.bias is not None:
                added = added + term.bias.to(added.dtype).reshape(spread)
            y = y + (added if term.rows is None else added * row_factor(term.rows, added))
        return y

    def usable(self, form: Form) -> bool:
        # A Kronecker product splits the input channels, which groups split in another way.
        return isinstance(form, Factors) or cast(Any, self).groups == 1

    def _small(self, x: Tensor, weight: Tensor, term: Term) -> Tensor:
        inner = F.dropout(x, term.dropout) if term.dropout else x
        if isinstance(term.form, Factors):
            return self._low_rank(inner, weight, term.form.folded())
        return self._kronecker(inner, weight, term.form)

    def _low_rank(self, x: Tensor, weight: Tensor, pair: Factors) -> Tensor:
        conv = cast(Any, self)
        dims = weight.dim() - 2
        groups: int = conv.groups
        A = pair.A.to(x.dtype).reshape(-1, *weight.shape[1:])
        low = conv._conv_forward(x, A.repeat(groups, *([1] * (dims + 1))), None)
        B = (pair.scale * pair.B).to(low.dtype).reshape(*pair.B.shape, *([1] * dims))
        conv_nd = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        return conv_nd(low, B, groups=groups)

    def _kronecker(self, x: Tensor, weight: Tensor, form: Kronecker) -> Tensor:
        """`right`'s kernels over every block of input channels, then `left` over the blocks."""
        conv = cast(Any, self)
        o1, i1 = form.left.shape
        blocks = x.reshape(-1, x.shape[-weight.dim() + 1] // i1, *x.shape[-weight.dim() + 2:])
        right = form.right.to(x.dtype).reshape(form.right.shape[0], blocks.shape[1], *weight.shape[2:])
        half = conv._conv_forward(blocks, right, None)
        half_rows = half.reshape(len(half) // i1, i1, half.shape[1:].numel())
        whole = torch.matmul((form.scale * form.left).to(half.dtype), half_rows)
        lead = x.shape[:1] if x.dim() == weight.dim() else ()
        return whole.reshape(*lead, o1 * form.right.shape[0], *half.shape[2:])
