"""State dicts of adapters and of the base below them, at PEFT's place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from veneer.attached import hosts
from veneer.peft.layers.base import BaseTunerLayer
from veneer.peft.saving import (
    LoadResult,
    base_of,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from veneer.peft.shown import parts
from veneer.wrappers import unwrap

__all__ = ["get_base_model_state_dict", "get_peft_model_state_dict", "load_peft_weights", "set_base_model_state_dict",
           "set_peft_model_state_dict"]


def get_base_model_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the base model alone, by its own keys; merged weights as they are now."""
    base = base_of(unwrap(model))
    state = base.state_dict()
    for path, host in hosts(base):
        prefix = f"{path}." if path else ""
        shown = {prefix + part.shown for part in parts(host)} if isinstance(host, BaseTunerLayer) else set()
        for key in [key for key in state if key in shown or key.startswith(f"{prefix}adapters.")]:
            del state[key]
    return dict(state)


def set_base_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True) -> LoadResult:
    """Give the base model the values of a state dict by its own keys; adapters stay as they are.

    Returns the keys that were missing and those that nothing wanted; raises `RuntimeError` with them where `strict`,
    before anything is changed.
    """
    base = base_of(unwrap(model))
    own = get_base_model_state_dict(model)
    found = LoadResult([key for key in own if key not in state_dict], [key for key in state_dict if key not in own])
    if strict and any(found):
        raise RuntimeError("Error(s) in loading state_dict: "
                           + "; ".join(f"{kind} {keys}" for kind, keys in zip(("missing", "unexpected"), found,
                                                                              strict=True) if keys))
    base.load_state_dict({key: tensor for key, tensor in state_dict.items() if key in own}, strict=False)
    return found
