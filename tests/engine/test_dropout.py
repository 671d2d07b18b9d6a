"""Dropout on the adapter's input: its statistics, its gradient, and when there is none.

With A = I, B = I and W = 0 the layer's output is the dropped input itself, so the mask can be read off.
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

from .nets import assert_as_good, scatter

RATES = [0.05, 0.1, 0.3, 0.5]
each_rate = pytest.mark.parametrize("p", RATES)
each_mode = pytest.mark.parametrize("mode", ["auto", "reference"])


def window(p, width=64, dtype=torch.float32, scale=1.0):
    """A layer whose output is `scale` · dropped input."""
    model = nn.Sequential(OrderedDict(up=nn.Linear(width, width, bias=False).to(dtype)))
    nn.init.zeros_(model.up.weight)
    veneer.attach(model, {"up": LoRA(rank=width, alpha=scale * width, dropout=p)})
    adapter = adapters(model)["default"].weights["up"]
    nn.init.eye_(adapter.A)
    nn.init.eye_(adapter.B)
    return model, adapter


@each_rate
@each_mode
def test_rate_scaling_and_expectation(p, mode):
    model, _ = window(p, width=128)
    x = torch.rand(2000, 128) + 0.5
    with veneer.ops.use(mode):
        y = model(x).detach()
    kept = y != 0
    count = x.numel()
    spread = math.sqrt(p * (1 - p) / count)
    assert abs(float(kept.double().mean()) - (1 - p)) < 5 * spread
    # what stays is scaled by one number, within 2⁻¹⁶ (the grain of the mask's bits) of 1 / (1 − p)
    ratio = (y / x)[kept]
    assert float(ratio.max() - ratio.min()) < 1e-6 * float(ratio.max())
    assert float(ratio.mean()) == pytest.approx(1 / (1 - p), rel=3e-5)
    assert float((y.double() / x.double()).mean()) == pytest.approx(1.0, abs=5 * spread / (1 - p))
    # no element, row or column is favoured, and neighbours are independent
    for dim, n in ((0, 2000), (1, 128)):
        assert float((kept.double().mean(dim) - (1 - p)).abs().max()) < 6 * math.sqrt(p * (1 - p) / n)
    gone = (~kept).double().flatten() - p
    for shift in (1, 2, 4, 128):
        pairs = gone[shift:] * gone[:-shift]
        assert abs(float(pairs.mean())) < 5 * p * (1 - p) / math.sqrt(count)


@each_rate
@pytest.mark.parametrize("size", [1, 2, 3, 5, 17])
def test_small_inputs_are_drawn_fairly(p, size):
    """The last elements of a draw are dropped as often as any other, whatever the size."""
    model, _ = window(p, width=size)
    x = torch.ones(1, size)
    times = 3000
    kept = sum((model(x).detach() != 0).double() for _ in range(times)) / times
    assert float((kept - (1 - p)).abs().max()) < 5 * math.sqrt(p * (1 - p) / times)


@each_rate
@each_mode
def test_masks_differ_by_call_and_repeat_by_seed(p, mode):
    model, _ = window(p)
    x = torch.ones(50, 64)
    with veneer.ops.use(mode):
        torch.manual_seed(3)
        first, second = model(x), model(x)
        torch.manual_seed(3)
        again = model(x)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


@each_rate
@each_mode
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gradient_is_that_of_the_mask_of_the_forward(p, mode, dtype):
    model, adapter = window(p, dtype=dtype, scale=0.5)
    x = (torch.rand(30, 64) + 0.5).to(dtype).requires_grad_()
    with veneer.ops.use(mode):
        y = model(x)
    gone = y.detach() == 0
    assert gone.any()
    stays = 1 - p
    if mode == "auto" and p >= 0.15:
        stays = 1 - round(p * 65536) / 65536  # the grain of the mask's bits
    upstream = torch.randn(30, 64).to(dtype)
    y.backward(upstream)
    assert not x.grad[gone].any(), "a gradient passed through an element that was dropped"
    got = {"y": y.detach(), "x": x.grad, "A": adapter.A.grad, "B": adapter.B.grad}
    own, truth = (_by_hand(x, upstream, ~gone, stays, adapter, t) for t in (dtype, torch.float64))
    for name, true in truth.items():
        assert_as_good(got[name], own[name], true, dtype)


def _by_hand(x, upstream, kept, stays, adapter, dtype):
    """Output and gradients of the window in `dtype`, by plain products, for the mask `kept`."""
    x = x.detach().to(dtype).requires_grad_()
    A, B = (p.detach().to(dtype).requires_grad_() for p in (adapter.A, adapter.B))
    y = 0.5 * (x * kept / stays) @ A.mT @ B.mT
    grads = torch.autograd.grad(y, [x, A, B], upstream.to(dtype))
    return dict(zip("yxAB", (y.detach(), *grads), strict=True))


@pytest.mark.parametrize("p", [*RATES, 0.01])
@each_mode
def test_an_empty_batch(p, mode):
    model, adapter = window(p)
    x = torch.empty(0, 64, requires_grad=True)
    with veneer.ops.use(mode):
        y = model(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 64)
    assert not adapter.A.grad.any()


@each_rate
@pytest.mark.parametrize("method", [LoRA, lambda **k: DoRA(LoRA(**k))], ids=["lora", "dora"])
def test_in_fp64_the_fused_gradient_is_the_numeric_one(p, method):
    torch.manual_seed(1)
    model = nn.Sequential(OrderedDict(up=nn.Linear(9, 7).double()))
    scatter(veneer.attach(model, {"up": method(rank=3, alpha=2.0, dropout=p)}))
    inputs = [torch.randn(5, 9, dtype=torch.float64, requires_grad=True), *veneer.trainable(model)]
    if len(inputs) == 4:  # the norm is a constant for DoRA's gradient: only x and the magnitude have the numeric one
        inputs = [inputs[0], next(q for n, q in model.named_parameters() if n.endswith("magnitude"))]

    def run(*_):
        torch.manual_seed(7)
        return model(inputs[0])

    assert torch.autograd.gradcheck(run, inputs)


@each_mode
def test_no_dropout_is_no_dropout(mode):
    torch.manual_seed(0)
    base = nn.Linear(8, 8)
    models = []
    for p in (0.0, 0.5):
        model = nn.Sequential(OrderedDict(up=nn.Linear(8, 8)))
        model.up.load_state_dict(base.state_dict())
        torch.manual_seed(1)
        models.append(scatter(veneer.attach(model, {"up": LoRA(rank=3, dropout=p)})))
    x = torch.randn(6, 8)
    state = torch.get_rng_state()
    with veneer.ops.use(mode):
        plain = models[0](x)
        assert torch.equal(models[1].eval()(x), plain)  # in eval mode there is none
        assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn without dropout"
        assert torch.equal(models[0](x), plain)
        models[1].train()
        assert not torch.equal(models[1](x), plain)
    with veneer.ops.use("reference"):
        torch.testing.assert_close(models[0](x), plain)


def test_dropout_touches_the_adapter_and_never_the_base():
    model = nn.Sequential(OrderedDict(up=nn.Linear(8, 8)))
    x = torch.randn(6, 8)
    before = model(x)
    veneer.attach(model, {"up": LoRA(rank=3, dropout=0.5)})
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(("layer", "x"), [
    (nn.Conv2d(4, 6, 3), torch.randn(3, 4, 6, 6)), (nn.Conv1d(4, 6, 3), torch.randn(3, 4, 9)),
    (nn.Embedding(11, 6), torch.randint(0, 11, (40, 5)))], ids=["conv2d", "conv1d", "embedding"])
@pytest.mark.parametrize("method", [LoRA, lambda **k: DoRA(LoRA(**k))], ids=["lora", "dora"])
def test_other_hosts_drop_in_training_and_keep_the_mean(layer, x, method):
    import copy

    model = nn.Sequential(OrderedDict(up=copy.deepcopy(layer)))
    scatter(veneer.attach(model, {"up": method(rank=3, dropout=0.3)}))
    with torch.no_grad():
        whole = model.eval()(x)
        assert torch.equal(model(x), whole)
        with veneer.disabled(model):
            base = model(x)
        draws = torch.stack([model.train()(x) for _ in range(600)])
    assert not torch.equal(draws[0], draws[1])
    spread = draws.std(0) / math.sqrt(600)
    assert float(((draws.mean(0) - whole).abs() / (spread + 1e-7)).mean()) < 1.2  # E|z| = 0.8 for a standard normal
    assert float(draws.std(0).mean()) > 0.05 * float((whole - base).abs().mean())


def test_two_live_adapters_drop_independently_and_only_their_own():
    model, _ = window(0.5)
    veneer.attach(model, {"up": LoRA(rank=64)}, name="other")
    adapter = adapters(model)["other"].weights["up"]
    nn.init.eye_(adapter.A)
    nn.init.eye_(adapter.B)
    veneer.activate(model, ["default", "other"])
    y = model(torch.ones(100, 64)).detach()
    assert set(y.unique().tolist()) == {1.0, 3.0}
    assert float((y == 3).double().mean()) == pytest.approx(0.5, abs=0.03)
