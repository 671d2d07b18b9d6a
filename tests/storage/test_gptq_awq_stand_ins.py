"""GPTQ and AWQ layers. Their libraries need GPUs to be installed, so that all layers here are stand-ins: of the same
names and contract, packed bit by bit from the formats' descriptions in `layers`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.method import VeneerError
from veneer.storage.packed_integers import unpack

from .layers import WithLinear, linear, read, stand_in_awq, stand_in_gptq, words
from .test_libraries import shake


def lifted(layer: nn.Linear) -> nn.Linear:
    """Some outputs with positive weights only, so that their zero is 0, which the first format holds as the most."""
    with torch.no_grad():
        layer.weight[::2] += 1
    return layer


@pytest.mark.parametrize(("bits", "word"), [(2, torch.int32), (3, torch.int32), (4, torch.int32), (8, torch.int32),
                                            (4, torch.int16), (2, torch.int8), (8, torch.int8)])
def test_codes_come_out_as_they_went_in(bits: int, word: torch.dtype) -> None:
    codes = torch.randint(0, 2**bits, (3, 96))
    codes[0] = 2**bits - 1  # sign bits set
    packed = words(codes, bits, word)
    assert packed.shape == (3, 96 * bits // torch.iinfo(word).bits)
    assert torch.equal(unpack(packed, bits), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_is_read(bits: int, version: int, act_order: bool) -> None:
    layer = stand_in_gptq(lifted(nn.Linear(96, 64)), bits=bits, version=version, act_order=act_order)
    assert torch.equal(read(layer, torch.float32), layer.truth)
    x = torch.randn(3, 96)
    torch.testing.assert_close(layer(x), linear(x, layer))


def test_gptq_with_one_group_and_other_words() -> None:
    for options in ({"group": 96, "act_order": False}, {"word": torch.int16}, {"word": torch.int8}):
        layer = stand_in_gptq(nn.Linear(96, 64, bias=False), **options)
        assert torch.equal(read(layer, torch.float32), layer.truth)


def test_auto_gptq_layers_are_known_by_their_module() -> None:
    kinds = {name: type("QuantLinear", (WithLinear,), {"__module__": f"auto_gptq.nn_modules.qlinear.{name}"})
             for name in ("qlinear_cuda_old", "qlinear_exllama")}
    layer = stand_in_gptq(nn.Linear(96, 64), kind=kinds["qlinear_cuda_old"])
    del layer._qzeros_format  # it knows the first format only
    del layer.in_features, layer.out_features
    layer.infeatures, layer.outfeatures = 96, 64
    assert torch.equal(read(layer, torch.float32), layer.truth)
    net = nn.Sequential(layer)
    veneer.attach(net, LoRA(rank=2))
    veneer.merge(net, keep=False)
    assert (layer.in_features, layer.out_features) == (96, 64)
    net = nn.Sequential(stand_in_gptq(nn.Linear(96, 64), kind=kinds["qlinear_exllama"]))
    with pytest.raises(VeneerError, match=r"QuantLinear \(auto_gptq.*exllama\) lays its weight out for its own"):
        veneer.attach(net, {"0": LoRA(rank=2)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_awq_is_read(dtype: torch.dtype) -> None:
    layer = stand_in_awq(lifted(nn.Linear(96, 64).to(dtype)))
    assert torch.equal(read(layer, torch.float32), layer.truth)
    assert torch.equal(read(layer), layer.truth.to(dtype))
    if dtype != torch.float16:
        x = torch.randn(3, 96, dtype=dtype)
        torch.testing.assert_close(layer(x), linear(x, layer))


@pytest.mark.parametrize(("package", "name", "make", "words_"), [
    ("gptqmodel.nn_modules.qlinear.marlin", "MarlinQuantLinear", stand_in_gptq, 'load the model with the backend'),
    ("awq.modules.linear.gemv", "WQLinear_GEMV", stand_in_awq, "another layout than AWQ's GEMM checkpoints"),
    ("gptqmodel.nn_modules.qlinear.awq_marlin", "AwqMarlinQuantLinear", stand_in_awq, "another layout than AWQ's GEMM"),
])
def test_other_layouts_are_refused(package: str, name: str, make, words_: str) -> None:
    net = nn.Sequential(make(nn.Linear(96, 64), kind=type(name, (WithLinear,), {"__module__": package})))
    with pytest.raises(VeneerError, match=words_):
        veneer.attach(net, {"0": LoRA(rank=2)})


@pytest.mark.parametrize("make", [stand_in_gptq, stand_in_awq])
def test_a_layer_with_an_adapter_of_its_own_is_refused(make) -> None:
    net = nn.Sequential(make(nn.Linear(96, 64)))
    net[0].adapter = object()
    with pytest.raises(VeneerError, match="carries an adapter of gptqmodel's own"):
        veneer.attach(net, {"0": LoRA(rank=2)})


@pytest.mark.parametrize("make", [stand_in_gptq, stand_in_awq])
def test_such_a_layer_is_not_written(make) -> None:
    layer = make(nn.Linear(96, 64))
    storage = veneer.storage.packed_storage(layer)
    assert not storage.writable
    with pytest.raises(VeneerError, match=f"held as {storage.name} cannot be quantised again; merge it into dense"):
        storage.encode(layer, read(layer))


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_forward_without_gradient_is_gone_by(compiled: bool) -> None:
    """autoawq's runs under no_grad, whatever the caller does."""
    body = {"__module__": "awq.modules.linear.gemm", "forward": torch.no_grad()(WithLinear.forward)}
    net = nn.Sequential(stand_in_awq(nn.Linear(96, 64), kind=type("WQLinear_GEMM", (WithLinear,), body)))
    veneer.attach(net, LoRA(rank=2))
    x = torch.randn(3, 96, requires_grad=True)
    (torch.compile(net, backend="aot_eager") if compiled else net)(x).sum().backward()
    torch.testing.assert_close(x.grad, net[0].truth.sum(0).expand(3, -1))
    torch._dynamo.reset()


@pytest.mark.parametrize("make", [stand_in_gptq, stand_in_awq])
def test_a_bias_that_is_a_buffer(make) -> None:
    net = nn.Sequential(make(nn.Linear(96, 64)))
    layer, bias = net[0], net[0].bias.clone()
    veneer.attach(net, LoRA(rank=2, bias=True))
    shake(net)
    x = torch.randn(3, 96)
    with torch.no_grad():
        adapted = net(x)
    torch.testing.assert_close(net(x), adapted)
    veneer.merge(net)
    torch.testing.assert_close(net(x), adapted)
    veneer.unmerge(net)
    assert torch.equal(layer.bias, bias)
    assert "bias" in layer._buffers
    veneer.merge(net, keep=False)
    veneer.detach(net)
    assert set(layer._parameters) == {"weight", "bias"}
    torch.testing.assert_close(net(x), adapted)
