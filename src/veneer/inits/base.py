"""What a start is: a frozen description that gives a weight's first pair of factors, and the registry of starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from veneer.method import Need, Part, Shape, VeneerError, nearest

Evidence = Mapping[str, Tensor]


class Started(NamedTuple):
    """The first pair of one weight, in fp32: A (r, in), B (out, r).

    base: what the base weight is to become (out, in), where the start moves a part of it that the pair is not (LoftQ's
    quantised weight); None leaves it to `LoRA.residual`. packed: the same in packed form, an encoded matrix of
    `veneer.storage.normal_float`, or None. remark: what the user should know of this weight, for a warning.
    """

    A: Tensor
    B: Tensor
    base: Tensor | None = None
    packed: Any = None
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Init(Part):
    """A start of a pair A (r, in), B (out, r). Subclasses are frozen dataclasses registered with `@register_init`.

    needs: the statistic of `veneer.calibrate` that it starts from: "inputs", "covariance", "gradient"; None = none.
    from_weight: it reads the base weight.
    moves: BA is not zero, so that the adapter carries its starting pair with it, or a part of the base is moved.
    keeps_scale: weights to which `ranks` gives another rank get another alpha, so that their scale stays.
    rebases: it may give the base weight anew itself (`Started.base`), so that no starting pair is carried.
    """

    key: ClassVar[str] = ""
    needs: ClassVar[str | None] = None
    from_weight: ClassVar[bool] = False
    moves: ClassVar[bool] = False
    keeps_scale: ClassVar[bool] = True
    rebases: ClassVar[bool] = False

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        """The first pair for a weight of `shape` (out, in), on its device.

        weight: (out, in) in fp32, there when `from_weight`. scale: s of W + s·B·A. generator: seeded by (seed, weight
        name), on the CPU. evidence: this weight's statistics by name, there when `needs`.
        Raises `VeneerError` where the weight or the evidence cannot give such a pair.
        """
        raise NotImplementedError(f"{type(self).__name__} must define factors")

    def stack(self, weight: Tensor | None, shape: Shape, rank: int, scale: float, generator: torch.Generator,
              evidence: Evidence | None) -> Started:
        """`factors` for a weight of `shape` (*batch, out, in), fused experts say: one matrix after the other."""
        size, batch = (shape.out, shape.in_), shape.batch
        if not batch:
            return self.factors(weight, size, rank, scale, generator, evidence)
        matrices = [None] * math.prod(batch) if weight is None else weight.reshape(-1, *size).unbind()
        found = [self.factors(W, size, rank, scale, generator, evidence) for W in matrices]
        bases = [one.base for one in found if one.base is not None]
        A, B = (torch.stack(part).unflatten(0, batch) for part in ([f.A for f in found], [f.B for f in found]))
        remark = next((one.remark for one in found if one.remark), "")
        return Started(A, B, torch.stack(bases).unflatten(0, batch) if bases else None, remark=remark)

    def ranks(self, evidence: Mapping[str, Evidence], rank: int) -> dict[str, int]:
        """Each weight's rank, from the statistics of all weights of one method; 0 leaves a weight alone."""
        return dict.fromkeys(evidence, rank)

    def need(self, rank: int) -> Need | None:
        """`needs` in detail, for a pair of this rank."""
        return None if self.needs is None else Need(self.needs)

    def refusal(self, shape: Shape, rank: int) -> str | None:
        """Why a weight of `shape` cannot have a pair of this rank from this start, or None when it can."""
        return None

    @classmethod
    def named(cls, name: str) -> Init | None:
        """The start that `name` stands for, where it is one of this class."""
        return cls() if name == cls.key else None

    def short(self) -> str | None:
        """A name by which `named` gives an equal start, or None."""
        return self.key if self == type(self)() else None

    def to_config(self) -> dict[str, Any]:
        """A plain dict from which `make_init` makes an equal start."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {"init": self.key, **plain}


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
        raise VeneerError(_unknown(key, owner))
    return _REGISTRY[key]


def make_init(value: Any, owner: str = "LoRA") -> Init:
    """The start that an option stands for: a name, a dotted name of `torch.nn.init`, a mapping with the key "init" and
    options (`{"init": "loftq", "bits": 4}`, what a config file gives), or a start itself.

    Raises `VeneerError`, beginning with `owner`, for an unknown name or option, naming the nearest.
    """
    if isinstance(value, Init):
        return value
    if isinstance(value, Mapping):
        return _from_mapping(value, owner)
    if not isinstance(value, str):
        raise VeneerError(_unknown(value, owner))
    for kind in list(_REGISTRY.values()):
        found = kind.named(value)
        if found is not None:
            return found
    raise VeneerError(_unknown(value, owner))


def _from_mapping(value: Mapping[str, Any], owner: str) -> Init:
    options = dict(value)
    name = options.pop("init", None)
    if not isinstance(name, str):
        raise VeneerError(f"{owner}: init as a mapping needs a key 'init' with a start's name, got {dict(value)!r}. "
                          f"Known: {', '.join(_REGISTRY)}")
    start = make_init(name, owner)
    fields = [f.name for f in dataclasses.fields(start)]
    for option in options:
        if option not in fields:
            raise VeneerError(f"{owner}: init {name!r} has no option {option!r}{nearest(str(option), fields) or '.'} "
                              f"Options: {', '.join(fields) or 'none'}")
    tuples = {key: tuple(given) if isinstance(given, list) else given for key, given in options.items()}
    return dataclasses.replace(start, **tuples)


def _unknown(value: Any, owner: str) -> str:
    hint = (nearest(value, [*_REGISTRY, "pissa_niter_4"]) if isinstance(value, str) else "") or "."
    return (f"{owner}: unknown init {value!r}{hint} Known: {', '.join(_REGISTRY)}, pissa_niter_N, and any "
            "torch.nn.init function by its dotted name, such as 'torch.nn.init.xavier_normal_'")
