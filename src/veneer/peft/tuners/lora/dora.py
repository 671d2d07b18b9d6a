"""What PEFT's module of DoRA has that does not depend on its own layers: how weights are read.

DoRA has no modules of its own here, so that `DoraLinearLayer` and its kin are absent: `layer.use_dora[adapter]` says
whether an adapter is DoRA, and `layer.lora_magnitude_vector[adapter].weight` is its vector of lengths.
"""

from __future__ import annotations

from typing import NoReturn

from veneer.peft.utils.integrations import dequantize_module_weight, gather_params_ctx
from veneer.peft.utils.other import transpose

__all__ = ["dequantize_module_weight", "gather_params_ctx", "transpose"]


def __getattr__(name: str) -> NoReturn:
    if name.startswith("Dora") and name.endswith("Layer"):
        raise AttributeError(f"veneer.peft has no {name}: DoRA has no modules of its own here. layer.use_dora[adapter] "
                             "says whether an adapter is DoRA, layer.lora_magnitude_vector[adapter].weight is its "
                             "vector of lengths")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
