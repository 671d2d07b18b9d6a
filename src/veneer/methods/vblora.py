"""VB-LoRA: LoRA whose A and B are put together from sub-vectors of one bank that all weights share (Li et al. 2024,
arXiv:2405.15179).

Each sub-vector is a mixture of the top k of the bank's vectors, weighted by the softmax of their k logits. The bank and
the logits are trained. By its definition the change is not zero at the start: PEFT's and the paper's starts are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from veneer.forms import Factors
from veneer.inits.random import normal, uniform
from veneer.method import (
    Adapter,
    Method,
    Shape,
    Shared,
    VeneerError,
    check_positive_int,
    check_probability,
    register,
    seeded_generator,
)
from veneer.methods.options import as_dtype, check_bool, check_number

_LOGITS = ("logits_A", "logits_B")
_NARROW = (torch.uint8, torch.int16, torch.int32, torch.int64)


@register("vblora")
@dataclass(frozen=True, kw_only=True)
class VBLoRA(Method):
    """LoRA from a vector bank.

    rank: r of the pair, whose scale is 1. num_vectors, vector_length: the bank. A size that vector_length does not
    divide has its last sub-vector cut off. topk: how many vectors a sub-vector mixes. dropout, dtype: as for LoRA.
    init_vector_bank_bound: the bank starts uniform within ± this; init_logits_std: of the normal logits.
    save_only_topk_weights: save the top k indices and weights instead of all logits: a small file, from which the
    adapter can be used and merged but not trained on.
    """

    training_only = (*Method.training_only, "init_vector_bank_bound", "init_logits_std")
    rank: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1
    save_only_topk_weights: bool = False
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for field in ("rank", "num_vectors", "vector_length", "topk"):
            check_positive_int("VBLoRA", field, getattr(self, field))
        if self.topk > self.num_vectors:
            raise VeneerError(f"VBLoRA: topk={self.topk} of a bank of num_vectors={self.num_vectors}")
        for field in ("dropout", "init_vector_bank_bound", "init_logits_std"):
            check_number("VBLoRA", field, getattr(self, field))
        check_probability("VBLoRA", "dropout", self.dropout)
        check_bool("VBLoRA", "save_only_topk_weights", self.save_only_topk_weights)
        object.__setattr__(self, "dtype", as_dtype("VBLoRA", self.dtype))

    @property
    def uses_input(self) -> bool:
        return self.dropout > 0

    def shared(self, dtype: torch.dtype) -> VectorBank:
        return VectorBank(self, self.dtype or torch.promote_types(dtype, torch.float32))

    def build(self, shape: Shape, dtype: torch.dtype, shared: Shared | None = None) -> VBLoRAAdapter:
        return VBLoRAAdapter(self, shape, self.dtype or dtype, shared)


class VectorBank(Shared):
    """bank (num_vectors, vector_length)."""

    def __init__(self, method: VBLoRA, dtype: torch.dtype) -> None:
        super().__init__()
        self.bound = method.init_vector_bank_bound
        self.bank = nn.Parameter(torch.empty(method.num_vectors, method.vector_length, dtype=dtype))

    def reset(self) -> None:
        uniform(self.bank, self.bound, seeded_generator(self.seed_key))


class VBLoRAAdapter(Adapter):
    """logits_A (*batch, r, ⌈in/length⌉, num_vectors) and logits_B (*batch, ⌈out/length⌉, r, num_vectors)."""

    identity_at_start = False

    def __init__(self, method: VBLoRA, shape: Shape, dtype: torch.dtype, shared: Shared | None) -> None:
        super().__init__(shape, method.dropout)
        self.topk, self.std, self.compact = method.topk, method.init_logits_std, method.save_only_topk_weights
        self.cut = False  # what was loaded had lost all but its top k logits
        tiles = [-(-size // method.vector_length) for size in (shape.in_, shape.out)]
        a, b = (*shape.batch, method.rank, tiles[0]), (*shape.batch, tiles[1], method.rank)
        self.logits_A, self.logits_B = (
            nn.Parameter(torch.empty(*size, method.num_vectors, dtype=dtype)) for size in (a, b))
        if shared is not None:
            self.use(shared)

    def reset_parameters(self) -> None:
        generator = self.generator()
        for logits in (self.logits_A, self.logits_B):
            normal(logits, self.std, generator)

    def form(self, dtype: torch.dtype | None = None) -> Factors:
        if self.cut and self.training and torch.is_grad_enabled():
            raise VeneerError("this VB-LoRA adapter was loaded from its top k weights only (save_only_topk_weights): "
                              "the other logits are gone, so it can be used and merged, not trained; call "
                              "model.eval(), or train on from a file with all logits")
        A = self._mixed(self.logits_A).flatten(-2)[..., :self.shape.in_]
        B = self._mixed(self.logits_B).mT.flatten(-3, -2)[..., :self.shape.out, :]
        return Factors(A, B)

    def _mixed(self, logits: Tensor) -> Tensor:
        bank = self.shared_state()
        assert isinstance(bank, VectorBank)
        top, index = logits.topk(self.topk, dim=-1)
        vectors = F.embedding(index, bank.bank.to(logits.device))
        return (top.softmax(-1).unsqueeze(-1) * vectors).sum(-2)

    def packed(self) -> dict[str, Tensor]:
        state = super().packed()
        for name in _LOGITS if self.compact else ():
            top, index = state.pop(name).topk(self.topk, dim=-1)
            narrow = next(d for d in _NARROW if self.logits_A.shape[-1] <= torch.iinfo(d).max)
            state |= {f"{name}_indices": index.to(narrow), f"{name}_weights": top.softmax(-1)[..., :-1]}
        return state

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        state = {k: t for k, t in tensors.items() if not k.endswith(("_indices", "_weights"))}
        for name in _LOGITS:
            if f"{name}_indices" in tensors:
                weights = tensors[f"{name}_weights"]
                weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1).clamp_min(0)
                logits = torch.full(self.get_parameter(name).shape, -torch.inf, dtype=weights.dtype)
                state[name] = logits.scatter(-1, tensors[f"{name}_indices"].long(), weights.log())
        super().unpack(state)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.cut = any(not t.is_meta and bool(t.isneginf().any()) for t in (self.logits_A, self.logits_B))
