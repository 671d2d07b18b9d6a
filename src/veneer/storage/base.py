"""The contract of a storage: how the weight of a module is held, read as dense numbers, and written back."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.method import VeneerError, nearest

_NAMES: weakref.WeakKeyDictionary[type, list[tuple[str, str]]] = weakref.WeakKeyDictionary()


class Storage:
    """One way to hold a weight. Stateless: every call is given the module.

    A packed storage holds the `weight` of a linear layer, y = x Wᵀ + bias with W (out, in), in fewer bits. It imports
    its library inside the calls that need it, and recognises a module by the names of its classes, so that nobody pays
    for a library that is not used.
    """

    #: as reports show it
    name: ClassVar[str] = ""
    #: the layer computes something else than x Wᵀ of what `read` gives (it rounds activations, say), so that its own
    #: forward must run, and its own backward
    own_forward: ClassVar[bool] = False
    #: the layer's own forward passes gradients on to its input
    own_gradient: ClassVar[bool] = True
    #: dense numbers can be put back into this form
    writable: ClassVar[bool] = False
    #: `pack` makes another module than the one it is given
    replaces: ClassVar[bool] = False
    #: names under which `veneer.quantize` makes it
    schemes: ClassVar[tuple[str, ...]] = ()

    def check(self, scheme: str, options: Mapping[str, Any]) -> None:
        """Raise `VeneerError` for an unknown option or a missing library, before anything is changed."""
        raise NotImplementedError

    def unfit(self, scheme: str, module: nn.Module, options: Mapping[str, Any]) -> str | None:
        """Why `pack` cannot take this `nn.Linear`, or None."""
        return None

    def pack(self, scheme: str, module: nn.Module, options: Mapping[str, Any]) -> nn.Module:
        """The `nn.Linear` with its weight held by one of `schemes`: the same module, or another to put in its place."""
        raise NotImplementedError

    def claims(self, module: nn.Module) -> bool:
        """Whether this storage holds the module's weight; the module may be adapted already."""
        raise NotImplementedError

    def refusal(self, module: nn.Module) -> str | None:
        """Why this one cannot be adapted although it is of this kind, or None."""
        return None

    def held_as(self, module: nn.Module) -> str:
        """How this module's weight is held, in a word or two, where one storage has several ways; `name` elsewhere."""
        return self.name

    def size(self, module: nn.Module) -> tuple[int, int]:
        """(out, in)."""
        raise NotImplementedError

    def carrier(self, module: nn.Module) -> Tensor:
        """The tensor that holds the numbers: it says the device, and which weights are one tensor."""
        raise NotImplementedError

    def bias(self, module: Any) -> Tensor | None:
        """The layer's bias, which some libraries do not hold as a parameter."""
        return module.bias

    def nbytes(self, module: nn.Module) -> int:
        """Bytes of everything the layer holds, its bias too."""
        return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))

    def dtype(self, module: nn.Module) -> torch.dtype:
        """What the weight stands for: the dtype it had, or is read as."""
        raise NotImplementedError

    def knows_dtype(self, module: nn.Module) -> bool:
        """Whether `dtype` is no guess. A library's layer need not remember what its weight was."""
        return True

    def compute_dtype(self, module: nn.Module, dtype: torch.dtype) -> torch.dtype:
        """In what the layer computes for an input of `dtype`."""
        return dtype

    def casts_back(self, module: nn.Module) -> bool:
        """Whether the layer's own forward gives the dtype of its input under autocast too."""
        return False

    def read(self, module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in) as dense numbers in `dtype`, or in its own; a fresh tensor without gradient."""
        raise NotImplementedError

    def forward(self, module: nn.Module, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """What the layer makes of x by its own forward, `own`; that may not change the weight."""
        return own(x)

    def encode(self, module: nn.Module, matrix: Tensor) -> Any:
        """`matrix` (out, in) in this form, with the module's settings; the module is not changed."""
        raise VeneerError(f"a weight held as {self.name} cannot be quantised again; merge it into dense numbers")

    def decode(self, module: nn.Module, held: Any, dtype: torch.dtype) -> Tensor:
        """What `read` would give if the module held `held`."""
        raise VeneerError(f"a weight held as {self.name} cannot be quantised again; merge it into dense numbers")

    def swap(self, module: nn.Module, held: Any) -> Any:
        """Put what `encode` gave into the module; returns what was there, for another `swap`."""
        raise VeneerError(f"a weight held as {self.name} cannot be quantised again; merge it into dense numbers")

    def takes(self, module: nn.Module, held: Any) -> bool:
        """Whether the module can hold this encoded matrix, which a start gives (`veneer.storage.normal_float`), as it
        is."""
        return False

    def unpack(self, module: nn.Module, weight: Tensor) -> type[nn.Module]:
        """Take away what holds the packed weight and give the module an ordinary parameter `weight`; returns the class
        that the module's own class is to be from now on."""
        raise NotImplementedError


def class_names(module: nn.Module) -> list[tuple[str, str]]:
    """(package, name) of the module's classes, nearest first: how a storage knows its library's layers unimported."""
    kind = type(module)
    if kind not in _NAMES:
        _NAMES[kind] = [(each.__module__.partition(".")[0], each.__name__) for each in kind.__mro__]
    return _NAMES[kind]


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, below a host that lies on it."""
    return getattr(type(module), "veneer_base", type(module))


def library(name: str, extra: str) -> ModuleType:
    """The module `name` (dots allowed); `VeneerError` naming the extra that installs it where it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != name.partition(".")[0]:
            raise  # the library is there and misses something itself
        raise VeneerError(f"{name.partition('.')[0]} is not installed: pip install 'veneer[{extra}]'") from error


def make_plain(module: Any, weight: Tensor, size: tuple[int, int], drop: Iterable[str]) -> type[nn.Module]:
    """Give a module that is to be an `nn.Linear` what one has, and take `drop` away where it has it; returns the class.

    weight: (out, in), of `size`. A bias that was no parameter becomes one, in the weight's dtype."""
    bias = module.bias
    for name in ("bias", *drop):
        for held in (module.__dict__, module._parameters, module._buffers, module._modules):
            held.pop(name, None)
    module._non_persistent_buffers_set.difference_update(drop)
    if bias is not None and not isinstance(bias, nn.Parameter):
        bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    module.out_features, module.in_features = size
    module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    module.register_parameter("bias", bias)
    return nn.Linear


def check_options(scheme: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `VeneerError` for an option that a scheme does not have."""
    known = list(known)
    for name in options:
        if name not in known:
            raise VeneerError(f"quantize: {scheme!r} has no option {name!r}{nearest(name, known) or '.'} Options: "
                              f"{', '.join(known) or 'none'}")
