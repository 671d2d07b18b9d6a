"""What a state dict holds while an adapter is merged into packed layers, and a bias that is no parameter."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import veneer
from veneer import LoRA
from veneer.method import VeneerError

from .layers import Net, each, stand_in_gptq


def merged(**options) -> Net:
    model = Net()
    veneer.quantize(model, "nf4")
    veneer.attach(model, LoRA(rank=2))
    with torch.no_grad():
        model.up.adapters.default.weight.B.normal_()
        model.down.adapters.default.weight.B.normal_()
    return veneer.merge(model, **options)


def test_a_state_dict_without_the_merged_adapter_is_refused(tmp_path) -> None:
    model = merged()
    with pytest.raises(VeneerError, match=r"state_dict: 'default' is merged into layers whose packed "
                                          r"weight .* without the adapter\. Merge for good, "
                                          r"veneer.merge\(model, keep=False\)"):
        model.state_dict()
    x = torch.randn(3, 64)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))
    veneer.save(model, tmp_path)
    veneer.unmerge(model)
    assert model.state_dict()["up.weight"].dtype == torch.uint8


def test_what_holds_the_merged_weight_is_written() -> None:
    model = merged(keep=False)
    assert model.state_dict()["up.weight"].dtype == torch.float32
    again = merged(requantize=True, at_least=0)
    assert torch.equal(again.state_dict()["up.weight"], again.up.weight)


def test_a_bias_that_is_no_parameter_comes_back_where_the_model_is() -> None:
    model = Net()
    each(stand_in_gptq)(model)
    veneer.attach(model, {"up": LoRA(rank=2, bias=True)})
    veneer.merge(model)
    veneer.unmerge(model.to("meta"))
    assert model.up.bias.device == model.up.qweight.device == torch.device("meta")
