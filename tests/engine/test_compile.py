"""One compiled model through a change of route, of gradient mode, of live adapters, and a merge."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import veneer
from veneer import DoRA, LoRA

from .nets import assert_as_good, scatter

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 5, 2), (4, 6, 3, 3)),
}


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=32):  # every change is compiled anew; the default allows 8
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("method", [LoRA(rank=3), DoRA(LoRA(rank=3))], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_one_compiled_model_follows_every_change(kind, method):
    make, shape = LAYERS[kind]
    model = nn.Sequential(OrderedDict(up=make()))
    for name in ("a", "b"):
        scatter(veneer.attach(model, {"up": method}, name=name), name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(shape)

    def agree():
        want, got = model(x), compiled(x)
        torch.testing.assert_close(got, want)
        params = veneer.trainable(model)
        if want.requires_grad:
            for a, c in zip(*(torch.autograd.grad(y.pow(2).sum(), params, allow_unused=True) for y in (got, want)),
                            strict=True):
                assert (a is None) == (c is None)
                if a is not None:
                    torch.testing.assert_close(a, c)
        return got.detach()

    b = agree()
    veneer.activate(model, ["a"])
    a = agree()
    assert not torch.allclose(a, b)
    veneer.activate(model, ["a", "b"])
    agree()
    with veneer.route(model, ["b", None, "a", "b"]):
        mixed = agree()
    torch.testing.assert_close(mixed[0], b[0])
    torch.testing.assert_close(mixed[2], a[2])
    with veneer.disabled(model):
        bare = agree()
    torch.testing.assert_close(mixed[1], bare[1])
    with torch.no_grad():
        agree()
    with torch.inference_mode():
        agree()
    veneer.activate(model, ["a"])
    with torch.no_grad():
        scatter(model, "a")
        assert not torch.allclose(agree(), a)
    veneer.merge(model)
    merged = agree()
    veneer.unmerge(model)
    torch.testing.assert_close(agree(), merged)


@pytest.mark.parametrize("method", [LoRA(rank=3), DoRA(LoRA(rank=3))], ids=str)
def test_compiled_under_autocast(method):
    model = nn.Sequential(OrderedDict(up=nn.Linear(16, 12)))
    scatter(veneer.attach(model, {"up": method}))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, 16, requires_grad=True)
    found = {}
    for name, run in {"compiled": compiled, "eager": model}.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = run(x)
        assert y.dtype == torch.bfloat16
        found[name] = (y.detach(), *torch.autograd.grad(y.float().pow(2).sum(), [x, *veneer.trainable(model)]))
    model.double()
    y = model(wide := x.detach().double().requires_grad_())
    truth = (y.detach(), *torch.autograd.grad(y.pow(2).sum(), [wide, *veneer.trainable(model)]))
    for got, own, true in zip(found["compiled"], found["eager"], truth, strict=True):
        assert_as_good(got, own, true, torch.bfloat16)


def test_compiled_dropout_draws_anew():
    model = nn.Sequential(OrderedDict(up=nn.Linear(64, 64)))
    scatter(veneer.attach(model, {"up": LoRA(rank=3, dropout=0.5)}))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 64)
    assert not torch.equal(compiled(x), compiled(x))
    model.eval()
    assert torch.equal(compiled(x), compiled(x))
    torch.testing.assert_close(compiled(x), model(x))
