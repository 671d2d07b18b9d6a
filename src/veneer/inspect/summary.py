"""What is on a model: its adapters, what is trainable, how far each weight has moved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.attached import adapter_names, attached, hosts, routes
from veneer.method import Adapter, VeneerError
from veneer.weights import original


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter by name: is it live, merged; how many of its parameters train; its weights by name."""

    name: str
    live: bool
    merged: bool
    parameters: int
    trainable: int
    weights: dict[str, Adapter]

    def __str__(self) -> str:
        state = "merged" if self.merged else "live" if self.live else "not live"
        return (f"{self.name}: {state}, {len(self.weights)} weights, {self.parameters:,} parameters, "
                f"{self.trainable:,} trainable")


def adapters(model: nn.Module) -> dict[str, AdapterSummary]:
    """Every adapter on the model by name; an empty dict for a bare model."""
    live = {name for route in routes(model) for name in route.live}
    merged = {name for _, host in hosts(model) for name in host.veneer.merged}
    found = {}
    for name in adapter_names(model):
        weights = {item.weight.name: item.adapter for item in attached(model, name)}
        params = _distinct(weights.values())
        found[name] = AdapterSummary(name, name in live, name in merged, sum(p.numel() for p in params),
                                     sum(p.numel() for p in params if p.requires_grad), weights)
    return found


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer should be given: those that require a gradient, each once.

    Of all adapters, live or not: an adapter that is not live gets no gradient and is not changed.
    Raises `VeneerError` on a model without an adapter (its whole base would be trained), and where all adapters
    are merged (nothing would).
    """
    found = adapters(model)
    merged = [name for name, summary in found.items() if summary.merged]
    if merged and len(merged) == len(found):
        raise VeneerError(f"trainable: adapter {', '.join(map(repr, merged))} is merged into the base weights and "
                          "cannot be trained; call veneer.unmerge(model) first")
    if not found:
        raise VeneerError("trainable: this model has no adapter, so that its whole base would be trained; call "
                          "veneer.attach(model, …) first, or use model.parameters()")
    states = (state for summary in found.values() for a in summary.weights.values() if (state := a.shared_state()))
    every = {id(p): p for p in model.parameters()} | {id(p): p for state in states for p in state.parameters()}
    return [param for param in every.values() if param.requires_grad]


@torch.no_grad()
def update_norms(model: nn.Module, name: str = "default") -> dict[str, float]:
    """‖new_weight(W) − W‖ / ‖W‖ (Frobenius) for every weight of an adapter, by weight name.

    W is the base's own weight, also while something is merged into it; NaN where W is zero or was not kept.
    From ΔW's form where it has one and there is no gain, else from the dense difference of one weight at a time.
    """
    out = {}
    for weight, adapter in attached(model, name):
        own = original(weight)
        if own is None:
            out[weight.name] = float("nan")
            continue
        matrix = weight.layout.matrix(own.detach()).to(weight.tensor.device).float()
        norm = float(torch.linalg.vector_norm(matrix))
        out[weight.name] = float(_change(adapter, matrix)) / norm if norm else float("nan")
    return out


def _change(adapter: Adapter, matrix: Tensor) -> Tensor:
    form = adapter.form()
    if form is None or adapter.gain(matrix) is not None:
        return torch.linalg.vector_norm(adapter.new_weight(matrix) - matrix)
    # What ΔW adds to rows of zeros is its own square.
    return form.added_square(torch.zeros_like(matrix), torch.float32).sum().clamp_min(0).sqrt()


def _distinct(items) -> list[nn.Parameter]:
    seen = {id(p): p for adapter in items for p in adapter.parameters()}
    return list(seen.values())
