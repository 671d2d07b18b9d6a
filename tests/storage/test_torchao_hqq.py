"""torchao's tensors and HQQ's layers: what is their own."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.method import VeneerError

from .layers import Net, linear, read, stand_in_int4
from .test_libraries import shake


def test_packing_of_int4_stand_in() -> None:
    """torchao's real `Int4Tensor`, which needs mslk to be made and to be multiplied, packed by hand."""
    pytest.importorskip("torchao")
    layer = nn.Linear(64, 32)
    original = layer.weight.detach().clone()
    net = nn.Sequential(nn.Linear(64, 64), stand_in_int4(layer))
    assert read(net[1]).shape == (32, 64)
    assert (read(net[1]) - original).norm() < 0.15 * original.norm()
    half_steps = net[1].weight.scale.T.repeat_interleave(32, 1) / 2
    assert ((read(net[1]) - original).abs() <= half_steps * 1.001).all()
    veneer.attach(net, {"0": None, "1": LoRA(rank=2)})
    shake(net)
    x, adapter = torch.randn(3, 64, requires_grad=True), net[1].adapters["default"]["weight"]
    torch.testing.assert_close(net[1](x), linear(x, net[1]) + x @ adapter.A.T @ adapter.B.T)
    veneer.merge(net, keep=False)
    torch.testing.assert_close(net[1](x), linear_of(net[1], x))


def linear_of(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.base_weight("weight").T + layer.bias


def quantised(layer: nn.Module, config) -> nn.Module:
    from torchao.quantization import quantize_

    quantize_(layer, config, filter_fn=lambda module, name: module is layer)
    return layer


def test_a_layer_that_rounds_its_inputs_is_refused() -> None:
    ao = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(quantised(nn.Linear(64, 32), ao.Int8DynamicActivationInt8WeightConfig()), nn.Tanh())
    with pytest.raises(VeneerError, match="torchao rounds or scales this layer's inputs too"):
        veneer.attach(net, {"0": LoRA(rank=2)})


def test_a_layout_that_cannot_be_read_is_refused() -> None:
    utils = pytest.importorskip("torchao.utils")

    class Opaque(utils.TorchAOBaseTensor):
        def __new__(cls, data: torch.Tensor) -> torch.Tensor:
            return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

        def __init__(self, data: torch.Tensor) -> None:
            self.data_held = data

    net = nn.Sequential(nn.Linear(8, 4))
    net[0]._parameters["weight"] = Opaque(torch.zeros(4, 8))
    with pytest.raises(VeneerError, match="its weight is torchao's Opaque, whose layout cannot be read"):
        veneer.attach(net, {"0": LoRA(rank=2)})


def test_a_torchao_weight_elsewhere_than_in_a_linear_layer_is_refused() -> None:
    ao = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(quantised(nn.Embedding(64, 32), ao.Int8WeightOnlyConfig()))
    with pytest.raises(VeneerError, match=r"stored as Int8Tensor of torch\.float32, which cannot be read"):
        veneer.attach(net, {"0": LoRA(rank=2)})


@pytest.mark.parametrize(("scheme", "options", "words"), [
    ("torchao-fp8", {"group_size": 32}, "'torchao-fp8' has no option 'group_size'"),
    ("torchao-int8", {"group_size": 0}, "group_size must be a whole number of at least 1"),
    ("torchao-int8", {"group_size": 48}, "its 64 inputs are no multiple of group_size=48"),
    ("hqq-4", {"group_size": 60}, "the group_size of 'hqq-4' is a multiple of 8, got 60"),
    ("hqq-4", {"group_size": 3000}, "its 8,192 numbers are no multiple of group_size=3000"),
    ("hqq-7", {}, "unknown scheme 'hqq-7'; did you mean 'hqq-8'"),
])
def test_errors(scheme: str, options: dict, words: str) -> None:
    pytest.importorskip(scheme.partition("-")[0])
    net = Net()
    with pytest.raises(VeneerError, match=words):
        veneer.quantize(net, scheme, **options)
    assert type(net.up) is nn.Linear


def test_what_does_not_fit_is_left_and_told() -> None:
    pytest.importorskip("torchao")
    net = Net()
    report = veneer.quantize(net, "torchao-int8", group_size=128)
    assert report.weights == 1
    assert "'up': its 64 inputs are no multiple of group_size=128" in str(report)


def test_int4_without_its_packer_says_what_else_there_is() -> None:
    pytest.importorskip("torchao")
    if sys.modules.get("mslk") is not None:
        pytest.skip("mslk is here")
    with pytest.raises(VeneerError, match=r"packs int4 weights with mslk.*; without it use .nf4."):
        veneer.quantize(Net(), "torchao-int4")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torchao's int4 product needs CUDA and mslk")
def test_int4_on_a_gpu() -> None:
    pytest.importorskip("mslk")
    net = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)).bfloat16().cuda()
    original = net[0].weight.detach().float().clone()
    veneer.quantize(net, "torchao-int4", "0", group_size=128)
    assert (read(net[0], torch.float32) - original).norm() < 0.15 * original.norm()
    x = torch.randn(16, 256, dtype=torch.bfloat16, device="cuda")
    own = net(x)
    veneer.attach(net, {"0": LoRA(rank=4)})
    torch.testing.assert_close(net(x.requires_grad_()), own, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize(("library", "scheme", "extra"), [
    ("torchao", "torchao-int8", "torchao"), ("hqq", "hqq-4", "hqq"), ("gguf", "gguf-q8_0", "gguf")])
def test_a_missing_library_is_named_with_its_extra(library: str, scheme: str, extra: str, monkeypatch) -> None:
    for name in {library, *(name for name in sys.modules if name.partition(".")[0] == library)}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(VeneerError, match=rf"{library} is not installed: pip install 'veneer\[{extra}\]'"):
        veneer.quantize(Net(), scheme)


def hqq_layer(ready: bool = True) -> nn.Module:
    """As the library makes it itself: with a bias that is a plain tensor."""
    hqq = pytest.importorskip("hqq.core.quantize")
    return hqq.HQQLinear(nn.Linear(64, 32), hqq.BaseQuantizeConfig(nbits=4, group_size=64), device="cpu",
                         compute_dtype=torch.float32, initialize=ready)


def test_an_hqq_bias_that_is_a_plain_tensor() -> None:
    net = nn.Sequential(nn.Linear(64, 64), hqq_layer())
    layer, bias = net[1], net[1].bias.clone()
    assert "bias" not in layer._parameters
    x = torch.randn(3, 64)
    before = layer(x)
    veneer.attach(net, {"0": None, "1": LoRA(rank=2, bias=True)})
    assert torch.equal(layer(x.clone().requires_grad_()), linear(x, layer))
    with torch.no_grad():
        assert torch.equal(layer(x), before)
        shake(net)
        adapted = layer(x)
        veneer.merge(net)
        torch.testing.assert_close(layer(x), adapted)
        assert not torch.equal(layer.bias, bias)
        veneer.unmerge(net)
        assert torch.equal(layer.bias, bias)
        assert "bias" not in layer._parameters
        veneer.merge(net, keep=False)
        veneer.detach(net)
        torch.testing.assert_close(layer(x), adapted)
    assert type(layer) is nn.Linear
    assert set(layer._parameters) == {"weight", "bias"}


def test_an_hqq_layer_that_is_not_quantised_is_refused() -> None:
    with pytest.raises(VeneerError, match="no adaptable weight matches '0'"):
        veneer.attach(nn.Sequential(hqq_layer(ready=False)), {"0": LoRA(rank=2)})


def test_an_hqq_model_with_adapters_loads_its_own_state() -> None:
    nets = [nn.Sequential(hqq_layer()) for _ in range(2)]
    for net in nets:
        veneer.attach(net, {"0": LoRA(rank=2)})
    shake(nets[0])
    nets[1].load_state_dict(nets[0].state_dict())
    x = torch.randn(3, 64, requires_grad=True)
    assert torch.equal(nets[0](x), nets[1](x))
