"""Adapters over what other libraries pack: the numbers of a dense base, its bits at the start, no dense weight kept."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
from torch import nn

import veneer
from veneer import DoRA, LoHa, LoKr, LoRA
from veneer.method import VeneerError
from veneer.storage import packed_storage

from .layers import CASES, Case, Net, linear, read

METHODS = {"lora": LoRA(rank=4), "bias": LoRA(rank=4, bias=True), "dora": DoRA(LoRA(rank=4)), "lokr": LoKr(rank=4)}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _one_thread():
    """Products this small are slowed down by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapters." in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))


def reads(net: Net) -> dict[str, torch.Tensor]:
    return {name: read(getattr(net, name)) for name in ("up", "down")}


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_size_and_numbers(case: Case, dtype: torch.dtype) -> None:
    packed = case.build(dtype)
    torch.manual_seed(0)
    original = Net().to(dtype)
    for name in ("up", "down"):
        layer, before = getattr(packed, name), getattr(original, name).weight
        storage = packed_storage(layer)
        assert storage.size(layer) == tuple(before.shape)
        assert storage.nbytes(layer) < (1.1 if "intx" in case.name else 0.65) * before.numel() * dtype.itemsize
        found = storage.read(layer)
        assert found.shape == before.shape
        assert not found.requires_grad
        assert found.dtype == storage.dtype(layer)
        assert (found.float() - before.float()).norm() < 0.2 * before.float().norm()
        if case.stand_in:
            torch.testing.assert_close(storage.read(layer, torch.float32), layer.truth)


@every_case
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters_over_packed_are_those_over_dense(case: Case, method: str, dtype: torch.dtype) -> None:
    grads = []
    for model in case.pair(dtype):
        veneer.attach(model, {"up": METHODS[method], "down": METHODS["lora" if method == "bias" else method]}, seed=3)
        shake(model)
        torch.manual_seed(2)
        x = torch.randn(7, 64, dtype=dtype, requires_grad=True)
        y = model(x)
        y.float().square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        grads.append({**found, "x": x.grad, "y": y.detach()})
    assert grads[0].keys() == grads[1].keys()
    for key, value in grads[0].items():
        assert value is not None, f"{key} has no gradient"
        other = grads[1][key]
        off = (value.double() - other.double()).norm() / other.double().norm()
        assert off < (1e-2 if dtype == torch.bfloat16 else 1e-5), f"{key}: {off:.2g}"


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_start_has_the_bases_bits(case: Case, dtype: torch.dtype) -> None:
    packed, dense = case.pair(dtype)
    x = torch.randn(9, 64, dtype=dtype, requires_grad=True)
    own = packed(x)
    with torch.no_grad():
        looked_at = packed(x)
    veneer.attach(packed, LoRA(rank=4))
    if case.same_bits:
        assert torch.equal(packed(x), own)
    else:  # the bits of the product over what is read; the library's own rounds in another order
        assert torch.equal(packed(x), dense(x))
        error = (packed(x) - own).float().norm() / own.float().norm()
        assert error < 4 * torch.finfo(dtype).eps
    with torch.no_grad():
        assert torch.equal(packed(x), looked_at)


@every_case
def test_evaluation_is_the_librarys_own(case: Case) -> None:
    packed = case.build().eval()
    x = torch.randn(12, 64)
    with torch.no_grad():
        before = packed(x)
        veneer.attach(packed, LoRA(rank=4)).eval()
        assert torch.equal(packed(x), before)
        shake(packed)
        up, adapter = packed.up, packed.up.adapters["default"]["weight"]
        torch.testing.assert_close(up(x), linear(x, up) + x @ adapter.A.T @ adapter.B.T, atol=5e-2, rtol=5e-2)
        with veneer.disabled(packed):
            assert torch.equal(packed(x), before)


@pytest.mark.parametrize("case", [c for c in CASES if not c.own_forward], ids=lambda case: case.name)
def test_no_dense_weight_lives_between_forward_and_backward(case: Case) -> None:
    packed = case.build()
    veneer.attach(packed, LoRA(rank=2))
    kind = type(packed_storage(packed.up))
    alive: list[weakref.ref] = []
    own = kind.read

    def spy(self, module, dtype=None):
        assert all(ref() is None for ref in alive), "two dense weights at once"
        found = own(self, module, dtype)
        alive.append(weakref.ref(found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "read", spy)
        y = packed(torch.randn(3, 64, requires_grad=True))
        assert all(ref() is None for ref in alive)
        assert len(alive) == 2
        y.sum().backward()
    assert len(alive) == 4


@every_case
@pytest.mark.parametrize("method", METHODS)
def test_merge_and_unmerge(case: Case, method: str) -> None:
    packed = case.build().eval()
    classes, values = [type(m) for m in packed.modules()], reads(packed)
    keys, bias = set(packed.state_dict()), packed.up.bias.clone()
    x = torch.randn(12, 64)
    with torch.no_grad():
        before = packed(x)
        veneer.attach(packed, {"up": METHODS[method]})
        shake(packed)
        adapted = packed(x)
        veneer.merge(packed)
        torch.testing.assert_close(packed(x), adapted, atol=3e-2, rtol=3e-2)
        assert not torch.allclose(packed(x), before, atol=3e-2, rtol=3e-2)
        veneer.unmerge(packed)
        assert torch.equal(packed(x), adapted)
        veneer.detach(packed)
        assert torch.equal(packed(x), before)
    assert [type(m) for m in packed.modules()] == classes
    assert set(packed.state_dict()) == keys
    assert torch.equal(packed.up.bias, bias)
    for name, value in reads(packed).items():
        assert torch.equal(value, values[name])


@every_case
@pytest.mark.parametrize("method", ["lora", "bias"])
def test_final_merge_makes_an_ordinary_layer(case: Case, method: str) -> None:
    packed = case.build().eval()
    x = torch.randn(12, 64)
    with torch.no_grad():
        veneer.attach(packed, {"up": METHODS[method]})
        shake(packed)
        adapted = packed(x)
        veneer.merge(packed, keep=False)
        merged = packed(x)
        torch.testing.assert_close(merged, adapted, atol=3e-2, rtol=3e-2)
        veneer.detach(packed)
        assert torch.equal(packed(x), merged)
    assert type(packed.up) is nn.Linear
    assert set(packed.up._parameters) == {"weight", "bias"}
    assert not packed.up._buffers
    assert all(name in {*nn.Linear(1, 1).__dict__, "truth"} for name in packed.up.__dict__), packed.up.__dict__.keys()
    fresh = nn.Linear(64, 128)
    fresh.load_state_dict(packed.up.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(x), packed.up(x))


@every_case
def test_copies_and_pickles(case: Case) -> None:
    packed = case.build()
    veneer.attach(packed, LoRA(rank=4))
    shake(packed)
    x = torch.randn(3, 64, requires_grad=True)
    want = packed(x)
    copied = copy.deepcopy(packed)
    shake(packed)
    assert torch.equal(copied(x), want)
    if case.stand_in:
        return  # a class that only this test knows
    file = io.BytesIO()
    torch.save(copied, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)


@every_case
def test_state_dict_has_the_adapters(case: Case) -> None:
    packed, again = case.build(), case.build()
    for model in (packed, again):
        veneer.attach(model, LoRA(rank=4))
    shake(packed)
    state = packed.state_dict()
    assert "up.adapters.default.weight.A" in state
    again.load_state_dict({key: value for key, value in state.items() if ".adapters." in key}, strict=False)
    x = torch.randn(3, 64, requires_grad=True)
    assert torch.equal(again(x), packed(x))


@every_case
def test_save_and_load(case: Case, tmp_path) -> None:
    packed = case.build()
    veneer.attach(packed, LoRA(rank=4))
    shake(packed)
    veneer.save(packed, tmp_path)
    again, dense = case.pair()
    veneer.load(again, tmp_path)
    x = torch.randn(3, 64, requires_grad=True)
    assert torch.equal(again(x), packed(x))
    veneer.load(dense, tmp_path)  # on numbers that are read from it
    torch.testing.assert_close(dense(x), packed(x))
    torch.manual_seed(0)
    veneer.load(Net(), tmp_path)  # and on the original ones
    torch.manual_seed(0)
    other = Net()
    nn.init.normal_(other.up.weight)
    with pytest.raises(VeneerError, match="another base model: 1 of"):
        veneer.load(other, tmp_path)


@every_case
def test_rows_go_their_own_ways(case: Case) -> None:
    outs = []
    for model in case.pair():
        veneer.attach(model, {"up": LoRA(rank=4)}, name="a")
        veneer.attach(model, {"up": DoRA(LoRA(rank=2)), "down": LoKr(rank=2)}, name="b")
        shake(model)
        torch.manual_seed(0)
        x = torch.randn(4, 64, requires_grad=True)
        with veneer.route(model, ["a", None, "b", "a"]):
            outs.append(model(x))
    torch.testing.assert_close(*outs)


@every_case
def test_several_live_adapters_of_all_kinds(case: Case) -> None:
    """A pair, what is applied by its dense weight, and what needs the base's lengths, each beside another."""
    rules = {"pair": LoRA(rank=4), "dense": LoHa(rank=8), "gain": DoRA(LoRA(rank=2)), "product": LoKr(rank=2)}
    models = case.pair()
    for model in models:
        for name, method in rules.items():
            veneer.attach(model, {"up": method}, name=name)
        shake(model)
    x = torch.randn(12, 64)
    for names in (["pair", "dense"], ["pair", "gain"], ["product", "pair"], ["dense"], list(rules)):
        found = []
        for model in models:
            veneer.activate(model, names)
            y, inner = model(x), x.clone().requires_grad_()
            with torch.no_grad():
                looked_at = model(x)
            model(inner).square().sum().backward()
            found.append({"y": y, "looked at": looked_at, "x": inner.grad,
                          **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
            model.zero_grad()
        assert found[0].keys() == found[1].keys()
        for key, value in found[0].items():
            bar = 2e-2 if case.own_forward and key == "looked at" else 1e-5
            assert (value - found[1][key]).norm() <= bar * found[1][key].norm(), f"{names}: {key}"


@pytest.mark.slow
@every_case
def test_compiled(case: Case) -> None:
    """With graph breaks: a storage's reading need not be traceable."""
    torch._dynamo.reset()
    found = []
    for model, compiled in zip(case.pair(), (True, False), strict=True):
        veneer.attach(model, LoRA(rank=4))
        shake(model)
        torch.manual_seed(0)
        x = torch.randn(12, 64, requires_grad=True)
        y = (torch.compile(model, backend="aot_eager") if compiled else model)(x)
        y.square().sum().backward()
        found.append((y, x.grad))
    torch._dynamo.reset()
    torch.testing.assert_close(*found)


@every_case
def test_explain_names_the_storage(case: Case) -> None:
    packed = case.build()
    veneer.attach(packed, LoRA(rank=4))
    name = packed_storage(packed.up).name
    report = veneer.inspect.explain(packed)
    assert name in report
    assert "beside" in report
