"""VeRA: W' = W + diag(b)·B·diag(d)·A with random A and B that all weights share and only vectors trained (Kopiczko et
al. 2024, arXiv:2310.11454).

A and B are drawn on the CPU from a seed, the same bits on every device, and are neither trained nor, unless asked for,
saved. The draw is the one PEFT makes from its `projection_prng_key`, so that a file holds the same adapter in both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.forms import Factors
from veneer.inits.random import check_choice, normal
from veneer.method import (
    Adapter,
    Method,
    Shape,
    Shared,
    check_positive_int,
    check_probability,
    register,
)
from veneer.methods.options import as_dtype, check_bases, check_bool, check_number, check_seed, largest
from veneer.stamp import Stamp


@register("vera")
@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Vector-based random matrix adaptation.

    rank: r of the shared pair; large, since a weight costs r + out numbers whatever it is. d_initial: what d starts
    at (b starts at zero). dropout, dtype: as for LoRA. seed: of the bases.
    bases: (out, in) of the shared bases; None: the largest out and in among the weights, filled in by the plan.
    save_bases: write A and B into the file too, for tools that cannot draw them.
    init: "zero", what b starts at; "random": b at one and d from N(0, 1), so that the model begins changed.
    """

    training_only = (*Method.training_only, "d_initial")
    rank: int = 256
    d_initial: float = 0.1
    dropout: float = 0.0
    seed: int = 0
    bases: tuple[int, int] | None = None
    save_bases: bool = False
    dtype: torch.dtype | None = None
    init: str = "zero"

    def __post_init__(self) -> None:
        check_positive_int("VeRA", "rank", self.rank)
        check_number("VeRA", "d_initial", self.d_initial)
        check_number("VeRA", "dropout", self.dropout)
        check_probability("VeRA", "dropout", self.dropout)
        check_seed("VeRA", self.seed)
        check_bool("VeRA", "save_bases", self.save_bases)
        check_choice("VeRA", "init", self.init, ("zero", "random"))
        object.__setattr__(self, "bases", check_bases("VeRA", self.bases))
        object.__setattr__(self, "dtype", as_dtype("VeRA", self.dtype))

    @property
    def uses_input(self) -> bool:
        return self.dropout > 0

    def refusal(self, shape: Shape) -> str | None:
        if self.bases is not None and (shape.out > self.bases[0] or shape.in_ > self.bases[1]):
            return f"its {shape.out} × {shape.in_} are more than the shared bases have, bases={self.bases}"
        return super().refusal(shape)

    def settle(self, shapes: Mapping[str, Shape]) -> Method:
        return self if self.bases is not None else dataclasses.replace(self, bases=largest(shapes))

    def shared(self, dtype: torch.dtype) -> VeRABases:
        return VeRABases(self)

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> VeRAAdapter:
        return VeRAAdapter(self, shape, self.dtype or dtype, shared)


class VeRABases(Shared):
    """A (r, in) and B (out, r) in fp32: Kaiming-uniform for a rectifier, bound √(6 / fan-in), A drawn first."""

    A: Tensor
    B: Tensor

    def __init__(self, method: VeRA) -> None:
        super().__init__()
        assert method.bases is not None
        self.seed, (out, in_) = method.seed, method.bases
        self._copies: tuple[tuple, tuple[Tensor, Tensor]] | None = None
        for name, size in (("A", (method.rank, in_)), ("B", (out, method.rank))):
            self.register_buffer(name, torch.empty(size, dtype=torch.float32), persistent=method.save_bases)

    def in_dtype(self, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """A and B; in a dtype of 16 bit as copies, kept for all weights together."""
        if dtype is None or dtype.itemsize >= 4 or torch.compiler.is_compiling():
            return self.A, self.B
        key = (dtype, Stamp(self.A), Stamp(self.B))
        if self._copies is None or self._copies[0] != key:
            with torch.inference_mode(False):  # else a later backward could not keep them
                self._copies = (key, (self.A.to(dtype), self.B.to(dtype)))
        return self._copies[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": None}

    def reset(self) -> None:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        for base in (self.A, self.B):
            bound = math.sqrt(6 / base.shape[1])
            base.copy_(torch.empty(base.shape, dtype=torch.float32, device="cpu")
                       .uniform_(-bound, bound, generator=generator))


class VeRAAdapter(Adapter):
    """d (*batch, r) and b (*batch, out)."""

    def __init__(self, method: VeRA, shape: Shape, dtype: torch.dtype, shared: Shared | None) -> None:
        super().__init__(shape, method.dropout)
        self.d_initial, self.init = method.d_initial, method.init
        self.d = nn.Parameter(torch.empty(*shape.batch, method.rank, dtype=dtype))
        self.b = nn.Parameter(torch.empty(*shape.batch, shape.out, dtype=dtype))
        if shared is not None:
            self.use(shared)

    def reset_parameters(self) -> None:
        if self.init == "random":
            normal(self.d, 1.0, self.generator())
            self.b.fill_(1.0)
        else:
            self.d.fill_(self.d_initial)
            self.b.zero_()

    def form(self, dtype: torch.dtype | None = None) -> Factors:
        bases = self.shared_state()
        assert isinstance(bases, VeRABases)
        A, B = bases.in_dtype(dtype)
        A, B = A[:, :self.shape.in_].to(self.d.device), B[:self.shape.out].to(self.b.device)
        batch = self.shape.batch
        # d and b stay apart: their gradients then need no product of A's or B's size.
        return Factors(A.expand(*batch, *A.shape), B.expand(*batch, *B.shape), mid=self.d, out=self.b)

    def fast_parameters(self) -> list[str]:
        return ["b"]
