"""Data-free random starts: of single tensors, and of a factor pair A (*batch, r, in), B (*batch, out, r).

Drawn on the CPU in fp32 from the adapter's own generator and then copied, so that the same (seed, weight
name) gives the same bits on every device, in every dtype's rounding, and in any order of creation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from veneer.method import VeneerError, nearest

#: said with every draw: torch's default dtype and device are the caller's, and change what is drawn
_DRAW: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}


def _uniform(shape: torch.Size, bound: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, **_DRAW).mul_(2 * bound).sub_(bound)


def uniform(tensor: Tensor, bound: float, generator: torch.Generator) -> None:
    """Fill in place from U(-bound, bound); 1/√(fan-in) is `nn.Linear`'s bound (Kaiming uniform with a = √5)."""
    tensor.copy_(_uniform(tensor.shape, bound, generator))


def normal(tensor: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill in place from N(0, std²)."""
    tensor.copy_(torch.randn(tensor.shape, generator=generator, **_DRAW).mul_(std))


def kaiming(A: Tensor, B: Tensor, generator: torch.Generator) -> None:
    """A ~ U(-1/√in, 1/√in), B = 0: what `nn.Linear` itself uses (Kaiming uniform with a = √5)."""
    A.copy_(_uniform(A.shape, 1 / math.sqrt(A.shape[-1]), generator))
    B.zero_()


def gaussian(A: Tensor, B: Tensor, generator: torch.Generator) -> None:
    """A ~ N(0, 1/r²), B = 0."""
    A.copy_(torch.randn(A.shape, generator=generator, **_DRAW).div_(A.shape[-2]))
    B.zero_()


def xavier(A: Tensor, B: Tensor, generator: torch.Generator) -> None:
    """A ~ N(0, 2/(r + in)), B = 0 (Glorot and Bengio 2010)."""
    rank, columns = A.shape[-2:]
    A.copy_(torch.randn(A.shape, generator=generator, **_DRAW).mul_(math.sqrt(2 / (rank + columns))))
    B.zero_()


FACTOR_INITS: dict[str, Callable[[Tensor, Tensor, torch.Generator], None]] = {
    "kaiming": kaiming,
    "gaussian": gaussian,
    "xavier": xavier,
}


def check_choice(owner: str, field: str, value: Any, known: Sequence[Any]) -> None:
    """Raise `VeneerError` unless `value` is one of `known`."""
    if value not in known:
        raise VeneerError(f"{owner}: unknown {field} {value!r}{nearest(str(value), map(str, known))} "
                          f"Known: {', '.join(map(str, known))}")


def check_init(owner: str, name: str) -> None:
    """Raise `VeneerError` unless `name` is a known start."""
    if not isinstance(name, str) or name not in FACTOR_INITS:
        raise VeneerError(f"{owner}: unknown init {name!r}{nearest(str(name), FACTOR_INITS)} "
                          f"Known: {', '.join(FACTOR_INITS)}")


def init_factors(name: str, A: Tensor, B: Tensor, generator: torch.Generator) -> None:
    """Fill A and B in place by the named start."""
    FACTOR_INITS[name](A, B, generator)
