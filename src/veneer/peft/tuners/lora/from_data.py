"""What the starts from data share: which weights of a model a config starts so, as rules for `veneer.calibrate`."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from veneer.inits import Init
from veneer.method import Method, VeneerError
from veneer.methods import DoRA, LoRA
from veneer.peft.errors import NotInVeneerError
from veneer.peft.translate import translate
from veneer.weights import Weight, scan


def rules_from_config(model: nn.Module, config: Any, start: Init) -> dict[str, Method]:
    """Full name → LoRA that begins by `start`, for what the config adapts of a bare model and whose inputs are seen.

    Raises `ValueError` where that is nothing, and what `translate` raises.
    """
    if getattr(config, "layer_replication", None):
        raise NotInVeneerError("layer_replication changes the model as its adapter is made, so that nothing can be "
                               f"collected for init={start.key!r} before; build the deeper model first")
    chosen = {name: method for name, method in translate(model, config, given=True).rules.items() if method is not None}
    found = rules_with(model, chosen, start)
    if not found:
        raise VeneerError("No supported layers found: the config adapts no layer whose inputs can be seen, which init="
                          f"{start.key!r} starts from")
    return found


def rules_with(model: nn.Module, methods: dict[str, Method], start: Init) -> dict[str, Method]:
    """Those of the methods (by full name) that are LoRA on a layer with inputs, beginning by `start`."""
    weights = {weight.places[0].names[-1]: weight for weight in scan(model)}
    return {name: started for name, method in methods.items()
            if (started := _started(weights[name], method, start)) is not None}


def _started(weight: Weight, method: Method, start: Init) -> Method | None:
    if isinstance(method, DoRA):
        inner = _started(weight, method.inner, start)
        return None if inner is None else DoRA(inner)
    shape = weight.layout.shape
    seen = all(place.host.has_input for place in weight.places) and not (shape.lookup or shape.batch)
    return dataclasses.replace(method, init=start) if isinstance(method, LoRA) and seen else None
