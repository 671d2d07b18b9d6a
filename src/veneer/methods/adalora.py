"""AdaLoRA: W' = W + s·B·diag(E)·A, with triplets (a column of B, an element of E, a row of A) cut away while training
until a budget of ranks is left, spread over the weights as they need it (Zhang et al. 2023, arXiv:2303.10512).

The method and its parameters; the budget itself is in `veneer.budget`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from veneer.budget.allocator import Allocator
from veneer.budget.arithmetic import Schedule
from veneer.budget.member import Member
from veneer.forms import Factors
from veneer.inits.random import check_choice, normal
from veneer.method import Method, Shape, Shared, VeneerError, check_positive_int, check_probability, register
from veneer.methods.options import as_dtype, check_number


@register("adalora")
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """Adaptive budget LoRA. All weights with this very method share one budget, target_r ranks for each on average.

    init_r, target_r: ranks at the start, and on average in the end. alpha: scale is alpha/init_r; None means 1.
    total_step: optimizer steps of the whole run; `veneer train` fills it in, else training without it is an error.
    tinit: steps before the first cut; None: a tenth of total_step. tfinal: steps after the last; None: three tenths.
    deltaT: steps from one cut to the next; in between, what was cut may grow again. beta1, beta2: of the running
    averages by which triplets are judged. orth_reg_weight: of the term that keeps A's rows and B's columns
    orthogonal; it is added to gradients as the optimizer steps. dropout, dtype: as for LoRA.
    init: "zero", what E starts at, with small A and B; "random": all from N(0, 1), so that the model begins changed.

    Optimizers of torch need nothing more. Each of their steps counts, from 1; one that a GradScaler skips does not. For
    others there is `veneer.update_and_allocate`. An adapter loaded with its final ranks keeps them when trained on.
    """

    training_only = (*Method.training_only, "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2",
                     "orth_reg_weight", "total_step")
    init_r: int = 12
    target_r: int = 8
    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    dtype: torch.dtype | None = None
    init: str = "zero"

    def __post_init__(self) -> None:
        for field in ("init_r", "target_r", "deltaT"):
            check_positive_int("AdaLoRA", field, getattr(self, field))
        for field in ("beta1", "beta2", "orth_reg_weight", "dropout"):
            check_number("AdaLoRA", field, getattr(self, field))
        check_probability("AdaLoRA", "dropout", self.dropout)
        check_choice("AdaLoRA", "init", self.init, ("zero", "random"))
        if self.alpha is not None:
            check_number("AdaLoRA", "alpha", self.alpha, also=" or None")
        if self.target_r > self.init_r:
            raise VeneerError(f"AdaLoRA: target_r={self.target_r} is above init_r={self.init_r}; ranks are only cut")
        if not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise VeneerError(f"AdaLoRA: beta1 and beta2 must lie between 0 and 1, got {self.beta1} and {self.beta2}")
        if self.orth_reg_weight < 0:
            raise VeneerError(f"AdaLoRA: orth_reg_weight must be at least 0, got {self.orth_reg_weight}")
        self._check_steps()
        object.__setattr__(self, "dtype", as_dtype("AdaLoRA", self.dtype))

    def _check_steps(self) -> None:
        if self.total_step is not None:
            check_positive_int("AdaLoRA", "total_step", self.total_step)
        for field in ("tinit", "tfinal"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise VeneerError(f"AdaLoRA: {field} must be a whole number of at least 0 or None, got {value!r}")
        plan = self.schedule
        if plan is not None and plan.start >= plan.end:
            raise VeneerError(f"AdaLoRA: no steps are left to cut ranks in: of total_step={self.total_step}, the first "
                              f"tinit={plan.start} and the last tfinal={plan.total - plan.end} are without cuts")

    @property
    def schedule(self) -> Schedule | None:
        """When how much is cut; None while total_step is."""
        total = self.total_step
        if total is None:
            return None
        start = total // 10 if self.tinit is None else self.tinit
        final = 3 * total // 10 if self.tfinal is None else self.tfinal
        return Schedule(start, total - final, total, self.deltaT)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.init_r

    @property
    def uses_input(self) -> bool:
        return self.dropout > 0

    def scheduled(self, steps: int) -> Method:
        return self if self.total_step is not None else dataclasses.replace(self, total_step=steps)

    def shared(self, dtype: torch.dtype) -> Allocator:
        return Allocator(self)

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> AdaLoRAAdapter:
        return AdaLoRAAdapter(self, shape, self.dtype or dtype, shared)

    def describe(self, tensors: Mapping[str, Tensor]) -> str:
        if "mask" not in tensors:
            return ""
        ranks = tensors["mask"].sum(-1)
        low, high = int(ranks.min()), int(ranks.max())
        return f"rank {low} of {self.init_r}" if low == high else f"ranks {low} to {high} of {self.init_r}"


class AdaLoRAAdapter(Member):
    """A (*batch, r, in), E (*batch, r), B (*batch, out, r); mask (*batch, r): the triplets that the last cut left."""

    def __init__(self, method: AdaLoRA, shape: Shape, dtype: torch.dtype, shared: Shared | None) -> None:
        super().__init__(shape, method.dropout)
        self.scale, self.init = method.scale, method.init
        self.A = nn.Parameter(torch.empty(*shape.batch, method.init_r, shape.in_, dtype=dtype))
        self.E = nn.Parameter(torch.empty(*shape.batch, method.init_r, dtype=dtype))
        self.B = nn.Parameter(torch.empty(*shape.batch, shape.out, method.init_r, dtype=dtype))
        self.register_buffer("mask", torch.empty(*shape.batch, method.init_r, dtype=torch.bool))
        if shared is not None:
            self.use(shared)

    def reset_parameters(self) -> None:
        generator = self.generator()
        std = 1.0 if self.init == "random" else 0.02
        normal(self.A, std, generator)
        normal(self.B, std, generator)
        if self.init == "random":
            normal(self.E, std, generator)
        else:
            self.E.zero_()
        self.mask.fill_(True)

    def form(self, dtype: torch.dtype | None = None) -> Factors:
        return Factors(self.A, self.B, self.scale, self.E)

    def rank(self) -> Tensor:
        """How many triplets are kept, (*batch,)."""
        return self.mask.sum(-1)

    def fast_parameters(self) -> list[str]:
        return ["B"]
