"""LoKr: W' = W + s·W₁ ⊗ W₂, a Kronecker product whose factors may be low-rank themselves (KronA, Edalati et al. 2022,
arXiv:2212.10650; LyCORIS, Yeh et al. 2023, arXiv:2309.14859).

The product is never formed in a forward: with x as a matrix X (i₁, i₂), ΔW x is W₁ X W₂ᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.forms import Kronecker
from veneer.inits.random import check_choice, uniform
from veneer.method import Adapter, Method, Shape, Shared, VeneerError, check_positive_int, register
from veneer.methods import tucker
from veneer.methods.drops import Drops, check_drops
from veneer.methods.options import as_dtype, check_bool, check_number


@register("lokr")
@dataclass(frozen=True, kw_only=True)
class LoKr(Method):
    """Low-rank Kronecker product.

    rank: of W₂, and with decompose_both of W₁; a factor for which it would save nothing (rank at least half its
    longer side) is trained whole. alpha: s = alpha/rank, also then; None means a scale of 1. (LyCORIS has s = 1
    where both factors are whole.)
    decompose_factor: out and in are split into m·n with m ≤ n, m the largest divisor that is at most this; -1 for
    as square as possible. If it divides a size itself, m is it.
    rank_dropout, rank_dropout_scale, module_dropout, effective_conv, dtype: as for LoHa.
    init: what starts at zero: "kaiming" W₁ (as PEFT has it), "lycoris" W₂, "random" neither: the model begins changed.
    """

    training_only = (*Method.training_only, "rank_dropout", "rank_dropout_scale", "module_dropout")
    rank: int = 8
    alpha: float | None = None
    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = True
    module_dropout: float = 0.0
    effective_conv: bool = False
    init: str = "kaiming"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_positive_int("LoKr", "rank", self.rank)
        if self.alpha is not None:
            check_number("LoKr", "alpha", self.alpha, also=" or None")
        factor = self.decompose_factor
        if not isinstance(factor, int) or isinstance(factor, bool) or (factor < 1 and factor != -1):
            raise VeneerError(f"LoKr: decompose_factor must be a whole number of at least 1, or -1, got {factor!r}")
        check_drops("LoKr", self.rank_dropout, self.rank_dropout_scale, self.module_dropout)
        check_bool("LoKr", "decompose_both", self.decompose_both)
        check_bool("LoKr", "effective_conv", self.effective_conv)
        check_choice("LoKr", "init", self.init, ("kaiming", "lycoris", "random"))
        object.__setattr__(self, "dtype", as_dtype("LoKr", self.dtype))

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> LoKrAdapter:
        return LoKrAdapter(self, shape, self.dtype or dtype)


def split(size: int, factor: int) -> tuple[int, int]:
    """size = m·n, by the rule of `decompose_factor`."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    m = max(d for d in range(1, int(size**0.5) + 1) if size % d == 0 and d <= most)
    return m, size // m


class LoKrAdapter(Adapter):
    """W₁ (o₁, i₁) is w1, or w1_a (o₁, r) · w1_b (r, i₁). W₂ (o₂, i₂·|kernel|) is w2, or w2_a (o₂, r) · w2_b
    (r, i₂·|kernel|), or for a decomposed kernel t2 (r, r, *kernel) with w2_a (r, o₂), w2_b (r, i₂). All with a leading
    batch where the weight has one."""

    t2: Tensor | None

    def __init__(self, method: LoKr, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape)
        self.scale, self.init, r = method.scale, method.init, method.rank
        self.drops = Drops(method.rank_dropout, method.rank_dropout_scale, method.module_dropout)
        positions = torch.Size(shape.kernel).numel()
        o1, o2 = split(shape.out, method.decompose_factor)
        i1, i2 = split(shape.in_ // positions, method.decompose_factor)
        sizes: dict[str, tuple[int, ...]] = {}
        if method.decompose_both and r < max(o1, i1) / 2:
            sizes |= {"w1_a": (*shape.batch, o1, r), "w1_b": (*shape.batch, r, i1)}
        else:
            sizes["w1"] = (*shape.batch, o1, i1)
        if r >= max(o2, i2) / 2:
            sizes["w2"] = (*shape.batch, o2, i2 * positions)
        elif method.effective_conv and positions > 1:
            sizes |= {"t2": (r, r, *shape.kernel), "w2_a": (r, o2), "w2_b": (r, i2)}
        else:
            sizes |= {"w2_a": (*shape.batch, o2, r), "w2_b": (*shape.batch, r, i2 * positions)}
        for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"):
            size = sizes.get(name)
            self.register_parameter(name, None if size is None else nn.Parameter(torch.empty(size, dtype=dtype)))

    def reset_parameters(self) -> None:
        generator = self.generator()
        zero = {"kaiming": ("w1", "w1_a"), "lycoris": ("w2", "w2_b"), "random": ()}[self.init]
        for name, tensor in self._parameters.items():
            if tensor is not None and name in zero:
                tensor.zero_()
            elif tensor is not None:
                fan_in = tensor[0].numel() if name == "t2" else tensor.shape[-1]
                uniform(tensor, fan_in**-0.5, generator)

    def form(self, dtype: torch.dtype | None = None) -> Kronecker:
        return Kronecker(self._factor("w1"), self._factor("w2"), self.scale)

    def _factor(self, name: str) -> Tensor:
        """W₁ or W₂, from what is there of it."""
        whole = self._parameters[name]
        if whole is not None:
            return whole
        a, b = self.get_parameter(f"{name}_a"), self.get_parameter(f"{name}_b")
        return a @ b if self.t2 is None or name == "w1" else tucker.matrix(self.t2, a, b)

    def fast_parameters(self) -> list[str]:
        # A whole factor has no sides: its inputs are as many as its outputs.
        return [name for name in ("w1_a", "w2_a") if self._parameters[name] is not None]

    def keep(self) -> Tensor | None:
        return self.drops.draw(self.shape, next(self.parameters()).device)
