"""Dense storage: an ordinary floating-point parameter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from veneer.method import VeneerError

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Dense:
    """Reads the parameter as it is; writes by putting another tensor under the same Parameter object."""

    def read(self, param: Tensor) -> Tensor:
        return param

    def swap(self, param: nn.Parameter, values: Tensor) -> Tensor:
        """Put `values` (same shape, dtype, device) under `param`; returns the tensor that was there."""
        before = param.data
        param.data = values
        return before


_DENSE = Dense()


def storage_of(param: Tensor, name: str) -> Dense:
    """The storage of a parameter; `VeneerError` where nothing here can read it as dense numbers."""
    if param.dtype in _FLOATS:
        return _DENSE
    raise VeneerError(f"{name!r} is stored as {type(param).__name__} of {param.dtype}, which cannot be read as "
                      f"dense numbers; load the model dequantised (float32, bfloat16, float16 or float64)")
