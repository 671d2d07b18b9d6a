"""Data-free random starts: of single tensors, and of a factor pair A (*batch, r, in), B (*batch, out, r).

Drawn on the CPU in fp32 from the adapter's own generator and then copied, so that the same (seed, weight
name) gives the same bits on every device, in every dtype's rounding, and in any order of creation.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from veneer.inits.base import Evidence, Init, Started, register_init
from veneer.method import Shape, VeneerError, nearest

#: said with every draw: torch's default dtype and device are the caller's, and change what is drawn
_DRAW: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


# -- single tensors -----------------------------------------------------------------------------------------
def _uniform(shape: Sequence[int], bound: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, **_DRAW).mul_(2 * bound).sub_(bound)


def uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill in place from U(-bound, bound); 1/√(fan-in) is `nn.Linear`'s bound (Kaiming uniform with a = √5)."""
    tensor.copy_(_uniform(tensor.shape, bound, generator))


def normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill in place from N(0, std²)."""
    tensor.copy_(torch.randn(tensor.shape, generator=generator, **_DRAW).mul_(std))


# -- A is drawn, B is zero ----------------------------------------------------------------------------------
@dataclass(frozen=True, kw_only=True)
class _DrawnA(Init):
    """A is drawn whole, for all matrices of a stack at once; B = 0."""

    def draw(self, size: Sequence[int], generator: torch.Generator) -> Tensor:
        """A of `size` (*batch, r, in), fp32 on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} must define draw")

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        return self.stack(weight, Shape(*shape), rank, scale, generator, evidence)

    def stack(self, weight: Tensor | None, shape: Shape, rank: int, scale: float, generator: torch.Generator,
              evidence: Evidence | None) -> Started:
        A = self.draw((*shape.batch, rank, shape.in_), generator)
        return Started(A, torch.zeros(*shape.batch, shape.out, rank, **_DRAW))


@register_init("kaiming")
@dataclass(frozen=True, kw_only=True)
class Kaiming(_DrawnA):
    """A ~ U(-1/√in, 1/√in), B = 0: what `nn.Linear` itself uses (Kaiming uniform with a = √5)."""

    def draw(self, size: Sequence[int], generator: torch.Generator) -> Tensor:
        return _uniform(size, 1 / math.sqrt(size[-1]), generator)


@register_init("gaussian")
@dataclass(frozen=True, kw_only=True)
class Gaussian(_DrawnA):
    """A ~ N(0, 1/r²), B = 0."""

    def draw(self, size: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(size, generator=generator, **_DRAW).div_(size[-2])


@register_init("xavier")
@dataclass(frozen=True, kw_only=True)
class Xavier(_DrawnA):
    """A ~ N(0, 2/(r + in)), B = 0 (Glorot and Bengio 2010)."""

    def draw(self, size: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(size, generator=generator, **_DRAW).mul_(math.sqrt(2 / (size[-2] + size[-1])))


# -- both are drawn -----------------------------------------------------------------------------------------
@register_init("kaiming_both")
@dataclass(frozen=True, kw_only=True)
class KaimingBoth(Init):
    """A ~ U(-1/√in, 1/√in), B ~ U(-1/√r, 1/√r): two `nn.Linear` as they come, so that BA is not zero. With
    `LoRA(residual="none")` it is PEFT's init_lora_weights=False, an adapter that changes the model before training.
    """

    moves = True

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        A = _uniform((rank, shape[1]), 1 / math.sqrt(shape[1]), generator)
        return Started(A, _uniform((shape[0], rank), 1 / math.sqrt(rank), generator))


@register_init("orthogonal")
@dataclass(frozen=True, kw_only=True)
class Orthogonal(Init):
    """A and B random and neither zero, with BA = 0 up to rounding, so that both learn from the first step: the r inner
    directions are split in two halves, A writes into the one and B reads from the other (the start of this name in
    PEFT). Entries of A and B are of the size 0.1. Needs a rank of at least 2.
    """

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        return Started(*orthogonal(shape, rank, generator))

    def refusal(self, shape: Shape, rank: int) -> str | None:
        return "init='orthogonal' needs a rank of at least 2: its halves go to A and B" if rank < 2 else None


def orthogonal(shape: tuple[int, int], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (r, in), B (out, r) in fp32 with entries of about 0.1 and BA = 0 up to rounding; `shape` is (out, in)."""
    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, **_DRAW).double()

    directions, _ = torch.linalg.qr(draw(rank, rank))
    write, read = directions.split([rank - rank // 2, rank // 2], dim=1)  # orthonormal columns
    # A column of `directions` has a mean square of 1/r: √(r / how many) makes each entry of A a sum of variance 1.
    A = write @ draw(write.shape[1], shape[1]) * (0.1 * math.sqrt(rank / write.shape[1]))
    B = draw(shape[0], read.shape[1]) @ read.mT * (0.1 * math.sqrt(rank / read.shape[1]))
    return A.float(), B.float()


# -- torch's own functions ----------------------------------------------------------------------------------
_TORCH = "torch.nn.init."
_ZEROS = f"{_TORCH}zeros_"


@register_init("torch")
@dataclass(frozen=True, kw_only=True)
class TorchInit(Init):
    """A and B by functions of `torch.nn.init`, given by their dotted names; those with random numbers draw them on the
    CPU in fp32 from the adapter's own generator. A function alone, `LoRA(init="torch.nn.init.xavier_normal_")`, is
    that of A, and B is zero. Where B is not zero the adapter carries its starting pair.

    Raises `VeneerError` for a name that is none of torch.nn.init's, and where both A and B would be zero.
    """

    a: str = f"{_TORCH}kaiming_uniform_"
    b: str = _ZEROS

    def __post_init__(self) -> None:
        for side in (self.a, self.b):
            _filled(side, (2, 2), torch.Generator())
        if self.a == self.b == _ZEROS:
            raise VeneerError("init: A and B would both be zero, and neither would ever get a gradient")

    @property
    def moves(self) -> bool:  # type: ignore[override]
        return _ZEROS not in (self.a, self.b)

    @classmethod
    def named(cls, name: str) -> Init | None:
        return cls(a=name) if name.startswith(_TORCH) else super().named(name)

    def short(self) -> str | None:
        return self.a if self.b == _ZEROS else None

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        return Started(_filled(self.a, (rank, shape[1]), generator), _filled(self.b, (shape[0], rank), generator))


def _function(name: Any) -> Callable[..., Any]:
    """The function of torch.nn.init that a dotted name stands for."""
    known = [key for key, value in vars(torch.nn.init).items()
             if key.endswith("_") and not key.startswith("_") and callable(value)]
    short = name.removeprefix(_TORCH) if isinstance(name, str) and name.startswith(_TORCH) else None
    if short not in known:
        hint = nearest(str(name).rpartition(".")[2], known)
        raise VeneerError(f"init: {name!r} is no function of torch.nn.init{hint or '.'} Give its dotted name: "
                          f"{', '.join(_TORCH + key for key in known[:3])}, …")
    return vars(torch.nn.init)[short]


def _filled(name: str, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    fill, tensor = _function(name), torch.empty(size, **_DRAW)
    options = {"generator": generator} if "generator" in inspect.signature(fill).parameters else {}
    try:
        with torch.no_grad():
            fill(tensor, **options)
    except (TypeError, ValueError) as error:
        raise VeneerError(f"init: {name} cannot fill a matrix {size} by itself: {error}") from error
    return tensor


def check_choice(owner: str, field: str, value: Any, known: Sequence[Any]) -> None:
    """Raise `VeneerError` unless `value` is one of `known`."""
    if value not in known:
        raise VeneerError(f"{owner}: unknown {field} {value!r}{nearest(str(value), map(str, known)) or '.'} "
                          f"Known: {', '.join(map(str, known))}")
