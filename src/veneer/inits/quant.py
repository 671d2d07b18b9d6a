"""Starts for a weight that is quantised: W ≈ Q + s·BA, with Q in a few bits and the pair making up for what that loses.

LoftQ (Li et al. 2023, arXiv:2310.08659) alternates between the two parts. Quantising the weight's residual after its
largest singular values first is QPiSSA (Meng et al. 2024, arXiv:2404.02948, §4). One step of LoftQ is what is known as
SVDQuant for weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.inits.base import Evidence, Init, Started, register_init
from veneer.inits.random import Kaiming, check_choice
from veneer.method import VeneerError, check_positive_int, without_autocast
from veneer.storage.normal_float import NormalFloat, check_settings, encode

FIRST = ("quantize", "svd")


class Iterate(NamedTuple):
    """One step of the alternation: A (r, in), B (out, r), Q encoded and as numbers (out, in), and the error
    ‖W − Q − s·BA‖ (Frobenius)."""

    A: Tensor
    B: Tensor
    packed: NormalFloat
    base: Tensor
    error: float


def alternate(weight: Tensor, rank: int, scale: float, quantize: Callable[[Tensor], NormalFloat], iterations: int,
              generator: torch.Generator, first: str = "quantize") -> Iterator[Iterate]:
    """The steps of LoftQ for W (out, in) in fp32, as they come; a later one is usually but not surely better.

    first="quantize": each step is Q = quantize(W − s·BA), beginning with BA = 0, then s·BA = the nearest of rank r to
    W − Q. first="svd": each step is s·BA = the nearest of rank r to W − Q, beginning with Q = 0, then
    Q = quantize(W − s·BA).
    """
    pair: tuple[Tensor, Tensor] | None = None
    base: Tensor | None = None
    for _ in range(iterations):
        if first == "svd":
            pair = nearest_pair(weight if base is None else weight - base, rank, scale, generator)
        packed = quantize(weight if pair is None else _less(weight, pair, scale))
        base = packed.decode()
        if first == "quantize":
            pair = nearest_pair(weight - base, rank, scale, generator)
        assert pair is not None
        error = float(torch.linalg.vector_norm(_less(weight - base, pair, scale)))
        yield Iterate(*pair, packed, base, error)


def _less(matrix: Tensor, pair: tuple[Tensor, Tensor], scale: float) -> Tensor:
    A, B = pair
    with without_autocast(matrix):
        return torch.addmm(matrix, B, A, alpha=-scale)


def nearest_pair(matrix: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (r, in), B (out, r) in fp32 with s·BA the nearest of rank r to `matrix` (out, in), each with the root of the
    singular values. Where there are none left, A is drawn as "kaiming" does and B is zero.

    From the eigenvectors of the smaller Gram matrix: about three times as fast as an SVD on a CPU. In fp32 it misses
    parts whose singular values are below 3e-4 of the largest. A quantisation error has none among its first; a weight
    (first="svd") may, and what is missed of it then stays in the part that is quantised.
    """
    A, B = matrix.new_zeros(rank, matrix.shape[1]), matrix.new_zeros(matrix.shape[0], rank)
    unit = float(matrix.abs().max())
    if unit > 0:
        U, values, V = _leading(matrix / unit, rank)  # so that no square leaves fp32's range
        root = (values * (unit / abs(scale))).sqrt()
        B[:, :len(root)] = U * (root * math.copysign(1, scale))
        A[:len(root)] = (V * root).mT
    empty = ~A.any(1)
    if empty.any():
        A[empty] = Kaiming().draw(A.shape, generator).to(A.device)[empty]
    return A, B


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, k), singular values (k,) falling, V (in, k); columns of U are zero where the value is."""
    tall = matrix.shape[0] >= matrix.shape[1]
    with without_autocast(matrix):
        M = matrix if tall else matrix.mT
        V = torch.linalg.eigh(M.mT @ M).eigenvectors[:, -rank:].flip(1)
        US = M @ V
    values = torch.linalg.vector_norm(US, dim=0)
    U = US / torch.where(values > 0, values, 1)
    return (U, values, V) if tall else (V, values, U)


@register_init("loftq")
@dataclass(frozen=True, kw_only=True)
class LoftQ(Init):
    """W ≈ Q + s·BA by alternation, the best step kept: more iterations never give a larger error. The base becomes Q.

    bits (2, 4, 8), block, double: of Q, as in `veneer.storage.normal_float.encode`; the paper's scales are not doubly
    quantised.
    iterations: steps. first: "quantize" as in the paper, which always ends below ‖W − quantize(W)‖; or "svd", the
    pair before Q as in QPiSSA, which leaves less of the error (docs/inits.md).
    packed: hold Q in those bits where the layer can; False keeps it as ordinary numbers, rounded to the base's dtype.

    Raises `VeneerError` for a scale of zero, or a weight with NaN or infinite values; attaching warns where the
    weight is quantised so already.
    """

    bits: int = 4
    iterations: int = 1
    block: int = 64
    double: bool = False
    first: str = "quantize"
    packed: bool = True
    from_weight = True
    moves = True
    rebases = True

    def __post_init__(self) -> None:
        check_settings("LoftQ", self.bits, self.block)
        check_positive_int("LoftQ", "iterations", self.iterations)
        check_choice("LoftQ", "first", self.first, FIRST)
        for field in ("double", "packed"):
            _check_bool("LoftQ", field, getattr(self, field))

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        assert weight is not None
        _check_scale("LoftQ", scale)
        quantize = partial(encode, bits=self.bits, block=self.block, double=self.double)
        steps = alternate(weight, rank, scale, quantize, self.iterations, generator, self.first)
        best = min(steps, key=lambda step: step.error)
        return Started(best.A, best.B, best.base, best.packed if self.packed else None, _remark("LoftQ", weight, best))


@register_init("svdquant")
@dataclass(frozen=True, kw_only=True)
class SVDQuant(Init):
    """s·BA is the nearest of rank r to W − Q, with Q = quantize(W), which the base becomes.

    bits, block, double, packed: as in `LoftQ`. With bits=None nothing is known of how the weight will be quantised:
    the pair starts as "kaiming" does, and attaching warns of it.
    """

    bits: int | None = None
    block: int = 64
    double: bool = False
    packed: bool = True

    def __post_init__(self) -> None:
        check_settings("SVDQuant", 4 if self.bits is None else self.bits, self.block)
        for field in ("double", "packed"):
            _check_bool("SVDQuant", field, getattr(self, field))
        for flag in ("from_weight", "moves", "rebases"):
            object.__setattr__(self, flag, self.bits is not None)

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        if self.bits is None:
            return _no_quantizer(shape, rank, generator)
        assert weight is not None
        _check_scale("SVDQuant", scale)
        quantize = partial(encode, bits=self.bits, block=self.block, double=self.double)
        step = next(alternate(weight, rank, scale, quantize, 1, generator))
        remark = _remark("SVDQuant", weight, step)
        return Started(step.A, step.B, step.base, step.packed if self.packed else None, remark)


def _no_quantizer(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Started:
    plain = Kaiming().factors(None, shape, rank, 1.0, generator, None)
    return plain._replace(remark=(
        "SVDQuant: no quantiser is known here, so the pair starts as 'kaiming' does, with B = 0. Say how the weight is "
        "to be quantised, SVDQuant(bits=4), or, for a model that is quantised already, call "
        "veneer.replace_lora_weights_loftq(model, originals) after attach"))


def _remark(owner: str, weight: Tensor, step: Iterate) -> str:
    if step.error or not bool(weight.any()):
        return ""
    return (f"{owner}: quantising changes nothing here, so there is nothing for the pair to make up for; on a model "
            "that is quantised already, call veneer.replace_lora_weights_loftq(model, originals) with the weights it "
            "had before")


def _check_scale(owner: str, scale: float) -> None:
    if scale == 0:
        raise VeneerError(f"{owner}: with a scale of 0 (alpha=0) the pair cannot hold a part of the weight")


def _check_bool(owner: str, field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise VeneerError(f"{owner}: {field} must be True or False, got {value!r}")
