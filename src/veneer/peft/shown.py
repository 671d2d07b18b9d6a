"""By which names PEFT knows the parameters of an adapter, and modules that show them there.

The parameters stay where the engine has them. What is shown is made anew at each look and holds the very same
`nn.Parameter` objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from veneer.hosts import Host
from veneer.hosts.parameter import ParameterHost
from veneer.io.dialects.hf_types import OF_METHOD
from veneer.method import Adapter
from veneer.methods import DoRA, Full, Rows


class Part(NamedTuple):
    """A parameter of an adapter: its path below the module in PEFT, and in the engine; the adapter (or the one that it
    wraps) that holds it, and under which name."""

    shown: str
    path: str
    owner: nn.Module
    attribute: str

    @property
    def tensor(self) -> nn.Parameter:
        tensor = self.owner._parameters[self.attribute]
        assert tensor is not None
        return tensor


def parts(host: Host) -> Iterator[Part]:
    """Every parameter of the adapters on a module, in their order. What many adapters share is not among them."""
    for name, slots in host.adapters.items():
        for param, adapter in cast(nn.ModuleDict, slots).items():
            assert isinstance(adapter, Adapter)
            for part, _ in adapter.named_parameters():
                if not part.startswith("shared."):
                    inside, _, attribute = part.rpartition(".")
                    yield Part(shown_path(host, name, param, adapter, part), f"adapters.{name}.{param}.{part}",
                               adapter.get_submodule(inside), attribute)


def shown_path(host: Host, name: str, param: str, adapter: Adapter, part: str) -> str:
    """Where below its module PEFT has a parameter of an adapter."""
    method = adapter.method
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
class Nested(nn.Module):
    """A place in the tree of names that is nothing by itself."""


class Factor(nn.Linear):
    """One factor of a pair, (out, in) or a batch of such. Assigning `weight` or `bias` replaces the adapter's own."""

    def __init__(self, held: dict[str, Part]) -> None:
        nn.Module.__init__(self)
        self.__dict__["held"] = held
        for tail in ("weight", "bias"):
            self._parameters[tail] = held[tail].tensor if tail in held else None
        size = self._parameters["weight"]
        assert size is not None
        self.out_features, self.in_features = (len(size), 1) if size.dim() == 1 else size.shape[-2:]

    def __setattr__(self, name: str, value: Any) -> None:
        held = self.__dict__.get("held", {})
        if name in held and isinstance(value, Tensor):
            old = held[name].tensor
            if value.shape != old.shape:
                raise ValueError(f"{held[name].shown} has shape {tuple(old.shape)}, got {tuple(value.shape)}")
            parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, old.requires_grad)
            held[name].owner._parameters[held[name].attribute] = parameter
        super().__setattr__(name, value)


class Copy(nn.Module):
    """The trained copies of a module's parameters (`modules_to_save`)."""

    def __init__(self, held: dict[str, Part]) -> None:
        super().__init__()
        self._parameters.update({tail: part.tensor for tail, part in held.items()})


def tree(host: Host) -> dict[str, nn.Module]:
    """What PEFT has below a module beside its own: submodules by name, made of the parameters themselves."""
    top = Nested()
    modules: dict[str, dict[str, Part]] = {}
    for part in parts(host):
        above, _, last = part.shown.rpartition(".")
        if last in ("weight", "bias") and not above.endswith("base_layer"):
            modules.setdefault(above, {})[last] = part
        elif above.endswith("base_layer"):
            _place(top, above, nn.Module)._parameters[last] = part.tensor
        else:
            cast(nn.ParameterDict, _place(top, above, nn.ParameterDict))[last] = part.tensor
    for path, held in modules.items():
        above, _, last = path.rpartition(".")
        shown = Copy(held) if above == "modules_to_save" else Factor(held)
        cast(nn.ModuleDict, _place(top, above, nn.ModuleDict))[last] = shown
    return {name: module for name, module in top._modules.items() if module is not None}


def _place(top: nn.Module, path: str, kind: type[nn.Module]) -> nn.Module:
    """The module at a path, made where it is not there yet."""
    *above, last = path.split(".")
    for name in above:
        if name not in top._modules:
            top.add_module(name, Nested())
        top = cast(nn.Module, top._modules[name])
    if last not in top._modules:
        top.add_module(last, kind())
    return cast(nn.Module, top._modules[last])


def bare(host: Host) -> nn.Module:
    """The module without its adapters: of its own class, over the same parameters and submodules."""
    base = type(host).veneer_base  # type: ignore[attr-defined]
    twin = base.__new__(base)
    twin.__dict__.update({key: value for key, value in host.__dict__.items()
                          if key not in ("veneer", "forward", "_old_forward", "_hf_hook")})
    twin.__dict__["_modules"] = {name: module for name, module in host._modules.items() if name != "adapters"}
    return cast(nn.Module, twin)
