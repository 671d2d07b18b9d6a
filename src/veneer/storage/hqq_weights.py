"""HQQ's `HQQLinear`: half-quadratic quantisation, W = (q − zero)·scale in groups (Badri & Shaji 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.method import VeneerError, check_positive_int
from veneer.storage.base import Storage, check_options, class_names, library, make_plain

_BITS = (8, 6, 5, 4, 3, 2, 1)
#: what `HQQLinear` keeps on itself besides what every module has
_OWN = ("W_q", "meta", "ready", "in_gpu", "axis", "channel_wise", "device", "compute_dtype", "quant_config", "del_orig",
        "offload_meta", "linear_layer", "encoded_state_dict")


class HQQWeights(Storage):
    """`HQQLinear`, which is no `nn.Linear`: W_q holds the codes, `meta` all else, and the bias is a tensor or a
    parameter. It computes in its own dtype, whatever its input has."""

    name = "hqq"
    writable = True
    replaces = True
    schemes = tuple(f"hqq-{bits}" for bits in _BITS)

    def check(self, scheme: str, options: Mapping[str, Any]) -> None:
        check_options(scheme, options, ("group_size",))
        group = options.get("group_size", 64)
        check_positive_int("quantize", "group_size", group)
        if group % 8:
            raise VeneerError(f"quantize: the group_size of {scheme!r} is a multiple of 8, got {group}")
        library("hqq.core.quantize", "hqq")

    def unfit(self, scheme: str, module: Any, options: Mapping[str, Any]) -> str | None:
        group = options.get("group_size", 64)
        size = module.weight.numel()
        return f"its {size:,} numbers are no multiple of group_size={group}" if size % group else None

    def pack(self, scheme: str, module: Any, options: Mapping[str, Any]) -> nn.Module:
        hqq: Any = library("hqq.core.quantize", "hqq")
        bits, group = int(scheme.removeprefix("hqq-")), options.get("group_size", 64)
        config = hqq.BaseQuantizeConfig(nbits=bits, group_size=group, axis=1)
        made = hqq.HQQLinear(module, config, compute_dtype=module.weight.dtype, device=str(module.weight.device),
                             del_orig=False)
        del made.linear_layer
        made.bias = module.bias
        return made.train(module.training)

    def claims(self, module: Any) -> bool:
        return ("hqq", "HQQLinear") in class_names(module) and bool(module.ready)  # one that is not has not even a size

    def size(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def carrier(self, module: Any) -> Tensor:
        return module.W_q

    def nbytes(self, module: Any) -> int:
        parts = [value for value in module.meta.values() if isinstance(value, Tensor)]
        bias = [] if module.bias is None else [module.bias]
        return sum(part.nbytes for part in (module.W_q, *parts, *bias))

    def dtype(self, module: Any) -> torch.dtype:
        return module.compute_dtype

    def compute_dtype(self, module: Any, dtype: torch.dtype) -> torch.dtype:
        return module.compute_dtype

    def read(self, module: Any, dtype: torch.dtype | None = None) -> Tensor:
        return module.dequantize().to(dtype or module.compute_dtype)

    def encode(self, module: Any, matrix: Tensor) -> tuple[Tensor, dict[str, Any]]:
        hqq: Any = library("hqq.core.quantize", "hqq")
        meta = module.meta
        if meta["quant_scale"] or meta["quant_zero"]:
            raise VeneerError("an HQQ layer whose scales are quantised cannot be quantised again; merge it into dense "
                              "numbers")
        settings = {name: meta[name] for name in ("nbits", "group_size", "axis", "view_as_float")}
        codes, made = hqq.Quantizer.quantize(matrix, device=str(matrix.device), compute_dtype=module.compute_dtype,
                                             round_zero=meta["nbits"] == 4, **settings)
        kept = {name: value for name, value in meta.items() if name not in made}
        return codes, {**kept, **made, "compute_dtype": module.compute_dtype,
                       "scale": made["scale"].to(meta["scale"]), "zero": made["zero"].to(meta["zero"])}

    def decode(self, module: Any, held: tuple[Tensor, dict[str, Any]], dtype: torch.dtype) -> Tensor:
        hqq: Any = library("hqq.core.quantize", "hqq")
        return hqq.Quantizer.dequantize(*held).to(dtype)

    def swap(self, module: Any, held: tuple[Tensor, dict[str, Any]]) -> tuple[Tensor, dict[str, Any]]:
        before = module.W_q.data, module.meta
        module.W_q, module.meta = nn.Parameter(held[0], requires_grad=False), held[1]
        return before

    def unpack(self, module: Any, weight: Tensor) -> type[nn.Module]:
        return make_plain(module, weight, self.size(module), _OWN)
