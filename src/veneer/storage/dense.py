"""Dense storage: an ordinary floating-point parameter."""

from __future__ import annotations

from torch import Tensor, nn


def stored(module: nn.Module, param: str) -> Tensor:
    """The parameter as the module has it now."""
    # Sharding wrappers put the gathered tensor in the instance's own dict while the forward runs.
    found = module._parameters.get(param)
    return module.__dict__[param] if found is None else found


def swap(param: nn.Parameter, values: Tensor) -> Tensor:
    """Put `values` (same shape, dtype, device) under the same Parameter object; returns the tensor that was there."""
    before = param.data
    param.data = values
    return before
