"""RandLoRA: W' = W + s·Σⱼ Bⱼ·diag(λⱼ)·A·diag(γⱼ) with shared random A and Bⱼ, so many that the change has full rank
(Albert et al. 2025, arXiv:2502.00987). λ and γ are trained.

As one pair: rows ρ·n + j of the trained side are λ[ρ,j]·A[ρ] ∘ γ[j], columns j·r + ρ of the other are Bⱼ's; which pair
up is random, as the bases are. The trained side lies on the shorter of out and in. The bases are drawn on the CPU from
a seed, as PEFT draws them from its `projection_prng_key` where it has bfloat16, and are not saved unless asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.forms import Factors
from veneer.inits.random import check_choice, normal
from veneer.method import Adapter, Method, Shape, Shared, VeneerError, check_positive_int, check_probability, register
from veneer.methods.bases import ScaledBases
from veneer.methods.options import as_dtype, check_bases, check_bool, check_number, check_seed, largest


@register("randlora")
@dataclass(frozen=True, kw_only=True)
class RandLoRA(Method):
    """Full-rank adaptation by random bases.

    rank: r of each base; a weight has n = ⌈min(out, in) / r⌉ of them: a smaller rank trains *more* numbers. alpha:
    s = alpha/rank. dropout, dtype: as for LoRA. seed, bases, save_bases: as for VeRA.
    sparsity: entries of the bases are uniform (None), or -1, 0, 1 with 2/3 ("sparse") or 1 - 1/√min ("very_sparse")
    of them zero (Li et al. 2006); in each case divided by their standard deviation.
    init: "zero", what λ starts at; "random": λ from N(0, 1), so that the model begins changed.
    """

    rank: int = 32
    alpha: float = 640
    dropout: float = 0.0
    seed: int = 0
    sparsity: str | None = None
    bases: tuple[int, int] | None = None
    save_bases: bool = False
    dtype: torch.dtype | None = None
    init: str = "zero"

    def __post_init__(self) -> None:
        check_positive_int("RandLoRA", "rank", self.rank)
        check_number("RandLoRA", "alpha", self.alpha)
        check_number("RandLoRA", "dropout", self.dropout)
        check_probability("RandLoRA", "dropout", self.dropout)
        check_seed("RandLoRA", self.seed)
        check_bool("RandLoRA", "save_bases", self.save_bases)
        check_choice("RandLoRA", "init", self.init, ("zero", "random"))
        check_choice("RandLoRA", "sparsity", self.sparsity, (None, "sparse", "very_sparse"))
        object.__setattr__(self, "bases", check_bases("RandLoRA", self.bases))
        object.__setattr__(self, "dtype", as_dtype("RandLoRA", self.dtype))

    @property
    def uses_input(self) -> bool:
        return self.dropout > 0

    def refusal(self, shape: Shape) -> str | None:
        longer, shorter = max(shape.out, shape.in_), min(shape.out, shape.in_)
        if self.bases is not None and (longer > max(self.bases) or shorter > min(self.bases)):
            return f"its {shape.out} × {shape.in_} are more than the shared bases have, bases={self.bases}"
        return super().refusal(shape)

    def settle(self, shapes: Mapping[str, Shape]) -> Method:
        return self if self.bases is not None else dataclasses.replace(self, bases=largest(shapes))

    def shared(self, dtype: torch.dtype) -> RandLoRABases:
        return RandLoRABases(self, dtype)

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> RandLoRAAdapter:
        return RandLoRAAdapter(self, shape, self.dtype or dtype, shared)


class RandLoRABases(Shared):
    """A (r, 1, min) and B (max, n, r): bfloat16 numbers, held so over a bfloat16 base, else in fp32; sparse: fp32."""

    A: Tensor
    B: Tensor

    def __init__(self, method: RandLoRA, dtype: torch.dtype) -> None:
        super().__init__()
        assert method.bases is not None
        self.seed, r = method.seed, method.rank
        longer, shorter = max(method.bases), min(method.bases)
        #: one over the share of entries that are not zero; None for uniform ones
        self.sparsity = {None: None, "sparse": 3.0, "very_sparse": shorter**0.5}[method.sparsity]
        dtype = torch.float32 if self.sparsity is not None or dtype != torch.bfloat16 else dtype
        for name, size in (("A", (r, 1, shorter)), ("B", (longer, -(-shorter // r), r))):
            self.register_buffer(name, torch.empty(size, dtype=dtype), persistent=method.save_bases)

    def reset(self) -> None:
        generator = torch.Generator("cpu").manual_seed(self.seed)
        A = self._draw(self.A.shape, generator)
        if self.sparsity is None:  # base by base
            B = torch.cat([self._draw((*self.B[:, :1].shape,), generator) for _ in range(self.B.shape[1])], dim=1)
        else:
            B = self._draw(self.B.shape, generator)
        for base, drawn in ((self.A, A), (self.B, B)):
            if drawn.min() == drawn.max():
                raise VeneerError(f"RandLoRA: the {drawn.numel()} numbers of its random bases are all equal with "
                                  f"seed={self.seed}, so they cannot be divided by their deviation; use a larger rank")
            base.copy_(drawn / drawn.std())

    def _draw(self, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if self.sparsity is None:
            bound = size[-1] ** -0.5
            return torch.empty(size, dtype=torch.bfloat16, device="cpu").uniform_(-bound, bound, generator=generator)
        even = torch.rand(size, dtype=torch.float32, device="cpu", generator=generator)
        edge = 1 / (2 * self.sparsity)
        return (even > 1 - edge).float() - (even < edge).float()


class RandLoRAAdapter(Adapter):
    """lambda_ (*batch, r, n) and gamma (*batch, n, min(out, in))."""

    def __init__(self, method: RandLoRA, shape: Shape, dtype: torch.dtype, shared: Shared | None) -> None:
        super().__init__(shape, method.dropout)
        self.scale, self.init = method.alpha / method.rank, method.init
        shorter = min(shape.out, shape.in_)
        bases = -(-shorter // method.rank)
        self.lambda_ = nn.Parameter(torch.empty(*shape.batch, method.rank, bases, dtype=dtype))
        self.gamma = nn.Parameter(torch.empty(*shape.batch, bases, shorter, dtype=dtype))
        if shared is not None:
            self.use(shared)

    def reset_parameters(self) -> None:
        if self.init == "random":
            normal(self.lambda_, 1.0, self.generator())
            self.gamma.fill_(1 / max(self.shape.out, self.shape.in_))
        else:
            self.lambda_.zero_()
            self.gamma.fill_(1 / max(self.gamma.shape[-2:]))

    def form(self, dtype: torch.dtype | None = None) -> Factors:
        bases = self.shared_state()
        assert isinstance(bases, RandLoRABases)
        count, shorter = self.gamma.shape[-2:]
        A = bases.A[:, 0, :shorter].to(self.gamma.device)
        B = bases.B[:max(self.shape.out, self.shape.in_), :count].flatten(1).to(self.gamma.device)
        if torch.compiler.is_compiling():  # which fuses the plain operations itself
            trained = (self.lambda_.unsqueeze(-1) * A.unsqueeze(-2) * self.gamma.unsqueeze(-3)).flatten(-3, -2)
        else:
            trained = ScaledBases.apply(A, self.lambda_, self.gamma, dtype or self.gamma.dtype)
        B = B.expand(*self.shape.batch, *B.shape)
        if self.shape.in_ <= self.shape.out:
            return Factors(trained, B, self.scale)
        return Factors(B.mT, trained.mT, self.scale)
