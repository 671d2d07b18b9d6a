"""Every method over a linear layer in every storage: the numbers of the dense layer that it is read as.

The truth is the same as in `test_matrix`, over a dense twin of the packed layer.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import veneer
from veneer.storage import packed_storage

from . import models
from .cells import METHODS, HostCase
from .oracle import (
    Result,
    adapt,
    adapter_parameters,
    assert_as_good,
    dense_run,
    dense_weights,
    error,
    inputs,
    live_run,
    scatter,
)

#: scheme → the library that it needs
STORAGES = {"nf4": None, "nf8": None, "bnb-nf4": "bitsandbytes", "bnb-int8": "bitsandbytes", "torchao-int8": "torchao",
            "torchao-fp8": "torchao", "hqq-4": "hqq", "gguf-q8_0": "gguf"}
#: run in every test run; the rest of the cells in `make test-all`
_OFTEN = ("nf4", "bnb-nf4", "torchao-int8", "gguf-q8_0")
_OFTEN_METHODS = ("lora", "lora-bias", "dora", "full", "rows", "circulant", "adalora", "loha", "loha-dense", "lokr",
                  "vera", "vblora", "randlora", "dora-lokr")



def _input(rows):
    return torch.randn(rows, 3, 32, dtype=torch.float64)


LINEAR = HostCase("linear", lambda: models.Wrap(nn.Linear(32, 24)), _input, {"layer.weight": "plain"}, ("layer.bias",))


def _cells():
    for method in METHODS:
        if method.kinds is not None:
            continue
        for scheme in STORAGES:
            often = scheme in _OFTEN and method.name in _OFTEN_METHODS
            marks = () if often else pytest.mark.slow
            yield pytest.param(method, scheme, id=f"{method.name}-{scheme}", marks=marks)


cell = pytest.mark.parametrize(("method", "scheme"), _cells())
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def _twins(scheme, dtype):
    """A model with a packed layer, and one with a dense layer that holds what the packed one is read as."""
    if STORAGES[scheme] is not None:
        pytest.importorskip(STORAGES[scheme])
    torch.manual_seed(1)
    dense = LINEAR.build().to(dtype)
    packed = copy.deepcopy(dense)
    veneer.quantize(packed, scheme)
    layer = packed.layer
    dense.layer.weight.data = packed_storage(layer).read(layer)
    assert dense.layer.weight.dtype == dtype
    return packed, dense


@cell
@both_dtypes
def test_forward_and_gradients(method, scheme, dtype):
    model, base = _twins(scheme, dtype)
    x = inputs(LINEAR, dtype)
    adapt(model, method, LINEAR)
    params = adapter_parameters(model)
    with torch.no_grad():
        g = torch.randn(base(x).shape, dtype=torch.float64)
    truth = dense_run(base, method, LINEAR, params, x, g, torch.float64)
    own = dense_run(base, method, LINEAR, params, x, g, dtype)
    assert error(truth.out, base(x).detach()) > 1e-2, "the adapter does nothing, so this would test nothing"
    assert_as_good(live_run(model, params, x, g), own, truth, dtype)
    if not packed_storage(model.layer).own_forward:  # which rounds its inputs where no gradient is wanted
        model.eval()
    assert_as_good(live_run(model, params, x, None), own._replace(grads={}), truth._replace(grads={}), dtype)


@cell
@both_dtypes
def test_merge_unmerge_detach(method, scheme, dtype):
    model, base = _twins(scheme, dtype)
    x, layer = inputs(LINEAR, dtype), model.layer
    kind, before = type(layer), packed_storage(layer).read(layer)
    adapt(model, method, LINEAR)
    params = adapter_parameters(model)
    with torch.no_grad():
        live = model(x)
    wide = {k: p.detach().double() for k, p in params.items()}
    new = dense_weights(copy.deepcopy(base).double(), method, LINEAR, wide)
    truth = dense_run(base, method, LINEAR, params, x, None, torch.float64)
    own = dense_run(base, method, LINEAR, params, x, None, dtype)
    veneer.merge(model)
    merged = layer.base_weight("weight")
    assert error(merged, new["layer.weight"]) <= 2 * torch.finfo(dtype).eps
    with torch.no_grad():
        assert_as_good(Result(model(x), {}), own, truth, dtype)
        veneer.unmerge(model)
        assert torch.equal(model(x), live)
    veneer.detach(model)
    assert type(layer) is kind
    assert torch.equal(packed_storage(layer).read(layer), before)


@cell
@both_dtypes
def test_mixed_rows(method, scheme, dtype):
    model, base = _twins(scheme, dtype)
    x = inputs(LINEAR, dtype)
    for name in ("a", "b"):
        adapt(model, method, LINEAR, name=name)
    names = ["b", None, "a", "b", "a"]
    params = {**adapter_parameters(model, "a"), **adapter_parameters(model, "b")}
    with torch.no_grad():
        g = torch.randn(base(x).shape, dtype=torch.float64)
    truth = dense_run(base, method, LINEAR, params, x, g, torch.float64, names)
    own = dense_run(base, method, LINEAR, params, x, g, dtype, names)
    with veneer.route(model, names):
        assert_as_good(live_run(model, params, x, g), own, truth, dtype)


@cell
def test_saved_and_loaded_bit_for_bit(method, scheme, tmp_path):
    model, _ = _twins(scheme, torch.float32)
    x = inputs(LINEAR, torch.float32)
    adapt(model, method, LINEAR, randomise=False)
    scatter(model)
    veneer.save(model, tmp_path)
    other, _ = _twins(scheme, torch.float32)
    veneer.load(other, tmp_path)
    assert torch.equal(other(x), model(x))
