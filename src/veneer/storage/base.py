"""The contract of a storage: how the weight of a module is held, read as dense numbers, and written back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.method import VeneerError, nearest


class Storage:
    """One way to hold a weight. Stateless: every call is given the module.

    A packed storage holds the `weight` of a linear layer, y = x Wᵀ + bias with W (out, in), in fewer bits. It imports
    its library inside the calls that need it, and recognises a module by the names of its classes, so that nobody pays
    for a library that is not used.
    """

    #: as reports show it
    name: ClassVar[str] = ""
    #: fewer bits than the numbers it is read as; a fresh tensor at every read
    packed: ClassVar[bool] = True
    #: the layer computes something else than x Wᵀ of what `read` gives (it rounds activations, say), so that its own
    #: forward must run, and its own backward
    own_forward: ClassVar[bool] = False
    #: dense numbers can be put back into this form
    writable: ClassVar[bool] = False
    #: names under which `veneer.quantize` makes it
    schemes: ClassVar[tuple[str, ...]] = ()

    def check(self, scheme: str, options: Mapping[str, Any]) -> None:
        """Raise `VeneerError` for an unknown option or a missing library, before anything is changed."""
        raise NotImplementedError

    def pack(self, scheme: str, module: nn.Module, options: Mapping[str, Any]) -> nn.Module:
        """The `nn.Linear` with its weight held by one of `schemes`: the same module, or another to put in its place."""
        raise NotImplementedError

    def claims(self, module: nn.Module) -> bool:
        """Whether this storage holds the module's weight; the module may be adapted already."""
        raise NotImplementedError

    def refusal(self, module: nn.Module) -> str | None:
        """Why this one cannot be adapted although it is of this kind, or None."""
        return None

    def size(self, module: nn.Module) -> tuple[int, int]:
        """(out, in)."""
        raise NotImplementedError

    def carrier(self, module: nn.Module) -> Tensor:
        """The tensor that holds the numbers: it says the device, and which weights are one tensor."""
        raise NotImplementedError

    def dtype(self, module: nn.Module) -> torch.dtype:
        """What the weight stands for: the dtype it had, or is read as."""
        raise NotImplementedError

    def compute_dtype(self, module: nn.Module, dtype: torch.dtype) -> torch.dtype:
        """In what the layer computes for an input of `dtype`."""
        return dtype

    def read(self, module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
        """The weight (out, in) as dense numbers in `dtype`, or in its own; a fresh tensor without gradient."""
        raise NotImplementedError

    def encode(self, module: nn.Module, matrix: Tensor) -> Any:
        """`matrix` (out, in) in this form, with the module's settings; the module is not changed."""
        raise VeneerError(f"a weight held as {self.name} cannot be quantised again; merge it into dense numbers")

    def decode(self, module: nn.Module, held: Any, dtype: torch.dtype) -> Tensor:
        """What `read` would give if the module held `held`."""
        raise VeneerError(f"a weight held as {self.name} cannot be quantised again; merge it into dense numbers")

    def swap(self, module: nn.Module, held: Any) -> Any:
        """Put what `encode` gave into the module; returns what was there, for another `swap`."""
        raise VeneerError(f"a weight held as {self.name} cannot be quantised again; merge it into dense numbers")

    def unpack(self, module: nn.Module, weight: Tensor) -> type[nn.Module]:
        """Take away what holds the packed weight and give the module an ordinary parameter `weight`; returns the class
        that the module's own class is to be from now on."""
        raise NotImplementedError


def class_names(module: nn.Module) -> list[tuple[str, str]]:
    """(package, name) of the module's classes, nearest first: how a storage knows its library's layers unimported."""
    return [(kind.__module__.partition(".")[0], kind.__name__) for kind in type(module).__mro__]


def check_options(scheme: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise `VeneerError` for an option that a scheme does not have."""
    known = list(known)
    for name in options:
        if name not in known:
            raise VeneerError(f"quantize: {scheme!r} has no option {name!r}{nearest(name, known) or '.'} Options: "
                              f"{', '.join(known) or 'none'}")
