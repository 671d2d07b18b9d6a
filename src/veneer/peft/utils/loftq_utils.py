"""LoftQ's start over a base that is quantised already, under PEFT's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from veneer.method import VeneerError
from veneer.peft import hub
from veneer.peft.saving import base_of
from veneer.refit import RefitReport
from veneer.refit import replace_lora_weights_loftq as refit
from veneer.wrappers import unwrap

__all__ = ["replace_lora_weights_loftq"]


def replace_lora_weights_loftq(peft_model: nn.Module, model_path: str | Path | None = None,
                               adapter_name: str = "default",
                               callback: Callable[[nn.Module, str], bool] | None = None) -> RefitReport:
    """Set each LoRA so that it makes up for what quantising the base lost; see `veneer.replace_lora_weights_loftq`.

    The base may be held in any form that Veneer reads, where PEFT has bitsandbytes' 4 bits alone. model_path: a folder
    or a .safetensors file with the weights before; None = where the base model was loaded from, if that is on this
    machine. callback: called as callback(peft_model, module name) after each; unless it returns True the old pair is
    put back.

    Raises `ValueError` where there are no such weights, none fits, or nothing is quantised.
    """
    base = base_of(unwrap(peft_model))
    if model_path is None:
        name = getattr(getattr(base, "config", None), "_name_or_path", None)
        if not name:
            raise VeneerError("replace_lora_weights_loftq: the model does not say where it was loaded from; give "
                              "model_path, the folder or .safetensors file with its weights before quantising")
        model_path = hub.cached_model(name)
    accept = None if callback is None else lambda _, weight: callback(peft_model, weight)
    return refit(base, model_path, adapter_name, accept)
