"""DoRA's norms: never those of an earlier weight, and never coarser than what a gain is trained for."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import veneer
from veneer import DoRA, LoRA
from veneer.inspect.summary import adapters

from .nets import assert_as_good, scatter


def make(dtype=torch.float32, rank=3):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(up=nn.Linear(12, 10).to(dtype)))
    return scatter(veneer.attach(model, {"up": DoRA(LoRA(rank=rank))}))


def dense(model, x, dtype=None):
    """The definition in fp64, from what the model holds now, as `dtype` or x's."""
    adapter = adapters(model)["default"].weights["up"]
    V = model.up.weight.double() + adapter.inner.B.double() @ adapter.inner.A.double()
    W = adapter.magnitude.double().unsqueeze(1) * V / V.norm(dim=1, keepdim=True)
    return (x.double() @ W.mT + model.up.bias.double()).to(dtype or x.dtype).detach()


def in_own_dtype(model, x):
    """The weight in fp32 or wider, rounded once; the product in the dtype of x."""
    adapter = adapters(model)["default"].weights["up"]
    wide = torch.promote_types(x.dtype, torch.float32)
    V = model.up.weight.to(wide) + adapter.inner.B.to(wide) @ adapter.inner.A.to(wide)
    W = adapter.magnitude.to(wide).unsqueeze(1) * V / V.norm(dim=1, keepdim=True)
    return nn.functional.linear(x, W.to(x.dtype), model.up.bias).detach()


def evaluate(model, x):
    with torch.no_grad():
        return model(x)


def step_through_data(model):
    for param in veneer.trainable(model):
        param.data.add_(torch.randn_like(param), alpha=0.2)  # leaves no trace in the tensor's version


def step_by_optimizer(model):
    optimizer = torch.optim.AdamW(veneer.trainable(model), lr=0.05, fused=True)
    model(torch.randn(4, 12, dtype=model.up.weight.dtype)).pow(2).sum().backward()
    optimizer.step()


def step_foreach(model):
    optimizer = torch.optim.SGD(veneer.trainable(model), lr=0.01, foreach=True)
    model(torch.randn(4, 12, dtype=model.up.weight.dtype)).pow(2).sum().backward()
    optimizer.step()


def train_with_data_writes(model):
    model(torch.randn(4, 12, dtype=model.up.weight.dtype)).pow(2).sum().backward()
    for param in veneer.trainable(model):
        param.data.add_(param.grad, alpha=-0.02)


def load_the_base(model):
    model.load_state_dict({"up.weight": torch.randn(10, 12), "up.bias": torch.randn(10)}, strict=False)


def assign_the_base(model):
    model.load_state_dict({"up.weight": torch.randn(10, 12), "up.bias": torch.randn(10)}, strict=False, assign=True)


def change_in_place(model):
    with torch.no_grad():
        model.up.weight.mul_(1.5)


def change_one_element(model):
    with torch.no_grad():
        model.up.weight[0, 0] += 3


def replace_the_data(model):
    model.up.weight.data = torch.randn(10, 12)


def load_the_adapter(model):
    state = {k: torch.randn_like(v) for k, v in model.state_dict().items() if "adapters" in k}
    model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("change", [
    step_by_optimizer, step_foreach, train_with_data_writes, load_the_base, assign_the_base, change_in_place,
    change_one_element, replace_the_data, load_the_adapter], ids=lambda f: f.__name__)
def test_norms_are_never_stale(change):
    model = make()
    x = torch.randn(5, 12)
    for round in range(3):
        for run in (evaluate, evaluate, lambda m, x: m(x)):
            torch.testing.assert_close(run(model, x), dense(model, x), rtol=1e-5, atol=1e-5)
        change(model)
        first = evaluate if round % 2 == 0 else (lambda m, x: m(x))
        torch.testing.assert_close(first(model, x), dense(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16])
def test_norms_follow_the_dtype(to):
    model = make()
    x = torch.randn(5, 12)
    evaluate(model, x)
    model.to(to)
    x = x.to(to)
    got = evaluate(model, x)
    assert got.dtype == to
    assert_as_good(got, in_own_dtype(model, x), dense(model, x, torch.float64), to)
    x = x.float()
    model.float()
    torch.testing.assert_close(evaluate(model, x), dense(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("turn", ["merge", "disabled", "copy"])
def test_norms_after_the_weight_was_swapped(turn):
    import copy

    model = make()
    x = torch.randn(5, 12)
    want = dense(model, x)
    evaluate(model, x)
    if turn == "merge":
        veneer.merge(model)
        torch.testing.assert_close(evaluate(model, x), want)
        veneer.unmerge(model)
    elif turn == "disabled":
        with veneer.disabled(model):
            evaluate(model, x)
    else:
        model = copy.deepcopy(model)
        change_in_place(model)
        want = dense(model, x)
    torch.testing.assert_close(evaluate(model, x), want, rtol=1e-5, atol=1e-5)


def test_a_compiled_training_step_leaves_no_old_norm_for_evaluation():
    torch._dynamo.reset()
    model = make()
    x = torch.randn(5, 12)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        evaluate(model, x)
        step(x).pow(2).sum().backward()
        for param in veneer.trainable(model):
            param.data.add_(param.grad, alpha=-0.02)
            param.grad = None
        torch.testing.assert_close(evaluate(model, x), dense(model, x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("gain", [1.003, 1.006])
@pytest.mark.parametrize("mode", ["auto", "reference"])
@pytest.mark.parametrize("host", ["linear", "conv"])
def test_a_small_gain_is_not_rounded_away_in_bf16(mode, host, gain):
    """bf16 knows nothing between 1 and 1.0078; the mean over many outputs must still show the gain.

    (Outputs that are themselves 16-bit hide any gain below half a unit in the last place, 1.002.)
    """
    torch.manual_seed(0)
    base = nn.Linear(64, 32, bias=False) if host == "linear" else nn.Conv1d(64, 32, 1, bias=False)
    model = nn.Sequential(OrderedDict(up=base)).bfloat16()
    veneer.attach(model, {"up": DoRA(LoRA(rank=2))})
    x = torch.randn(4000, 64, dtype=torch.bfloat16)
    x = x if host == "linear" else x.unsqueeze(-1)
    with torch.no_grad(), veneer.ops.use(mode):
        before = model(x).double()
        adapters(model)["default"].weights["up"].magnitude.mul_(gain)
        after = model(x).double()
    slope = float((after * before).sum() / before.pow(2).sum())
    assert slope - 1 == pytest.approx(gain - 1, rel=0.2)


def test_the_norm_is_a_constant_for_the_gradient():
    """§4.3 of the paper: A's gradient is that of m/c · (W + BA) with c held fixed."""
    model = make(torch.float64)
    adapter = adapters(model)["default"].weights["up"]
    x = torch.randn(5, 12, dtype=torch.float64)
    model(x).pow(3).sum().backward()
    A, B, m = (p.detach().clone().requires_grad_() for p in (adapter.inner.A, adapter.inner.B, adapter.magnitude))
    V = model.up.weight.detach() + B @ A
    W = (m / V.detach().norm(dim=1)).unsqueeze(1) * V
    (x @ W.mT + model.up.bias.detach()).pow(3).sum().backward()
    for mine, theirs in ((adapter.inner.A, A), (adapter.inner.B, B), (adapter.magnitude, m)):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_row_of_zeros_stays_one_and_gives_no_nan():
    model = nn.Sequential(OrderedDict(up=nn.Linear(6, 4, bias=False)))
    with torch.no_grad():
        model.up.weight[1] = 0
    veneer.attach(model, {"up": DoRA(LoRA(rank=2))})
    x = torch.randn(3, 6, requires_grad=True)
    y = model(x)
    assert not y[:, 1].any()
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in veneer.trainable(model))
    veneer.merge(model)
    assert torch.equal(model(x)[:, 1], torch.zeros(3))
