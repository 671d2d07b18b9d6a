"""What a start is: a frozen description that gives a weight's first pair of factors, and the registry of starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from veneer.method import VeneerError, nearest

Evidence = Mapping[str, Tensor]


class Started(NamedTuple):
    """The first pair of one weight, in fp32: A (r, in), B (out, r).

    base: what the base weight is to become (out, in), where the start moves a part of it that the pair is not (LoftQ's
    quantised weight); None leaves it to `LoRA.residual`. packed: the same in packed form, an encoded matrix of
    `veneer.storage.normal_float`, or None.
    """

    A: Tensor
    B: Tensor
    base: Tensor | None = None
    packed: Any = None


@dataclass(frozen=True, kw_only=True)
class Init:
    """A start of a pair A (r, in), B (out, r). Subclasses are frozen dataclasses registered with `@register_init`.

    needs: the statistic of `veneer.calibrate` that it starts from: "inputs", "covariance", "gradient"; None = none.
    from_weight: it reads the base weight.
    moves: BA is not zero, so that the adapter carries its starting pair with it, or a part of the base is moved.
    """

    key: ClassVar[str] = ""
    needs: ClassVar[str | None] = None
    from_weight: ClassVar[bool] = False
    moves: ClassVar[bool] = False

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        """The first pair for a weight of `shape` (out, in), on its device.

        weight: (out, in) in fp32, there when `from_weight`. scale: s of W + s·B·A. generator: seeded by (seed, weight
        name), on the CPU. evidence: this weight's statistics by name, there when `needs`.
        Raises `VeneerError` where the weight or the evidence cannot give such a pair.
        """
        raise NotImplementedError

    def ranks(self, evidence: Mapping[str, Evidence], rank: int) -> dict[str, int]:
        """Each weight's rank, from the statistics of all weights of one method; 0 leaves a weight alone."""
        return dict.fromkeys(evidence, rank)

    def to_config(self) -> dict[str, Any]:
        """A plain dict from which `make_init` makes an equal start."""
        return {"init": self.key, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}


I = TypeVar("I", bound=type[Init])  # noqa: E741
_REGISTRY: dict[str, type[Init]] = {}


def register_init(key: str) -> Callable[[I], I]:
    """Class decorator: make a start known by `key` to methods, config files and saved adapters."""

    def add(cls: I) -> I:
        if key in _REGISTRY and _REGISTRY[key].__qualname__ != cls.__qualname__:
            raise VeneerError(f"init {key!r} is already registered by {_REGISTRY[key].__qualname__}")
        cls.key = key
        _REGISTRY[key] = cls
        return cls

    return add


def init_names() -> list[str]:
    """The registered names, sorted."""
    return sorted(_REGISTRY)


def init_class(key: str, owner: str = "LoRA") -> type[Init]:
    """The class registered as `key`; `VeneerError` with the nearest name otherwise."""
    if key not in _REGISTRY:
        raise VeneerError(f"{owner}: unknown init {key!r}{nearest(key, _REGISTRY) or '.'} Known: "
                          f"{', '.join(init_names())}, pissa_niter_N, and any torch.nn.init function by its dotted "
                          "name, such as 'torch.nn.init.xavier_normal_'")
    return _REGISTRY[key]
