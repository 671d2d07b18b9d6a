"""Packed layers that cannot be read, or not be packed: refused before anything is changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.method import VeneerError
from veneer.storage.packed import PackedLinear

from .layers import Net, stand_in_gptq

ExllamaQuantLinear = type("ExllamaQuantLinear", (nn.Module,), {"__module__": "gptqmodel.nn_modules.qlinear.exllama"})


def other_layout() -> Net:
    """`down` is held as nf4, and `up` in a layout of GPTQ that is not read."""
    net = Net()
    veneer.quantize(net, "nf4", "down")
    net.up = stand_in_gptq(net.up, kind=ExllamaQuantLinear)
    return net


def unquantised() -> Net:
    """`up` is a layer of bitsandbytes that was not moved to its device yet."""
    layers = pytest.importorskip("bitsandbytes.nn")
    net = Net()
    net.up = layers.Linear4bit(64, 128)
    return net


@pytest.mark.parametrize("make", [other_layout, unquantised])
def test_saving_beside_a_layer_that_cannot_be_read(make, tmp_path) -> None:
    model = make()
    veneer.attach(model, {"lm_head": LoRA(rank=2)})
    veneer.save(model, tmp_path)
    again = make()
    veneer.load(again, tmp_path, strict=False)
    assert torch.equal(again.lm_head.adapters.default.weight.A, model.lm_head.adapters.default.weight.A)


def test_dequantize_changes_nothing_where_a_layer_cannot_be_read() -> None:
    model = other_layout()
    with pytest.raises(VeneerError, match=r"dequantize: 1 of 2 packed weights cannot be read, so nothing was changed\. "
                                          r"'up': ExllamaQuantLinear .* lays its weight out for its own kernel"):
        veneer.dequantize(model)
    assert type(model.down) is PackedLinear
    assert type(model.up) is ExllamaQuantLinear


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite(bad: float) -> None:
    model = Net()
    model.down.weight.data[3, 4] = bad
    with pytest.raises(VeneerError, match=r"quantize: 'down' has numbers that are not finite .* nothing was"):
        veneer.quantize(model, "nf4")
    assert type(model.up) is nn.Linear


class Twice(nn.Module):
    """One linear layer under two names, one of them in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.rest = nn.ModuleList([nn.Linear(64, 64), self.first])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest[1](self.rest[0](self.first(x)))


@pytest.mark.parametrize(("scheme", "needs"), [("nf4", None), ("bnb-nf4", "bitsandbytes"), ("hqq-4", "hqq")])
def test_one_layer_under_two_names(scheme: str, needs: str | None) -> None:
    if needs is not None:
        pytest.importorskip(needs)
    model = Twice()
    assert veneer.quantize(model, scheme).weights == 2
    assert model.first is model.rest[1]
    assert type(model.first) is type(model.rest[0]) is not nn.Linear
    model(torch.randn(3, 64))


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_on_a_layer_that_would_be_replaced(hook: str) -> None:
    pytest.importorskip("bitsandbytes")
    model = Net()
    getattr(model.up, hook)(lambda *_: None)
    report = veneer.quantize(model, "bnb-nf4")
    assert type(model.up) is nn.Linear
    assert report.weights == 1
    assert "'up': another layer would take its place, as bitsandbytes 4-bit does it, without the hooks" in str(report)
    assert veneer.quantize(model, "nf4").weights == 1, "the same layer stays, with its hooks"
