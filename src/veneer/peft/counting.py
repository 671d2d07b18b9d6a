"""How many parameters a model with adapters has, and how many of them are trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from veneer.attached import attached, shared_states
from veneer.weights import scan


def count_parameters(base: nn.Module, names: Any) -> tuple[int, int]:
    """Trainable parameters, and all of the base and of the adapters called `names`; what is shared counts once."""
    adapters: dict[int, nn.Parameter] = {}
    for name in names:
        for holder in (*(adapter for _, adapter in attached(base, name)), *shared_states(base, name)):
            adapters |= {id(param): param for param in holder.parameters()}
    weights = scan(base)
    trained = [w.numel() for w in weights if isinstance(w.tensor, Tensor) and w.tensor.requires_grad]
    trainable = sum(p.numel() for p in adapters.values() if p.requires_grad) + sum(trained)
    return trainable, sum(w.numel() for w in weights) + sum(p.numel() for p in adapters.values())
