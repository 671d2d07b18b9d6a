"""What is attached to a model: hosts, routes, adapters by name, and what stands in the way of a change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import nn

from veneer.hosts import Host
from veneer.method import Adapter, Shared, VeneerError, nearest
from veneer.route import Route
from veneer.weights import Weight, base_modules, scan


def hosts(model: nn.Module) -> Iterator[tuple[str, Host]]:
    """(module name, host) of every adapted module, in the model's order."""
    for name, module in base_modules(model):
        if isinstance(module, Host):
            yield name, module


def routes(model: nn.Module) -> list[Route]:
    """The distinct routes of the model's hosts: one, unless parts were adapted before they were put together."""
    found = {id(host.veneer.route): host.veneer.route for _, host in hosts(model)}
    return list(found.values())


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on the model, in the order of their first host."""
    return list(dict.fromkeys(name for _, host in hosts(model) for name in host.adapters))


class Attached(NamedTuple):
    """One adapter on one weight of a model."""

    weight: Weight
    adapter: Adapter


def attached(model: nn.Module, name: str) -> list[Attached]:
    """The adapters called `name`, one per weight (a tied weight counts once), in the model's order."""
    found = []
    for weight in scan(model):
        for place in weight.places:
            if isinstance(place.module, Host) and name in place.module.adapters:
                slots = place.module.adapters[name]
                if place.param in slots:  # type: ignore[operator]
                    adapter = slots[place.param]  # type: ignore[index]
                    if adapter.pending:  # whoever asks for adapters reads their values
                        place.module.finish(place.param, adapter)
                    found.append(Attached(weight, adapter))
                    break
    return found


def shared_states(model: nn.Module, name: str) -> list[Shared]:
    """What the adapters called `name` share, each state once, in the order of its first weight."""
    states = (adapter.shared_state() for _, adapter in attached(model, name))
    return list({id(state): state for state in states if state is not None}.values())


def known_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names, each once; `VeneerError` for one that no adapter has."""
    present = adapter_names(model)
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in present:
            have = ", ".join(map(repr, present)) or "none"
            hint = nearest(str(name), present) or "."
            raise VeneerError(f"no adapter named {name!r} on this model{hint} It has: {have}")
    return names


def refuse_merged(model: nn.Module, doing: str) -> None:
    """Raise `VeneerError` while something is merged, with the way out of it."""
    found = [host for _, host in hosts(model) if host.veneer.merged]
    if not found:
        return
    names = sorted({name for host in found for name in host.veneer.merged})
    way = "call veneer.unmerge(model) first"
    if not any(host.veneer.kept for host in found):
        way = f"for good (keep=False), so detach(model, {names[0]!r}) takes it off and leaves its weights"
    raise VeneerError(f"{doing}: adapter {', '.join(map(repr, names))} is merged into the base weights; {way}")


def hosts_outside(model: nn.Module) -> list[Host]:
    """Hosts that share a route with those of `model` but are no part of it, when `model` is itself a part."""
    inside = {id(host) for _, host in hosts(model)}
    return [host for each in routes(model) for host in each.hosts
            if isinstance(host, Host) and id(host) not in inside]


def refuse_split_ties(model: nn.Module, doing: str) -> None:
    """Refuse what would change a tied weight in one of its places only."""
    ours = {id(adapter): name for name, host in hosts(model) for adapter in host.adapters.modules()
            if isinstance(adapter, Adapter)}
    for host in hosts_outside(model):
        for adapter in host.adapters.modules():
            if id(adapter) in ours:
                raise VeneerError(f"{doing}: the weight of {ours[id(adapter)] or 'this module'!r} is tied to one "
                                  "outside the part of the model given; call this on the whole model")
