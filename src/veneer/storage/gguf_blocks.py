"""Weights that stay the blocks of a GGUF file: a linear layer of ours, and transformers' `GgufLinear`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.method import VeneerError
from veneer.storage.base import Storage, check_options, class_names, library, make_plain
from veneer.storage.gguf_codec import decode, encode, kind_of
from veneer.storage.read_linear import ReadLinear, read_linear

#: schemes of `veneer.quantize` → ggml's type numbers
_SCHEMES = {"gguf-q8_0": 8, "gguf-q5_1": 7, "gguf-q5_0": 6, "gguf-q4_1": 3, "gguf-q4_0": 2}
#: transformers hands so few rows to a kernel for GPUs, which a CPU does not have
_KERNEL_ROWS = 8


class BlockLinear(ReadLinear):
    """y = x Wᵀ + bias with W (out, in) held as GGUF blocks; made in place by `gguf_linear`.

    `weight` is uint8 (out, bytes of a row), the bytes of the file; `ggml_type` says what they are.
    """

    ggml_type: int

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        return decode(self.weight.data, self.ggml_type, dtype or self.packed_dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {kind_of(self.ggml_type).name}, {self.packed_dtype}"


def gguf_linear(module: nn.Linear, blocks: Tensor, ggml_type: int) -> BlockLinear:
    """Hold the weight of an `nn.Linear`, which may be on the meta device, as the blocks of a GGUF file, in place.

    blocks: uint8, any shape of out rows; ggml_type: ggml's number for their kind. What the weight is read as keeps the
    dtype of the module's. A row of W is a row of blocks, so that outputs can be reordered (as Llama's q and k are in
    such files) by indexing the blocks; inputs cannot.
    Raises `VeneerError` for another class of module, an unknown type, or blocks that do not fit its size.
    """
    if type(module) is not nn.Linear:
        raise VeneerError(f"gguf_linear: only an nn.Linear itself can hold GGUF blocks, and this is a "
                          f"{type(module).__name__}")
    kind, (out, in_) = kind_of(ggml_type), (module.out_features, module.in_features)
    if blocks.dtype != torch.uint8 or in_ % kind.numbers or blocks.numel() != out * in_ // kind.numbers * kind.bytes:
        raise VeneerError(f"gguf_linear: a weight ({out}, {in_}) in {kind.name} is uint8 blocks of {kind.bytes} bytes "
                          f"for {kind.numbers} numbers each, and does not fit {tuple(blocks.shape)} {blocks.dtype}")
    dtype = module.weight.dtype
    module.__class__ = BlockLinear
    assert isinstance(module, BlockLinear)
    module.packed_dtype, module.ggml_type = dtype, int(ggml_type)
    module.weight = nn.Parameter(blocks.reshape(out, -1), requires_grad=False)
    return module


class GGUFBlocks(Storage):
    """`BlockLinear`, and transformers' `GgufLinear`, whose forward needs a kernel for GPUs."""

    name = "gguf"
    own_gradient = False  # that of transformers' kernel
    writable = True
    schemes = tuple(_SCHEMES)

    def check(self, scheme: str, options: Mapping[str, Any]) -> None:
        check_options(scheme, options, ())
        library("gguf", "gguf")

    def unfit(self, scheme: str, module: Any, options: Mapping[str, Any]) -> str | None:
        numbers = kind_of(_SCHEMES[scheme]).numbers
        return f"its {module.in_features} inputs are no multiple of a block's {numbers}" \
            if module.in_features % numbers else None

    def pack(self, scheme: str, module: Any, options: Mapping[str, Any]) -> nn.Module:
        return gguf_linear(module, encode(module.weight.detach(), _SCHEMES[scheme]), _SCHEMES[scheme])

    def claims(self, module: nn.Module) -> bool:
        return isinstance(module, BlockLinear) or ("transformers", "GgufLinear") in class_names(module)

    def size(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def carrier(self, module: Any) -> Tensor:
        return module._parameters["weight"]

    def dtype(self, module: Any) -> torch.dtype:
        if isinstance(module, BlockLinear):
            return module.packed_dtype
        return torch.get_default_dtype() if module.bias is None else module.bias.dtype

    def knows_dtype(self, module: Any) -> bool:
        return isinstance(module, BlockLinear) or module.bias is not None

    def casts_back(self, module: Any) -> bool:
        return not isinstance(module, BlockLinear)

    def read(self, module: Any, dtype: torch.dtype | None = None) -> Tensor:
        return self.decode(module, module._parameters["weight"].data, dtype or self.dtype(module))

    def forward(self, module: Any, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if isinstance(module, BlockLinear) or x.device.type != "cpu" or x.shape[:-1].numel() > _KERNEL_ROWS:
            return own(x)
        return read_linear(x, module.bias, lambda dtype: self.read(module, dtype))

    def encode(self, module: Any, matrix: Tensor) -> Tensor:
        order = _order(module)
        return encode(matrix if order is None else matrix[:, order], module.ggml_type)

    def decode(self, module: Any, held: Tensor, dtype: torch.dtype) -> Tensor:
        found, order = decode(held, module.ggml_type, dtype), _order(module)
        return found if order is None else torch.empty_like(found).index_copy_(1, order, found)

    def swap(self, module: Any, held: Tensor) -> Tensor:
        weight = module._parameters["weight"]
        before, weight.data = weight.data, held
        return before

    def unpack(self, module: Any, weight: Tensor) -> type[nn.Module]:
        drop = ("weight", "ggml_type", "packed_dtype", "input_permutation")
        return make_plain(module, weight, self.size(module), drop)


def _order(module: Any) -> Tensor | None:
    """(in,): the blocks' column j meets input order[j], where transformers reordered inputs and not columns."""
    return module._buffers.get("input_permutation")
