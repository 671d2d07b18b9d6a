"""By which names PEFT knows the parameters of an adapter, and modules that show them there.

The parameters stay where the engine has them. What is shown is made anew at each look and holds the very same
`nn.Parameter` objects.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from veneer.hosts import Host
from veneer.hosts.parameter import ParameterHost
from veneer.io.dialects.hf_types import OF_METHOD
from veneer.method import Adapter, Method, check_probability
from veneer.methods import AdaLoRA, DoRA, Full, LoRA, RandLoRA, Rows, VBLoRA, VeRA


class Part(NamedTuple):
    """A parameter of an adapter: its path below the module in PEFT, and in the engine; the adapter (or the one that it
    wraps) that holds it, and under which name."""

    shown: str
    path: str
    owner: nn.Module
    attribute: str

    def get(self) -> Any:
        return self.owner._parameters[self.attribute]

    def put(self, value: Tensor) -> nn.Parameter:
        """Give the adapter another parameter. Raises `ValueError` for one of another shape."""
        old = self.get()
        if value.shape != old.shape:
            raise ValueError(f"{self.shown} has shape {tuple(old.shape)}, got {tuple(value.shape)}")
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, old.requires_grad)
        self.owner._parameters[self.attribute] = parameter
        return parameter


#: what PEFT calls what adapters share and train
_SHARED = {"bank": "vblora_vector_bank"}


def parts(host: Host) -> Iterator[Part]:
    """Every parameter of the adapters on a module, in their order. What many adapters share is with the first."""
    for name, slots in host.adapters.items():
        for param, adapter in cast(nn.ModuleDict, slots).items():
            assert isinstance(adapter, Adapter)
            for part, _ in adapter.named_parameters():
                inside, _, attribute = part.rpartition(".")
                yield Part(shown_path(host, name, param, adapter, part), f"adapters.{name}.{param}.{part}",
                           adapter.get_submodule(inside), attribute)


def shown_path(host: Host, name: str, param: str, adapter: Adapter, part: str) -> str:
    """Where below its module PEFT has a parameter of an adapter."""
    method = adapter.method
    if part.startswith("shared."):
        return f"{_SHARED[part.removeprefix('shared.')]}.{name}"
    if isinstance(method, Rows):
        return f"token_adapter.trainable_tokens_delta.{name}"
    if isinstance(method, Full):
        slots = cast(nn.ModuleDict, host.adapters[name])
        whole = "weight" in slots and isinstance(cast(Adapter, slots["weight"]).method, Full)
        return f"modules_to_save.{name}.{param}" if whole else f"base_layer.{param}"
    inner = method.inner if isinstance(method, DoRA) else method
    assert inner is not None
    kind = "embedding" if host.veneer.layouts[param].shape.lookup else "linear"
    piece, _, tail = OF_METHOD[type(inner)].piece(part, kind).partition(".")
    if piece == "lora_magnitude_vector":  # whose files have the ".weight" of its module taken off
        tail = "weight"
    return f"{_depth(host, name, param)}{piece}.{name}" + (f".{tail}" if tail else "")


def _depth(host: Host, name: str, param: str) -> str:
    """PEFT lays one wrapper around a module for each parameter that it adapts; the last is the outermost."""
    if not isinstance(host, ParameterHost):
        return ""
    adapted = [p for p in host._parameters if p in host.adapters[name]]  # type: ignore[operator]
    return "base_layer." * (len(adapted) - 1 - adapted.index(param))


# -- modules that show them -----------------------------------------------------------------------------------
class Looked(MutableMapping[str, Any]):
    """A module's table of parameters that are an adapter's: looked up there each time.

    What is put in or taken out here is so for this table alone: tools that swap parameters for other tensors
    (sharding, functional calls) find the adapter itself among the modules too, as the other holder of a tied parameter,
    and swap it in both.
    """

    def __init__(self, held: Mapping[str, Part], absent: Iterable[str] = ()) -> None:
        self.held, self.hidden = dict(held), set[str]()
        self.own: dict[str, Any] = dict.fromkeys(absent)

    def __getitem__(self, name: str) -> Any:
        if name in self.hidden:
            raise KeyError(name)
        return self.own[name] if name in self.own else self.held[name].get()

    def __setitem__(self, name: str, value: Any) -> None:
        self.own[name] = value
        self.hidden.discard(name)

    def __delitem__(self, name: str) -> None:
        self[name]  # raises KeyError
        self.own.pop(name, None)
        self.hidden.add(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in dict.fromkeys([*self.held, *self.own]) if name not in self.hidden)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def copy(self) -> dict[str, Any]:
        return dict(self)


class Nested(nn.Module):
    """A place in the tree of names that is nothing by itself."""


class ShownDict(nn.ModuleDict):
    """Modules by adapter name, which are shown and not kept."""

    def _get_name(self) -> str:
        return "ModuleDict"

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and name not in self._modules:  # wrappers and replicas take a module's place
            self[name] = value
        super().__setattr__(name, value)

    def __setitem__(self, key: str, module: nn.Module) -> None:
        if self._modules.get(key) is module:  # wrappers that walk a model put back what they do not wrap
            return
        raise TypeError(f"a module put here would be lost, as what a layer shows of its adapters is made anew at each "
                        f"look; assign to layer.…[{key!r}].weight, or add an adapter")


class Factor(nn.Linear):
    """One factor of a pair, (out, in) or a batch of such. Assigning `weight` or `bias` replaces the adapter's own."""

    def _get_name(self) -> str:
        return "Linear"

    def __init__(self, held: Mapping[str, Part]) -> None:
        nn.Module.__init__(self)
        self.__dict__["_parameters"] = Looked(held)
        size = self._parameters["weight"].shape  # type: ignore[union-attr]
        self.out_features, self.in_features = (size.numel(), 1) if len(size) < 2 else size[-2:]
        if "bias" not in held:
            self.bias = None  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        _assign(self, name, value)
        super().__setattr__(name, value)


def _assign(module: nn.Module, name: str, value: Any) -> None:
    """Give the adapter a parameter that is assigned to what shows it. A flat one of another size is a sharding
    wrapper's, which gives it to the adapter by itself."""
    table = module.__dict__.get("_parameters")
    if isinstance(table, Looked) and name in table.held and name in table and isinstance(value, nn.Parameter):
        old = table.held[name].get()
        if value.numel() == old.numel() and value.dim() <= 1 < old.dim() and old.shape[-1] == 1:
            value = nn.Parameter(value.detach().reshape(old.shape), value.requires_grad)  # a vector is held as (n, 1)
        if value.dim() > 1 or value.shape == old.shape:
            table.held[name].put(value)


class ShownParameters(nn.ParameterDict):
    """Parameters by adapter name. Assigning one replaces the adapter's own."""

    def _get_name(self) -> str:
        return "ParameterDict"

    def __init__(self, held: Mapping[str, Part] | None = None) -> None:
        super().__init__()
        self._keys = dict.fromkeys(held or ())
        self.__dict__["_parameters"] = Looked(held or {})

    def __setitem__(self, key: str, value: Any) -> None:
        table: Any = self._parameters
        if key not in table.held:
            raise TypeError(f"no adapter {key!r} has such a parameter here; there are: "
                            f"{', '.join(table.held) or 'none'}")
        table.held[key].put(value)


class Drop(nn.Dropout):
    """The dropout of an adapter. Setting `p` sets the adapter's."""

    def _get_name(self) -> str:
        return "Dropout"

    def __init__(self, adapter: Adapter, training: bool) -> None:
        nn.Module.__init__(self)
        self.__dict__["_adapter"] = adapter
        self.inplace = False
        self.training = training

    @property
    def p(self) -> float:
        return self.__dict__["_adapter"].dropout

    @p.setter
    def p(self, rate: float) -> None:
        check_probability("dropout", "p", rate)
        for part in self.__dict__["_adapter"].modules():
            if isinstance(part, Adapter):
                part.dropout = float(rate)


#: what PEFT calls the dropout of each method
_DROPOUT: dict[type[Method], str] = {LoRA: "lora_dropout", AdaLoRA: "lora_dropout", VeRA: "vera_dropout",
                                     VBLoRA: "vblora_dropout", RandLoRA: "randlora_dropout"}


def tree(host: Host) -> dict[str, nn.Module]:
    """What PEFT has below a module beside its own: submodules by name, made of the parameters themselves."""
    top = Nested()
    for name, adapter, piece, rate in _dropouts(host):
        _put(top, f"{piece}.{name}", Drop(adapter, host.training) if rate else nn.Identity())
    tables: dict[str, dict[str, Part]] = {}
    for part in parts(host):
        above, _, last = part.shown.rpartition(".")
        tables.setdefault(above, {})[last] = part
    for path, held in tables.items():
        if path.startswith("modules_to_save."):
            _put(top, path, _copy(host, held))
        elif path.endswith("base_layer"):
            nested = top._modules.get(path) or Nested()
            nested.__dict__["_parameters"] = Looked(held)
            _put(top, path, nested)
        elif held.keys() <= {"weight", "bias"}:
            _put(top, path, Factor(held))
        else:
            _put(top, path, ShownParameters(held))
    return {name: module for name, module in top._modules.items() if module is not None}


def _dropouts(host: Host) -> Iterator[tuple[str, Adapter, str, float]]:
    """(adapter's name, adapter, what PEFT calls its dropout, its rate by the config) of those that can drop inputs."""
    for name, slots in host.adapters.items():
        for adapter in cast(nn.ModuleDict, slots).values():
            assert isinstance(adapter, Adapter)
            method: Any = adapter.method.inner if isinstance(adapter.method, DoRA) else adapter.method
            if type(method) in _DROPOUT:
                yield name, adapter, _DROPOUT[type(method)], method.dropout
                break


def _put(top: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path; what it is one of several in, by adapter name, is made where it is not there yet."""
    *above, last = path.split(".")
    for i, name in enumerate(above):
        if name not in top._modules:
            by_name = i == len(above) - 1 and not isinstance(module, (ShownParameters, Nested))
            top.add_module(name, ShownDict() if by_name else Nested())
        top = cast(nn.Module, top._modules[name])
    top.add_module(last, module)


def _copy(host: Host, held: Mapping[str, Part]) -> nn.Module:
    """The module as it is trained (`modules_to_save`): of its own class, over the copies of its parameters."""
    twin = bare(host)
    twin.__dict__["_parameters"] = Looked(held, [name for name, param in host._parameters.items() if param is None])
    vectors = tuple(name for name in held if host.veneer.layouts[name].shape.is_vector)
    twin.__class__ = _copy_class(type(twin), vectors)
    return twin


_COPIES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _copy_class(base: type[nn.Module], vectors: tuple[str, ...]) -> type[nn.Module]:
    """A subclass whose forward finds these parameters as vectors (n,), which an adapter holds as (n, 1), and in which
    assigning a parameter gives it to the adapter."""
    def vector(name: str) -> property:
        return property(lambda self: self._parameters[name].reshape(-1))

    def assign(self: Any, name: str, value: Any) -> None:
        _assign(self, name, value)
        if not (name in vectors and isinstance(value, nn.Parameter)):
            base.__setattr__(self, name, value)

    if (base, vectors) not in _COPIES:
        body = {**{name: vector(name) for name in vectors}, "__module__": base.__module__, "__setattr__": assign}
        _COPIES[base, vectors] = type(base.__name__, (base,), body)
    return _COPIES[base, vectors]


#: of a module's attributes, those that do not belong to its twin: what the engine and wrappers keep on it
_NOT_SHARED = ("veneer", "forward", "_old_forward", "_hf_hook")
_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
          "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")


def bare(host: Host) -> nn.Module:
    """The module without its adapters and hooks: of its own class, over the same parameters and submodules."""
    base = type(host).veneer_base  # type: ignore[attr-defined]
    twin = base.__new__(base)
    twin.__dict__.update({key: value for key, value in host.__dict__.items() if key not in _NOT_SHARED})
    twin.__dict__["_modules"] = {name: module for name, module in host._modules.items() if name != "adapters"}
    twin.__dict__.update({name: OrderedDict() for name in _HOOKS})
    return cast(nn.Module, twin)
