"""Laying a host over a module in place: the module stays the same object, its class becomes a subclass."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from veneer.hosts.base import Host, HostState
from veneer.hosts.parameter import ParameterHost, shown_property
from veneer.route import Route

#: the module's own class, its host, the parameters that a `ParameterHost` shows, and the faces over it
_Key = tuple[type, type[Host], tuple[str, ...], tuple[type[Host], ...]]
_CLASSES: dict[_Key, type] = {}


def adapted_class(base: type, host: type[Host], params: tuple[str, ...], faces: tuple[type[Host], ...] = ()) -> type:
    """The cached subclass `Adapted<Base>`; `params` are those a `ParameterHost` shows; `faces`: see `show`."""
    key = (base, host, params, faces)
    if key not in _CLASSES:
        body: dict[str, Any] = {p: shown_property(p) for p in params}
        body.update(__module__=base.__module__, __doc__=base.__doc__, __reduce_ex__=_reduce, veneer_base=base,
                    veneer_key=key, become=_become)
        _CLASSES[key] = type(f"Adapted{base.__name__}", (*faces, host, base), body)
    return _CLASSES[key]


def show(module: Host, faces: tuple[type[Host], ...]) -> None:
    """Lay these faces over a host, instead of those it has: classes of a front door that show its adapters under
    the names of another library (attributes, names of parameters). A face changes nothing that the host computes."""
    base, host, params, _ = type(module).veneer_key  # type: ignore[attr-defined]
    module.__class__ = adapted_class(base, host, params, faces)
    _rebind(module)


def _reduce(self: Any, protocol: Any) -> tuple:
    """Pickle and deepcopy by what made the class: it has no name that could be imported."""
    kind = type(self)
    _, args, *rest = super(kind, self).__reduce_ex__(max(2, int(protocol)))
    return (_rebuild, (kind.veneer_key, *args[1:]), *rest)


def _rebuild(key: _Key, *args: Any) -> Any:
    kind = adapted_class(*key)
    return kind.__new__(kind, *args)


def _become(self: Any, base: type, host: type[Host]) -> None:
    self.__class__ = adapted_class(base, host, (), type(self).veneer_key[3])
    _rebind(self)


def lay(module: nn.Module, host: type[Host], params: tuple[str, ...], route: Route) -> Host:
    """Make `module` a host for `params` (in addition to those it already hosts)."""
    if not isinstance(module, Host):
        base = type(module)
        shown = tuple(sorted(params)) if issubclass(host, ParameterHost) else ()
        module.__class__ = adapted_class(base, host, shown)
        module.adapters = nn.ModuleDict()
        module.veneer = HostState(route)  # type: ignore[assignment]
        route.hosts.add(module)
    elif issubclass(host, ParameterHost):
        shown = tuple(sorted({*params, *module.veneer.layouts}))
        base, _, _, faces = type(module).veneer_key  # type: ignore[attr-defined]
        module.__class__ = adapted_class(base, host, shown, faces)
    assert isinstance(module, Host)
    _rebind(module)
    return module


def has_own_forward(module: nn.Module) -> bool:
    """The instance carries a forward that hides its class's, and not in the way accelerate's hooks do."""
    return "forward" in module.__dict__ and "_old_forward" not in module.__dict__


def _rebind(module: nn.Module) -> None:
    """accelerate's hooks keep the class's forward, bound, on the instance: give them the present class's."""
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)


def lift(module: Host) -> None:
    """Give the module back its own class and take away everything that was added."""
    for guard in module.veneer.guards.values():
        guard.remove()
    module.veneer.route.hosts.discard(module)
    del module.adapters
    del module.veneer
    module.__class__ = type(module).veneer_base  # type: ignore[attr-defined]
    _rebind(module)
