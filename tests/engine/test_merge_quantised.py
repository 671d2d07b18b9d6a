"""Merging into packed weights: as ordinary numbers, or packed again with a measure of what is left."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import veneer
from veneer import DoRA, Full, LoHa, LoKr, LoRA
from veneer.inspect import requantized, update_norms
from veneer.merge import RequantizeReport
from veneer.method import VeneerError
from veneer.quantize import schemes
from veneer.storage.packed import Packed, PackedLinear
from veneer.storage.recent import keep_dense
from veneer.storage.requantise import surviving

from .nets import scatter


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)
        self.lm_head = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(x + self.down(torch.tanh(self.up(x))))


def packed(scheme: str = "nf4", dtype: torch.dtype = torch.float32) -> Net:
    model = Net().to(dtype).eval()
    veneer.quantize(model, scheme)
    return model


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if ".adapters." not in key}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def change(model: Net, name: str = "up") -> torch.Tensor:
    """ΔW of the only adapter on a layer, in fp64."""
    layer = getattr(model, name)
    base = layer.read(torch.float32)
    return (layer.adapters["default"]["weight"].new_weight(base).double() - base.double()).detach()


# -- into ordinary numbers ------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [LoRA(rank=4), LoRA(rank=4, bias=True), DoRA(LoRA(rank=4)), LoHa(rank=2),
                                    LoKr(rank=2), Full()], ids=str)
@pytest.mark.parametrize("keep", [True, False])
def test_a_packed_merge_has_the_bits_of_a_dense_one(method: veneer.LoRA, keep: bool) -> None:
    model = packed(dtype=torch.bfloat16)
    dense = Net().bfloat16().eval()
    dense.load_state_dict({**{k: v for k, v in model.state_dict().items() if k in ("up.bias",) or "lm_head" in k},
                           "up.weight": model.up.read(), "down.weight": model.down.read()})
    x = torch.randn(5, 32).bfloat16()
    outs = []
    for each in (model, dense):
        torch.manual_seed(1)
        scatter(veneer.attach(each, {"up": method, "up.bias": Full()}))
        veneer.merge(each, keep=keep)
        outs.append(each(x))
        assert each.up.bias.dtype == torch.bfloat16
    assert torch.equal(*outs)


def test_a_merged_packed_model_copies_pickles_and_casts() -> None:
    model = scatter(veneer.attach(packed(), {"up": LoRA(rank=4)}))
    x = torch.randn(3, 32)
    adapted = model(x)
    want = veneer.merge(model)(x)
    assert not torch.equal(adapted, model.lm_head(x + model.down(torch.tanh(F.linear(x, model.up.read())))))
    other = copy.deepcopy(model)
    assert torch.equal(other(x), want)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)
    veneer.unmerge(other)
    assert torch.equal(other(x), adapted)
    assert torch.equal(model(x), want), "the copy unmerged the original"
    before = model.up.weight.clone()
    half = model.to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert half.up.veneer.dense.dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), want, atol=3e-2, rtol=3e-2)
    veneer.unmerge(half)
    assert torch.equal(half.up.weight, before)


@pytest.mark.parametrize("requantize", [True, False])
def test_the_base_itself_is_known_while_merged(requantize: bool, tmp_path) -> None:
    model = scatter(veneer.attach(packed("nf8"), {"up": LoRA(rank=8)}), by=0.3)
    norms = update_norms(model)
    x = torch.randn(3, 32)
    want = model(x)
    veneer.merge(model, requantize=requantize)
    assert update_norms(model) == norms
    veneer.save(model, tmp_path)
    veneer.unmerge(model)
    veneer.detach(model)
    veneer.load(model, tmp_path)  # checks the fingerprint
    assert torch.equal(model(x), want)


# -- packed again ---------------------------------------------------------------------------------------
def test_the_measure_is_the_definition() -> None:
    model = scatter(veneer.attach(packed(), {"up": LoRA(rank=4), "down": DoRA(LoRA(rank=2))}), by=0.3)
    report = requantized(model)
    squares = []
    for name in ("up", "down"):
        wanted, before = change(model, name), getattr(model, name).read(torch.float32).double()
        held = Packed().encode(getattr(model, name), (before + wanted).float())
        after = held.decode(torch.float32).double()
        wrong = float(((after - before) - wanted).square().sum())
        squares.append((float(wanted.square().sum()), wrong))
        assert report.weights[name] == pytest.approx(1 - wrong / squares[-1][0], abs=1e-5)
    changes, wrongs = zip(*squares, strict=True)
    assert report.share == pytest.approx(1 - sum(wrongs) / sum(changes), abs=1e-5)
    assert list(report.weights.values()) == sorted(report.weights.values())
    assert set(report.changes) == {"up", "down"}


def test_a_share_of_nothing_and_of_what_went_wrong() -> None:
    assert surviving(4.0, 1.0) == 0.75
    assert surviving(1.0, 2.0) == -1.0
    assert surviving(0.0, 0.0) == 1.0
    assert surviving(0.0, 1.0) == -float("inf")
    assert str(RequantizeReport({"a": (4.0, 1.0), "b": (1.0, 9.0), "c": (0.0, 1.0)})) == (
        "none (-120.0%) of the trained change survives quantising 3 merged weights again; least: 'c' none, "
        "'b' none (-800.0%), 'a' 75.0%")


def test_a_small_change_is_refused_with_nothing_changed() -> None:
    model = scatter(veneer.attach(packed(), {"up": LoRA(rank=4), "down": LoRA(rank=4), "lm_head": Full()}), by=0.01)
    before, x = bits(model), torch.randn(3, 32)
    want = model(x)
    report = requantized(model)
    assert report.share < 0.5
    with pytest.raises(VeneerError) as caught:
        veneer.merge(model, requantize=True)
    text = str(caught.value)
    assert text.startswith(f"merge: {report}. That is below at_least=0.9, so nothing was merged. Instead: merge into "
                           "ordinary 16-bit numbers (requantize=False)")
    assert f"({100 * report.share:.1f}%) of the trained change survives quantising 2 merged weights again" in text
    worst, share = next(iter(report.weights.items()))
    assert f"least: {worst!r} none ({100 * share:.1f}%)" in text
    assert same(bits(model), before)
    assert torch.equal(model(x), want)
    assert not veneer.adapters(model)["default"].merged
    veneer.merge(model, requantize=True, at_least=report.share)
    assert veneer.adapters(model)["default"].merged


@pytest.mark.parametrize("cycles", [1, 5])
def test_a_requantised_merge_and_back(cycles: int) -> None:
    model = scatter(veneer.attach(packed("nf8"), {"up": LoRA(rank=4, bias=True), "down": LoRA(rank=4, bias=True)}),
                    by=0.3)
    before, x = bits(model), torch.randn(4, 32)
    want, size = model(x), sum(b.nbytes for b in before.values())
    for _ in range(cycles):
        tried = requantized(model)
        veneer.merge(model, requantize=True)
        assert requantized(model) == tried
        assert tried.share > 0.99
        assert type(model.up).veneer_base is PackedLinear
        assert not torch.equal(model.up.weight, before["up.weight"])
        assert model.up.veneer.dense is None
        assert sum(b.nbytes for b in bits(model).values()) <= size + 4 * 32  # and the added bias
        torch.testing.assert_close(model(x), want, atol=0.05, rtol=0.05)
        veneer.unmerge(model)
        assert same(bits(model), before)
        assert torch.equal(model(x), want)
    veneer.merge(model, requantize=True)
    veneer.detach(model)
    assert type(model.up) is PackedLinear
    assert same(bits(model), before)


def test_a_final_requantised_merge_leaves_a_packed_model() -> None:
    model = packed("nf8")
    keys, x = list(model.state_dict()), torch.randn(4, 32)
    scatter(veneer.attach(model, {"up": LoRA(rank=4), "down": LoRA(rank=4)}), by=0.3)
    veneer.attach(model, {"up": LoRA(rank=1)}, name="second")
    veneer.activate(model, "default")
    norms = update_norms(model)
    wanted = model.up.read(torch.float32) + change(model).float()
    veneer.merge(model, keep=False, requantize=True)
    assert requantized(model).share > 0.99
    assert all(value != value for value in update_norms(model).values()), (norms, "the base's numbers are gone")
    merged = model(x)
    with pytest.raises(VeneerError, match="keep=False, so the base's own values are gone"):
        veneer.unmerge(model)
    other = copy.deepcopy(model)
    veneer.detach(model)
    assert torch.equal(model(x), merged)
    assert type(model.up) is PackedLinear
    assert list(model.state_dict()) == keys
    again = nn.Linear(32, 64)
    again.weight.data = wanted
    veneer.quantize(nn.ModuleDict({"up": again}), "nf8")
    assert torch.equal(model.up.weight, again.weight)
    veneer.attach(model, LoRA())
    veneer.detach(other, "default")
    with pytest.raises(VeneerError, match="no adapter is live"):
        requantized(other)
    veneer.activate(other, "second")
    assert requantized(other).share == 1.0
    assert update_norms(other, "second") == {"up": 0.0}


def test_a_change_of_nothing_keeps_every_bit() -> None:
    model = veneer.attach(packed(dtype=torch.bfloat16), LoRA(rank=4))
    before = bits(model)
    veneer.merge(model, requantize=True)
    assert requantized(model).share == 1.0
    assert same(bits(model), before)


def test_recent_reads_are_forgotten() -> None:
    model = scatter(veneer.attach(packed("nf8"), {"up": LoRA(rank=4)}), by=0.3)
    keep_dense(1)
    try:
        model(torch.randn(3, 32, requires_grad=True))
        old = model.up.base_weight("weight")
        veneer.merge(model, requantize=True)
        assert not torch.equal(model.up.base_weight("weight"), old)
        model.up.base_weight("weight")
        veneer.unmerge(model)
        assert torch.equal(model.up.base_weight("weight"), old)
    finally:
        keep_dense(0)


def test_some_weights_packed_and_some_not() -> None:
    model = packed("nf8")
    scatter(veneer.attach(model, {"up": LoRA(rank=4), "lm_head": LoRA(rank=4), "down": LoRA(rank=4)}), by=0.3)
    before, x = bits(model), torch.randn(4, 32)
    want = model(x)
    head = change_of_dense(model)
    veneer.merge(model, requantize=True)
    assert torch.equal(model.lm_head.weight, head)
    torch.testing.assert_close(model(x), want, atol=0.05, rtol=0.05)
    veneer.unmerge(model)
    assert same(bits(model), before)


def change_of_dense(model: Net) -> torch.Tensor:
    head = model.lm_head
    return head.adapters["default"]["weight"].new_weight(head.weight).detach()


@pytest.mark.parametrize("scheme", schemes())
def test_every_storage_that_can_be_written(scheme: str) -> None:
    model = nn.ModuleDict({"up": nn.Linear(256, 64).bfloat16()})
    try:
        veneer.quantize(model, scheme)
    except VeneerError as missing:
        pytest.skip(str(missing))
    scatter(veneer.attach(model, {"up": LoRA(rank=4)}), by=0.02)
    layer, x = model["up"], torch.randn(3, 256).bfloat16()
    with torch.no_grad():
        before, base = layer(x), layer.base_weight("weight").clone()
        few = any(mark in scheme for mark in ("2", "-1", "-3", "nf4", "fp4", "q4", "-4"))
        if few:
            with pytest.raises(VeneerError, match="of the trained change survives quantising 1 merged weights again"):
                veneer.merge(model, requantize=True)
        tried = requantized(model)
        veneer.merge(model, requantize=True, at_least=-1e9)
        assert requantized(model) == tried
        assert (tried.share < 0.5) == few, tried
        moved = (layer.base_weight("weight").float() - base.float()).norm()
        assert moved > 0
        veneer.unmerge(model)
        assert torch.equal(layer.base_weight("weight"), base)
        assert torch.equal(layer(x), before)


# -- errors ---------------------------------------------------------------------------------------------
def test_a_form_that_cannot_be_written() -> None:
    model = scatter(veneer.attach(packed(), {"up": LoRA(), "down": LoRA()}))
    before = bits(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packed, "writable", False)
        for call in (lambda: veneer.merge(model, requantize=True, at_least=-1), lambda: requantized(model)):
            with pytest.raises(VeneerError, match=r"'up' and 1 more cannot be quantised again: nothing here writes "
                                                  r"nf2, nf4, nf8. Merge into ordinary numbers \(requantize=False\)"):
                call()
        assert same(bits(model), before)
        veneer.merge(model)


def test_errors() -> None:
    dense = veneer.attach(Net(), {"up": LoRA()})
    with pytest.raises(VeneerError, match="requantize=True, and no adapted weight is packed; leave it out"):
        veneer.merge(dense, requantize=True)
    model = scatter(veneer.attach(packed(), {"up": LoRA()}))
    for bad in (1.5, float("nan"), "all", True):
        with pytest.raises(VeneerError, match="at_least is the share of the trained change that must survive"):
            veneer.merge(model, requantize=True, at_least=bad)
    with pytest.raises(VeneerError, match=r"no adapter named 'defualt' on this model; did you mean 'default'\?"):
        requantized(model, "defualt")
    before = bits(model)
    with torch.no_grad():
        model.up.adapters["default"]["weight"].A[0, 3] = float("nan")
    with pytest.raises(VeneerError, match=r"merge: up\.weight would hold NaN or infinite values; nothing was merged"):
        veneer.merge(model, requantize=True, at_least=-1e9)
    assert same(bits(model), before)


def test_a_model_that_was_moved_meanwhile() -> None:
    model = scatter(veneer.attach(packed("nf8"), {"up": LoRA(rank=4)}), by=0.3)
    veneer.merge(model, requantize=True)
    codes = model.up.weight
    model.up.weight = nn.Parameter(codes.data.to("meta"), requires_grad=False)
    with pytest.raises(VeneerError, match="the weight of 'up' cannot be put back: it was merged on cpu and is on meta "
                                          "now; move the model back first"):
        veneer.unmerge(model)
    assert veneer.adapters(model)["default"].merged
    model.up.weight = codes
    veneer.unmerge(model)
