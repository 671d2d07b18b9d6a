"""to_lora: the same function in plain LoRA, the nearest one of a smaller rank, and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import veneer
from veneer import DoRA, Full, LoRA, Rows, low_rank
from veneer.attach import attached
from veneer.convert import to_lora
from veneer.forms import Factors, Kronecker
from veneer.inspect import adapters
from veneer.method import VeneerError

from .nets import Net, adapter_state, scatter
from .zoo import CASES, IDS, WEIGHTS, Zoo, deltas, method, outputs, relative, zoo

every_case = pytest.mark.parametrize("case", CASES)


def methods(model, name="default"):
    return {weight.name: adapter.method for weight, adapter in attached(model, name)}


def product(adapter):
    """s·B·A in fp64, by hand."""
    inner = getattr(adapter, "inner", adapter)
    return inner.scale * inner.B.detach().double() @ inner.A.detach().double()


def products(model, name="default"):
    return {weight.name: product(adapter) for weight, adapter in attached(model, name)}


# -- exact --------------------------------------------------------------------------------------------------
@every_case
def test_exact_is_the_same_function(case):
    model = zoo(method(case))
    want, before = outputs(model), deltas(model)
    report = to_lora(model, "exact")
    assert set(report.ranks) == set(WEIGHTS) == set(methods(model))
    assert all(type(m) is LoRA for m in methods(model).values())
    assert relative(outputs(model), want) < 2e-6
    for name, got in products(model).items():
        assert relative(got, before[name]) < 1e-6, name
        assert report.errors[name] < 1e-6, name
        assert report.ranks[name] <= min(before[name].shape[-2:])
    assert report.error < 1e-6


@every_case
def test_dora_becomes_dora_of_lora(case):
    model = zoo(DoRA(method(case)))
    want = outputs(model)
    magnitudes = {w.name: a.magnitude.detach().clone() for w, a in attached(model, "default")}
    report = to_lora(model, "exact")
    assert all(isinstance(m, DoRA) and type(m.inner) is LoRA for m in methods(model).values())
    assert relative(outputs(model), want) < 2e-6
    cut = to_lora(model, 1)
    assert set(cut.ranks.values()) == {1}
    assert case == "loha" or max(report.ranks.values()) > 1
    for weight, adapter in attached(model, "default"):
        assert torch.equal(adapter.magnitude, magnitudes[weight.name])


def test_the_smallest_exact_rank():
    model = zoo(LoRA(rank=6))
    with torch.no_grad():
        for _, adapter in attached(model, "default"):
            adapter.B[..., 3:] = 0
    want = outputs(model)
    assert set(to_lora(model).ranks.values()) == {3}
    assert relative(outputs(model), want) < 1e-6


def test_triplets_that_adalora_has_cut_are_not_taken_along():
    model = zoo(method("adalora"))
    with torch.no_grad():
        for weight, adapter in attached(model, "default"):
            adapter.E[..., 2 if weight.name == "up" else 1:] = 0
    want = outputs(model)
    assert to_lora(model).ranks == {**dict.fromkeys(WEIGHTS, 1), "up": 2}
    assert relative(outputs(model), want) < 2e-6
    optimizer = torch.optim.SGD(veneer.trainable(model), lr=0.01)  # the shared budget is gone with the adapters
    model(IDS).square().sum().backward()
    optimizer.step()
    assert relative(outputs(model), want) > 1e-3


def test_none_is_exact_where_the_rank_is_low_and_asks_where_it_is_full():
    model = zoo(method("vera"))
    want = outputs(model)
    assert set(to_lora(model).ranks.values()) == {4}
    assert relative(outputs(model), want) < 2e-6
    model = zoo({"up": method("randlora")})
    with pytest.raises(VeneerError) as caught:
        to_lora(model)
    now = sum(p.numel() for p in veneer.trainable(model))
    assert str(caught.value) == (
        f"to_lora: the change of 'up' by {methods(model)['up']} has the full rank 9, so that an exact LoRA would hold "
        f"189 parameters, more than the {now} of now. Give a rank (8), a share of the squared norm to keep (0.99), or "
        'rank="exact" for that')
    report = to_lora(model, "exact")
    assert report.ranks == {"up": 9}
    assert "of full rank: 1" in str(report)


def test_a_rank_above_the_weights_own_is_cut_without_asking():
    model = zoo({"up": LoRA(rank=30)})
    assert to_lora(model).ranks == {"up": 9}


def test_a_change_of_zero_can_still_be_trained():
    model = veneer.attach(Zoo(), LoRA(rank=4))
    report = to_lora(model)
    assert set(report.ranks.values()) == {1}
    assert set(report.errors.values()) == {0.0}
    assert report.error == 0
    assert relative(outputs(model), outputs(veneer.detach(copy.deepcopy(model)))) == 0
    model(IDS).square().sum().backward()
    assert all(a.B.grad.norm() > 0 for _, a in attached(model, "default"))


# -- a smaller rank -----------------------------------------------------------------------------------------
@every_case
@pytest.mark.parametrize("rank", [1, 3])
def test_the_error_is_the_tail_of_the_singular_values(case, rank):
    model = zoo(method(case))
    before = deltas(model)
    report = to_lora(model, rank)
    tails = norms = 0.0
    for name, got in products(model).items():
        values = torch.linalg.svdvals(before[name])
        tail, norm = float(values[..., rank:].square().sum()), float(values.square().sum())
        measured = relative(got, before[name])
        assert report.ranks[name] <= rank
        assert measured == pytest.approx((tail / norm) ** 0.5, abs=1e-6), name
        assert report.errors[name] == pytest.approx(measured, abs=2e-7), name
        tails, norms = tails + tail, norms + norm
    assert report.error == pytest.approx((tails / norms) ** 0.5, abs=1e-6)


@every_case
def test_a_share_of_the_squared_norm(case):
    model = zoo(method(case))
    before = deltas(model)
    report = to_lora(model, 0.9)
    for name, got in products(model).items():
        rank = report.ranks[name]
        own = torch.linalg.svdvals(before[name]).square().reshape(-1, min(before[name].shape[-2:])).sum(0)
        assert own[:rank].sum() >= 0.9 * own.sum() * (1 - 1e-9)
        assert rank == 1 or own[:rank - 1].sum() < 0.9 * own.sum()
        assert relative(got, before[name]) <= 0.1 ** 0.5 + 1e-6


def test_cutting_a_lora_that_needs_no_cut_keeps_its_bits():
    model = zoo(LoRA(rank=2, alpha=5, dropout=0.0, init="xavier"))
    before, objects = adapter_state(model), {id(p) for p in model.parameters()}
    report = to_lora(model, 4)
    assert {id(p) for p in model.parameters()} == objects
    assert all(torch.equal(t, before[k]) for k, t in adapter_state(model).items())
    assert set(report.ranks.values()) == {2}
    assert report.parameters == report.parameters_before


def test_bias_and_dropout_come_along():
    model = zoo({"up": LoRA(rank=4, bias=True, dropout=0.25), "conv": LoRA(rank=4, bias=True)}).eval()
    want = outputs(model)
    biases = {w.name: a.bias.detach().clone() for w, a in attached(model, "default")}
    to_lora(model, "exact")
    assert relative(outputs(model), want) < 1e-6
    to_lora(model, 2)
    assert methods(model) == {"up": LoRA(rank=2, bias=True, dropout=0.25), "conv": LoRA(rank=2, bias=True)}
    assert all(torch.equal(a.bias, biases[w.name]) for w, a in attached(model, "default"))


@pytest.mark.parametrize(("base", "own"), [
    (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16), (torch.float64, None), (torch.float32, torch.float16),
    (torch.float32, torch.float64)])
def test_the_dtype_of_the_adapter_is_kept(base, own):
    torch.manual_seed(4)
    model = zoo(LoRA(rank=4, dtype=own), model=Zoo().to(base))
    dtype = own or torch.promote_types(base, torch.float32)
    before = deltas(model)
    report = to_lora(model, 3)
    assert all(p.dtype == dtype for p in veneer.trainable(model))
    assert set(methods(model).values()) == {LoRA(rank=3, dtype=own)}
    for name, got in products(model).items():
        measured = relative(got, before[name])
        assert report.errors[name] == pytest.approx(measured, rel=1e-2), "rounding counts too"
    exact = to_lora(copy.deepcopy(model), "exact")
    assert max(exact.errors.values()) == 0


def test_rounding_is_part_of_the_error():
    model = zoo({"up": LoRA(rank=8, dtype=torch.bfloat16)})
    with torch.no_grad():
        for _, adapter in attached(model, "default"):
            adapter.B[..., 4:] = 0
    before = products(model)["up"]  # not the new weight, whose product is rounded too
    report = to_lora(model)
    measured = relative(products(model)["up"], before)
    assert 1e-4 < measured < 1e-2
    assert report.errors["up"] == pytest.approx(measured, rel=1e-6)


# -- on the model -------------------------------------------------------------------------------------------
def test_in_place_everything_else_stays():
    model = zoo(method("vblora"))
    zoo({"up": LoRA(rank=3)}, name="other", model=model)
    veneer.activate(model, ["other", "default"])
    for _, adapter in attached(model, "default"):
        adapter.requires_grad_(False)
    model.eval()
    other, want = adapter_state(model, "other"), outputs(model)
    names = list(adapters(model))
    report = to_lora(model, "exact")
    assert list(adapters(model)) == names
    assert all(summary.live for summary in adapters(model).values())
    assert adapters(model)["default"].trainable == 0 < adapters(model)["other"].trainable
    assert not any(a.training for _, a in attached(model, "default"))
    assert all(torch.equal(t, other[k]) for k, t in adapter_state(model, "other").items())
    assert relative(outputs(model), want) < 2e-6
    assert report.parameters == adapters(model)["default"].parameters
    assert not any("bank" in key for key in model.state_dict())


def test_what_is_trainable_stays_so_tensor_by_tensor():
    model = zoo(DoRA(LoRA(rank=4)))
    for _, adapter in attached(model, "default"):
        adapter.magnitude.requires_grad_(False)
    to_lora(model, 2)
    for _, adapter in attached(model, "default"):
        assert {n: p.requires_grad for n, p in adapter.named_parameters()} == {
            "magnitude": False, "inner.A": True, "inner.B": True}


def test_a_new_name_leaves_the_old_adapter():
    model = zoo({**dict.fromkeys(WEIGHTS[:4], method("vera")), "turned.w": DoRA(LoRA(rank=2)), "up": Full()})
    before, want = adapter_state(model), outputs(model)
    report = to_lora(model, "exact", to="plain")
    assert all(torch.equal(t, before[k]) for k, t in adapter_state(model).items())
    assert {n: s.live for n, s in adapters(model).items()} == {"default": False, "plain": True}
    assert relative(outputs(model), want) < 2e-6
    assert methods(model, "plain")["up"] == Full()
    assert report.parameters == adapters(model)["plain"].parameters
    assert adapters(model)["plain"].trainable == report.parameters
    veneer.activate(model, "default")
    assert torch.equal(outputs(model), want)


def test_a_tied_weight_stays_tied():
    model = scatter(veneer.attach(Net(tied=True), {"embed": method("lokr"), "*.up": LoRA(rank=2)}))
    want = outputs(model)
    to_lora(model, "exact")
    assert model.embed.adapters["default"]["weight"] is model.lm_head.adapters["default"]["weight"]
    assert relative(outputs(model), want) < 2e-6


def test_a_part_of_a_model():
    model = scatter(veneer.attach(Net(), {"*.up": LoRA(rank=4), "*.down": LoRA(rank=4)}))
    assert len(to_lora(model.layers[0], 2).ranks) == 2
    assert {m.rank for m in methods(model).values()} == {2, 4}
    model = scatter(veneer.attach(Net(), {"*.up": method("vblora")}))
    before = adapter_state(model)
    with pytest.raises(VeneerError) as caught:
        to_lora(model.layers[1], 2)
    assert str(caught.value) == ("to_lora: the adapter 'default' of 'up' is also used outside the part of the model "
                                 "given; call this on the whole model")
    assert adapter_state(model).keys() == before.keys()


def test_it_merges_trains_and_saves_like_any_lora(tmp_path):
    model = zoo(method("lokr"))
    to_lora(model, 3)
    want = outputs(model)
    veneer.save(model, tmp_path)
    torch.manual_seed(4)
    other = Zoo()
    veneer.load(other, tmp_path)
    assert torch.equal(outputs(other), want)
    veneer.merge(model)
    assert relative(outputs(model), want) < 2e-6
    veneer.unmerge(model)
    before = adapter_state(model)
    optimizer = torch.optim.SGD(veneer.trainable(model), lr=0.01)
    model(IDS).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(t, before[k]) for k, t in adapter_state(model).items())


def test_under_autocast_the_arithmetic_stays_wide():
    model = zoo(method("lokr-small"))
    before = deltas(model)
    with torch.autocast("cpu", torch.bfloat16):
        to_lora(model, "exact")
    assert all(relative(got, before[name]) < 1e-6 for name, got in products(model).items())


# -- what is not additive -----------------------------------------------------------------------------------
RULES = {"embed": Rows([3, 4]), "up": Full(), "conv": LoRA(rank=4), "experts.w": DoRA(LoRA(rank=3))}


def test_full_and_rows_are_left_alone_and_listed():
    model = zoo(RULES)
    want = outputs(model)
    report = to_lora(model, "exact")
    assert torch.equal(outputs(model), want)
    assert set(report.ranks) == {"conv", "experts.w"}
    assert report.left == {
        "embed": "Rows(ids=(3, 4)): not a change that is added; extract=True takes it for one",
        "up": "Full(): not a change that is added; extract=True takes it for one",
        "up.bias": "Full(): a vector has no low-rank change"}
    assert "left as it was: up.bias is Full(): a vector has no low-rank change" in str(report)


def test_extract_takes_the_new_weight_minus_the_base():
    model = zoo(RULES)
    want = outputs(model)
    changes = deltas(model)
    report = to_lora(model, "exact", extract=True)
    assert report.ranks["embed"] == 2
    assert set(report.left) == {"up.bias"}
    assert {type(m) for n, m in methods(model).items() if n != "up.bias"} == {LoRA}
    assert relative(outputs(model), want) < 2e-6
    report = to_lora(model, 1)
    for name, rank in report.ranks.items():
        tail = torch.linalg.svdvals(changes[name]).square().reshape(-1, min(changes[name].shape[-2:])).sum(0)
        assert report.errors[name] == pytest.approx(float(tail[rank:].sum() / tail.sum()) ** 0.5, abs=1e-5), name


def test_nothing_to_convert():
    model = zoo({"up": Full()})
    with pytest.raises(VeneerError) as caught:
        to_lora(model, 2)
    assert str(caught.value) == (
        "to_lora: nothing to convert in 'default': 'up' is Full(): not a change that is added; extract=True takes it "
        "for one; 'up.bias' is Full(): a vector has no low-rank change")


# -- files --------------------------------------------------------------------------------------------------
def test_a_file_becomes_a_file_of_peft(tmp_path):
    model = zoo({"up": method("vera"), "conv": method("vera")})
    want = outputs(model)
    veneer.save(model, tmp_path / "vera")
    torch.manual_seed(4)
    base = zoo({"up": LoRA(rank=2)}, name="mine", model=Zoo())
    own = outputs(base)
    keys = list(base.state_dict())
    report = to_lora(tmp_path / "vera", "exact", model=base, output=tmp_path / "lora")
    assert torch.equal(outputs(base), own)
    assert list(base.state_dict()) == keys
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert report.saved.format == "peft"
    assert str(report).startswith(f"{tmp_path / 'vera'} as LoRA: 2 weights of rank 4")
    assert f"to {tmp_path / 'lora'}" in str(report)
    torch.manual_seed(4)
    other = Zoo()
    bare = {k: (type(m), [p.requires_grad for p in m.parameters()]) for k, m in other.named_modules()}
    to_lora(tmp_path / "vera", 1, model=other, output=str(tmp_path / "one"))
    assert {k: (type(m), [p.requires_grad for p in m.parameters()]) for k, m in other.named_modules()} == bare
    veneer.load(other, tmp_path / "lora")
    assert relative(outputs(other), want) < 2e-6


def test_a_file_that_cannot_be_converted_leaves_the_model(tmp_path):
    model = zoo({"up": method("randlora")})
    veneer.save(model, tmp_path / "full")
    torch.manual_seed(4)
    base = Zoo()
    with pytest.raises(VeneerError, match="has the full rank 9"):
        to_lora(tmp_path / "full", model=base, output=tmp_path / "out")
    assert type(base.up) is nn.Linear
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("options", "words"), [
    ({}, "to_lora: a file says neither what kind of layer a weight belongs to nor how it is laid out: give the base "
         "model and where to write, to_lora(path, model=model, output=...), or load it and call to_lora(model)"),
    ({"model": True, "output": "x", "to": "b"},
     "to_lora: `to` names an adapter on a model; a path's result is written to `output`")])
def test_a_file_needs_a_model_and_a_place(options, words):
    if "model" in options:
        options = {**options, "model": Zoo()}
    with pytest.raises(VeneerError) as caught:
        to_lora("somewhere", 2, **options)
    assert str(caught.value) == words


# -- what is refused ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [0, -1, True, 1.0, 0.0, 1.5, float("nan"), "exakt", "full", [2]])
def test_bad_ranks(rank):
    with pytest.raises(VeneerError) as caught:
        to_lora(zoo(LoRA(rank=2)), rank)
    hint = "; did you mean 'exact'?" if rank == "exakt" else ""
    assert str(caught.value) == ("to_lora: rank must be a whole number of at least 1, a share of the squared norm "
                                 f'above 0 and below 1, "exact" or None, got {rank!r}{hint}')


def test_unknown_and_taken_names():
    model = zoo(LoRA(rank=2))
    zoo({"up": LoRA(rank=2)}, name="other", model=model)
    with pytest.raises(VeneerError) as caught:
        to_lora(model, 1, name="othr")
    assert str(caught.value) == ("to_lora: no adapter named 'othr' on this model; did you mean 'other'? It has: "
                                 "'default', 'other'")
    with pytest.raises(VeneerError) as caught:
        to_lora(model, 1, to="other")
    assert str(caught.value) == ("to_lora: this model already has an adapter 'other'; detach(model, 'other') first, or "
                                 "give the new one another name")
    with pytest.raises(VeneerError, match=r"no adapter named 'default' on this model\. It has: none"):
        to_lora(Zoo(), 1)
    with pytest.raises(VeneerError, match="an adapter name must be a non-empty string without dots"):
        to_lora(model, 1, to="a.b")
    with pytest.raises(VeneerError, match="model and output go with a path"):
        to_lora(model, 1, output="x")


def test_merged_meta_and_nan():
    model = veneer.merge(zoo(LoRA(rank=2)))
    with pytest.raises(VeneerError) as caught:
        to_lora(model, 1)
    assert str(caught.value) == ("to_lora: adapter 'default' is merged into the base weights; call "
                                 "veneer.unmerge(model) first")
    with torch.device("meta"):
        model = Zoo()
    veneer.attach(model, LoRA(rank=2))
    with pytest.raises(VeneerError, match="the adapter of 'up' is on the meta device and has no values yet"):
        to_lora(model, 1)


def test_sharded():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = veneer.attach(Net(blocks=1), LoRA(rank=2))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        fully_shard(model.layers[0], mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(VeneerError) as caught:
            to_lora(model, 1)
    finally:
        dist.destroy_process_group()
    assert str(caught.value) == (
        "to_lora: the adapter of 'layers.0.q_proj' is sharded over processes; save it (every process must call save), "
        "and load it onto a model that is not sharded")


@pytest.mark.parametrize(("rules", "extract"), [
    (LoRA(rank=3), False), ({"up": LoRA(rank=3), "turned.w": Full()}, True)])
def test_an_error_changes_nothing(rules, extract):
    model = zoo(rules)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if n.startswith("turned.adapters"))[..., 0, 0] = torch.inf
    objects = [(n, id(p)) for n, p in model.named_parameters()]
    with pytest.raises(VeneerError) as caught:
        to_lora(model, 1, extract=extract)
    assert str(caught.value) == ("to_lora: the adapter of 'turned.w' holds NaN or infinite values; nothing was changed")
    assert [(n, id(p)) for n, p in model.named_parameters()] == objects


# -- the report ---------------------------------------------------------------------------------------------
def test_the_report():
    model = zoo({"up": LoRA(rank=4), "conv": LoRA(rank=2)})
    report = to_lora(model, 2)
    up, conv = report.errors["up"], report.errors["conv"]
    assert str(report).splitlines() == [
        "'default' as LoRA: 2 weights of rank 2, 112 parameters (before: 154), relative error "
        f"{report.error:.2g}",
        "  weight  was           rank    error",
        f"  up      LoRA(rank=4)  2 of 9  {up:.2g}",
        f"  conv    LoRA(rank=2)  2 of 8  {conv:.2g}"]
    assert conv == 0 < up
    many = veneer.attach(Net(blocks=5), LoRA(rank=2))
    lines = str(to_lora(scatter(many), 1)).splitlines()
    assert len(lines) == 13
    assert lines[-1] == "  … and 5 more, none worse"


# -- the linear algebra -------------------------------------------------------------------------------------
def forms():
    torch.manual_seed(2)
    d = torch.float64
    yield Factors(torch.randn(5, 30, dtype=d), torch.randn(20, 5, dtype=d), -1.5, torch.randn(5, dtype=d))
    yield Factors(torch.randn(2, 25, 30, dtype=d), torch.randn(2, 20, 25, dtype=d), 0.5)
    yield Kronecker(torch.randn(4, 3, dtype=d), torch.randn(5, 10, dtype=d), -2.0)
    yield Kronecker(torch.randn(2, 4, 3, dtype=d), torch.randn(2, 5, 10, dtype=d), 2.0)
    yield torch.randn(2, 20, 30, dtype=d)


@pytest.mark.parametrize("form", list(forms()), ids=lambda form: type(form).__name__)
def test_the_spectrum_of_a_form_is_that_of_its_dense_matrix(form):
    whole = low_rank.dense(form)
    values = torch.linalg.svdvals(whole)
    found = low_rank.spectrum_of(form)
    k = found.values.shape[-1]
    torch.testing.assert_close(found.values, values[..., :k], rtol=1e-10, atol=1e-10)
    assert found.square == pytest.approx(float(whole.square().sum()))
    for rank in (1, 3, k):
        U, Vh = found.vectors(rank)
        eye = torch.eye(rank, dtype=U.dtype).expand(*U.shape[:-2], rank, rank)
        torch.testing.assert_close(U.mT @ U, eye)
        torch.testing.assert_close(Vh @ Vh.mT, eye)
        B, A = found.pair(rank)
        tail = float(values[..., rank:].square().sum())
        assert float((whole - B @ A).square().sum()) == pytest.approx(tail, abs=1e-9)
        assert found.tails()[rank] == pytest.approx(tail, abs=1e-9)


def test_a_randomised_svd_is_near_the_best(monkeypatch):
    torch.manual_seed(2)
    slow = torch.randn(300, 260, dtype=torch.float64)  # singular values that hardly fall: the hard case
    wide = Factors(torch.randn(200, 260, dtype=torch.float64), torch.randn(300, 200, dtype=torch.float64), 0.1)
    monkeypatch.setattr(low_rank, "EXACT_UP_TO", 100)
    for change in (slow, wide, torch.stack([slow, 2 * slow])):
        found = low_rank.spectrum_of(change, 20)
        assert not found.complete
        assert low_rank.spectrum_of(change).complete
        whole = low_rank.dense(change)
        best = float(torch.linalg.svdvals(whole)[..., 20:].square().sum()) ** 0.5
        B, A = found.pair(20)
        error = float((whole - B @ A).norm())
        assert best <= error < 1.01 * best
        assert found.tails()[20] ** 0.5 == pytest.approx(error, rel=1e-6)
        assert low_rank.rank_for(found, 20, 1e-16) == 20
        again = low_rank.spectrum_of(change, 20).pair(20)
        assert torch.equal(again[0], B), "from a fixed seed"
        assert torch.equal(again[1], A)
    exact = Factors(torch.randn(200, 260, dtype=torch.float64)[:5].repeat(40, 1),
                    torch.randn(300, 200, dtype=torch.float64))
    found = low_rank.spectrum_of(exact, 20)
    assert low_rank.rank_for(found, 20, 1e-7) == 5
