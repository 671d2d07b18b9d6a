"""What a model was converted by: the config of each of its adapters."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from veneer.attached import adapter_names
from veneer.modelopt.config import PEFTConfig
from veneer.wrappers import unwrap

_KEY = "veneer_modelopt"


@dataclass
class State:
    """The config of each adapter, in the order in which they came; a plain attribute of the model, so that it travels
    with copies and pickles. bare: names of those whose config means no layer."""

    configs: dict[str, PEFTConfig] = field(default_factory=dict)
    bare: set[str] = field(default_factory=set)


def state_of(model: nn.Module) -> State | None:
    """The state of a converted model, without adapters that have been detached since; None for another model."""
    found = unwrap(model).__dict__.get(_KEY)
    if found is None:
        return None
    present = {*adapter_names(model), *found.bare}
    return State({name: config for name, config in found.configs.items() if name in present}, set(found.bare))


def record(model: nn.Module, config: PEFTConfig) -> None:
    """Remember an adapter's config on the model, once it is there."""
    state, name = state_of(model) or State(), config.adapter_name
    state.configs[name] = config
    if name not in adapter_names(model):
        state.bare.add(name)
    unwrap(model).__dict__[_KEY] = state


def forget(model: nn.Module) -> None:
    """Make it an ordinary model again."""
    unwrap(model).__dict__.pop(_KEY, None)


def is_peft_model(model: nn.Module) -> bool:
    """Whether `update_model` was called on it, or `restore`."""
    return state_of(model) is not None
