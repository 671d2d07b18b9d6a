"""Dropout on what an adapter puts out (LoRA(dropout_on="output")): its mask, its gradient, where it is carried along.

With A = I, B = I and W = 0 the layer's output is the dropped output of the adapter itself, so the mask can be read off.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

import veneer
from veneer import DoRA, LoRA
from veneer.inspect.summary import adapters
from veneer.method import VeneerError

from .nets import scatter

each_mode = pytest.mark.parametrize("mode", ["auto", "reference"])
each_rate = pytest.mark.parametrize("p", [0.05, 0.3])


def window(p, width=48, scale=0.5, **options):
    model = nn.Sequential(OrderedDict(up=nn.Linear(width, width, bias=False)))
    nn.init.zeros_(model.up.weight)
    veneer.attach(model, {"up": LoRA(rank=width, alpha=scale * width, dropout=p, dropout_on="output", **options)})
    adapter = adapters(model)["default"].weights["up"]
    nn.init.eye_(adapter.A)
    nn.init.eye_(adapter.B)
    return model, adapter


@each_rate
@each_mode
def test_single_elements_of_the_output_fall_out_and_the_mean_stays(p, mode):
    model, adapter = window(p)
    with torch.no_grad():
        adapter.A.fill_(1.0)  # every inner number mixes all inputs: an input that fell out would be seen in all outputs
    x = torch.rand(3000, 48) + 0.5
    with veneer.ops.use(mode):
        y = model(x).detach()
    whole = 0.5 * x.sum(-1, keepdim=True).expand(-1, 48)
    kept = y != 0
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / y.numel())
    ratio = (y / whole)[kept]
    assert float(ratio.mean()) == pytest.approx(1 / (1 - p), rel=3e-5)
    assert float(ratio.max() - ratio.min()) < 1e-5
    assert float(kept.double().mean(0).std()) < 0.03, "an output is favoured"


@each_rate
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_that_of_the_mask_of_the_forward(p, mode, dtype):
    model, adapter = window(p)
    model = model.to(dtype)
    x = (torch.rand(30, 48) + 0.5).to(dtype).requires_grad_()
    with veneer.ops.use(mode):
        y = model(x)
    kept, stays = y.detach() != 0, 1 - p
    if mode == "auto" and p >= 0.15:
        stays = 1 - round(p * 65536) / 65536  # the grain of the mask's bits
    upstream = torch.randn(30, 48).to(dtype)
    y.backward(upstream)
    X, A, B = (t.detach().double().requires_grad_() for t in (x, adapter.A, adapter.B))
    true = 0.5 * (X @ A.mT @ B.mT) * kept / stays
    true.backward(upstream.double())
    for got, want in ((y, true), (x.grad, X.grad), (adapter.A.grad, A.grad), (adapter.B.grad, B.grad)):
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", [LoRA, lambda **k: DoRA(LoRA(**k))], ids=["lora", "dora"])
def test_in_fp64_the_fused_gradient_is_the_numeric_one(method, bias):
    model = nn.Sequential(OrderedDict(up=nn.Linear(9, 7, bias=bias).double()))
    scatter(veneer.attach(model, {"up": method(rank=3, alpha=2.0, dropout=0.3, dropout_on="output")}))
    inputs = [torch.randn(5, 9, dtype=torch.float64, requires_grad=True), *veneer.trainable(model)]
    if len(inputs) == 4:  # the norm is a constant for DoRA's gradient: only x and the magnitude have the numeric one
        inputs = [inputs[0], next(q for n, q in model.named_parameters() if n.endswith("magnitude"))]
    assert "fused" in veneer.inspect.explain(model)

    def run(*_):
        torch.manual_seed(7)
        return model(inputs[0])

    assert torch.autograd.gradcheck(run, inputs)


@each_mode
def test_eval_mode_and_the_start_know_none_of_it(mode):
    model = nn.Sequential(OrderedDict(up=nn.Linear(8, 8)))
    x = torch.randn(6, 8)
    with veneer.ops.use(mode):
        before = model(x)
        veneer.attach(model, {"up": LoRA(rank=3, dropout=0.5, dropout_on="output")})
        assert torch.equal(model(x), before), "the base's output was dropped"
        scatter(model)
        assert torch.equal(model.eval()(x), model(x))
        assert not torch.equal(model.train()(x), model(x))


@pytest.mark.parametrize(("layer", "x"), [
    (nn.Conv2d(4, 6, 3), torch.randn(3, 4, 6, 6)), (nn.Embedding(11, 6), torch.randint(0, 11, (40, 5)))],
    ids=["conv2d", "embedding"])
def test_other_hosts_drop_single_elements_too(layer, x):
    model = nn.Sequential(OrderedDict(up=layer))
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
        scatter(veneer.attach(model, {"up": LoRA(rank=3, dropout=0.3, dropout_on="output")}))
        whole, y = model.eval()(x), model.train()(x)
    kept = y != 0
    assert 0.5 < float(kept.double().mean()) < 0.85
    torch.testing.assert_close(y[kept], (whole / 0.7)[kept])


def test_several_live_adapters_drop_each_their_own():
    model, _ = window(0.5, scale=1.0)
    veneer.attach(model, {"up": LoRA(rank=48, dropout=0.5, dropout_on="output")}, name="other")
    for part in ("A", "B"):
        nn.init.eye_(getattr(adapters(model)["other"].weights["up"], part))
    veneer.activate(model, ["default", "other"])
    y = model(torch.ones(100, 48)).detach()
    assert set(y.unique().tolist()) == {0.0, 2.0, 4.0}


def test_a_weight_that_is_used_directly_refuses_it():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return x @ self.w

    with pytest.raises(VeneerError, match="no input to drop from; use dropout=0"):
        veneer.attach(Bare(), {"w": LoRA(rank=2, dropout=0.1, dropout_on="output")})


def test_a_wrong_side_is_an_error():
    with pytest.raises(VeneerError, match="LoRA: unknown dropout_on 'ouput'; did you mean 'output'"):
        LoRA(dropout_on="ouput")


def test_what_is_made_of_such_an_adapter_drops_on_the_same_side(tmp_path):
    def net():
        torch.manual_seed(5)
        return nn.Sequential(OrderedDict(up=nn.Linear(8, 8)))

    model = scatter(veneer.attach(net(), {"up": LoRA(rank=4, dropout=0.25, dropout_on="output")}))
    assert "0.25" in "".join(veneer.save(model, tmp_path).notes)
    veneer.load(other := net(), tmp_path)
    made = veneer.to_lora(model, rank=2)
    assert made is not None
    for each in (other, model):
        adapter = adapters(each)["default"].weights["up"]
        assert (adapter.method.dropout, adapter.method.dropout_on, adapter.dropout_on) == (0.25, "output", "output")
