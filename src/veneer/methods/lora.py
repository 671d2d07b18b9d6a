"""LoRA: W' = W + s·B·A, with s = α/r (Hu et al. 2021, arXiv:2106.09685) or, rank-stabilised, s = α/√r
(Kalajdzievski 2023, arXiv:2312.03732).

Where the start A₀, B₀ is not zero (PiSSA, say), W' = W + s·(B·A − B₀·A₀), so that training starts at W itself: the
adapter keeps the starting pair. It is computed as s·(B·(A − A₀) + (B − B₀)·A₀), one pair of rank 2r. Both differences
are exactly 0 at the start, and small changes are not lost in 16 bit.
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
from veneer.inits import Init, Started, make_init
from veneer.inits.random import check_choice
from veneer.method import (
    Adapter,
    Method,
    Need,
    NewBase,
    Shape,
    Shared,
    VeneerError,
    check_positive_int,
    check_probability,
    register,
    without_autocast,
)
from veneer.methods.options import as_dtype, check_bool, check_number
from veneer.methods.starting_pair import doubled, doubled_alpha, halved

_BIAS_HINT = '. To train the biases of the base, as PEFT\'s bias="all" does, add the rule {"*.bias": Full()}'


@register("lora")
@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation.

    rank: r, the inner width of the pair. A rank above min(out, in) only wastes parameters and is allowed, except with
    starts by a decomposition of W.
    alpha: scale is alpha/rank; None means alpha = rank, a scale of 1.
    rank_stabilized: scale is alpha/√rank instead.
    dropout: probability of zeroing an element on the adapter's path, in training mode only.
    dropout_on: elements of what: "input", x of s·B·A·x as usual, or "output", all of s·B·A·x (as in NeMo).
    dtype: of the adapter's parameters, or its name; None = fp32 over a 16-bit base, else the base's.
    init: what A and B start from: a name ("kaiming", "pissa", "torch.nn.init.xavier_normal_", …), a start with options
    (`veneer.inits`), or a mapping of them ({"init": "loftq", "bits": 4}). See docs/inits.md.
    residual: where the start is not zero, "exact" keeps the base as it is and subtracts the starting pair in the
    adapter, so that the model's output is unchanged bit for bit; "base" writes W − s·B₀·A₀ over the base weight,
    rounded to its dtype; "none" subtracts it nowhere: the output begins changed by s·B₀·A₀·x.
    bias: also train an addition to the layer's bias (starts at zero).
    """

    training_only = (*Method.training_only, "dropout_on", "residual")
    rank: int = 8
    alpha: float | None = None
    rank_stabilized: bool = False
    dropout: float = 0.0
    dropout_on: str = "input"
    dtype: torch.dtype | None = None
    init: str | Init | Mapping[str, Any] = "kaiming"
    residual: str = "exact"
    bias: bool = False

    def __post_init__(self) -> None:
        check_positive_int("LoRA", "rank", self.rank)
        check_number("LoRA", "dropout", self.dropout)
        check_probability("LoRA", "dropout", self.dropout)
        check_choice("LoRA", "dropout_on", self.dropout_on, ("input", "output"))
        start = make_init(self.init, "LoRA")
        object.__setattr__(self, "init", start.short() or start)
        check_choice("LoRA", "residual", self.residual, ("exact", "base", "none"))
        if self.alpha is not None:
            check_number("LoRA", "alpha", self.alpha, also=" or None")
        check_bool("LoRA", "rank_stabilized", self.rank_stabilized)
        check_bool("LoRA", "bias", self.bias, hint=_BIAS_HINT if isinstance(self.bias, str) else "")
        object.__setattr__(self, "dtype", as_dtype("LoRA", self.dtype))

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    @property
    def start_rule(self) -> Init:
        """What `init` stands for."""
        return make_init(self.init, "LoRA")

    @property
    def uses_input(self) -> bool:
        return self.dropout > 0

    @property
    def adds_bias(self) -> bool:
        return self.bias

    @property
    def needs(self) -> str | None:
        return self.start_rule.needs

    @property
    def need(self) -> Need | None:
        return self.start_rule.need(self.rank)

    @property
    def moves_base(self) -> bool:
        rule = self.start_rule
        return rule.rebases or (rule.moves and self.residual == "base")

    def portioned(self, evidence: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Method | None]:
        ranks = self.start_rule.ranks(evidence, self.rank)
        return {name: self._of_rank(rank) if rank else None for name, rank in ranks.items()}

    def _of_rank(self, rank: int) -> LoRA:
        """With another rank, and the same scale where the start asks for that, else the same alpha."""
        alpha = self.alpha
        if rank != self.rank and not self.start_rule.keeps_scale:
            alpha = self.rank if alpha is None else alpha  # None would follow the rank
        elif rank != self.rank and (alpha is not None or self.rank_stabilized):
            alpha = self.scale * (math.sqrt(rank) if self.rank_stabilized else rank)
        return dataclasses.replace(self, rank=rank, alpha=alpha)

    def refusal(self, shape: Shape) -> str | None:
        return super().refusal(shape) or self.start_rule.refusal(shape, self.rank)

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> LoRAAdapter:
        return LoRAAdapter(self, shape, self.dtype or dtype)

    def plain(self, tensors: Mapping[str, Tensor]) -> tuple[Method, Mapping[str, Tensor]]:
        if "start_A" not in tensors:
            return self, tensors
        method = dataclasses.replace(self, init="kaiming", residual="exact")
        pair = tensors["A"], tensors["B"]
        if self.residual == "exact":
            alpha, stabilized = doubled_alpha(self.rank, self.scale, self.alpha, self.rank_stabilized)
            method = dataclasses.replace(method, rank=2 * self.rank, alpha=alpha, rank_stabilized=stabilized)
            pair = doubled(*pair, tensors["start_A"], tensors["start_B"])
        rest = {name: tensor for name, tensor in tensors.items() if not name.startswith("start_")}
        return method, {**rest, "A": pair[0], "B": pair[1]}

    def regained(self, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
        if "start_A" not in own:
            return None if "start_A" in tensors else tensors
        start = {name: own[name] for name in ("start_A", "start_B")}
        if "start_A" in tensors:
            same = all(torch.equal(tensors[name], tensor) for name, tensor in start.items())
            return tensors if same or self.residual == "exact" else None
        pair = halved(tensors["A"], tensors["B"], *start.values())
        return None if pair is None else {**tensors, **start, "A": pair[0], "B": pair[1]}

    def unmoved(self) -> Method:
        if self.residual == "none" or not self.start_rule.moves:
            return self
        return dataclasses.replace(self, residual="exact")


class LoRAAdapter(Adapter):
    """A (*batch, r, in), B (*batch, out, r) and, if asked for, an additional bias (out,); of a start that is not zero
    also the starting pair, start_A and start_B, as buffers."""

    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, method: LoRA, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__(shape, method.dropout)
        self.dropout_on = method.dropout_on
        self.scale = method.scale
        self.rank = method.rank
        self.rule = rule = method.start_rule
        self.residual = method.residual
        self.needs_weight = rule.from_weight or rule.needs is not None or method.moves_base
        self.A = nn.Parameter(torch.empty(*shape.batch, method.rank, shape.in_, dtype=dtype))
        self.B = nn.Parameter(torch.empty(*shape.batch, shape.out, method.rank, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(*shape.batch, shape.out, dtype=dtype)) if method.bias else None
        carried = rule.moves and not rule.rebases and method.residual != "none"
        for name, pair in (("start_A", self.A), ("start_B", self.B)):
            self.register_buffer(name, torch.empty_like(pair, requires_grad=False) if carried else None)

    def reset_parameters(self) -> None:
        if self.bias is not None:
            self.bias.zero_()
        if self.needs_weight:  # until then it changes nothing
            for tensor in (self.A, self.B, self.start_A, self.start_B):
                if tensor is not None:
                    tensor.zero_()
        else:
            self._begin(None)

    def start(self, weight: Tensor) -> NewBase | None:
        began = self._begin(weight)
        if began.base is not None:
            return NewBase(began.base, began.packed)
        if self.residual == "base" and self.start_A is not None:
            wide = torch.promote_types(weight.dtype, torch.float32)
            return NewBase(weight.to(wide) - Factors(self.A.to(wide), self.B.to(wide), self.scale).dense())
        return None

    def _begin(self, weight: Tensor | None) -> Started:
        wide = weight.float() if weight is not None and self.rule.from_weight else None
        try:
            with without_autocast(self.A):  # also when `to_empty` fills what was attached on the meta device
                began = self.rule.stack(wide, self.shape, self.rank, self.scale, self.generator(), self.evidence)
        except VeneerError as error:
            raise VeneerError(f"{self.seed_key.partition('/')[2]!r}: {error}") from error
        self.remark = began.remark
        for tensor, value in ((self.A, began.A), (self.B, began.B), (self.start_A, began.A), (self.start_B, began.B)):
            if tensor is not None:
                tensor.copy_(value)
        return began

    def form(self, dtype: torch.dtype | None = None) -> Factors:
        if self.start_A is None or self.start_B is None or self.residual == "base":
            return Factors(self.A, self.B, self.scale)
        return Factors(*doubled(self.A, self.B, self.start_A, self.start_B), self.scale)

    def progress(self) -> dict[str, Tensor]:
        return {} if self.start_A is None else {"A": self.A.detach()}  # the plain form has A − A₀, rounded

    def resume(self, progress: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.A.copy_(progress["A"])

    def bias_delta(self) -> Tensor | None:
        return self.bias

    def fast_parameters(self) -> list[str]:
        return ["B"] if self.bias is None else ["B", "bias"]
