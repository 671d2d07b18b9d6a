"""Embeddings: a weight (vocabulary, width) whose rows are looked up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.hosts.base import Layout
from veneer.hosts.tensor_host import TensorHost, finish_term
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
        if cast(Any, module).max_norm is None:
            return None
        return "an embedding with max_norm rewrites its own weight in every forward; set max_norm=None"

    def with_terms(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
        y = base = self._look_up(x, weight)
        for term in terms:
            low = self._look_up(x, term.B.to(base.dtype))
            added = low @ (term.scale * term.A).to(low.dtype)
            if term.dropout:
                added = added * F.dropout(torch.ones(*x.shape, 1, dtype=added.dtype, device=x.device), term.dropout)
            added = finish_term(added, base, None, term, term.gain)
            if cast(Any, self).padding_idx is not None:  # the row of the padding is never trained, by no parameter
                added = torch.where((x == cast(Any, self).padding_idx).unsqueeze(-1), added.detach(), added)
            y = y + (added if term.rows is None else added * row_factor(term.rows, added))
        return y

    def _look_up(self, ids: Tensor, weight: Tensor) -> Tensor:
        table = cast(Any, self)
        return F.embedding(ids, weight, table.padding_idx, None, 2.0, table.scale_grad_by_freq, table.sparse)
