"""bitsandbytes on the CPU: what is its own about the 4-bit and the 8-bit layers."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.method import VeneerError
from veneer.storage import packed_storage

from .layers import Net, linear, read
from .test_libraries import shake

bnb = pytest.importorskip("bitsandbytes")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="bitsandbytes' GPU kernels need CUDA")


def wrapped(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer, nn.Tanh())


def test_outputs_are_pefts_on_the_same_layer() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    ours, theirs = Net(), Net()
    theirs.load_state_dict(ours.state_dict())
    for net in (ours, theirs):
        veneer.quantize(net, "bnb-nf4")
    theirs.is_loaded_in_4bit = True
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], lora_dropout=0.0)
    theirs = peft.inject_adapter_in_model(config, theirs)
    assert "bnb" in type(theirs.up).__module__
    veneer.attach(ours, {"up": LoRA(rank=4, alpha=8), "down": LoRA(rank=4, alpha=8)})
    shake(ours)
    pairs = []
    for name in ("up", "down"):
        mine, other = getattr(ours, name).adapters["default"]["weight"], getattr(theirs, name)
        for mine_p, their_p in ((mine.A, other.lora_A["default"].weight), (mine.B, other.lora_B["default"].weight)):
            their_p.data.copy_(mine_p.data)
            pairs.append((mine_p, their_p))
    x = torch.randn(9, 64)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [model(each) for model, each in zip((ours, theirs), xs, strict=True)]
    assert (ys[0] - ys[1]).abs().max() <= 1e-5
    for y in ys:
        y.square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, atol=1e-5, rtol=1e-5)
    for mine_p, their_p in pairs:
        torch.testing.assert_close(mine_p.grad, their_p.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("layer", "words"), [
    (lambda: bnb.nn.Linear4bit(64, 32), "has not been quantised yet: move the model to its device"),
    (lambda: bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False), "has not been quantised yet: move the model"),
    (lambda: bnb.nn.Linear8bitLt(64, 32), "load it with has_fp16_weights=False"),
])
def test_a_layer_that_is_not_quantised_is_refused(layer, words: str) -> None:
    with pytest.raises(VeneerError, match=words):
        veneer.attach(wrapped(layer()), {"0": LoRA(rank=2)})


def test_moving_the_model_quantises_it() -> None:
    model = wrapped(bnb.nn.Linear4bit(64, 32, quant_type="nf4")).to("cpu")
    veneer.attach(model, LoRA(rank=2))
    model(torch.randn(2, 64, requires_grad=True)).sum().backward()


def test_the_layers_compute_dtype_is_kept() -> None:
    model = wrapped(bnb.nn.Linear4bit(64, 32, compute_dtype=torch.bfloat16, quant_type="nf4")).to("cpu")
    x = torch.randn(5, 64, requires_grad=True)
    own = model(x)
    veneer.attach(model, LoRA(rank=2))
    assert model(x).dtype == torch.float32
    assert torch.equal(model(x), own)
    shake(model)
    model(x).sum().backward()
    assert x.grad is not None


def test_an_evaluation_leaves_an_adapted_weight_as_it_is() -> None:
    """On CPUs with AVX512-BF16 the layer's own evaluation would round its scales for good, and lose the gradient."""
    net = Net()
    veneer.quantize(net, "bnb-nf4")
    veneer.attach(net, LoRA(rank=2))
    for layer in (net.up, net.down):
        layer.support_avx512bf16_for_cpu = True
    before = read(net.up)
    net.eval()
    with torch.no_grad():
        net(torch.randn(3, 64))
    assert torch.equal(read(net.up), before)
    assert net.up.support_avx512bf16_for_cpu
    assert not getattr(net.up.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("scheme", ["bnb-nf4", "bnb-fp4"])
def test_a_weight_that_an_evaluation_has_laid_out_anew_is_read(scheme: str, double: bool) -> None:
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    net = Net()
    veneer.quantize(net, scheme, double=double)
    layer, before = net.up, read(net.up)
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(layer.weight.data,
                                                                                 layer.weight.quant_state)
    layer.quant_state = layer.weight.quant_state
    after = read(layer, torch.float32)
    assert (after - before).norm() < 4e-3 * before.norm()  # scales in bf16
    veneer.attach(net, {"up": LoRA(rank=2)})
    shake(net)
    x = torch.randn(3, 64, requires_grad=True)
    y = net.up(x)
    adapter = layer.adapters["default"]["weight"]
    torch.testing.assert_close(y, linear(x, layer) + x @ adapter.A.T @ adapter.B.T)
    (found,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(found, (after + adapter.B @ adapter.A).sum(0).expand(3, -1), atol=1e-4, rtol=1e-4)


def test_a_final_merge_of_8_bit_has_the_dtype_of_the_inputs() -> None:
    """The layer does not remember the dtype its weight had; what it was fed says it."""
    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    model = nn.Sequential(nn.Linear(64, 64), layer).to("cpu")
    model[0].bfloat16()
    veneer.attach(model, {"0": None, "1": LoRA(rank=2)})
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    model(x)
    veneer.merge(model, keep=False)
    veneer.detach(model)
    assert model[1].weight.dtype == torch.bfloat16
    model(x)


def test_an_8_bit_layer_in_evaluation_rounds_its_inputs_as_it_does_by_itself() -> None:
    net = Net().eval()
    veneer.quantize(net, "bnb-int8")
    x = torch.randn(6, 64, requires_grad=True)
    own = net(x)
    assert not torch.equal(own, net.train()(x))  # training on a CPU does not
    veneer.attach(net.eval(), LoRA(rank=2))
    assert torch.equal(net(x), own)


@pytest.mark.parametrize(("scheme", "options", "words"), [
    ("bnb-nf4", {"block": 48}, "'bnb-nf4' has blocks of 32, 64, .* elements, got block=48"),
    ("bnb-nf4", {"doubled": True}, "'bnb-nf4' has no option 'doubled'; did you mean 'double'"),
    ("bnb-int8", {"threshold": -1}, "threshold is a number of at least 0"),
    ("bnb-int4", {}, "unknown scheme 'bnb-int4'; did you mean 'bnb-int8'"),
])
def test_errors(scheme: str, options: dict, words: str) -> None:
    net = Net()
    with pytest.raises(VeneerError, match=words):
        veneer.quantize(net, scheme, **options)
    assert type(net.up) is nn.Linear


def test_a_missing_library_is_named_with_its_extra(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "bitsandbytes"]:
        monkeypatch.setitem(sys.modules, name, None)
    net = Net()
    with pytest.raises(VeneerError, match=r"bitsandbytes is not installed: pip install 'veneer\[bitsandbytes\]'"):
        veneer.quantize(net, "bnb-nf4")
    assert type(net.up) is nn.Linear


@needs_gpu
@pytest.mark.parametrize("scheme", ["bnb-nf4", "bnb-fp4", "bnb-int8"])
def test_on_a_gpu(scheme: str) -> None:
    net = Net().half().cuda()
    veneer.quantize(net, scheme)
    x = torch.randn(16, 64, dtype=torch.float16, device="cuda", requires_grad=True)
    before = net(x)
    veneer.attach(net, LoRA(rank=4))
    torch.testing.assert_close(net(x), before, atol=2e-3, rtol=2e-3)
    if not packed_storage(net.up).own_forward:
        torch.testing.assert_close(net.up(x), linear(x, net.up), atol=2e-3, rtol=2e-3)
    shake(net)
    net(x).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)
    veneer.merge(net)
    veneer.unmerge(net)
