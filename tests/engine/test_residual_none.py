"""LoRA(residual="none"): a start that is not zero is subtracted nowhere, and the model begins changed by it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import veneer
from veneer import DoRA, LoRA
from veneer.inits.random import TorchInit
from veneer.inspect.summary import adapters
from veneer.method import VeneerError

ONES = TorchInit(b="torch.nn.init.ones_")


def net():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))


def test_the_output_begins_changed_by_the_starting_pair():
    model, x = net(), torch.randn(3, 6)
    base = model(x)
    veneer.attach(model, {"1": None, "0": LoRA(rank=2, alpha=1.0, init=ONES, residual="none")})
    adapter = adapters(model)["default"].weights["0"]
    assert {name for name, _ in adapter.named_parameters()} == {"A", "B"} == set(adapter.state_dict())
    assert torch.equal(adapter.B, torch.ones(5, 2))
    weight = model[0].weight + 0.5 * adapter.B @ adapter.A
    torch.testing.assert_close(model(x), model[1](nn.functional.linear(x, weight, model[0].bias)))
    with veneer.disabled(model):
        assert torch.equal(model(x), base), "the base was changed"


@pytest.mark.parametrize("method", [LoRA, lambda **k: DoRA(LoRA(**k))], ids=["lora", "dora"])
def test_saved_merged_and_loaded_it_stays_a_pair_of_its_own_rank(method, tmp_path):
    model, x = net(), torch.randn(3, 6)
    bare = copy.deepcopy(model)
    veneer.attach(model, {"1": None, "0": method(rank=2, alpha=1.0, init=ONES, residual="none")})
    y = model(x)
    report = veneer.save(model, tmp_path)
    assert report.format == "peft"
    veneer.load(bare, tmp_path)
    assert torch.equal(bare(x), y)
    torch.testing.assert_close(veneer.merge(model)(x), y)


def test_an_unknown_residual_names_the_known_ones():
    with pytest.raises(VeneerError, match=r"unknown residual 'non'; did you mean 'none'\? Known: exact, base, none"):
        LoRA(residual="non")
