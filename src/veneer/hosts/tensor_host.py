"""The common course of hosts that map one tensor, batch first, to one tensor: linear, convolution, embedding."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.hosts.base import Host, check_rows
from veneer.hosts.batch import refuse_sequence_first, refuse_unbatched
from veneer.method import Adapter, VeneerError
from veneer.ops import Term
from veneer.ops.gain import with_gain
from veneer.route import Route


class TensorHost(Host):
    """A subclass says how to apply the base weight with terms, and how to apply another weight."""

    def forward(self, input: Tensor) -> Tensor:
        route = self.route_now()
        if route.disabled or (route.rows is None and not route.live):
            return self.plain(input)
        if route.rows is not None:
            return self._forward_rows(input, route)
        return self._forward_names(input, route.live)

    def batched_dims(self) -> int:
        """The least number of dimensions of an input that has a batch."""
        return 2

    def with_terms(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
        """The layer's output with `weight` (stored layout), `bias` and the terms."""
        raise NotImplementedError

    def with_adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
        """The same with a weight that is not the base's own."""
        return self.with_terms(x, weight, bias, terms)

    def explain_live(self, param: str, adapters: Sequence[Adapter]) -> tuple[str, str]:
        terms: list[Term] = []
        dense = list(adapters)
        if param == "weight":
            terms, dense = self._sort(adapters, self.weight_for(adapters))
        if dense:
            return "weight space", f"{type(dense[0]).__name__} has no shortcut here"
        rows = self.veneer.route.rows
        routed_bias = rows is not None and "bias" in self.veneer.layouts and self.live("bias", rows.distinct)
        if rows is not None and not routed_bias:  # else the rows go through one by one, each without a mask
            mask = torch.ones(len(rows.names))
            terms = [dataclasses.replace(term, rows=mask) for term in terms]
        return self.explain_terms(terms)

    def base_matrix(self, param: str) -> Tensor:
        return self.matrix_of(self.base_weight(param), param)

    def matrix_of(self, weight: Tensor, param: str = "weight") -> Tensor:
        """A stored base weight as (out, in); refuses one that has been resized since the attach."""
        layout = self.veneer.layouts[param]
        if tuple(weight.shape) != layout.native:
            raise VeneerError(f"the {param!r} of this {type(self).__name__.removeprefix('Adapted')} is now "
                              f"{tuple(weight.shape)} and was {layout.native} when its adapters were attached: resize "
                              "the model (resize_token_embeddings, say) before attaching")
        return layout.matrix(weight)

    def explain_terms(self, terms: Sequence[Term]) -> tuple[str, str]:
        return "low rank", "two small layers beside the base's own"

    def plain(self, x: Tensor) -> Tensor:
        """The base layer's own forward."""
        return super().forward(x)

    def _forward_names(self, x: Tensor, names: Sequence[str | None]) -> Tensor:
        adapters = self.live("weight", names)
        bias = self.adapted_bias(names)
        if not adapters and bias is self._parameters.get("bias"):
            return self.plain(x)
        weight = self.weight_for(adapters)
        terms, dense = self._sort(adapters, weight)
        if not dense:
            return self.with_terms(x, weight, bias, terms)
        return self.with_adapted(x, self.adapted_weight("weight", dense, dropping=self.training), bias, terms)

    def weight_for(self, adapters: Sequence[Adapter]) -> Tensor:
        """The base weight (stored layout) for a forward with these adapters."""
        return self.base_weight("weight")

    def _sort(self, adapters: Sequence[Adapter], weight: Tensor) -> tuple[list[Term], list[Adapter]]:
        """Adapters with a form that pays as terms, the others as they are (for weight space)."""
        if not adapters:  # of the bias alone, perhaps: then W has no layout here
            return [], []
        matrix = self.matrix_of(weight)
        pairs = [(adapter, self.term(adapter, matrix)) for adapter in adapters]
        dense = [adapter for adapter, term in pairs if term is None]
        if dense and any(term is not None and term.gain is not None for _, term in pairs):
            return [], list(adapters)  # a gain multiplies the base's own product, which is not there then
        return [term for _, term in pairs if term is not None], dense

    def _forward_rows(self, x: Tensor, route: Route) -> Tensor:
        assert route.rows is not None
        rows = route.rows
        size = x.shape[0] if x.dim() else 1
        check_rows(route, size)
        named = [name for name in rows.distinct if name is not None]
        adapters = [(name, a) for name in named for a in self.live("weight", [name])]
        biases = any(self.live("bias", [name]) for name in named) if "bias" in self.veneer.layouts else False
        if not adapters and not biases:
            return self.plain(x)
        refuse_sequence_first(self, route)
        refuse_unbatched(route, x.dim(), self.batched_dims(), "an input")
        weight = self.weight_for([a for _, a in adapters])
        terms = [self.term(a, self.matrix_of(weight), rows.mask(name, x.device)) for name, a in adapters]
        whole = [term for term in terms if term is not None]
        if len(whole) == len(terms) and not biases:
            return self.with_terms(x, weight, self._parameters.get("bias"), whole)
        return self._split_rows(x, route)

    def _split_rows(self, x: Tensor, route: Route) -> Tensor:
        """Each adapter's rows go through by themselves: every row is computed once, by the dense weight."""
        assert route.rows is not None
        parts = [(name, route.rows.index(name, x.shape[0], x.device)) for name in route.rows.distinct]
        outs = [self._forward_names(x.index_select(0, index), (name,)) for name, index in parts]
        order = torch.cat([index for _, index in parts])
        return torch.cat(outs).index_select(0, torch.argsort(order))


def finish_term(added: Tensor, base: Tensor, bias: Any, term: Term, gain: Tensor | None) -> Tensor:
    """`added` plus what the term's gain, shaped to multiply `base`, does to base and added together."""
    return added if gain is None else with_gain(added, base, bias, gain)
