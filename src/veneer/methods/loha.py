"""LoHa: W' = W + s·(A₁B₁) ∘ (A₂B₂), a Hadamard product of two low-rank matrices: rank up to r² from 2r(out + in)
numbers (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098; LyCORIS, Yeh et al. 2023, arXiv:2309.14859).

Row o of A₁B₁ ∘ A₂B₂ is Σᵢⱼ A₁[o,i] A₂[o,j] · (B₁[i] ∘ B₂[j]): a pair of factors of rank r² (Khatri–Rao products of
the small ones), which stands in for the dense product while it is the cheaper of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.forms import Factors
from veneer.inits.random import check_choice, uniform
from veneer.method import Adapter, Method, Shape, Shared, check_positive_int, register
from veneer.methods import tucker
from veneer.methods.drops import Drops, check_drops
from veneer.methods.options import as_dtype, check_bool, check_number

#: r² · this ≤ min(out, in): the six products of a rank-r² pair then cost less than the gradient of a dense ΔW
_PAYS = 6


@register("loha")
@dataclass(frozen=True, kw_only=True)
class LoHa(Method):
    """Low-rank Hadamard product.

    rank: r of each of the two products. alpha: s = alpha/rank; None means a scale of 1.
    rank_dropout, rank_dropout_scale, module_dropout: in training, zero single outputs of ΔW (and rescale what
    stays), or leave all of it out.
    effective_conv: decompose a convolution's kernel too (`tucker`); without effect on other weights.
    init: "kaiming" for all but B₂, which starts at zero; "random" for B₂ too, so that the model begins changed. dtype:
    as for LoRA.
    """

    training_only = (*Method.training_only, "rank_dropout", "rank_dropout_scale", "module_dropout")
    rank: int = 8
    alpha: float | None = None
    rank_dropout: float = 0.0
    rank_dropout_scale: bool = True
    module_dropout: float = 0.0
    effective_conv: bool = False
    init: str = "kaiming"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        check_positive_int("LoHa", "rank", self.rank)
        if self.alpha is not None:
            check_number("LoHa", "alpha", self.alpha, also=" or None")
        check_drops("LoHa", self.rank_dropout, self.rank_dropout_scale, self.module_dropout)
        check_bool("LoHa", "effective_conv", self.effective_conv)
        check_choice("LoHa", "init", self.init, ("kaiming", "random"))
        object.__setattr__(self, "dtype", as_dtype("LoHa", self.dtype))

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> LoHaAdapter:
        return LoHaAdapter(self, shape, self.dtype or dtype)


class LoHaAdapter(Adapter):
    """w1_a, w2_a (*batch, out, r) and w1_b, w2_b (*batch, r, in); for a decomposed kernel w1_a, w2_a (r, out), w1_b,
    w2_b (r, channels) and t1, t2 (r, r, *kernel)."""

    def __init__(self, method: LoHa, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape)
        self.scale, self.rank, self.init = method.scale, method.rank, method.init
        self.drops = Drops(method.rank_dropout, method.rank_dropout_scale, method.module_dropout)
        positions = torch.Size(shape.kernel).numel()
        self.decomposed = method.effective_conv and positions > 1
        r = self.rank
        a, b = (*shape.batch, shape.out, r), (*shape.batch, r, shape.in_)
        if self.decomposed:
            a, b = (r, shape.out), (r, shape.in_ // positions)
            self.t1 = nn.Parameter(torch.empty(r, r, *shape.kernel, dtype=dtype))
            self.t2 = nn.Parameter(torch.empty(r, r, *shape.kernel, dtype=dtype))
        self.w1_a, self.w1_b, self.w2_a, self.w2_b = (
            nn.Parameter(torch.empty(size, dtype=dtype)) for size in (a, b, a, b))

    def reset_parameters(self) -> None:
        generator = self.generator()
        drawn = (self.w1_a, self.w1_b, self.w2_a, self.w2_b)
        for tensor in drawn if self.init == "random" else drawn[:3]:
            uniform(tensor, tensor.shape[-1] ** -0.5, generator)
        if self.init != "random":
            self.w2_b.zero_()
        if self.decomposed:
            for tensor in (self.t1, self.t2):
                uniform(tensor, tensor[0].numel() ** -0.5, generator)

    def _pairs(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The two products as (*batch, out, r) and (*batch, r, in)."""
        if not self.decomposed:
            return (self.w1_a, self.w1_b), (self.w2_a, self.w2_b)
        return ((self.w1_a.mT, tucker.columns(self.t1, self.w1_b)), (self.w2_a.mT, tucker.columns(self.t2, self.w2_b)))

    def delta(self) -> Tensor:
        (a1, b1), (a2, b2) = self._pairs()
        return (self.scale * (a1 @ b1)) * (a2 @ b2)

    def form(self, dtype: torch.dtype | None = None) -> Factors | None:
        if self.rank**2 * _PAYS > min(self.shape.out, self.shape.in_):
            return None
        (a1, b1), (a2, b2) = self._pairs()
        B = (a1.unsqueeze(-1) * a2.unsqueeze(-2)).flatten(-2)
        A = (b1.unsqueeze(-2) * b2.unsqueeze(-3)).flatten(-3, -2)
        return Factors(A, B, self.scale)

    def fast_parameters(self) -> list[str]:
        return ["w1_a", "w2_a"]

    def keep(self) -> Tensor | None:
        return self.drops.draw(self.shape, self.w1_a.device)
