"""Embeddings: a weight (vocabulary, width) whose rows are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.forms import Factors, Form
from veneer.hosts.base import Layout
from veneer.hosts.tensor_host import TensorHost, finish_term
from veneer.method import Adapter
from veneer.ops import Term
from veneer.ops.reference import row_factor


class EmbeddingHost(TensorHost):
    """y = W[ids]. The input is one-hot: dropping an input element drops the adapter for that token."""

    has_bias = False
    lookup = True

    @classmethod
    def claims(cls, module: nn.Module, kind: type[nn.Module]) -> dict[str, Layout]:
        weight = module._parameters.get("weight")
        if not issubclass(kind, nn.Embedding) or kind.forward is not nn.Embedding.forward or weight is None:
            return {}
        return {"weight": Layout.of(weight, lookup=True)}

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        table = cast(Any, module)
        if table.max_norm is not None:
            return "an embedding with max_norm rewrites its own weight in every forward; set max_norm=None"
        if table.scale_grad_by_freq:  # factors are not looked up alone: A would get the gradient unscaled
            return ("an embedding with scale_grad_by_freq divides gradients by how often a token occurs, which is "
                    "defined for its own weight only; set scale_grad_by_freq=False")
        return None

    def with_terms(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
        return self._add(x, self._look_up(x, weight), terms)

    def explain_live(self, param: str, adapters: Sequence[Adapter]) -> tuple[str, str]:
        if self._replaced(adapters) is not None:
            return "rows", "what is looked up is replaced where the row has a new value"
        return super().explain_live(param, adapters)

    def _forward_names(self, x: Tensor, names: Sequence[str | None]) -> Tensor:
        found = self._replaced(self.live("weight", names))
        if found is None:
            return super()._forward_names(x, names)
        terms, ids, values = found
        return self._add(x, self._replace(x, self._look_up(x, self.base_weight("weight")), ids, values), terms)

    def _replaced(self, adapters: Sequence[Adapter]) -> tuple[list[Term], Tensor, Tensor] | None:
        """The row numbers and values of the one dense adapter that only gives rows new values, and the others."""
        if not any(adapter.row_values() is not None for adapter in adapters):
            return None  # told before `_sort`, which may be costly
        terms, dense = self._sort(adapters, self.base_weight("weight"))
        found = dense[0].row_values() if len(dense) == 1 else None
        return None if found is None else (terms, *found)

    def _replace(self, x: Tensor, base: Tensor, ids: Tensor, values: Tensor) -> Tensor:
        """What the embedding looks up when its rows `ids` (n,) are `values` (n, width), without the new table."""
        ids, order = ids.to(x.device).sort()
        place = torch.searchsorted(ids, x.to(ids.dtype)).clamp(max=len(ids) - 1)
        new = F.embedding(order[place], values.to(base.dtype))
        padding = cast(Any, self).padding_idx
        if padding is not None:
            new = torch.where((x == padding).unsqueeze(-1), new.detach(), new)
        return torch.where((ids[place] == x).unsqueeze(-1), new, base)

    def _add(self, x: Tensor, base: Tensor, terms: Sequence[Term]) -> Tensor:
        y = base
        for term in terms:
            added = self._small(x, base, term.form)
            if term.dropout:
                added = added * F.dropout(torch.ones(*x.shape, 1, dtype=added.dtype, device=x.device), term.dropout)
            if term.keep is not None:
                added = added * term.keep.to(added.dtype)
            if term.out_dropout:
                added = F.dropout(added, term.out_dropout)
            added = finish_term(added, base, None, term, term.gain)
            if cast(Any, self).padding_idx is not None:  # the row of the padding is never trained, by no parameter
                added = torch.where((x == cast(Any, self).padding_idx).unsqueeze(-1), added.detach(), added)
            y = y + (added if term.rows is None else added * row_factor(term.rows, added))
        return y

    def _small(self, ids: Tensor, base: Tensor, form: Form) -> Tensor:
        """The rows `ids` of ΔW, in base's dtype. What is looked up is cast after it, and its gradients before they are
        added up over tokens: 16-bit sums of many tokens would lose most of them."""
        if isinstance(form, Factors):
            A, B, scale, *_ = form.folded()
            return self._look_up(ids, B).to(base.dtype) @ (scale * A).to(base.dtype)
        # Row o of left ⊗ right is row o // block of the one times row o % block of the other.
        block = form.right.shape[0]
        left = F.embedding(ids // block, form.scale * form.left).to(base.dtype)
        right = F.embedding(ids % block, form.right).to(base.dtype)
        return (left.unsqueeze(-1) * right.unsqueeze(-2)).flatten(-2)

    def _look_up(self, ids: Tensor, weight: Tensor) -> Tensor:
        table = cast(Any, self)
        # a sparse gradient is for the stored table: a computed one passes it on to operations that know none, and
        # the usual optimizers of an adapter know none either
        sparse = table.sparse and weight is self._parameters.get("weight")
        return F.embedding(ids, weight, table.padding_idx, sparse=sparse)
