"""Fused experts under NeMo's settings: which parameters they are, and the rank that moe_rank_scaling gives them."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from veneer.method import VeneerError, VeneerWarning
from veneer.nemo.config import PeftConfig

#: how configs call the number of experts a token goes through: NeMo's name, then transformers'
_ACTIVE = ("n_activated_experts", "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")


def expert_parameters(module: nn.Module) -> list[str]:
    """Names of the stacked matrices (experts, …, …) that a module itself holds."""
    return [name for name, param in module._parameters.items()
            if param is not None and param.dim() == 3 and param.is_floating_point()]


def expert_dim(config: PeftConfig, model: Any) -> int:
    """The rank of experts. Raises `VeneerError` where it would be 0, or nothing says how many experts are active."""
    if not config.moe_rank_scaling:
        return config.dim
    said = getattr(model, "config", None)
    found = [(name, getattr(said, name)) for name in _ACTIVE if isinstance(getattr(said, name, None), int)]
    if not found:
        raise VeneerError("moe_rank_scaling=True divides dim by the experts that a token goes through, and this "
                          f"model's config does not say how many: none of {', '.join(_ACTIVE)}")
    name, active = found[0]
    if config.dim < active:
        raise VeneerError(f"moe_rank_scaling=True: dim={config.dim} is less than {name}={active}, so that experts "
                          f"would have a rank of 0; give a dim of at least {active}")
    if config.dim % active:
        warnings.warn(f"moe_rank_scaling=True: dim={config.dim} is no multiple of {name}={active}; experts get a rank "
                      f"of {config.dim // active}", VeneerWarning, stacklevel=3)
    return config.dim // active


def check_experts(config: PeftConfig, names: list[str]) -> None:
    """Say what of the settings experts cannot have."""
    if config.use_dora:
        raise VeneerError(f"use_dora=True is for linear layers only, as in NeMo, and {names[0]!r} holds stacked "
                          "experts; leave it out of target_modules")
    if config.dropout:
        warnings.warn(f"dropout={config.dropout} is not applied to experts, as in NeMo ({names[0]!r})", VeneerWarning,
                      stacklevel=3)
