"""keep_dense: what it keeps is what the layer holds now, and goes with the layer."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import veneer
from veneer import LoRA
from veneer.storage.recent import RECENT, keep_dense

from .layers import CASES, Case, Net, scheme


@pytest.fixture(autouse=True)
def _kept():
    keep_dense(1)
    yield
    keep_dense(0)


def dense(layer) -> torch.Tensor:
    """The layer's weight, by the store."""
    return layer.base_weight("weight")


@pytest.mark.parametrize("case", [Case("nf4", scheme("nf4")), *CASES], ids=lambda case: case.name)
def test_one_read_serves_the_next(case: Case) -> None:
    model = veneer.attach(case.build(), {"up": LoRA(rank=2)})
    assert dense(model.up) is dense(model.up)


@pytest.mark.parametrize("name", ["nf4", "torchao-int8"])
def test_after_load_state_dict(name: str) -> None:
    if name == "torchao-int8":
        pytest.importorskip("torchao")
    torch.manual_seed(0)
    nets = [Net(), Net()]
    for net in nets:
        veneer.quantize(net, name)
        veneer.attach(net, {"up": LoRA(rank=2)})
    before, other = dense(nets[0].up), dense(nets[1].up)
    nets[0].load_state_dict(nets[1].state_dict())
    assert torch.equal(dense(nets[0].up), other)
    assert not torch.equal(before, other)


def test_after_a_move() -> None:
    model = Net()
    veneer.quantize(model, "nf4")
    veneer.attach(model, {"up": LoRA(rank=2)})
    dense(model.up)
    assert dense(model.to("meta").up).is_meta


def test_another_weight_put_in_its_place() -> None:
    model = Net()
    veneer.quantize(model, "nf4")
    veneer.attach(model, {"up": LoRA(rank=2)})
    before = dense(model.up)
    codes = model.up.weight.data
    model.up.weight.data = codes.flip(0)
    assert not torch.equal(dense(model.up), before)
    model.up.weight.data = codes
    model.up.weight_scales.zero_()
    assert not torch.equal(dense(model.up), before)


def test_nothing_is_kept_of_layers_that_are_gone() -> None:
    model = Net()
    veneer.quantize(model, "nf4")
    veneer.attach(model, LoRA(rank=2))
    copied = copy.deepcopy(model)
    gc.collect()
    before = RECENT.size
    for name in ("up", "down"):
        dense(getattr(copied, name))
    assert RECENT.size == before + 2 * 64 * 128 * 4
    del copied
    gc.collect()
    assert RECENT.size == before
