"""Layers of every kind with inputs, and how two implementations of one layer are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import veneer
from veneer.attach import attached
from veneer.method import Adapter, Method
from veneer.weights import Weight

#: relative, by norm, in fp32
BAR = 1e-5


@dataclass(frozen=True)
class Layer:
    """How a layer is made, and the size of an input."""

    make: Callable[[], nn.Module]
    input: tuple[int, ...]


def _conv1d_of_transformers(in_: int, out: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, in_)


LAYERS = {
    "wide": Layer(lambda: nn.Linear(24, 8), (3, 5, 24)),
    "no bias": Layer(lambda: nn.Linear(24, 16, bias=False), (7, 24)),
    "tall": Layer(lambda: nn.Linear(12, 20), (3, 5, 12)),
    "square": Layer(lambda: nn.Linear(16, 16), (9, 16)),
    "Conv1D": Layer(lambda: _conv1d_of_transformers(12, 20), (3, 5, 12)),
    "Conv1D wide": Layer(lambda: _conv1d_of_transformers(24, 8), (3, 5, 24)),
    "conv1d": Layer(lambda: nn.Conv1d(12, 16, 3, stride=2, padding=1), (2, 12, 11)),
    "conv1d point": Layer(lambda: nn.Conv1d(12, 16, 1), (2, 12, 7)),
    "conv2d": Layer(lambda: nn.Conv2d(12, 16, 3, padding=1), (2, 12, 5, 6)),
    "conv2d uneven": Layer(lambda: nn.Conv2d(12, 16, (3, 2), stride=(1, 2), padding=(2, 0), bias=False), (2, 12, 5, 6)),
    "conv2d point": Layer(lambda: nn.Conv2d(12, 16, 1), (2, 12, 5, 6)),
    "conv2d groups": Layer(lambda: nn.Conv2d(24, 16, 3, groups=2, dilation=2), (2, 24, 7, 6)),
}
LINEAR = ("wide", "no bias", "tall", "square")
CONV1D_OF_TRANSFORMERS = ("Conv1D", "Conv1D wide")
CONV1D = ("conv1d", "conv1d point")
CONV2D = ("conv2d", "conv2d uneven", "conv2d point", "conv2d groups")


def layers(names: tuple[str, ...], seed: int = 0) -> nn.ModuleDict:
    """Equal layers for an equal seed."""
    torch.manual_seed(seed)
    return nn.ModuleDict({name: LAYERS[name].make() for name in names})


def attach(model: nn.Module, method: Method) -> dict[str, tuple[Weight, Adapter]]:
    """Adapt the weight of every layer; what was attached by the layer's name."""
    veneer.attach(model, {f"{name}.weight": method for name, _ in model.named_children()})
    return {item.weight.places[0].module_name: (item.weight, item.adapter) for item in attached(model, "default")}


def parameters(adapter: Adapter) -> dict[str, nn.Parameter]:
    """All that one weight's change depends on, its own parameters and those it shares."""
    shared = adapter.shared_state()
    found = {name.removeprefix("shared."): p for name, p in adapter.named_parameters()}
    return found if shared is None else {**found, **dict(shared.named_parameters())}


@torch.no_grad()
def copy_into(adapter: Adapter, values: Mapping[str, Tensor]) -> None:
    """Give every parameter of the adapter its value, whose elements are in the same order."""
    own = parameters(adapter)
    assert set(own) == set(values)
    for name, param in own.items():
        assert param.numel() == values[name].numel(), name
        param.copy_(values[name].reshape(param.shape))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).norm() / want.detach().double().norm())


def assert_equal_layers(base: Callable, other: Callable, theirs: Mapping[str, nn.Parameter], own: nn.Module,
                        adapter: Adapter, size: tuple[int, ...]) -> None:
    """Outputs, and gradients of the input and of every parameter, agree; the change is one that shows in them."""
    x = torch.randn(size)
    grads, outputs = [], []
    mine = parameters(adapter)
    for layer, params in ((other, theirs), (own, mine)):
        inner = x.clone().requires_grad_()
        y = layer(inner)
        outputs.append(y)
        pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        grads.append(dict(zip(["x", *params], torch.autograd.grad(y, [inner, *params.values()], pull), strict=True)))
    plain = base(x)
    assert 0.02 < relative(outputs[0], plain) < 50
    assert relative(outputs[1], outputs[0]) < BAR
    assert relative(outputs[1] - plain, outputs[0] - plain) < 2 * BAR
    assert set(grads[0]) == set(grads[1])
    for name, want in grads[0].items():
        assert float(want.norm()) > 0, name
        assert relative(grads[1][name].reshape(want.shape), want) < BAR, name
