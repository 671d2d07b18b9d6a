"""update_model: an adapter laid over a model as a PEFTConfig says."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from veneer.attach import activate, attach
from veneer.attached import routes
from veneer.method import VeneerError, VeneerWarning
from veneer.modelopt.config import PEFTConfig
from veneer.modelopt.layers import rules_for, written_out
from veneer.modelopt.state import record, state_of
from veneer.modelopt.switch import matching, train
from veneer.plan import resolve
from veneer.weights import scan
from veneer.wrappers import unwrap


def update_model(model: nn.Module, config: PEFTConfig | Mapping[str, Any], *, seed: int | None = None) -> nn.Module:
    """Add the adapter that `config` describes, in place, beside those that are there; all that are on are summed.

    seed: of random starts, together with each weight's name; None = `torch.initial_seed()`, what `torch.manual_seed`
    was given. Returns the model. Patterns that match no layer are a `VeneerWarning`, and so is a config that gives no
    layer an adapter. Raises pydantic's ValidationError for a bad config, and `VeneerError` for a name that is taken or
    a layer that cannot be adapted, with the model as it was.
    """
    given = config if isinstance(config, PEFTConfig) else PEFTConfig.model_validate(dict(config))
    refuse_taken(model, given.adapter_name)
    inner = unwrap(model)
    weights = scan(inner)
    rules = rules_for(given, weights)
    if any(method is not None for method in rules.values()):
        before = Before(inner)
        attach(inner, resolve(inner, weights, rules), given.adapter_name,
               torch.initial_seed() if seed is None else seed)
        before.restore(given)
        if given.freeze_lora_weights:
            for match in matching(inner, "update_model", None, given.adapter_name):
                train(match, False)
    else:
        warnings.warn(f"update_model: adapter {given.adapter_name!r} lies on no layer: adapter_cfg enables none",
                      VeneerWarning, stacklevel=2)
    record(model, written_out(given, weights))
    return model


def refuse_taken(model: nn.Module, name: str) -> None:
    """Raise `VeneerError` for an adapter's name that the model has already."""
    state = state_of(model)
    if state is not None and name in state.configs:
        raise VeneerError(f"Adapter {name!r} already exists; this model has {', '.join(map(repr, state.configs))}")


class Before:
    """What an attach changes and ModelOpt does not: which adapters are live, and what of the base is trained."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.live = list(dict.fromkeys(name for route in routes(model) for name in route.live))
        self.trained = [param for param in model.parameters() if param.requires_grad]

    def restore(self, config: PEFTConfig) -> None:
        """Make the adapters that were live so again beside the new one, and the base as trainable as it was unless it
        is to be frozen."""
        activate(self.model, [*self.live, config.adapter_name])
        if not config.freeze_base_model:
            for param in self.trained:
                param.requires_grad_(True)
