"""EVA (Paischer et al. 2024, arXiv:2410.07170) in one call, under the names its users know."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from veneer.attach import attach, detach
from veneer.attached import adapter_names, attached, hosts, known_names, routes
from veneer.calibrate import calibrate
from veneer.inits import EVA, Init, make_init
from veneer.method import Method, VeneerError, seeded_generator
from veneer.methods import DoRA, LoRA
from veneer.plan import Plan, Rules, plan_warning, portioned, resolve
from veneer.statistics import Statistics
from veneer.weights import scan


def get_eva_state_dict(model: nn.Module, batches: Iterable[Any], rules: Rules, **options: Any) -> dict[str, Tensor]:
    """The A (r, in) that EVA gives each weight, by weight name; r differs between weights, and one that gets none is
    not there. Nothing is attached.

    rules: those of `attach`, with methods that start by EVA, LoRA(init="eva") say. options: those of `calibrate`.
    Raises what `calibrate` raises, and `VeneerError` when a method starts in another way.
    """
    made = plan_warning(model, rules)
    for entry in made.entries:
        if entry.method.needs != EVA.needs:
            raise VeneerError(f"get_eva_state_dict: {entry.method} for {entry.name!r} does not start by EVA; give it "
                              "init=\"eva\"")
    return first_factors(made, calibrate(model, batches, made, **options))


def first_factors(made: Plan, statistics: Statistics) -> dict[str, Tensor]:
    """The A (r, in) of every weight of a plan whose methods start by EVA, by weight name; those without a rank are not
    there."""
    return {entry.name: _first_factor(entry.method, statistics[entry.name])
            for entry in portioned(made, statistics).entries}


def initialize_lora_eva_weights(model: nn.Module, batches: Iterable[Any] | None = None, name: str = "default", *,
                                statistics: Statistics | None = None, init: str | Mapping[str, Any] | Init = "eva",
                                seed: int = 0, **options: Any) -> nn.Module:
    """Start the attached adapter `name` anew by EVA: the ranks are dealt out among its weights, and one that gets none
    loses its adapter. Its parameters are new ones, so call this before the optimizer is made.

    batches: data to look at, or give statistics that `calibrate` collected. init: "eva", or the same with options.
    seed: as for `attach`. options: those of `calibrate`. Which adapters are live stays as it is. Returns the model.

    Raises `VeneerError` for an unknown adapter, one with methods other than LoRA and DoRA over LoRA, neither batches
    nor statistics, and what `calibrate` and `attach` raise; the adapter is then what it was.
    """
    known_names(model, [name])
    start = make_init(init, "initialize_lora_eva_weights")
    if start.needs != EVA.needs:
        raise VeneerError(f"initialize_lora_eva_weights: init must be 'eva', or EVA with options, got {init!r}")
    rules: dict[Any, Method | None] = {weight.name: _restarted(adapter.method, start, weight.name)
                                       for weight, adapter in attached(model, name)}
    if statistics is None and batches is None:
        raise VeneerError("initialize_lora_eva_weights needs batches, or statistics that veneer.calibrate found")
    made = resolve(model, scan(model), rules)
    if statistics is None:
        statistics = calibrate(model, batches or (), made, **options)
    return replaced(model, made, name, seed, statistics)


def replaced(model: nn.Module, made: Plan, name: str, seed: int, statistics: Statistics | None) -> nn.Module:
    """With the adapter that `made` says instead of `name`, which stays until the new one is there, whole."""
    live = [(route, route.live) for route in routes(model)]
    new = f"{name}_anew"
    while new in adapter_names(model):
        new += "_"
    try:
        attach(model, made, new, seed, statistics)
        detach(model, name)
    except BaseException:  # KeyboardInterrupt too: what was trained is worth more
        if new in adapter_names(model):
            detach(model, new)
        raise
    finally:
        for route, names in live:
            route.live = names
    for _, host in hosts(model):
        if new in host.adapters:
            host.adapters[name] = host.adapters.pop(new)
    return model


def _restarted(method: Method | None, start: Init, weight: str) -> Method:
    if isinstance(method, LoRA):
        return dataclasses.replace(method, init=start)
    if isinstance(method, DoRA):
        return DoRA(_restarted(method.inner, start, weight))
    raise VeneerError(f"initialize_lora_eva_weights: {weight!r} has {method}, and only LoRA and DoRA(LoRA(…)) start by "
                      "EVA")


def _first_factor(method: Method, evidence: Mapping[str, Tensor]) -> Tensor:
    """A (r, in) of a method with its own share of the ranks."""
    while isinstance(method, DoRA):
        method = method.inner
    assert isinstance(method, LoRA)
    shape = (1, evidence["components"].shape[1])
    return method.start_rule.factors(None, shape, method.rank, method.scale, seeded_generator("eva"), evidence).A
