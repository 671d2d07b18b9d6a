"""attach, detach, activate, disabled, route: what lays adapters over a model in place, and which of them are live."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from veneer.attached import (
    Attached,
    adapter_names,
    attached,
    hosts,
    hosts_outside,
    known_names,
    refuse_merged,
    refuse_split_ties,
    routes,
    shared_states,
)
from veneer.hosts import AttentionHost, Host, host_of
from veneer.hosts.base import Moved
from veneer.hosts.direct_readers import guard_direct_readers
from veneer.hosts.swap import lay, lift
from veneer.io.fingerprint import Sample, sample
from veneer.merge import unmerge
from veneer.method import Adapter, Method, Shared, VeneerError, VeneerWarning, without_autocast
from veneer.notices import tell
from veneer.plan import Evidence, Plan, PlanEntry, Rules, plan_warning, portioned
from veneer.rebase import Rewrite, prepare, write
from veneer.route import Route, RowNames
from veneer.statistics import Statistics
from veneer.weights import base_modules

__all__ = ["Attached", "activate", "adapter_names", "attach", "attached", "detach", "disabled", "hosts", "route",
           "routes", "shared_states"]


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
    detach does not bring it back. Either all such weights are rewritten or none.

    Returns the same model. Raises `VeneerError` for a bad rule (see `plan`), a name in use, a plan made for
    another model, statistics that are missing or of another model, a merged model, or such a start on a weight that is
    on the meta device, before anything has been touched.
    """
    _check_name(model, name)
    refuse_merged(model, "attach")
    if isinstance(rules, Plan):
        _check_plan(model, rules)
    if isinstance(statistics, Statistics):
        statistics.check(model)
    made = portioned(rules if isinstance(rules, Plan) else plan_warning(model, rules), statistics)
    _no_adapters_on_moved(made)
    _no_moved_on_meta(made)
    adapters = _build(made, seed, statistics or {})
    _tell(made, adapters)  # before anything is touched: a filter may turn a warning into an error
    kept = _samples([rewrite for _, rewrite in adapters if rewrite is not None])
    write([rewrite for _, rewrite in adapters if rewrite is not None])
    known = routes(model)
    route = known[0] if known else Route()
    for entry, (adapter, rewrite) in zip(made.entries, adapters, strict=True):
        for place in entry.weight.places:
            packed = rewrite is not None and rewrite.held is not None
            host = lay(place.module, host_of(place.module)[0] if packed else place.host, (place.param,), route)
            host.veneer.layouts[place.param] = place.layout
            if rewrite is not None:
                host.veneer.moved[place.param] = Moved(str(entry.method), kept[entry.name])
            if name not in host.adapters:
                host.adapters[name] = nn.ModuleDict()
            host.adapters[name][place.param] = adapter  # type: ignore[operator]
            host.adapters[name].train(host.training)
    guard_direct_readers(module for _, module in base_modules(model))
    freeze_base(model, route)
    outside = {n for host in hosts_outside(model) for n in host.adapters}
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


def _no_moved_on_meta(made: Plan) -> None:
    for entry in made.entries:
        if entry.method.moves_base and not entry.given and entry.weight.tensor.is_meta:
            raise VeneerError(f"attach: the start of {entry.method} rewrites the base weight {entry.name!r}, which is "
                              "on the meta device and has no values yet: load the base weights first, then attach")


def _samples(rewrites: Sequence[Rewrite]) -> dict[str, Sample]:
    """Of the base weights that are about to be rewritten: by these a file knows the base again."""
    return {rewrite.weight.name: sample(rewrite.weight) for rewrite in rewrites}


def _build(made: Plan, seed: int, statistics: Evidence) -> list[tuple[Adapter, Rewrite | None]]:
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
        adapters.append((adapter, _start(entry, adapter)))
    return adapters


@torch.no_grad()
def _start(entry: PlanEntry, adapter: Adapter) -> Rewrite | None:
    """Give an adapter its first values; what becomes of the base weight, without anything of fp32 that is not kept."""
    weight, started = entry.weight, adapter.needs_weight and not entry.given
    with without_autocast(weight.tensor):
        base = adapter.initialise(weight.layout.matrix(weight.read()) if started else None)
    adapter.pending &= not entry.given
    if not adapter.pending:
        adapter.evidence = None
    return None if base is None else prepare(entry, base)


def _tell(made: Plan, adapters: Sequence[tuple[Adapter, Rewrite | None]]) -> None:
    texts: dict[str, list[str]] = {}
    for entry, (adapter, rewrite) in zip(made.entries, adapters, strict=True):
        found = [part.remark for part in adapter.modules() if isinstance(part, Adapter) and part.remark]
        if rewrite is not None and rewrite.loose is not None:
            found.append(f"{entry.method} makes a packed weight, which is held as ordinary numbers: {rewrite.loose}")
        for text in found:
            texts.setdefault(text, []).append(entry.name)
    tell(texts)


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
    names = adapter_names(model) if name is None else known_names(model, [name])
    refuse_split_ties(model, "detach")
    _refuse_split_shares(model, names)
    merged = {n for _, host in hosts(model) for n in host.veneer.merged}
    final = {id(host) for _, host in hosts(model) if host.veneer.merged and not host.veneer.kept}
    if merged and name is not None and name not in merged:
        refuse_merged(model, f"detach {name!r}")
    if merged & set(names) and any(host.veneer.kept for _, host in hosts(model)):
        unmerge(model)
    known = routes(model)
    found = [host for _, host in hosts(model)]
    for host in found:
        host.veneer.merged = tuple(n for n in host.veneer.merged if n not in names)
        for each in names:
            host.veneer.off.discard(each)
            if each in host.adapters:
                del host.adapters[each]
    for route in known:
        left = {n for host in route.hosts if isinstance(host, Host) for n in host.adapters}
        route.live = tuple(n for n in route.live if n not in names or n in left)
    needed = _still_needed(found)
    moved = {why for host in found if not needed[id(host)] and id(host) not in final  # what is merged is whole again
             for why in (each.start for each in host.veneer.moved.values())}
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


def _refuse_split_shares(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to take off the adapter that owns what adapters outside of this part share with it."""
    def states(host: Host) -> dict[int, str]:
        return {id(a.shared_state()): n for n in names if n in host.adapters
                for a in host.adapters[n].modules() if isinstance(a, Adapter) and a.shared_state() is not None}

    outside = {key for host in hosts_outside(model) for key in states(host)}
    for name, host in hosts(model):
        for key, adapter in states(host).items():
            if key in outside:
                raise VeneerError(f"detach: adapter {adapter!r} of {name or 'this module'!r} shares its state with "
                                  "weights outside the part of the model given; call this on the whole model")


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
    wanted = tuple(known_names(model, [names] if isinstance(names, str) else names))
    refuse_merged(model, "activate")
    for route in routes(model):
        route.live = wanted
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the context the model computes what the bare base computes, in every thread that runs it."""
    refuse_merged(model, "disabled")
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
    known_names(model, [name for name in row_names if name is not None])
    refuse_merged(model, "route")
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
