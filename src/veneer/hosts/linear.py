"""Linear layers: `nn.Linear`, and transformers' `Conv1D`, which stores the transpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer import ops
from veneer.hosts.base import Layout
from veneer.hosts.tensor_host import TensorHost
from veneer.ops import Term


class LinearHost(TensorHost):
    """y = x Wᵀ + bias with W (out, in)."""

    is_linear = True
    transposed: ClassVar[bool] = False

    @classmethod
    def claims(cls, module: nn.Module, kind: type[nn.Module]) -> dict[str, Layout]:
        if not issubclass(kind, nn.Linear) or kind.forward is not nn.Linear.forward:
            return {}
        return _layouts(module, transposed=False)

    def with_terms(self, x: Tensor, weight: Tensor, bias: Tensor | None, terms: Sequence[Term]) -> Tensor:
        matrix = weight.mT if self.transposed else weight  # an adapter of the bias alone brings no layout of W
        return ops.linear(x, matrix, bias, terms) if terms else self._plain(x, weight, bias)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own operation, with another weight: its bits are those of the layer."""
        return F.linear(x, weight, bias)

    def explain_terms(self, terms: Sequence[Term]) -> tuple[str, str]:
        return ops.choose(None, self.base_matrix("weight"), terms)


class Conv1DHost(LinearHost):
    """The same over a weight stored as (in, out)."""

    transposed = True

    def forward(self, x: Tensor) -> Tensor:  # by the name that Conv1D gives its input
        return super().forward(x)

    def _plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
        return y.view(*x.shape[:-1], weight.shape[1])

    @classmethod
    def claims(cls, module: nn.Module, kind: type[nn.Module]) -> dict[str, Layout]:
        # Named, not imported: transformers is no dependency of the core.
        if kind.__name__ != "Conv1D" or kind.__module__ != "transformers.pytorch_utils":
            return {}
        return _layouts(module, transposed=True)


def _layouts(module: nn.Module, transposed: bool) -> dict[str, Layout]:
    found = {}
    for name in ("weight", "bias"):
        param = module._parameters.get(name)
        if param is not None:
            found[name] = Layout.of(param, transposed=transposed and name == "weight")
    return found if "weight" in found else {}
