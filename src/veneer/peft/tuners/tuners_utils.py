"""What all of PEFT's tuners share, at PEFT's place; and its functions for models that no `PeftModel` is around."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from veneer.attached import adapter_names, refuse_merged
from veneer.io.dialects.hf_names import is_target
from veneer.peft import dtypes
from veneer.peft.config import PeftConfig
from veneer.peft.layers.base import BaseTunerLayer, check_adapters_to_merge, onload_layer
from veneer.peft.saving import base_of, tuner_of
from veneer.peft.targets import inspect_matched_modules as matched_modules
from veneer.peft.tuner import BaseTuner
from veneer.wrappers import unwrap

__all__ = ["BaseTuner", "BaseTunerLayer", "cast_adapter_dtype", "check_adapters_to_merge",
           "check_target_module_exists", "delete_adapter", "inspect_matched_modules", "onload_layer", "set_adapter",
           "set_requires_grad"]

#: what a config says about which modules are adapted
_WHERE = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether a config adapts the module called `key`, by its name alone."""
    return is_target({name: getattr(config, name, None) for name in _WHERE}, key)


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """Names of the base's modules, "matched" by an adapter's config or "unmatched"."""
    return matched_modules(tuner.model, tuner.peft_config[adapter_name])


# -- of any model with adapters -------------------------------------------------------------------------------
def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False,
                layer_cls: type[BaseTunerLayer] = BaseTunerLayer) -> None:
    """Make these the active adapters, trainable unless `inference_mode`; all others are frozen. A merged model is
    unmerged first, with a warning. Raises `ValueError` for an unknown name.

    layer_cls: without effect; what is active holds for the whole model here.
    """
    _tuner(model).set_adapter(adapter_name, inference_mode)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str = "",
                   layer_cls: type[BaseTunerLayer] = BaseTunerLayer) -> list[str] | None:
    """Take an adapter off a model, and return those that are active now, or None where no adapter is left.

    prefix, layer_cls: without effect; an adapter is found by its name. Raises `ValueError` for an unknown name and a
    merged model.
    """
    refuse_merged(unwrap(model), "delete_adapter")
    tuner = _tuner(model)
    tuner.delete_adapter(adapter_name)
    return tuner.active_adapters or None


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make these adapters trainable, or freeze them."""
    _tuner(model).set_requires_grad(adapter_names, requires_grad)


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Make fp32 of an adapter's 16-bit parameters, which stay the same objects; nothing where
    `autocast_adapter_dtype` is false."""
    dtypes.cast_adapter_dtype(base_of(unwrap(model)), adapter_name, autocast_adapter_dtype)


def _tuner(model: nn.Module) -> BaseTuner:
    """The model's own tuner, or one that knows of its adapters no more than their names."""
    model = unwrap(model)
    found = tuner_of(model)
    if found is None:
        found = BaseTuner(model, {}, empty=True)
        found.peft_config.update(dict.fromkeys(adapter_names(model), PeftConfig()))
    return found
