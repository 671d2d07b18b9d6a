"""Every method on every host in every dtype: the shortcut agrees with weight space, and nothing is left behind."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

import veneer
from veneer.method import VeneerError

from .cells import ALL, CELLS, DTYPES, FORBIDDEN, HOSTS, METHODS
from .oracle import (
    Result,
    adapt,
    adapter_parameters,
    assert_as_good,
    build,
    dense_run,
    dense_weights,
    error,
    inputs,
    live_run,
    scatter,
)

_NAMES = [f"{method.name}-{host.name}" for method, host in CELLS]
cell = pytest.mark.parametrize(("method", "host"), CELLS, ids=_NAMES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp64"])
_BY_NAME = {m.name: m for m in METHODS}


def _cotangent(out):
    return torch.randn(out.shape, dtype=torch.float64)


def _outputs(model, x):
    with torch.no_grad():
        return model(x)


def _bits(model):
    return {key: (id(p), p.dtype, p.detach().clone(), p.requires_grad)
            for key, p in model.named_parameters(remove_duplicate=False)}


def _assert_given_back(model, before, kinds):
    assert [type(m) for m in model.modules()] == kinds
    assert list(dict(model.named_parameters(remove_duplicate=False))) == list(before)
    for key, param in model.named_parameters(remove_duplicate=False):
        number, dtype, values, trained = before[key]
        assert (id(param), param.dtype, param.requires_grad) == (number, dtype, trained), key
        assert torch.equal(param, values), f"{key} lost its bits"


@cell
@every_dtype
def test_identity_at_start(method, host, dtype):
    model = build(host, dtype)
    x = inputs(host, dtype)
    # For some shapes torch takes another kernel, with other bits, where the weight requires a gradient. So what is
    # asked for is the bits of the base for one of the two: no third value may come out.
    before = [_three_ways(model.requires_grad_(trained), x) for trained in (True, False)]
    adapt(model, method, host, randomise=False)
    if not method.identity_at_start:
        assert not torch.equal(_outputs(model, x), before[1][0])
        return
    for got, trained, frozen in zip(_three_ways(model, x), *before, strict=True):
        assert torch.equal(got, trained) or torch.equal(got, frozen)


def _three_ways(model, x):
    return _outputs(model.train(), x), model(x).detach(), _outputs(model.eval(), x)


@cell
@every_dtype
def test_shortcut_is_weight_space(method, host, dtype):
    base = build(host, dtype)
    x = inputs(host, dtype)
    model = adapt(copy.deepcopy(base), method, host)
    params = adapter_parameters(model)
    truth = dense_run(base, method, host, params, x, None, torch.float64)
    own = dense_run(base, method, host, params, x, None, dtype)
    assert error(truth.out, _outputs(base, x)) > 1e-2, "the adapter does nothing, so this would test nothing"
    assert_as_good(live_run(model, params, x, None), own, truth, dtype)
    assert_as_good(live_run(model, params, x, None), own, truth, dtype)  # again, from whatever was kept
    scatter(model)
    own = dense_run(base, method, host, params, x, None, dtype)
    truth = dense_run(base, method, host, params, x, None, torch.float64)
    assert_as_good(live_run(model, params, x, None), own, truth, dtype)


@cell
@every_dtype
def test_gradients(method, host, dtype):
    base = build(host, dtype)
    x = inputs(host, dtype)
    model = adapt(copy.deepcopy(base), method, host)
    params = adapter_parameters(model)
    g = _cotangent(_outputs(base, x))
    truth = dense_run(base, method, host, params, x, g, torch.float64)
    own = dense_run(base, method, host, params, x, g, dtype)
    assert all(p.requires_grad for p in params.values())
    assert_as_good(live_run(model, params, x, g), own, truth, dtype)


@cell
@every_dtype
def test_merge_unmerge_detach(method, host, dtype):
    model = build(host, dtype)
    base, before, kinds = copy.deepcopy(model), _bits(model), [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    x = inputs(host, dtype)
    adapt(model, method, host)
    params = adapter_parameters(model)
    live = _outputs(model, x)
    truth = dense_run(base, method, host, params, x, None, torch.float64)
    own = dense_run(base, method, host, params, x, None, dtype)
    new = dense_weights(copy.deepcopy(base).double(), method, host, {k: p.detach().double() for k, p in params.items()})
    veneer.merge(model)
    for key, wide in new.items():
        _assert_rounded_once(model.get_parameter(key), wide, key)
    assert_as_good(Result(_outputs(model, x), {}), own, truth, dtype)
    veneer.unmerge(model)
    assert torch.equal(_outputs(model, x), live)
    veneer.merge(model)
    veneer.detach(model)
    assert list(model.state_dict()) == keys
    _assert_given_back(model, before, kinds)


def _assert_rounded_once(merged, wide, key):
    assert merged.isfinite().all()
    merged, wide = merged.detach(), wide.detach()
    off = (merged.double() - wide).abs()
    if merged.dtype in (torch.float32, torch.float64):
        bar = 1e-6 if merged.dtype == torch.float32 else 1e-14
        assert float(off.max() / wide.abs().max()) <= bar, key
    else:
        # One rounding is half a unit in the last place; the sum before it is good to fp32.
        half = torch.finfo(merged.dtype).eps / 2
        assert (off <= half * wide.abs() + 1e-6 * wide.abs().max()).all(), key


@cell
@every_dtype
def test_copies(method, host, dtype):
    model = adapt(build(host, dtype), method, host)
    x = inputs(host, dtype)
    before = _outputs(model, x)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    for other in copies:
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert list(other.state_dict()) == list(model.state_dict())
        assert torch.equal(_outputs(other, x), before)
        scatter(other)
        assert not torch.equal(_outputs(other, x), before)
        veneer.activate(other, [])
        assert not set(map(id, other.parameters())) & set(map(id, model.parameters()))
        veneer.detach(other)
    assert torch.equal(_outputs(model, x), before)


@cell
@every_dtype
def test_saved_and_loaded_bit_for_bit(method, host, dtype, tmp_path):
    model = adapt(build(host, dtype), method, host)
    x = inputs(host, dtype)
    report = veneer.save(model, tmp_path / "adapter")
    other = build(host, dtype)
    veneer.load(other, tmp_path / "adapter")
    assert torch.equal(_outputs(other, x), _outputs(model, x))
    assert torch.equal(_outputs(other.eval(), x), _outputs(model.eval(), x))
    mine, theirs = adapter_parameters(model), adapter_parameters(other)
    assert mine.keys() == theirs.keys()
    if method.made_plain and report.format == "peft":
        assert all(theirs[key].dtype == param.dtype for key, param in mine.items())
        return
    for key, param in mine.items():
        assert (theirs[key].dtype, theirs[key].requires_grad) == (param.dtype, True), key
        assert torch.equal(theirs[key], param), key


@cell
@every_dtype
def test_mixed_rows(method, host, dtype):
    base = build(host, dtype)
    x = inputs(host, dtype)
    model = copy.deepcopy(base)
    for name in ("a", "b"):
        adapt(model, method, host, name=name)
    names = ["b", None, "a", "b", "a"]
    params = {**adapter_parameters(model, "a"), **adapter_parameters(model, "b")}
    g = _cotangent(_outputs(base, x))
    truth = dense_run(base, method, host, params, x, g, torch.float64, names)
    own = dense_run(base, method, host, params, x, g, dtype, names)
    with veneer.route(model, names):
        assert_as_good(live_run(model, params, x, None), own._replace(grads={}), truth._replace(grads={}), dtype)
        assert_as_good(live_run(model, params, x, g), own, truth, dtype)
    with veneer.route(model, ["a"] * 5):
        got = live_run(model, params, x, None).out
    own, truth = (dense_run(base, method, host, params, x, None, d, ["a"]) for d in (dtype, torch.float64))
    assert_as_good(Result(got, {}), own, truth, dtype)


_SOME_HOSTS = ("linear", "conv2d", "embedding", "attention", "experts")


#: methods that are compiled in every run: in fp32, and in bf16 too. The others are traced like one of these.
_COMPILED = ("lora", "dora", "full", "rows", "circulant", "adalora", "loha", "lokr", "dora-lokr", "vera", "vblora",
             "randlora")
_COMPILED_16 = ("lora", "dora", "full", "lokr")


def _compiled_cells():
    """All cells in fp32 and bf16, most of them only in `make test-all`."""
    cells = []
    for (method, host), name in zip(CELLS, _NAMES, strict=True):
        for dtype, label, often in ((torch.float32, "fp32", _COMPILED), (torch.bfloat16, "bf16", _COMPILED_16)):
            slow = () if method.name in often else pytest.mark.slow
            cells.append(pytest.param(method, host, dtype, id=f"{label}-{name}", marks=slow))
    return cells


@pytest.mark.parametrize(("method", "host", "dtype"), _compiled_cells())
def test_compile_fullgraph(method, host, dtype):
    _compiled(method, host, dtype, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(("method", "host"), [pytest.param(*c, id=f"{c[0].name}-{c[1].name}") for c in CELLS
                                              if c[1].name in _SOME_HOSTS])
def test_compile_inductor(method, host):
    _compiled(method, host, torch.float32, "inductor")


def _compiled(method, host, dtype, backend):
    torch._dynamo.reset()
    base = build(host, dtype)
    x = inputs(host, dtype)
    model = adapt(copy.deepcopy(base), method, host)
    params = adapter_parameters(model)
    g = _cotangent(_outputs(base, x))
    truth = dense_run(base, method, host, params, x, g, torch.float64)
    own = dense_run(base, method, host, params, x, g, dtype)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    try:
        assert_as_good(live_run(compiled, params, x, g), own, truth, dtype)
        scatter(model)  # as an optimizer step does: no recompilation, no stale value
        truth = dense_run(base, method, host, params, x, g, torch.float64)
        own = dense_run(base, method, host, params, x, g, dtype)
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert_as_good(live_run(compiled, params, x, g), own, truth, dtype)
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("host", HOSTS, ids=[h.name for h in HOSTS])
@pytest.mark.parametrize("name", ["lora", "dora", "full"])
def test_bits_after_1000_merges(name, host):
    model = build(host, torch.bfloat16)
    before, kinds = _bits(model), [type(m) for m in model.modules()]
    adapt(model, _BY_NAME[name], host)
    for _ in range(1000):
        veneer.merge(model)
        veneer.unmerge(model)
    for key, (_, _, values, _) in before.items():
        assert torch.equal(model.get_parameter(key), values), f"{key} lost its bits"
    veneer.detach(model)
    _assert_given_back(model, before, kinds)


@pytest.mark.parametrize(("names", "words"), FORBIDDEN.items(), ids=["-".join(names) for names in FORBIDDEN])
@every_dtype
def test_forbidden_cells_say_why(names, words, dtype):
    method = _BY_NAME[names[0]]
    host = next(h for h in HOSTS if h.name == names[1])
    model = build(host, dtype)
    before, kinds = _bits(model), [type(m) for m in model.modules()]
    with pytest.raises(VeneerError) as refused:
        adapt(model, method, host)
    assert words in str(refused.value)
    assert f"cannot adapt {host.patterns[0].removesuffix('.weight')!r}" in str(refused.value)
    _assert_given_back(model, before, kinds)


def test_no_cell_is_missing():
    assert len(CELLS) + len(FORBIDDEN) == len(ALL)
    assert {names[0] for names in FORBIDDEN} == {"lora-bias", "rows"}
    assert {m.name for m in METHODS if m.kinds is None} == {m.name for m, h in ALL if h.name == "linear"}
