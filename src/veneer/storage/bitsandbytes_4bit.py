"""bitsandbytes' `Linear4bit`: NF4 or FP4 in blocks, with scales that may be quantised too (Dettmers et al. 2023,
arXiv:2305.14314)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.method import VeneerError
from veneer.storage.base import Storage, check_options, class_names, library, make_plain

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class BitsAndBytes4Bit(Storage):
    """`Linear4bit` and what derives from it; `weight` holds the codes, its `quant_state` all else."""

    name = "bitsandbytes 4-bit"
    writable = True
    replaces = True
    schemes = ("bnb-nf4", "bnb-fp4")

    def check(self, scheme: str, options: Mapping[str, Any]) -> None:
        check_options(scheme, options, ("block", "double"))
        if options.get("block", 64) not in _BLOCKS:
            raise VeneerError(f"quantize: {scheme!r} has blocks of {', '.join(map(str, _BLOCKS))} elements, "
                              f"got block={options['block']!r}")
        library("bitsandbytes", "bitsandbytes")

    def pack(self, scheme: str, module: Any, options: Mapping[str, Any]) -> nn.Module:
        layers: Any = library("bitsandbytes.nn", "bitsandbytes")
        weight, double = module.weight, options.get("double", True)
        made = layers.Linear4bit(module.in_features, module.out_features, bias=False, compress_statistics=double,
                                 quant_type=scheme.removeprefix("bnb-"), device="meta")
        held = layers.Params4bit(weight.detach(), requires_grad=False, compress_statistics=double,
                                 quant_type=scheme.removeprefix("bnb-"), blocksize=options.get("block", 64))
        made.weight = held.to(weight.device)
        made.quant_state = made.weight.quant_state
        made.bias = module.bias
        # Some CPUs would lay the weight out anew in the first evaluation and round its scales to bf16, for good.
        made.support_avx512bf16_for_cpu = False
        return made.train(module.training)

    def claims(self, module: nn.Module) -> bool:
        return ("bitsandbytes", "Linear4bit") in class_names(module)

    def refusal(self, module: nn.Module) -> str | None:
        if _state(module) is None:
            return ("its bitsandbytes layer has not been quantised yet: move the model to its device first "
                    "(model.to(device))")
        return None

    def size(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def carrier(self, module: Any) -> Tensor:
        return module._parameters["weight"]

    def nbytes(self, module: nn.Module) -> int:
        state = _state(module)
        scales = [] if state is None else [state.absmax, *([state.state2.absmax] if state.nested else [])]
        return super().nbytes(module) + sum(tensor.nbytes for tensor in scales)

    def dtype(self, module: Any) -> torch.dtype:
        state = _state(module)
        return module.weight.dtype if state is None else state.dtype

    def compute_dtype(self, module: Any, dtype: torch.dtype) -> torch.dtype:
        chosen = module.compute_dtype
        return dtype if chosen is None or not module.compute_type_is_set else chosen

    def casts_back(self, module: nn.Module) -> bool:
        return True

    def read(self, module: Any, dtype: torch.dtype | None = None) -> Tensor:
        return self.decode(module, (module._parameters["weight"].data, _state(module)), dtype or self.dtype(module))

    def forward(self, module: Any, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        # See `pack`: an adapted weight stays what its adapters were trained on.
        before = module.__dict__.get("support_avx512bf16_for_cpu", False)
        if not before:
            return own(x)
        module.support_avx512bf16_for_cpu = False
        try:
            return own(x)
        finally:
            module.support_avx512bf16_for_cpu = before

    def encode(self, module: Any, matrix: Tensor) -> tuple[Tensor, Any]:
        state = _state(module)
        functional: Any = library("bitsandbytes.functional", "bitsandbytes")
        codes, made = functional.quantize_4bit(
            matrix.contiguous(), blocksize=state.blocksize, compress_statistics=state.nested,
            quant_type=state.quant_type, quant_storage=module.quant_storage)
        made.dtype = self.dtype(module)
        return codes, made

    def decode(self, module: Any, held: tuple[Tensor, Any], dtype: torch.dtype) -> Tensor:
        codes, state = held
        if state.__dict__.get("packing_format_for_cpu", False):
            return _from_cpu_layout(codes, state, dtype)
        functional: Any = library("bitsandbytes.functional", "bitsandbytes")
        wanted = copy.copy(state)
        wanted.dtype = dtype  # decoded to, and rounded once
        return functional.dequantize_4bit(codes, wanted)

    def swap(self, module: Any, held: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        weight = module._parameters["weight"]
        before = weight.data, _state(module)
        weight.data, weight.quant_state = held
        module.quant_state = weight.quant_state
        return before

    def unpack(self, module: Any, weight: Tensor) -> type[nn.Module]:
        return make_plain(module, weight, self.size(module), (
            "weight", "quant_state", "quant_storage", "compute_dtype", "compute_type_is_set",
            "support_avx512bf16_for_cpu"))


def _state(module: Any) -> Any:
    """bitsandbytes' `QuantState`; sharding may take it off the parameter, and then the layer has it."""
    state = module._parameters["weight"].__dict__.get("quant_state")
    return module.__dict__.get("quant_state") if state is None else state


def _from_cpu_layout(codes: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """The weight from the layout that an evaluation on a CPU with AVX512-BF16 leaves behind.

    There, 32 rows lie side by side: codes (out/32, in/2, 32, 2), of which the first half of every 64 is in the low
    bits of 32 bytes and the other in the high bits; scales (in/block, out) in bf16.
    """
    out, in_ = state.shape
    pairs = codes.reshape(-1, 32)
    both = torch.stack([pairs & 15, pairs >> 4], 1).view(out // 32, in_ // 2, 32, 2)
    rows = both.transpose(1, 2).reshape(out, -1, state.blocksize)
    values = state.code.float().index_select(0, rows.reshape(-1).int()).view(rows.shape)
    return values.mul_(state.absmax.float().T.unsqueeze(-1)).to(dtype).view(out, in_)
