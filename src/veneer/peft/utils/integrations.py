"""PEFT's helpers around libraries that hold weights in their own ways: quantised, or spread over processes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from veneer.hosts.packed import PackedHost
from veneer.storage import packed_storage

__all__ = ["dequantize_module_weight", "gather_params_ctx", "get_bnb_param_type"]


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The weight of a layer as dense numbers: (out, in) and in the dtype that it stands for where it is held in fewer
    bits, in any form that Veneer reads; while an adapter is merged into the layer, what was merged. Else
    `module.weight` itself.

    Raises `TypeError` for a module without a weight.
    """
    if isinstance(module, PackedHost):
        return module.base_weight("weight").detach()
    storage = packed_storage(module)
    if storage is not None:
        return storage.read(module)
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"dequantize_module_weight: a layer with a weight is needed, and the weight of this "
                        f"{type(module).__name__} is {weight!r}")
    return weight


def gather_params_ctx(param: nn.Parameter | Iterable[nn.Parameter], modifier_rank: int | None = 0,
                      fwd_module: nn.Module | None = None) -> contextlib.AbstractContextManager[Any]:
    """DeepSpeed's `GatheredParameters` for parameters that its ZeRO-3 has spread over processes; for all others a
    context that does nothing."""
    params = [param] if isinstance(param, Tensor) else list(param)
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is None or not any("ds_id" in vars(each) for each in params):
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters(params, modifier_rank=modifier_rank, fwd_module=fwd_module)


def get_bnb_param_type(param: nn.Parameter) -> bool | str:
    """"4bit" or "8bit" for a parameter of bitsandbytes, else False."""
    return {"Params4bit": "4bit", "Int8Params": "8bit"}.get(type(param).__name__, False)
