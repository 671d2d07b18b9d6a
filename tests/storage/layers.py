"""The layers that other libraries hold packed weights in, real ones and stand-ins, over one small net.

Everything here is the library's own class and runs for real on the CPU, except what is marked `stand_in`: a class of
the same name, package and contract, whose packing is written here from the format's description.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import veneer

torch.manual_seed(0)


class Net(nn.Module):
    """64 → 128 → 64 → 16; `up` and `down` are what is packed."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 64, bias=False)
        self.lm_head = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(x + self.down(torch.tanh(self.up(x))))


@dataclass(frozen=True)
class Case:
    """same_bits: the layer's own forward in training gives the bits of F.linear over what is read (others differ by
    rounding). own_forward: it is more than x Wᵀ, and runs in training too. pickles: the bare module can be pickled."""

    name: str
    pack: Callable[[Net], Any]
    same_bits: bool = True
    own_forward: bool = False
    stand_in: bool = False
    pickles: bool = True
    needs: str | None = None

    def build(self, dtype: torch.dtype = torch.float32) -> Net:
        if self.needs is not None:
            pytest.importorskip(self.needs)
        torch.manual_seed(0)
        net = Net().to(dtype)
        self.pack(net)
        return net

    def pair(self, dtype: torch.dtype = torch.float32) -> tuple[Net, Net]:
        """A packed net, and a dense one that holds what the packed one is read as."""
        packed = self.build(dtype)
        torch.manual_seed(0)
        dense = Net().to(dtype)
        for name in ("up", "down"):
            getattr(dense, name).weight.data = read(getattr(packed, name)).to(dtype)
        return packed, dense


def read(layer: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What the layer's weight is read as."""
    storage = veneer.storage.packed_storage(layer)
    assert storage is not None, type(layer)
    return storage.read(layer, dtype)


def scheme(name: str, **options: Any) -> Callable[[Net], Any]:
    return lambda net: veneer.quantize(net, name, **options)


def each(make: Callable[[nn.Linear], nn.Module]) -> Callable[[Net], Any]:
    """Put another layer in the place of each linear one."""
    def pack(net: Net) -> None:
        for name in ("up", "down"):
            setattr(net, name, make(getattr(net, name)))

    return pack


def intx(layer: nn.Linear) -> nn.Module:
    """torchao's 4-bit numbers in a byte each: what it has for CPUs."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))
    layer.__dict__.pop("extra_repr")
    return layer


def transformers_gguf(layer: nn.Linear) -> nn.Module:
    """transformers' `GgufLinear`, as its loader fills it, with inputs in another order."""
    from gguf import GGMLQuantizationType, quants
    from transformers.integrations.gguf.utils import GgufLinear

    made = GgufLinear(layer.in_features, layer.out_features, 8, layer.bias is not None)
    made.input_permutation = torch.randperm(layer.in_features, generator=torch.Generator().manual_seed(1))
    weight = layer.weight.detach().float()[:, made.input_permutation]
    made.weight.data = torch.from_numpy(quants.quantize(weight.numpy(), GGMLQuantizationType.Q8_0))
    if layer.bias is not None:
        made.bias.data = layer.bias.detach()
    return made


# -- stand-ins --------------------------------------------------------------------------------------------
class WithLinear(nn.Module):
    """A stand-in's forward: its library's, in plain operations over the numbers it was made of."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.truth.to(x.dtype).T
        return y if self.bias is None else y + self.bias


TorchQuantLinear = type("TorchQuantLinear", (WithLinear,), {"__module__": "gptqmodel.nn_modules.qlinear.torch"})
WQLinear_GEMM = type("WQLinear_GEMM", (WithLinear,), {"__module__": "awq.modules.linear.gemm"})


def stand_in_gptq(layer: nn.Linear, bits: int = 4, group: int = 32, version: int = 1, act_order: bool = True,
                  kind: type = TorchQuantLinear, word: torch.dtype = torch.int32) -> nn.Module:
    """A layer of the GPTQ contract; every code and every zero is written bit by bit into a stream of bits."""
    out, in_ = layer.out_features, layer.in_features
    groups, most = -(-in_ // group), 2**bits - 1
    g_idx = torch.arange(in_) // group
    if act_order:
        g_idx = g_idx[torch.randperm(in_, generator=torch.Generator().manual_seed(2))]
    weight = layer.weight.detach().float()
    scales, zeros = torch.empty(groups, out), torch.empty(groups, out, dtype=torch.int64)
    for g in range(groups):
        low = weight[:, g_idx == g].amin(1).clamp_max(0)
        scales[g] = (weight[:, g_idx == g].amax(1).clamp_min(0) - low) / most + 1e-8
        zeros[g] = (-low / scales[g]).round()
    scales = scales.to(torch.float16 if layer.weight.dtype == torch.float16 else layer.weight.dtype)
    codes = (weight.T / scales.float()[g_idx] + zeros[g_idx]).round().clamp(0, most).long()  # (in, out)
    made = kind()
    held = (zeros - 1) & most if version == 1 else zeros
    made.register_buffer("qweight", words(codes.T, bits, word).T.contiguous())
    made.register_buffer("qzeros", words(held, bits, word))
    made.register_buffer("scales", scales)
    made.register_buffer("g_idx", g_idx.int())
    finish(made, layer, (codes - zeros[g_idx]).T.float() * scales.float()[g_idx].T)
    made.bits, made.group_size, made._qzeros_format = bits, group, version
    return made


def stand_in_awq(layer: nn.Linear, group: int = 32, kind: type = WQLinear_GEMM) -> nn.Module:
    """A layer of AWQ's GEMM contract: eight outputs to a word, in the order 0 2 4 6 1 3 5 7."""
    weight, groups = layer.weight.detach().float(), layer.in_features // group
    parts = weight.view(layer.out_features, groups, group)
    low = parts.amin(2).clamp_max(0)
    scales = ((parts.amax(2).clamp_min(0) - low) / 15 + 1e-8).T.to(layer.weight.dtype)  # (groups, out)
    zeros = (-low.T / scales.float()).round().long()
    index = torch.arange(layer.in_features) // group
    codes = (weight.T / scales.float()[index] + zeros[index]).round().clamp(0, 15).long()  # (in, out)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    made = kind()
    for name, tensor in (("qweight", codes), ("qzeros", zeros)):
        made.register_buffer(name, words(tensor.unflatten(1, (-1, 8))[..., order].flatten(1), 4))
    made.register_buffer("scales", scales)
    finish(made, layer, (codes - zeros[index]).T.float() * scales.float()[index].T)
    made.w_bit, made.group_size = 4, group
    return made


def finish(made: nn.Module, layer: nn.Linear, truth: torch.Tensor) -> None:
    made.in_features, made.out_features = layer.in_features, layer.out_features
    made.truth = truth
    if layer.bias is None:
        made.bias = None
    else:
        made.register_buffer("bias", layer.bias.detach().clone())


def words(codes: torch.Tensor, bits: int, word: torch.dtype = torch.int32) -> torch.Tensor:
    """Codes along the last dimension, one after the other from the lowest bit of the first word."""
    width = torch.iinfo(word).bits
    stream = torch.stack([(codes >> i) & 1 for i in range(bits)], -1).flatten(-2).unflatten(-1, (-1, width))
    values = (stream << torch.arange(width)).sum(-1)
    return torch.where(values >= 2**(width - 1), values - 2**width, values).to(word)


def stand_in_int4(layer: nn.Linear, group: int = 32) -> nn.Module:
    """torchao's real `Int4Tensor`, packed here: its own packing and its own product need mslk."""
    from torchao.quantization import Int4Tensor

    parts = layer.weight.detach().float().view(layer.out_features, -1, group)
    low, high = parts.amin(2, keepdim=True), parts.amax(2, keepdim=True)
    scale = (high - low).clamp_min(1e-6) / 15
    codes = ((parts - low) / scale).round().clamp(0, 15).sub(8).to(torch.int8).view(layer.weight.shape)
    scales, zeros = ((t.squeeze(2).T.contiguous().to(layer.weight.dtype)) for t in (scale, low + 8 * scale))
    data = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    held = Int4Tensor(data, scales, zeros, [1, group], layer.weight.shape)
    made = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    made.weight, made.bias = nn.Parameter(held, requires_grad=False), layer.bias
    return made


BITSANDBYTES, TORCHAO, HQQ, GGUF = "bitsandbytes", "torchao", "hqq", "gguf"
CASES = [
    Case("bnb-nf4", scheme("bnb-nf4"), needs=BITSANDBYTES),
    Case("bnb-nf4-plain-scales", scheme("bnb-nf4", double=False, block=128), needs=BITSANDBYTES),
    Case("bnb-fp4", scheme("bnb-fp4"), needs=BITSANDBYTES),
    Case("bnb-int8", scheme("bnb-int8"), own_forward=True, needs=BITSANDBYTES),
    Case("torchao-int8", scheme("torchao-int8"), same_bits=False, needs=TORCHAO),
    Case("torchao-int8-groups", scheme("torchao-int8", group_size=32), same_bits=False, needs=TORCHAO),
    Case("torchao-fp8", scheme("torchao-fp8"), same_bits=False, needs=TORCHAO),
    Case("torchao-intx", each(intx), needs=TORCHAO),
    Case("hqq-4", scheme("hqq-4"), same_bits=False, needs=HQQ),
    Case("hqq-3", scheme("hqq-3"), same_bits=False, needs=HQQ),
    Case("gguf-q4_1", scheme("gguf-q4_1"), needs=GGUF),
    Case("gguf-q8_0", scheme("gguf-q8_0"), needs=GGUF),
    Case("gguf-transformers", each(transformers_gguf), same_bits=False, needs=GGUF),
    Case("gptq-stand-in", each(stand_in_gptq), same_bits=False, stand_in=True),
    Case("awq-stand-in", each(stand_in_awq), same_bits=False, stand_in=True),
]


def linear(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """The dense product over what is read."""
    return F.linear(x, read(layer, x.dtype), layer.bias)
