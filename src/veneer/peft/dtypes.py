"""The dtype of an adapter's parameters: PEFT's cast, and what a new adapter begins with."""

from __future__ import annotations

import torch
from torch import nn

from veneer.attached import attached

_NARROW = (torch.float16, torch.bfloat16)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Make fp32 of the 16-bit parameters of an adapter of the base model `model`, which stay the same objects; nothing
    where `autocast_adapter_dtype` is false."""
    if not autocast_adapter_dtype:
        return
    for _, adapter in attached(model, adapter_name):
        if any(param.dtype in _NARROW for param in adapter.parameters()):
            adapter.to(torch.float32)


def settle_new(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Give an adapter that was just made or loaded the dtype that PEFT makes it with: that of each base weight, or fp32
    where that has 16 bit and `autocast_adapter_dtype` is true."""
    if not autocast_adapter_dtype:
        for weight, adapter in attached(model, adapter_name):
            adapter.to(weight.dtype)
    cast_adapter_dtype(model, adapter_name, autocast_adapter_dtype)
