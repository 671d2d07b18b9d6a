"""One adapted linear layer: NeMo's outputs and gradients, its names, and that each option does something."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest
import torch
from torch import nn

import veneer
from veneer.method import VeneerError
from veneer.nemo import LinearLoRA, LoRATritonFunction, TritonLinearLoRA, linear, patch_linear_module
from veneer.ops import dispatch
from veneer.ops.dropout import Dropped

from .nets import META, golden_linear

BF16 = torch.bfloat16


def golden(**options):
    layer, data = golden_linear()
    patch_linear_module(layer, dim=4, alpha=8, use_triton=False, **options)
    with torch.no_grad():
        layer.lora_A.weight.copy_(data["A"])
        layer.lora_B.weight.copy_(data["B"])
    return layer, data


def compare(layer, data, key):
    x = data["x3"].clone().requires_grad_()
    y = layer(x)
    y.backward(data["g3"])
    for name, got in {"y": y, "dx": x.grad, "dA": layer.lora_A.weight.grad, "dB": layer.lora_B.weight.grad}.items():
        torch.testing.assert_close(got, data[f"{key}.{name}"], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize(("dropout", "train"), [(0.0, True), (0.0, False), (0.3, False)])
def test_outputs_and_gradients_are_nemos(position, dropout, train):
    layer, data = golden(dropout=dropout, dropout_position=position)
    compare(layer.train(train), data, "post_0.0_eval")  # they are all the same, in NeMo too


def test_with_nemos_mask_dropout_on_the_output_is_nemos(monkeypatch):
    """Which elements NeMo had dropped can be read off its output: there it is the base's."""
    layer, data = golden(dropout=0.3)
    with torch.no_grad(), veneer.disabled(layer):
        gone = torch.isclose(data["post_0.3_train.y"], layer(data["x3"]), rtol=0, atol=1e-6)
    assert 0.2 < float(gone.double().mean()) < 0.4

    def drawn(p, shape, device):
        fake = Dropped.__new__(Dropped)
        fake.positions, fake.keep, fake.scale = None, ~gone.view(shape), 1 / (1 - p)
        return fake

    monkeypatch.setattr(dispatch, "Dropped", drawn)
    compare(layer.train(), data, "post_0.3_train")


def test_other_inputs_and_other_dtypes():
    layer, data = golden()
    torch.testing.assert_close(layer(data["x2"]), data["y2d"], rtol=1e-5, atol=1e-5)
    layer = nn.Linear(12, 20, dtype=BF16)
    with torch.no_grad():
        layer.weight.copy_(data["base_weight"])
        layer.bias.copy_(data["base_bias"])
    patch_linear_module(layer, dim=4, alpha=8, use_triton=False)
    assert f"{layer.lora_A.weight.dtype}" == META["linear"]["bf16_lora_dtype"]
    with torch.no_grad():
        layer.lora_A.weight.copy_(data["A"])
        layer.lora_B.weight.copy_(data["B"])
    x = data["x3"].to(BF16)
    true = golden()[0].double()(x.double())
    own = (data["bf16.y"].double() - true).abs().mean()
    assert (layer(x).double() - true).abs().mean() < 1.5 * own


def test_the_merged_weight_is_nemos():
    layer, data = golden()
    veneer.merge(layer)
    torch.testing.assert_close(layer.weight, data["merged_weight"], rtol=1e-6, atol=1e-6)


def test_names_and_what_is_trainable():
    layer = nn.Linear(12, 20)
    weight, bias = layer.weight, layer.bias
    assert patch_linear_module(layer, dim=4, alpha=8, use_triton=False) is layer
    assert layer.weight is weight
    assert layer.bias is bias
    assert {"weight", "bias"} < set(layer.state_dict())
    assert isinstance(layer, LinearLoRA)
    assert not isinstance(layer, TritonLinearLoRA)
    assert not isinstance(nn.Linear(2, 2), LinearLoRA)
    assert (layer.dim, layer.scale, layer.dropout_p, layer.dropout_position, layer.use_dora) == (4, 2.0, 0.0, "post",
                                                                                                 False)
    shapes = layer.lora_A.weight.shape, layer.lora_B.weight.shape
    assert shapes == ((4, 12), (20, 4))
    assert (layer.lora_A.in_features, layer.lora_A.out_features, layer.lora_A.bias) == (12, 4, None)
    named = {"weight": layer.weight, "bias": layer.bias, "lora_A.weight": layer.lora_A.weight,
             "lora_B.weight": layer.lora_B.weight}
    assert {name: tensor.requires_grad for name, tensor in named.items()} == META["linear"]["requires_grad"]
    x = torch.randn(3, 12)
    nn.init.normal_(layer.lora_B.weight, std=0.1)  # as scripts do
    low = layer.lora_B(layer.lora_A(x)) * layer.scale
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias) + low)


def test_each_option_does_something():
    torch.manual_seed(0)
    plain = patch_linear_module(nn.Linear(64, 48), seed=1)
    assert (plain.dim, plain.scale) == (8, 4.0)
    assert patch_linear_module(nn.Linear(6, 5), dim=3).dim == 3
    assert patch_linear_module(nn.Linear(6, 5), dim=4, alpha=6).scale == 1.5
    assert patch_linear_module(nn.Linear(6, 5), lora_dtype="bf16").lora_A.weight.dtype == BF16
    assert patch_linear_module(nn.Linear(6, 5), use_dora=True).lora_magnitude.shape == (5,)
    assert torch.equal(plain.lora_A.weight, patch_linear_module(nn.Linear(64, 48), seed=1).lora_A.weight)
    assert not torch.equal(plain.lora_A.weight, patch_linear_module(nn.Linear(64, 48), seed=2).lora_A.weight)
    with pytest.raises(VeneerError, match="has LoRA and no magnitude; use_dora=True gives it one"):
        _ = plain.lora_magnitude
    for position, single in (("pre", False), ("post", True)):
        layer = patch_linear_module(nn.Linear(64, 48), dropout=0.5, dropout_position=position, seed=1)
        assert (layer.dropout_p, layer.dropout_position) == (0.5, position)
        nn.init.ones_(layer.lora_B.weight)
        x = torch.randn(20, 64)
        with veneer.disabled(layer):
            base = layer(x)
        moved = (layer(x) - base).abs() > 1e-6
        # with equal rows of B, whole rows of the output are equal unless single outputs fall out
        assert bool((moved.float().mean(1) < 1).all()) is single


def test_starts():
    """xavier as documented (NeMo's first version drew from U[0, 1)); uniform is U(-1/√in, 1/√in), as NeMo's."""
    A = patch_linear_module(nn.Linear(256, 8), dim=16, lora_A_init_method="xavier").lora_A.weight.detach()
    assert A.std() == pytest.approx(math.sqrt(2 / (16 + 256)), rel=0.05)
    assert abs(float(A.mean())) < 0.01
    for name in ("uniform", "kaiming"):
        layer = patch_linear_module(nn.Linear(256, 8), dim=16, lora_A_init_method=name)
        old = META["inits"][name]
        assert layer.lora_A.weight.detach().std() == pytest.approx(old["std"], rel=0.05)
        assert float(layer.lora_A.weight.detach().abs().max()) <= 1 / 16
        assert not layer.lora_B.weight.any()


def test_torch_manual_seed_decides_and_two_layers_differ():
    def two(seed):
        torch.manual_seed(seed)
        return [patch_linear_module(nn.Linear(6, 6)).lora_A.weight for _ in range(2)]

    torch.manual_seed(4)
    first, again, other = two(3), two(3), two(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_meta_device():
    layer = patch_linear_module(nn.Linear(6, 5, device="meta"), dim=2)
    assert layer.lora_A.weight.is_meta
    layer.to_empty(device="cpu")
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    assert layer.lora_A.weight.any()
    assert torch.equal(layer(torch.ones(1, 6)), torch.full((1, 5), 6.0))


@pytest.mark.parametrize("use_triton", [False, True])
def test_4_bit_layers(use_triton):
    model = nn.Sequential(nn.Linear(64, 32))
    dense = copy.deepcopy(model)
    veneer.quantize(model, "nf4")
    x = torch.randn(3, 64)
    packed = model(x)
    layer = patch_linear_module(model[0], dim=4, use_triton=use_triton)
    assert isinstance(layer, LinearLoRA)
    assert isinstance(layer, TritonLinearLoRA) is use_triton
    assert layer.lora_A.weight.dtype == torch.float32
    assert torch.equal(model(x), packed)
    nn.init.normal_(layer.lora_B.weight)
    model(x).square().sum().backward()
    assert layer.lora_A.weight.grad.any()
    assert not torch.allclose(packed, dense(x), atol=1e-6), "nothing was quantised"


def test_use_triton_without_a_gpu_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(linear, "_said", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.INFO, logger="veneer.nemo"):
        first, second = (patch_linear_module(nn.Linear(6, 5), use_triton=True) for _ in range(2))
        patch_linear_module(nn.Linear(6, 5), use_triton=False)
    assert [record.getMessage() for record in caplog.records] == [
        "use_triton: there is no GPU here; Veneer's fused op is used (veneer.inspect.explain(model) shows the path of "
        "every layer)"]
    assert isinstance(first, TritonLinearLoRA)
    assert "fused" in veneer.inspect.explain(second)


def test_the_classes_make_adapted_copies():
    layer = nn.Linear(6, 5)
    for kind in (LinearLoRA, TritonLinearLoRA):
        made = kind(layer, dim=2, alpha=3, dropout=0.1, dropout_position="pre", lora_A_init_method="uniform",
                    lora_dtype=BF16)
        assert isinstance(made, kind)
        assert type(layer) is nn.Linear, "the original was changed"
        assert torch.equal(made.weight, layer.weight)
        assert made.weight.data_ptr() != layer.weight.data_ptr()
        assert (made.dim, made.scale, made.dropout_p, made.dropout_position) == (2, 1.5, 0.1, "pre")
        assert made.lora_A.weight.dtype == BF16
        assert torch.equal(made.eval()(torch.ones(2, 6)), layer(torch.ones(2, 6)))


def test_copies_pickles_and_detach():
    layer, x = nn.Linear(6, 5), torch.randn(2, 6)
    before = layer(x)
    patch_linear_module(layer, dim=2)
    nn.init.normal_(layer.lora_B.weight)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(other, LinearLoRA)
        assert torch.equal(other(x), layer(x))
    veneer.detach(layer)
    assert type(layer) is nn.Linear
    assert torch.equal(layer(x), before)
    assert layer.weight.requires_grad


def test_what_cannot_be_patched():
    with pytest.raises(VeneerError, match="patch_linear_module takes a linear layer, got a Conv2d"):
        patch_linear_module(nn.Conv2d(3, 3, 1))
    with pytest.raises(VeneerError, match="patch_linear_module takes a linear layer, got a Conv2d"):
        LinearLoRA(nn.Conv2d(3, 3, 1))
    layer = patch_linear_module(nn.Linear(3, 3))
    with pytest.raises(VeneerError, match="already has an adapter 'default'"):
        patch_linear_module(layer)
    with pytest.raises(VeneerError, match="unknown dropout_position 'middle'"):
        patch_linear_module(nn.Linear(3, 3), dropout_position="middle")


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_the_function_by_itself(dtype):
    x, A, B = (torch.randn(*size, requires_grad=True) for size in ((2, 3, 6), (2, 6), (5, 2)))
    y = LoRATritonFunction.apply(x, A, B, 1.5, dtype)
    assert y.dtype == (dtype or torch.float32)
    want = 1.5 * (x @ A.mT @ B.mT)
    torch.testing.assert_close(y.float(), want)
    upstream = torch.randn_like(want)
    for got, true in zip(torch.autograd.grad(y, [x, A, B], upstream.to(y.dtype)),
                         torch.autograd.grad(want, [x, A, B], upstream), strict=True):
        torch.testing.assert_close(got, true)
