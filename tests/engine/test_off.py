"""An adapter that is live in the model and switched off in single layers (`HostState.off`)."""

from __future__ import annotations

import copy

import pytest
import torch

import veneer
from veneer import LoRA
from veneer.attached import hosts
from veneer.method import VeneerError

from .nets import Net, scatter

IDS = torch.tensor([[1, 2, 3]])


def net():
    return scatter(veneer.attach(Net(blocks=2), {"*.q_proj": LoRA(rank=2)}))


def host(model, name):
    return dict(hosts(model))[name]


def test_a_layer_goes_without_it_and_the_others_keep_it():
    model = net()
    whole = model(IDS)
    host(model, "layers.0.q_proj").veneer.off.add("default")
    only_second = model(IDS)
    other = copy.deepcopy(model)
    host(other, "layers.1.q_proj").veneer.off.add("default")
    with veneer.disabled(model):
        base = model(IDS)
    assert torch.equal(other(IDS), base), "both off is the base"
    assert not torch.equal(only_second, whole)
    assert not torch.equal(only_second, base)
    with torch.no_grad():
        for tensor in host(model, "layers.0.q_proj").adapters["default"]["weight"].parameters():
            tensor.zero_()
    host(model, "layers.0.q_proj").veneer.off.clear()
    torch.testing.assert_close(model(IDS), only_second)


def test_merging_writes_what_the_model_computes():
    model = net()
    host(model, "layers.0.q_proj").veneer.off.add("default")
    before = model(IDS)
    kept = model.layers[0].q_proj.weight.clone()
    veneer.merge(model)
    torch.testing.assert_close(model(IDS), before)
    assert torch.equal(model.layers[0].q_proj.weight, kept)


def test_rows_that_are_sent_there_go_without_it_too():
    model = net()
    ids = IDS.repeat(2, 1)
    host(model, "layers.0.q_proj").veneer.off.add("default")
    want = model(ids)
    with veneer.route(model, ["default", "default"]):
        torch.testing.assert_close(model(ids), want)


def test_detaching_forgets_it():
    model = net()
    veneer.attach(model, {"*.q_proj": LoRA(rank=2)}, name="other")
    host(model, "layers.0.q_proj").veneer.off.add("default")
    veneer.detach(model, "default")
    assert host(model, "layers.0.q_proj").veneer.off == set()


def test_gradient_checkpointing_sees_that_it_was_switched_meanwhile():
    model = net()
    layer = model.layers[0]
    x = torch.randn(2, 8, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    host(model, "layers.0.q_proj").veneer.off.add("default")
    with pytest.raises(VeneerError, match="gradient checkpointing recomputes this layer"):
        y.sum().backward()


def test_a_compiled_model_follows_the_switch():
    model = net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    whole = compiled(IDS)
    host(model, "layers.0.q_proj").veneer.off.add("default")
    torch.testing.assert_close(compiled(IDS), model(IDS))
    assert not torch.equal(compiled(IDS), whole)
