"""merge, unmerge and what is refused while something is merged."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import veneer
from veneer import DoRA, Full, LoRA
from veneer.method import VeneerError

from .nets import Net, scatter

RULES = {"*.q_proj": LoRA(rank=2), "*.up": DoRA(LoRA(rank=3)), "*.down": Full(), "embed": LoRA(rank=2)}


def bits(model):
    return {k: p.detach().clone() for k, p in model.named_parameters() if ".adapters." not in k}


def near(got, want):
    """Within two roundings of the dtype, in the Frobenius norm: a merged 16-bit weight is rounded once."""
    got, want = got.detach(), want.detach()
    return float((got - want).double().norm()) <= 2 * torch.finfo(want.dtype).eps * float(want.double().norm())


def same(model, before):
    return all(torch.equal(p, before[k]) for k, p in model.named_parameters() if ".adapters." not in k)


def test_the_parameter_object_stays_the_same():
    model = scatter(veneer.attach(Net(), RULES))
    objects = {k: id(p) for k, p in model.named_parameters()}
    veneer.merge(model)
    assert {k: id(p) for k, p in model.named_parameters()} == objects
    veneer.unmerge(model)
    assert {k: id(p) for k, p in model.named_parameters()} == objects


def test_nan_is_refused_with_nothing_changed():
    model = scatter(veneer.attach(Net(), RULES))
    before = bits(model)
    with torch.no_grad():
        model.layers[2].q_proj.adapters["default"]["weight"].A[0, 3] = float("nan")
    with pytest.raises(VeneerError) as caught:
        veneer.merge(model)
    assert str(caught.value) == ("merge: layers.2.q_proj.weight would hold NaN or infinite values; nothing was merged")
    assert same(model, before)
    assert not veneer.adapters(model)["default"].merged
    with pytest.raises(VeneerError, match="nothing is merged"):
        veneer.unmerge(model)


def test_overflow_in_fp16_is_refused():
    model = nn.Sequential(OrderedDict(up=nn.Linear(4, 4).half()))
    veneer.attach(model, {"up": LoRA(rank=1)})
    with torch.no_grad():
        for param in veneer.trainable(model):
            param.fill_(1000.0)
    with pytest.raises(VeneerError, match=r"merge: up.weight would hold NaN or infinite values"):
        veneer.merge(model)


def test_while_merged_everything_else_waits():
    model = scatter(veneer.attach(Net(), {"*.q_proj": LoRA()}, name="a"), "a")
    veneer.attach(model, {"*.up": LoRA()}, name="b")
    veneer.merge(model, "a")
    for call in (lambda: veneer.merge(model, "b"), lambda: veneer.activate(model, ["b"]),
                 lambda: veneer.attach(model, LoRA(), name="c"), lambda: veneer.detach(model, "b"),
                 lambda: veneer.disabled(model).__enter__(), lambda: veneer.route(model, ["a", None]).__enter__()):
        with pytest.raises(VeneerError, match=r"adapter 'a' is merged into the base weights; call veneer.unmerge"):
            call()
    assert list(veneer.adapters(model)) == ["a", "b"]
    assert veneer.adapters(model)["a"].merged
    assert "merged" in str(veneer.adapters(model)["a"])


def test_merging_one_of_several_and_all_of_several():
    model = scatter(veneer.attach(Net(), {"*.q_proj": LoRA(), "embed": LoRA()}, name="a"), "a")
    scatter(veneer.attach(model, {"*.q_proj": LoRA(rank=3)}, name="b"), "b")
    before = bits(model)
    x = torch.randint(0, 13, (3, 5))
    for names in (["a"], ["b"], ["a", "b"]):
        veneer.activate(model, names)
        want = model(x)
        veneer.merge(model)
        torch.testing.assert_close(model(x), want)
        veneer.unmerge(model)
        assert same(model, before)
        assert torch.equal(model(x), want)
    veneer.activate(model, ["a"])
    want = model(x)
    veneer.activate(model, ["b"])
    veneer.merge(model, "a")
    with pytest.raises(VeneerError):
        veneer.activate(model, [])
    veneer.unmerge(model)
    veneer.activate(model, [])
    veneer.merge(model, ["a"])
    torch.testing.assert_close(model(x), want)


def test_merge_needs_something_to_merge():
    model = veneer.attach(Net(), {"*.q_proj": LoRA()})
    veneer.activate(model, [])
    with pytest.raises(VeneerError, match="merge: no adapter is live; name the ones to merge"):
        veneer.merge(model)
    with pytest.raises(VeneerError, match="unmerge: nothing is merged"):
        veneer.unmerge(model)


def test_a_final_merge_then_detach_leaves_an_ordinary_model():
    model = scatter(veneer.attach(Net(), RULES))
    kinds, keys = [type(m) for m in Net().modules()], list(Net().state_dict())
    x = torch.randint(0, 13, (3, 5))
    want = model(x)
    veneer.merge(model, keep=False)
    with pytest.raises(VeneerError, match="keep=False, so the base's own values are gone"):
        veneer.unmerge(model)
    veneer.detach(model)
    assert [type(m) for m in model.modules()] == kinds
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(x), want)
    veneer.attach(model, LoRA())


def test_detach_undoes_a_merge_that_kept_the_originals():
    model = Net()
    before = bits(model)
    scatter(veneer.attach(model, RULES))
    veneer.merge(model)
    veneer.detach(model, "default")
    assert same(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("cycles", [1, 30])
def test_an_added_bias_on_a_layer_without_one(dtype, kind, cycles):
    layer = nn.Linear(6, 5, bias=False) if kind == "linear" else nn.Conv1d(6, 5, 2, bias=False)
    model = nn.Sequential(OrderedDict(up=layer)).to(dtype)
    before, keys = bits(model), list(model.state_dict())
    x = torch.randn(4, 6, dtype=dtype) if kind == "linear" else torch.randn(4, 6, 7, dtype=dtype)
    scatter(veneer.attach(model, {"up": LoRA(rank=2, bias=True)}))
    want = model(x)
    for _ in range(cycles):
        veneer.merge(model)
        assert model.up.bias is not None
        assert model.up.bias.dtype == dtype
        assert near(model(x), want)
        veneer.unmerge(model)
        assert model.up.bias is None
    assert torch.equal(model(x), want)
    veneer.merge(model)
    veneer.detach(model)
    assert model.up.bias is None
    assert same(model, before)
    assert list(model.state_dict()) == keys
    scatter(veneer.attach(model, {"up": LoRA(rank=2, bias=True)}))
    want = model(x)
    veneer.merge(model, keep=False)
    veneer.detach(model)
    assert type(model.up) is type(layer)
    assert list(model.state_dict()) == ["up.weight", "up.bias"]
    assert near(model(x), want)


def test_an_added_bias_beside_a_trained_one():
    model = nn.Sequential(OrderedDict(up=nn.Linear(6, 5)))
    scatter(veneer.attach(model, {"up": LoRA(rank=2, bias=True), "up.bias": Full()}))
    x = torch.randn(4, 6)
    want = model(x)
    veneer.merge(model)
    torch.testing.assert_close(model(x), want)


def test_tied_weights_merge_once():
    model = scatter(veneer.attach(Net(tied=True), {"embed": LoRA(rank=2)}))
    before = bits(model)
    x = torch.randint(0, 13, (3, 5))
    want = model(x)
    veneer.merge(model)
    assert model.embed.weight is model.lm_head.weight
    torch.testing.assert_close(model(x), want)
    veneer.unmerge(model)
    assert same(model, before)


@pytest.mark.parametrize("keep", [True, False])
def test_a_merged_model_copies_and_saves(keep, tmp_path):
    model = scatter(veneer.attach(Net(), RULES))
    before = bits(model)
    x = torch.randint(0, 13, (3, 5))
    veneer.merge(model, keep=keep)
    want = model(x)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), want)
    if keep:
        veneer.unmerge(other)
        assert same(other, before)
        assert torch.equal(model(x), want), "the copy unmerged the original"


@pytest.mark.parametrize("move", [torch.float64, torch.bfloat16])
def test_unmerge_after_a_change_of_dtype(move):
    model = Net()
    scatter(veneer.attach(model, RULES))
    before = bits(model)
    veneer.merge(model)
    model.to(move)
    veneer.unmerge(model)
    for key, param in model.named_parameters():
        if key in before:
            assert torch.equal(param, before[key].to(move)), key


def test_after_a_merge_nothing_of_the_adapter_runs():
    model = scatter(veneer.attach(Net(), {"*.q_proj": LoRA(dropout=0.5)}))
    veneer.merge(model)
    x = torch.randint(0, 13, (3, 5))
    assert torch.equal(model.train()(x), model(x))
    state = {k: v for k, v in model.state_dict().items() if ".adapters." not in k}
    bare = Net()
    bare.load_state_dict(state)
    assert torch.equal(bare(x), model(x))
