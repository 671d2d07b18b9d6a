"""The weights of a model that can be adapted: what each is, where it hangs, and how it is held."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from veneer.hosts import Host, Layout, host_of
from veneer.hosts.attention import OutProjHost
from veneer.hosts.parameter import ParameterHost
from veneer.storage import STORAGES, Storage, packed_storage
from veneer.wrappers import unwrap

#: names under which heads are known that `get_output_embeddings` does not report
_HEADS = {"lm_head", "score", "classifier", "qa_outputs", "output_layer", "embed_out"}


class Place(NamedTuple):
    """One place where a tensor hangs in the model: `names` are what patterns may call it by."""

    module_name: str
    module: nn.Module
    param: str
    host: type[Host]
    layout: Layout
    names: tuple[str, ...]
    refusal: str | None = None

    @property
    def storage(self) -> Storage | None:
        """How the parameter is held in fewer bits; None where it is an ordinary one."""
        return packed_storage(self.module) if self.param == "weight" else None

    def carrier(self) -> Tensor | None:
        """The tensor that holds the parameter now."""
        storage = self.storage
        return self.module._parameters.get(self.param) if storage is None else storage.carrier(self.module)


@dataclass(eq=False)
class Weight:
    """One tensor of the base model that can be adapted, with every place it hangs in (more than one = tied).

    `tensor` is what holds it, which for a packed weight has a shape and a dtype of its own.
    """

    name: str
    tensor: Tensor
    places: list[Place]
    is_linear: bool
    is_head: bool

    @property
    def layout(self) -> Layout:
        return self.places[0].layout

    @property
    def storage(self) -> Storage | None:
        return self.places[0].storage

    @property
    def held_as(self) -> str:
        """How a packed weight is held ("nf4", say); empty for an ordinary one."""
        storage = self.storage
        return "" if storage is None else storage.held_as(self.places[0].module)

    @property
    def dtype(self) -> torch.dtype:
        """What the weight is read as."""
        storage = self.storage
        return self.tensor.dtype if storage is None else storage.dtype(self.places[0].module)

    def numel(self) -> int:
        """Its numbers, however many bits they take."""
        return math.prod(self.layout.native) if self.storage is not None else self.tensor.numel()

    def read(self) -> Tensor:
        """The weight as dense numbers, in the stored layout; a packed one is read anew."""
        storage = self.storage
        return self.tensor if storage is None else storage.read(self.places[0].module)


def original(weight: Weight) -> Tensor | None:
    """The base's own values, also while something is merged into them; None when they are gone, or held in a
    form that cannot be read."""
    if weight.storage is not None:
        return _original_packed(weight, weight.storage)
    for place in weight.places:
        module = place.module
        if isinstance(module, Host):
            kept = module.veneer.kept.get(place.param)
            if kept is not None:
                return kept
            # A tied weight is kept in the one place that was merged; look at all of them before giving up.
    merged = any(isinstance(p.module, Host) and p.module.veneer.merged and not p.module.veneer.kept
                 and p.param in p.module.veneer.layouts for p in weight.places)
    return None if merged else weight.tensor


def _original_packed(weight: Weight, storage: Storage) -> Tensor | None:
    module = weight.places[0].module
    if storage.refusal(module) is not None:
        return None
    if not isinstance(module, Host) or not module.veneer.merged or module.veneer.requantised is None:
        return weight.read()
    kept = module.veneer.kept.get("weight")
    return None if kept is None else storage.decode(module, kept, storage.dtype(module))


def moved(weight: Weight) -> bool:
    """A part of the base's own values was moved into an adapter when that was attached."""
    return any(isinstance(p.module, Host) and p.param in p.module.veneer.moved for p in weight.places)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` of the base model: what adapters consist of, and wrappers around it, are left out."""
    # By the modules themselves and not by `named_modules`, which a front door's face overrides.
    seen: set[int] = set()
    stack = [("", unwrap(model))]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        stack += [(f"{name}.{child}" if name else child, part) for child, part in reversed(module._modules.items())
                  if part is not None and not (child == "adapters" and isinstance(module, Host))]


def scan(model: nn.Module) -> list[Weight]:
    """Every adaptable weight of the model, in order; tied places are one weight."""
    heads = _head_modules(model)
    found: dict[int, Weight] = {}
    for module_name, module in base_modules(model):
        if any(map(is_lazy, module._parameters.values())):
            continue
        host, layouts = host_of(module)
        refusal = _out_of_reach(model, module_name) if host is OutProjHost else None
        leaf = all(name == "adapters" or child is None for name, child in module._modules.items())
        for param, tensor in _tensors(module, layouts).items():
            kind, layout = (host, layouts[param]) if param in layouts else (ParameterHost, Layout.of(tensor))
            full = f"{module_name}.{param}" if module_name else param
            by_module = bool(module_name) and leaf and (param == "weight" or kind is ParameterHost)
            names = (module_name, full) if by_module else (full,)
            place = Place(module_name, module, param, kind, layout, names, refusal)
            linear = (kind.is_linear or isinstance(module, nn.Linear)) and not layout.shape.is_vector
            head = id(module) in heads or module_name.rsplit(".", 1)[-1] in _HEADS
            if id(tensor) in found:
                weight = found[id(tensor)]
                weight.places.append(place)
                weight.is_head |= head
            else:
                display = module_name if by_module and param == "weight" else full
                found[id(tensor)] = Weight(display, tensor, [place], linear, head)
    return list(found.values())


def _tensors(module: nn.Module, layouts: Mapping[str, Layout]) -> dict[str, Tensor]:
    """A module's parameters, or what holds them; of a packed layer only those that stand for something."""
    storage = packed_storage(module)
    if storage is None:
        return {name: param for name, param in module._parameters.items() if param is not None}
    ours = {name: module._parameters.get(name) for name in layouts if name != "weight"}
    return {"weight": storage.carrier(module), **{name: param for name, param in ours.items() if param is not None}}


def is_lazy(param: Any) -> bool:
    return isinstance(param, nn.parameter.UninitializedParameter)


def _out_of_reach(model: nn.Module, name: str) -> str | None:
    """Why the `out_proj` called `name` cannot be adapted here: only its attention module reads it."""
    parent = unwrap(model).get_submodule(name.rpartition(".")[0]) if name else None
    # A list of modules is as good as none: what is in it is read from elsewhere.
    if parent is None or type(parent).forward is nn.Module.forward:
        return ("its nn.MultiheadAttention reads its weight without calling it, and is not inside this model; give "
                "the attention module or what contains it")
    return None


def _head_modules(model: nn.Module) -> set[int]:
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    return {id(head)} if isinstance(head, nn.Module) else set()


def foreign(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Layers that hold a weight in a form nothing here reads: name, layer, and a sentence about it."""
    found = []
    known = ", ".join(storage.name for storage in STORAGES)
    for name, module in base_modules(model):
        size = module.__dict__.get("in_features"), module.__dict__.get("out_features")
        if isinstance(module._parameters.get("weight"), Tensor) or packed_storage(module) is not None:
            continue
        held = [f"{key}: {tensor.dtype}" for key, tensor in (*module._parameters.items(), *module._buffers.items())
                if tensor is not None and tensor.dim() == 2 and not tensor.is_floating_point()]
        if held and all(isinstance(n, int) for n in size):
            found.append((name, module, f"{name!r} is a {type(module).__name__} with its weight in a form that nothing "
                          f"here reads ({', '.join(held)}); read are ordinary numbers and {known}"))
    return found
