"""torchao's weight-only tensors under an ordinary `nn.Linear`: int8, float8, int4."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.method import VeneerError, check_positive_int
from veneer.storage.base import Storage, check_options, library, own_class
from veneer.storage.byte_codes import scaled


def _int4(weight: Any, dtype: torch.dtype) -> Tensor:
    """`Int4Tensor`: qdata int8 (out, in/2), the even column in the low bits; W = q·scale + zero, with scale and zero
    (in/group, out). The class has no reading of its own."""
    codes = weight.qdata.view(torch.int8)
    groups, out = weight.scale.shape
    values = torch.stack([(codes << 4) >> 4, codes >> 4], -1).view(out, groups, -1).float()
    values.mul_(weight.scale.float().T.unsqueeze(-1)).add_(weight.zero_point.float().T.unsqueeze(-1))
    return values.view(out, -1).to(dtype)


def _scaled(weight: Any, dtype: torch.dtype) -> Tensor:
    """`Int8Tensor` and `Float8Tensor`: qdata (out, in), scales (out, in/group). Its own reading has these bits too."""
    zero = weight.__dict__.get("zero_point")
    plain = weight.block_size[0] == 1 and weight.shape[1] % weight.block_size[1] == 0
    if weight.qdata.device.type != "cpu" or not plain or (zero is not None and bool(zero.any())):
        return weight.dequantize(output_dtype=dtype)
    codes, scales = weight.qdata.view(-1, weight.block_size[1]), weight.scale.float().reshape(-1, 1)
    return scaled(codes, scales, dtype).view(weight.shape)


#: how each class is read as dense numbers; they are what its own product uses, but for the order of roundings
_READERS: dict[str, Callable[[Any, torch.dtype], Tensor]] = {
    "Int8Tensor": _scaled,
    "Float8Tensor": _scaled,
    "IntxUnpackedToInt8Tensor": lambda weight, dtype: weight.dequantize().to(dtype),
    "Int4Tensor": _int4,
}


def holds(tensor: Any) -> bool:
    """Whether a tensor is one of torchao's."""
    return any(kind.__module__.partition(".")[0] == "torchao" for kind in type(tensor).__mro__)


#: what a tensor has that does something to the layer's inputs
_ON_INPUTS = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")


class TorchaoWeights(Storage):
    """An `nn.Linear` with one of torchao's tensors as its `weight`, whose shape and dtype are those it stands for.

    In training torchao keeps the dense weight from the forward to the backward; here it is read twice. Its int8
    product multiplies by the scales after the sum, so that a forward that reads W differs by rounding.
    """

    name = "torchao"
    writable = True
    schemes = ("torchao-int8", "torchao-fp8", "torchao-int4")

    def check(self, scheme: str, options: Mapping[str, Any]) -> None:
        check_options(scheme, options, () if scheme == "torchao-fp8" else ("group_size",))
        if options.get("group_size") is not None:
            check_positive_int("quantize", "group_size", options["group_size"])
        library("torchao.quantization", "torchao")
        if scheme == "torchao-int4" and importlib.util.find_spec("mslk") is None:
            raise VeneerError("quantize: torchao packs int4 weights with mslk, a library for GPUs that is not "
                              "installed (pip install mslk); without it use \"nf4\" or \"bnb-nf4\"")

    def unfit(self, scheme: str, module: Any, options: Mapping[str, Any]) -> str | None:
        group = options.get("group_size", 128 if scheme == "torchao-int4" else None)
        if group is not None and module.in_features % group:
            return f"its {module.in_features} inputs are no multiple of group_size={group}"
        return None

    def pack(self, scheme: str, module: Any, options: Mapping[str, Any]) -> nn.Module:
        ao: Any = library("torchao.quantization", "torchao")
        if scheme == "torchao-int8":
            config = ao.Int8WeightOnlyConfig(granularity=_granularity(options.get("group_size")),
                                             set_inductor_config=False)
        elif scheme == "torchao-fp8":
            config = ao.Float8WeightOnlyConfig(set_inductor_config=False)
        else:
            config = ao.Int4WeightOnlyConfig(group_size=options.get("group_size") or 128, set_inductor_config=False)
        ao.quantize_(module, config)
        module.__dict__.pop("extra_repr", None)  # a bound partial, with which the module could not be pickled
        return module

    def claims(self, module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        # The module first: torch.compile follows these lines for every packed layer, and not those of `holds`.
        return (weight is not None and isinstance(module, nn.Linear) and own_class(module).forward is nn.Linear.forward
                and holds(weight) and weight.dim() == 2)

    def refusal(self, module: Any) -> str | None:
        weight = module._parameters["weight"]
        kind, state = type(weight).__name__, weight.__dict__
        if kind not in _READERS:
            return (f"its weight is torchao's {kind}, whose layout cannot be read as dense numbers; read are "
                    f"{', '.join(_READERS)}")
        if any(state.get(name) is not None for name in _ON_INPUTS):
            return ("torchao rounds or scales this layer's inputs too, and gives them no gradient; quantise with a "
                    "weight-only config")
        return None

    def size(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def carrier(self, module: Any) -> Tensor:
        return module._parameters["weight"]

    def nbytes(self, module: Any) -> int:
        weight, bias = module._parameters["weight"], module.bias
        parts = [weight.__dict__[name] for name in weight.__tensor_flatten__()[0]]
        return sum(part.nbytes for part in (*parts, *([] if bias is None else [bias])))

    def dtype(self, module: Any) -> torch.dtype:
        return module._parameters["weight"].dtype

    def casts_back(self, module: Any) -> bool:
        # Its own products, which autocast does not see; that of float8 only does so beside a bias.
        kind = type(module._parameters["weight"]).__name__
        return kind == "Int8Tensor" or (kind == "Float8Tensor" and module.bias is not None)

    def read(self, module: Any, dtype: torch.dtype | None = None) -> Tensor:
        return self.decode(module, module._parameters["weight"], dtype or self.dtype(module))

    def encode(self, module: Any, matrix: Tensor) -> Tensor:
        weight = module._parameters["weight"]
        kind, matrix = type(weight).__name__, matrix.to(weight.dtype)
        if kind == "Int4Tensor":
            self.check("torchao-int4", {})
            return type(weight).from_hp(matrix, list(weight.block_size))
        if kind not in ("Int8Tensor", "Float8Tensor"):
            return super().encode(module, matrix)
        rows, columns = weight.block_size
        whole = (rows, columns) == tuple(weight.shape) and rows > 1
        granularity = _granularity(None if columns == matrix.shape[1] else columns, whole)
        if kind == "Int8Tensor":
            return type(weight).from_hp(matrix, granularity)
        return type(weight).from_hp(matrix, weight.qdata.dtype, granularity, kernel_preference=weight.kernel_preference)

    def decode(self, module: Any, held: Any, dtype: torch.dtype) -> Tensor:
        return _READERS[type(held).__name__](held, dtype)

    def swap(self, module: Any, held: Tensor) -> Tensor:
        before = module._parameters["weight"]
        module.weight = nn.Parameter(held, requires_grad=False)
        return before

    def unpack(self, module: Any, weight: Tensor) -> type[nn.Module]:
        module.__dict__.pop("extra_repr", None)  # torchao's, which tells of the tensor that was there
        module.weight = nn.Parameter(weight, requires_grad=False)
        return own_class(module)


def _granularity(group: int | None, whole: bool = False) -> Any:
    granularity: Any = library("torchao.quantization.granularity", "torchao")
    if whole:
        return granularity.PerTensor()
    return granularity.PerRow() if group is None else granularity.PerGroup(group)
