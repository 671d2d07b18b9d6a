"""attach, detach, activate, disabled, route, merge, unmerge: everything that changes a model in place."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from veneer.hosts import AttentionHost, Host, host_of
from veneer.hosts.direct_readers import guard_direct_readers
from veneer.hosts.swap import lay, lift
from veneer.method import Adapter, Method, NewBase, Shared, VeneerError, VeneerWarning, nearest, without_autocast
from veneer.plan import Evidence, Plan, Rules, plan_warning, portioned
from veneer.route import Route, RowNames
from veneer.storage import dense, packed
from veneer.weights import Place, Weight, base_modules, scan


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


def _known(model: nn.Module, names: Iterable[str]) -> list[str]:
    present = adapter_names(model)
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in present:
            have = ", ".join(map(repr, present)) or "none"
            hint = nearest(str(name), present) or "."
            raise VeneerError(f"no adapter named {name!r} on this model{hint} It has: {have}")
    return names


def _no_merge(model: nn.Module, doing: str) -> None:
    found = [host for _, host in hosts(model) if host.veneer.merged]
    if not found:
        return
    names = sorted({name for host in found for name in host.veneer.merged})
    way = "call veneer.unmerge(model) first"
    if not any(host.veneer.kept for host in found):
        way = f"for good (keep=False), so detach(model, {names[0]!r}) takes it off and leaves its weights"
    raise VeneerError(f"{doing}: adapter {', '.join(map(repr, names))} is merged into the base weights; {way}")


def _outside(model: nn.Module) -> list[Host]:
    """Hosts that share a route with those of `model` but are no part of it, when `model` is itself a part."""
    inside = {id(host) for _, host in hosts(model)}
    return [host for each in routes(model) for host in each.hosts
            if isinstance(host, Host) and id(host) not in inside]


def _whole_ties(model: nn.Module, doing: str) -> None:
    """Refuse what would change a tied weight in one of its places only."""
    ours = {id(adapter): name for name, host in hosts(model) for adapter in host.adapters.modules()
            if isinstance(adapter, Adapter)}
    for host in _outside(model):
        for adapter in host.adapters.modules():
            if id(adapter) in ours:
                raise VeneerError(f"{doing}: the weight of {ours[id(adapter)] or 'this module'!r} is tied to one "
                                  "outside the part of the model given; call this on the whole model")


def _whole_shares(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to take off the adapter that owns what adapters outside of this part share with it."""
    def states(host: Host) -> dict[int, str]:
        return {id(a.shared_state()): n for n in names if n in host.adapters
                for a in host.adapters[n].modules() if isinstance(a, Adapter) and a.shared_state() is not None}

    outside = {key for host in _outside(model) for key in states(host)}
    for name, host in hosts(model):
        for key, adapter in states(host).items():
            if key in outside:
                raise VeneerError(f"detach: adapter {adapter!r} of {name or 'this module'!r} shares its state with "
                                  "weights outside the part of the model given; call this on the whole model")


def attach(model: nn.Module, rules: Rules | Plan, name: str = "default", seed: int = 0,
           statistics: Evidence | None = None) -> nn.Module:
    """Lay adapters over the weights that `rules` name, in place, and make them the live ones.

    The base is frozen; other adapters keep their `requires_grad`, but only `name` is live afterwards (see
    `activate`), beside those that are live in other parts when `model` is a part. Adapter parameters are fp32 over
    a 16-bit base and are seeded by (seed, weight name): equal
    on every device, rank and order. On the meta device nothing is computed; `to_empty` fills the adapters.

    statistics: what `veneer.calibrate` found, for methods whose start asks for it (LoRA(init="eva"), say), by weight
    name. Some of them give each weight a rank of its own; a weight that gets none is left alone.

    A start that moves a part of the base weight into the adapter (residual="base", LoftQ) rewrites that weight, and
    detach does not bring it back.

    Returns the same model. Raises `VeneerError` for a bad rule (see `plan`), a name in use, a plan made for
    another model, statistics that are missing or of another model, or a merged model, before anything has been touched.
    """
    _check_name(model, name)
    _no_merge(model, "attach")
    if isinstance(rules, Plan):
        _check_plan(model, rules)
    made = portioned(rules if isinstance(rules, Plan) else plan_warning(model, rules), statistics)
    _no_adapters_on_moved(made)
    adapters = _build(made, seed, statistics or {})
    known = routes(model)
    route = known[0] if known else Route()
    for entry, (adapter, base) in zip(made.entries, adapters, strict=True):
        for place in entry.weight.places:
            kind = place.host if base is None else _rebase(place, base)
            host = lay(place.module, kind, (place.param,), route)
            host.veneer.layouts[place.param] = place.layout
            if base is not None:
                host.veneer.moved[place.param] = str(entry.method)
            if name not in host.adapters:
                host.adapters[name] = nn.ModuleDict()
            host.adapters[name][place.param] = adapter  # type: ignore[operator]
            host.adapters[name].train(host.training)
    guard_direct_readers(module for _, module in base_modules(model))
    freeze_base(model, route)
    outside = {n for host in _outside(model) for n in host.adapters}
    for each in routes(model):
        each.live = (*(n for n in each.live if n in outside), name)
    return model


def _check_plan(model: nn.Module, made: Plan) -> None:
    inside = {id(module) for module in model.modules()}
    for entry in made.entries:
        for place in entry.weight.places:
            here = place.carrier() if id(place.module) in inside else None
            if here is not entry.weight.tensor:
                raise VeneerError(f"attach: this plan was made for another model, or before {entry.name!r} was "
                                  "replaced; make it again with veneer.plan(model, rules)")


def _check_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or name in dir(nn.ModuleDict()):
        raise VeneerError(f"an adapter name must be a non-empty string without dots that is no attribute of "
                          f"nn.ModuleDict, got {name!r}")
    if name in adapter_names(model):
        raise VeneerError(f"this model already has an adapter {name!r}; detach(model, {name!r}) first, or give "
                          "this one another name")


def _no_adapters_on_moved(made: Plan) -> None:
    """A start that rewrites the base would change what other adapters on it add to."""
    for entry in made.entries:
        if entry.method.moves_base and not entry.given:
            for place in entry.weight.places:
                if isinstance(place.module, Host) and place.param in place.module.veneer.layouts:
                    raise VeneerError(f"attach: the start of {entry.method} rewrites the base weight {entry.name!r}, "
                                      "on which another adapter lies already; detach that one first")


def _rebase(place: Place, base: NewBase) -> type[Host]:
    """Write what a start made of the base weight; returns the host for the layer as it is then."""
    module, storage = place.module, place.storage
    if storage is not None:
        storage.swap(module, storage.encode(module, base.matrix) if base.packed is None else base.packed)
        return place.host
    stored = module._parameters[place.param]
    assert stored is not None
    if base.packed is not None and packed.refusal(module) is None:
        return host_of(packed.install(module, base.packed))[0]  # type: ignore[arg-type]
    dense.swap(stored, place.layout.stored(base.matrix).to(stored.device, stored.dtype))
    return place.host


def _build(made: Plan, seed: int, statistics: Evidence) -> list[tuple[Adapter, NewBase | None]]:
    """The adapters of a plan, filled, not yet attached, and what each makes of its base weight."""
    states: dict[Method, Shared | None] = {}
    adapters = []
    for entry in made.entries:
        weight, layout, method = entry.weight, entry.weight.layout, entry.method
        with torch.device(weight.tensor.device):
            first = method not in states
            if first:
                states[method] = _shared(method, weight.dtype, f"{seed}/shared/{method}")
            adapter = method.build(layout.shape, torch.promote_types(weight.dtype, torch.float32), states[method])
        if first and states[method] is not None:
            adapter.own_shared()
        adapter.seed_key = f"{seed}/{entry.name}"
        adapter.method = method
        adapter.evidence = statistics.get(entry.name)
        with torch.no_grad():
            started = adapter.needs_weight and not entry.given
            base = adapter.initialise(layout.matrix(weight.read()) if started else None)
            adapter.pending &= not entry.given
        adapter.evidence = None
        adapters.append((adapter, base))
    return adapters


def _shared(method: Method, dtype: torch.dtype, seed_key: str) -> Shared | None:
    state = method.shared(dtype)
    if state is not None:
        state.seed_key = seed_key
        state.initialise()
    return state


def freeze_base(model: nn.Module, route: Route) -> None:
    """Freeze everything but adapters; what was trainable is remembered for the last detach."""
    for path, module in base_modules(model):
        for name, param in module._parameters.items():
            if param is not None and param.requires_grad:
                param.requires_grad = False  # not requires_grad_: a lazy parameter has no methods yet
                route.thawed[f"{path}.{name}" if path else name] = weakref.ref(module)


def detach(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take the adapter `name`, or all of them, off the model.

    With the last one gone the model is the object it was: classes, state-dict keys, bits, `requires_grad`.
    What was merged with its originals kept is unmerged; after `merge(model, keep=False)` the merged weights
    stay. Base weights that a start rewrote (see `attach`) stay as it left them, with a warning. Raises `VeneerError`
    for an unknown name.
    """
    names = adapter_names(model) if name is None else _known(model, [name])
    _whole_ties(model, "detach")
    _whole_shares(model, names)
    merged = {n for _, host in hosts(model) for n in host.veneer.merged}
    if merged and name is not None and name not in merged:
        _no_merge(model, f"detach {name!r}")
    if merged & set(names) and any(host.veneer.kept for _, host in hosts(model)):
        unmerge(model)
    known = routes(model)
    found = [host for _, host in hosts(model)]
    for host in found:
        host.veneer.merged = tuple(n for n in host.veneer.merged if n not in names)
        for each in names:
            if each in host.adapters:
                del host.adapters[each]
    for route in known:
        left = {n for host in route.hosts if isinstance(host, Host) for n in host.adapters}
        route.live = tuple(n for n in route.live if n not in names or n in left)
    needed = _still_needed(found)
    moved = {why for host in found if not needed[id(host)] for why in host.veneer.moved.values()}
    for host in found:
        if not needed[id(host)]:
            lift(host)
    if moved:
        warnings.warn(f"detach: the start of {' and '.join(sorted(moved))} rewrote the base weights it lay on, and "
                      "they stay as it left them", VeneerWarning, stacklevel=2)
    for route in known:
        if not route.hosts:
            route.thaw(model)
    return model


def _still_needed(found: Sequence[Host]) -> dict[int, bool]:
    """A host stays for adapters of its own, or (attention) for those of the `out_proj` it reads."""
    needed = {id(host): len(host.adapters) > 0 for host in found}
    for host in found:
        if isinstance(host, AttentionHost):
            needed[id(host)] |= any(needed.get(id(child), False) for child in host.shown_hosts())
    return needed


def activate(model: nn.Module, names: str | Iterable[str]) -> nn.Module:
    """Make exactly these adapters live (several add up; an empty list is the bare base).

    What is live holds for the whole model, also when `model` is a part of it. Never changes `requires_grad`.
    Raises `VeneerError` for an unknown name or a merged model.
    """
    wanted = tuple(_known(model, [names] if isinstance(names, str) else names))
    _no_merge(model, "activate")
    for route in routes(model):
        route.live = wanted
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the context the model computes what the bare base computes, in every thread that runs it."""
    _no_merge(model, "disabled")
    known = routes(model)
    for route in known:
        route.disabled += 1
    try:
        yield model
    finally:
        for route in known:
            route.disabled -= 1


@contextlib.contextmanager
def route(model: nn.Module, row_names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Inside the context each row of the batch goes through its own adapter; None is the bare base.

    row_names: one entry per row of the batch (dimension 0 of what the model is given). A batch expanded n-fold
    inside the model (beams, flattened tokens) must keep the copies of a row together. It holds for every thread
    that runs the model. Dimension 0 of an adapted layer's input is taken for the batch: leave out layers where it is
    something else (a position table looked up by arange(T), T5's relative attention bias).
    Raises `VeneerError` for an unknown name, a merged model, or, in the forward, a batch that does not fit.
    """
    if isinstance(row_names, str) or not len(row_names):
        raise VeneerError(f"route needs one adapter name or None per row of the batch, got {row_names!r}")
    _known(model, [name for name in row_names if name is not None])
    _no_merge(model, "route")
    known = routes(model)
    before = [each.rows for each in known]
    rows = RowNames(row_names)
    for each in known:
        each.rows = rows
    try:
        yield model
    finally:
        for each, old in zip(known, before, strict=True):
            each.rows = old


def merge(model: nn.Module, names: str | Iterable[str] | None = None, keep: bool = True) -> nn.Module:
    """Write the adapted weights over the base weights; `names` defaults to the live adapters.

    Computed in fp32 or wider and rounded once. With `keep` the base's own values are kept (costing their
    memory) so that `unmerge` gives their bits back; without, the merge is final.
    Raises `VeneerError`, with nothing changed, when a merged weight would not be finite, when something is
    merged already, or when a live adapter that is left out would start from the merged weights and change.
    """
    _no_merge(model, "merge")
    _whole_ties(model, "merge")
    if names is None:
        names = [n for each in routes(model) for n in each.live]
    wanted = _known(model, [names] if isinstance(names, str) else names)
    if not wanted:
        raise VeneerError("merge: no adapter is live; name the ones to merge")
    _no_dependents(model, wanted)
    done: dict[int, Any] = {}
    todo = [(host, _merged_values(module, host, wanted, done)) for module, host in hosts(model)]
    for host, values in todo:
        for param, value in values.items():
            host.write(param, value, keep)
        host.veneer.merged = tuple(n for n in wanted if n in host.adapters)
    return model


def _no_dependents(model: nn.Module, wanted: Sequence[str]) -> None:
    for name, host in hosts(model):
        for param in host.veneer.layouts:
            left = [n for n in host.veneer.route.live if n not in wanted]
            for other, adapter in ((n, a) for n in left for a in host.live(param, [n])):
                if host.live(param, wanted) and adapter.method is not None and not adapter.method.additive:
                    raise VeneerError(f"merge: {other!r} is live on {name}.{param} too, and its {adapter.method} "
                                      "starts from the base weight, so merging only the others would change it; "
                                      "merge all of them, or activate only what is to be merged")


@torch.no_grad()
def _merged_values(name: str, host: Host, wanted: Sequence[str], done: dict[int, Any]) -> dict[str, torch.Tensor]:
    """New values by parameter name; a tied tensor is merged once, in its first place."""
    values: dict[str, torch.Tensor] = {}
    for param in host.veneer.layouts:
        stored = host.carrier(param)
        adapters = host.live(param, wanted)
        if not adapters or stored is None or id(stored) in done:
            continue
        done[id(stored)] = True
        with without_autocast(stored):
            values[param] = host.adapted_weight(param, adapters, wide=True).to(host.weight_dtype(param))
    added = [a.bias_delta() for a in host.live("weight", wanted)] if "weight" in host.veneer.layouts else []
    extra = [d for d in added if d is not None]
    if extra:
        bias = values.get("bias", host._parameters.get("bias"))
        total = torch.stack([d.to(torch.promote_types(d.dtype, torch.float32)) for d in extra]).sum(0)
        values["bias"] = (total if bias is None else bias + total).to(host.weight_dtype("weight"))
    for param, value in values.items():
        if not torch.isfinite(value).all():
            raise VeneerError(f"merge: {name}.{param} would hold NaN or infinite values; nothing was merged")
    return values


def unmerge(model: nn.Module) -> nn.Module:
    """Give the base weights their own bits back, after any number of cycles.

    Raises `VeneerError` when nothing is merged, or when the originals were not kept.
    """
    merged = [host for _, host in hosts(model) if host.veneer.merged]
    if not merged:
        raise VeneerError("unmerge: nothing is merged")
    _whole_ties(model, "unmerge")
    if not any(host.veneer.kept for host in merged):
        raise VeneerError("unmerge: the merge was made with keep=False, so the base's own values are gone")
    for host in merged:
        for param in list(host.veneer.kept):
            host.restore(param)
        host.veneer.merged = ()
    return model
