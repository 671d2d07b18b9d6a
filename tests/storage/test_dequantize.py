"""dequantize: a packed model as an ordinary one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.method import VeneerError

SCHEMES = ["nf4", "nf8"]


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32, bias=False), nn.LayerNorm(32)).to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_are_those_that_were_read(scheme: str, dtype: torch.dtype) -> None:
    model = net(dtype)
    keys = list(model.state_dict())
    assert veneer.dequantize(model) == 0, "nothing is packed yet"
    veneer.quantize(model, scheme)
    x = torch.randn(5, 32, dtype=dtype)
    want = model(x)
    assert veneer.dequantize(model) == 2
    assert [type(m) for m in (model[0], model[2])] == [nn.Linear] * 2
    assert list(model.state_dict()) == keys
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(model(x), want)
    veneer.quantize(model, scheme)  # an ordinary model again, which can be quantised as before
    assert torch.equal(model(x), want)


def test_after_a_merge_for_good_the_rest_follows() -> None:
    model = net()
    veneer.quantize(model, "nf4")
    veneer.attach(model, {"0": LoRA(rank=2), "2": None})
    with pytest.raises(VeneerError, match=r"this model has adapters; merge them for good .*keep=False"):
        veneer.dequantize(model)
    veneer.merge(model, keep=False)
    veneer.detach(model)
    assert veneer.dequantize(model) == 1
    assert not any(p.dtype == torch.uint8 for p in model.parameters())
