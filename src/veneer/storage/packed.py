"""Our own packed linear layer: a weight held as `NormalFloat` (NF4, NF2, NF8), in plain PyTorch on any device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.method import VeneerError
from veneer.storage.base import Storage, check_options
from veneer.storage.normal_float import NormalFloat, encode
from veneer.storage.read_linear import ReadLinear


class PackedLinear(ReadLinear):
    """y = x Wᵀ + bias with W (out, in) held as `NormalFloat`; frozen. Made in place, from an ordinary linear layer, by
    `pack`.

    `weight` holds the codes (uint8). Scales lie in integer buffers whatever they are, so that a cast of the model
    changes what W is read as and not the scales.
    """

    packed_bits: int
    packed_block: int
    weight_scales: Tensor
    weight_outer: Tensor | None

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """W (out, in)."""
        return self.encoded().decode(dtype or self.packed_dtype)

    def encoded(self) -> NormalFloat:
        scales, outer = self.weight_scales, self.weight_outer
        scales = scales.view(torch.float32) if scales.dtype == torch.int32 else scales
        return NormalFloat(self.weight.data, scales, None if outer is None else outer.view(torch.float32),
                           (self.out_features, self.in_features), self.packed_bits, self.packed_block)

    def hold(self, held: NormalFloat) -> None:
        """Take over an encoded weight of this layer's size."""
        self.weight = nn.Parameter(held.codes, requires_grad=False)
        self.packed_bits, self.packed_block = held.bits, held.block
        scales = held.scales
        self.register_buffer("weight_scales", scales.view(torch.int32) if scales.is_floating_point() else scales)
        self.register_buffer("weight_outer", None if held.outer is None else held.outer.view(torch.int32))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {_name(self.packed_bits)}, block={self.packed_block}, {self.packed_dtype}"


def _name(bits: int) -> str:
    return f"nf{bits}"


def refusal(module: nn.Module) -> str | None:
    """Why `pack` cannot take this module, or None."""
    if type(module) is not nn.Linear:
        return f"only an nn.Linear itself is packed, and this is a {type(module).__name__}"
    if module.weight.is_meta:
        return "it is on the meta device and has no values yet"
    return None


@torch.no_grad()
def pack(module: nn.Linear, bits: int = 4, block: int = 64, double: bool = True) -> PackedLinear:
    """Hold the module's weight as `NormalFloat`, in place. Raises `VeneerError` for anything but an `nn.Linear`."""
    return install(module, encode(module.weight.detach(), bits, block, double))


def install(module: nn.Linear, held: NormalFloat) -> PackedLinear:
    """Give the module an encoded weight of its size instead of its own, in place; what it is read as keeps its dtype.

    Raises `VeneerError` for anything but an `nn.Linear`."""
    reason = refusal(module)
    if reason is not None:
        raise VeneerError(f"a layer cannot be packed: {reason}")
    dtype = module.weight.dtype
    module.__class__ = PackedLinear
    assert isinstance(module, PackedLinear)
    module.packed_dtype = dtype
    module.hold(held)
    return module


class Packed(Storage):
    """`PackedLinear`."""

    name = "nf2, nf4, nf8"
    writable = True
    schemes = ("nf4", "nf2", "nf8")

    def check(self, scheme: str, options: Mapping[str, Any]) -> None:
        check_options(scheme, options, ("block", "double"))

    def pack(self, scheme: str, module: Any, options: Mapping[str, Any]) -> nn.Module:
        return pack(module, int(scheme.removeprefix("nf")), **options)

    def claims(self, module: nn.Module) -> bool:
        return isinstance(module, PackedLinear)

    def held_as(self, module: Any) -> str:
        return _name(module.packed_bits)

    def size(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def carrier(self, module: Any) -> Tensor:
        return module._parameters["weight"]

    def dtype(self, module: Any) -> torch.dtype:
        return module.packed_dtype

    def read(self, module: Any, dtype: torch.dtype | None = None) -> Tensor:
        return module.read(dtype)

    def encode(self, module: Any, matrix: Tensor) -> NormalFloat:
        return encode(matrix, module.packed_bits, module.packed_block, module.weight_outer is not None)

    def decode(self, module: Any, held: NormalFloat, dtype: torch.dtype) -> Tensor:
        return held.decode(dtype)

    def swap(self, module: Any, held: NormalFloat) -> NormalFloat:
        before = module.encoded()
        module.hold(held)
        return before

    def takes(self, module: Any, held: Any) -> bool:
        return isinstance(held, NormalFloat) and held.bits == module.packed_bits

    def unpack(self, module: Any, weight: Tensor) -> type[nn.Module]:
        for name in ("weight_scales", "weight_outer"):
            del module._buffers[name]
        for name in ("packed_bits", "packed_block", "packed_dtype"):
            del module.__dict__[name]
        module.weight = nn.Parameter(weight, requires_grad=False)
        return nn.Linear
