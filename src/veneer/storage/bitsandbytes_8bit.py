"""bitsandbytes' `Linear8bitLt`: LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), a scale for every row of W."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.method import VeneerError
from veneer.storage.base import Storage, check_options, class_names, library, make_plain
from veneer.storage.byte_codes import scaled


class BitsAndBytes8Bit(Storage):
    """`Linear8bitLt`. Its forward rounds x to 8 bits too (but for outliers), on a GPU also in training, so that it is
    more than x Wᵀ; its backward takes W as it is read here.
    """

    name = "bitsandbytes 8-bit"
    own_forward = True
    writable = True
    replaces = True
    schemes = ("bnb-int8",)

    def check(self, scheme: str, options: Mapping[str, Any]) -> None:
        check_options(scheme, options, ("threshold",))
        threshold = options.get("threshold", 6.0)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
            raise VeneerError(f"quantize: threshold is a number of at least 0 (inputs beyond it stay in 16 bit; 0 for "
                              f"none), got {threshold!r}")
        library("bitsandbytes", "bitsandbytes")

    def pack(self, scheme: str, module: Any, options: Mapping[str, Any]) -> nn.Module:
        layers: Any = library("bitsandbytes.nn", "bitsandbytes")
        made = layers.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False,
                                   threshold=float(options.get("threshold", 6.0)), device="meta")
        weight = module.weight
        made.weight = layers.Int8Params(weight.detach(), requires_grad=False, has_fp16_weights=False).to(weight.device)
        made.bias = module.bias
        made.held_dtype = weight.dtype
        return made.train(module.training)

    def claims(self, module: nn.Module) -> bool:
        return ("bitsandbytes", "Linear8bitLt") in class_names(module)

    def refusal(self, module: Any) -> str | None:
        if module.state.has_fp16_weights:
            return ("its bitsandbytes layer keeps 16-bit weights and quantises them in every forward "
                    "(has_fp16_weights=True); load it with has_fp16_weights=False")
        if module.weight.dtype != torch.int8:
            return ("its bitsandbytes layer has not been quantised yet: move the model to its device first "
                    "(model.to(device))")
        return None

    def size(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def carrier(self, module: Any) -> Tensor:
        return module._parameters["weight"]

    def nbytes(self, module: Any) -> int:
        scales = _scales(module)
        return super().nbytes(module) + (0 if scales is None else scales.nbytes)

    def dtype(self, module: Any) -> torch.dtype:
        # The library does not remember it. It quantises from fp16.
        bias = module.bias
        return module.__dict__.get("held_dtype", torch.float16 if bias is None else bias.dtype)

    def knows_dtype(self, module: Any) -> bool:
        return "held_dtype" in module.__dict__ or module.bias is not None

    def read(self, module: Any, dtype: torch.dtype | None = None) -> Tensor:
        return self.decode(module, (module._parameters["weight"].data, _scales(module)), dtype or self.dtype(module))

    def encode(self, module: Any, matrix: Tensor) -> tuple[Tensor, Tensor]:
        functional: Any = library("bitsandbytes.functional", "bitsandbytes")
        codes, scales, _ = functional.int8_vectorwise_quant(matrix.to(torch.float16).contiguous())
        return codes, scales

    def decode(self, module: Any, held: tuple[Tensor, Tensor | None], dtype: torch.dtype) -> Tensor:
        codes, scales = held
        if scales is None:
            raise VeneerError("a bitsandbytes 8-bit layer has lost its scales (SCB): load the model again")
        # As its backward does it: in fp32, rounded once.
        factors = scales.float().mul(1 / 127).unsqueeze(1)
        if codes.device.type == "cpu":
            return scaled(codes, factors, dtype)
        return torch.mul(codes, factors, out=torch.empty(codes.shape, dtype=dtype, device=codes.device))

    def swap(self, module: Any, held: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        weight = module._parameters["weight"]
        before = weight.data, _scales(module)
        weight.data, scales = held
        weight.CB, weight.SCB = weight.data, scales  # taken over by the next forward
        module.state.CB = module.state.SCB = None
        return before

    def unpack(self, module: Any, weight: Tensor) -> type[nn.Module]:
        for key, hook in list(module._load_state_dict_pre_hooks.items()):
            if hook.hook.__module__.startswith("bitsandbytes"):
                del module._load_state_dict_pre_hooks[key]
        return make_plain(module, weight, self.size(module), ("weight", "state", "index", "held_dtype"))


def _scales(module: Any) -> Tensor | None:
    """fp32 (out,), which the layer's first forward moves from the parameter to its state."""
    scales = module._parameters["weight"].__dict__.get("SCB")
    return module.state.SCB if scales is None else scales
