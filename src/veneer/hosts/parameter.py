"""Any named parameter of any module: fused experts, position tables, norms, layers with a forward of their own.

The adapted weight is shown in place of the stored one only while the module's own forward runs: sharding,
quantisers, savers and everyone else outside see the stored parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from veneer.hosts.base import Host, Layout, check_rows
from veneer.hosts.batch import refuse_sequence_first
from veneer.method import VeneerError, VeneerWarning


class ParameterHost(Host):
    """Weight space: the dense adapted weight is computed once per forward."""

    has_input = False
    has_bias = False

    @classmethod
    def claims(cls, module: nn.Module, kind: type[nn.Module]) -> dict[str, Layout]:
        # transformers' fused experts say by this attribute that they store (E, in, out).
        transposed = bool(getattr(module, "is_transposed", False))
        table = isinstance(module, nn.Embedding)  # one with a forward of its own
        conv = issubclass(kind, _ConvNd)  # (out, in, k) is one matrix there, not `out` of them
        return {name: Layout.of(param, transposed=transposed and param.dim() == 3 and not conv,
                                kernel=param.shape[2:] if conv else (), lookup=table and name == "weight")
                for name, param in module._parameters.items() if param is not None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        route = self.route_now()
        if route.rows is None or route.disabled:
            return self._forward_names(None, args, kwargs)
        rows = route.rows
        refuse_sequence_first(self, route)
        carriers = [host for host in self.shown_hosts()]
        distinct = [n for n in rows.distinct if n is None or any(n in h.adapters for h in carriers)]
        if all(name is None for name in distinct):
            return super().forward(*args, **kwargs)
        outs = {name: self._forward_names((name,), args, kwargs) for name in rows.distinct}
        dim = self.batch_dim(args, kwargs)
        return _select(outs, rows.distinct, route, dim)

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if isinstance(module, nn.RNNBase):
            return "a recurrent layer keeps its own list of weights and never asks for them by name"
        for name in module._parameters:
            stem = name.removesuffix("_g").removesuffix("_v").removesuffix("_orig")
            if stem != name and isinstance(module.__dict__.get(stem), Tensor):
                return (f"its {stem!r} is computed from {name!r} before the forward runs (torch.nn.utils.weight_norm, "
                        "spectral_norm or pruning); use torch.nn.utils.parametrizations or make it permanent first")
        return None

    def shown_hosts(self) -> Sequence[Host]:
        """The hosts whose weights this module's forward reads: itself, and children it does not call."""
        return (self,)

    def batch_dim(self, args: tuple, kwargs: dict) -> int:
        """The dimension of the outputs that runs over the rows of the batch."""
        return 0

    def _forward_names(self, names: Sequence[str | None] | None, args: tuple, kwargs: dict) -> Any:
        hosts = self.shown_hosts()
        shown = [host.shown_weights(names) if isinstance(host, ParameterHost) else {} for host in hosts]
        if not any(shown):
            return super().forward(*args, **kwargs)
        with _showing(hosts, shown):
            return super().forward(*args, **kwargs)

    def shown_weights(self, names: Sequence[str | None] | None) -> dict[str, Tensor]:
        """The adapted weights of this module, by parameter name, for the live adapters."""
        found = {}
        for param in self.veneer.layouts:
            adapters = self.live(param, names)
            if adapters:
                found[param] = self.adapted_weight(param, adapters, dropping=self.training)
        return found


@contextmanager
def _showing(hosts: Sequence[Host], shown: Sequence[dict[str, Tensor]]) -> Iterator[None]:
    before = [host.veneer.shown for host in hosts]
    for host, weights in zip(hosts, shown, strict=True):
        host.veneer.shown = weights
    try:
        yield
    finally:
        for host, weights_before in zip(hosts, before, strict=True):
            host.veneer.shown = weights_before
    if not torch.compiler.is_compiling():
        for host, weights in zip(hosts, shown, strict=True):
            _warn_unread(host, weights)


def _warn_unread(host: Host, weights: dict[str, Tensor]) -> None:
    """An adapted weight that the forward did not ask for had no effect: say so, once."""
    for name in weights.keys() - host.veneer.read:
        host.veneer.read.add(name)
        warnings.warn(f"the forward of {type(host).__name__.removeprefix('Adapted')} did not read its parameter "
                      f"{name!r}, so the adapter on it had no effect in this call", VeneerWarning, stacklevel=3)


def shown_property(name: str) -> property:
    """The class attribute through which a module's forward reads parameter `name`."""

    def read(self: Any) -> Any:
        shown = self.veneer.shown
        if shown is not None and name in shown:
            if not torch.compiler.is_compiling():
                self.veneer.read.add(name)
            return shown[name]
        return self._parameters[name] if name in self._parameters else self.__dict__[name]

    def write(self: Any, value: Any) -> None:
        self.__dict__[name] = value

    return property(read, write)


def _select(outs: dict, distinct: Sequence, route: Any, dim: int) -> Any:
    """From one whole output per adapter, each row's own: tensors, and tuples or lists of them."""
    first = outs[distinct[0]]
    if isinstance(first, Tensor):
        size = first.shape[dim]
        check_rows(route, size)
        picked = [route.rows.index(name, size, first.device) for name in distinct]
        joined = torch.cat([outs[n].index_select(dim, i) for n, i in zip(distinct, picked, strict=True)], dim)
        return joined.index_select(dim, torch.argsort(torch.cat(picked)))
    if isinstance(first, (tuple, list)):
        parts = [_select({n: outs[n][i] for n in distinct}, distinct, route, dim) for i in range(len(first))]
        return type(first)(parts)
    if first is None:
        return None
    raise VeneerError(f"route() cannot tell the rows apart in an output of type {type(first).__name__}")
