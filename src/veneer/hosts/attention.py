"""`nn.MultiheadAttention`, which reads `in_proj_weight` and `out_proj.weight` without calling a submodule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from veneer.hosts.base import Host, Layout
from veneer.hosts.batch import refuse_unbatched
from veneer.hosts.parameter import ParameterHost
from veneer.method import Shape


class AttentionHost(ParameterHost):
    """Shows its own projections and, for the same time, those of its `out_proj`."""

    is_linear = True

    @classmethod
    def claims(cls, module: nn.Module, kind: type[nn.Module]) -> dict[str, Layout]:
        if not issubclass(kind, nn.MultiheadAttention):
            return {}
        found = super().claims(module, kind)
        for name in ("bias_k", "bias_v"):  # (1, 1, E): one more key and value, and no matrix
            if name in found:
                size = found[name].native
                found[name] = Layout(Shape(out=size[-1], in_=1, is_vector=True), size)
        return found

    def shown_hosts(self) -> Sequence[Host]:
        out_proj = cast(Any, self).out_proj
        return (self, out_proj) if isinstance(out_proj, Host) else (self,)

    def batch_dim(self, args: tuple, kwargs: dict) -> int:
        # The attention weights returned beside the output have the batch first in any case; see `forward`.
        return 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        attention = cast(Any, self)
        route = self.veneer.route
        if route.rows is None or route.disabled:
            return super().forward(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        refuse_unbatched(route, query.dim(), 3, "an attention query")
        if attention.batch_first or query.dim() < 3:
            return super().forward(*args, **kwargs)
        # Rows are told apart along dimension 0, where this module has the batch only for the weights.
        return self._batch_second(*args, **kwargs)

    def _batch_second(self, *args: Any, **kwargs: Any) -> Any:
        attention = cast(Any, self)
        args = tuple(_swap(a) if i < 3 else a for i, a in enumerate(args))
        kwargs = {k: _swap(v) if k in ("query", "key", "value") else v for k, v in kwargs.items()}
        attention.batch_first = True
        try:
            out, weights = super().forward(*args, **kwargs)
        finally:
            attention.batch_first = False
        return _swap(out), weights


class OutProjHost(ParameterHost):
    """The `out_proj` of an attention module: shown by its parent, or by itself when it is called."""

    is_linear = True

    @classmethod
    def claims(cls, module: nn.Module, kind: type[nn.Module]) -> dict[str, Layout]:
        out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear
        return super().claims(module, kind) if issubclass(kind, out_proj) else {}


def _swap(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)
