"""combine: ΔW of the new adapter is the weighted sum of the others' ΔWs, or what the papers make of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer import DoRA, Full, LoRA, Rows
from veneer.attach import attached
from veneer.combine import combine
from veneer.inspect import adapters
from veneer.method import VeneerError, seeded_generator

from .nets import Net, adapter_state, scatter
from .zoo import CASES, IDS, WEIGHTS, Zoo, deltas, method, outputs, relative, zoo

FACTORS = {"a": 0.7, "b": -0.3, "c": 1.5}


def three(*cases):
    """The model with adapters a, b, c of these methods on all weights."""
    model = None
    for name, case in zip(FACTORS, cases, strict=True):
        model = zoo(method(case), name=name, model=model)
    return model


def wanted(model, factors=FACTORS):
    """Σ factor · ΔW in fp64 by weight name, a weight that an adapter is not on counting as zero."""
    total: dict = {}
    for name, factor in factors.items():
        for key, delta in deltas(model, name).items():
            total[key] = total.get(key, 0) + factor * delta
    return total


def plain(model, name):
    """ΔW of an adapter that must be plain LoRA, by hand, by weight name."""
    found = {}
    for weight, adapter in attached(model, name):
        assert type(adapter.method) is LoRA
        found[weight.name] = adapter.scale * adapter.B.detach().double() @ adapter.A.detach().double()
    return found


# -- sums ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["sum", "cat"])
@pytest.mark.parametrize("cases", [("lora", "rslora", "lora"), ("lora", "loha", "lokr"), ("vera", "vblora", "randlora"),
                                   ("adalora", "loha-dense", "lokr-small"), ("circulant", "lora", "lokr-conv")],
                         ids="+".join)
def test_the_change_is_the_weighted_sum(cases, how):
    model = three(*cases)
    want = wanted(model)
    report = combine(model, FACTORS, name="abc", how=how, rank="exact" if how == "sum" else None)
    got = plain(model, "abc")
    assert set(got) == set(WEIGHTS)
    for name, delta in got.items():
        assert relative(delta, want[name]) < 1e-6, name
        assert report.errors[name] < 1e-6
    assert adapters(model)["abc"].live
    assert not any(adapters(model)[name].live for name in FACTORS)
    assert adapters(model)["abc"].trainable == report.parameters == adapters(model)["abc"].parameters


@pytest.mark.parametrize("case", CASES)
def test_one_adapter_times_a_number(case):
    model = zoo(method(case), name="a")
    combine(model, {"a": -2}, "b", rank="exact")
    want = deltas(model, "a")
    assert all(relative(delta, -2 * want[name]) < 1e-6 for name, delta in plain(model, "b").items())


def test_no_cross_terms_and_the_same_outputs():
    """What the sum of A's and of B's would give, and PEFT's "linear" does, is another adapter."""
    model = zoo(LoRA(rank=2), name="a")
    zoo(LoRA(rank=2), name="b", model=model)
    veneer.activate(model, ["a", "b"])
    want = outputs(model)
    combine(model, {"a": 1, "b": 1}, "both")
    assert relative(outputs(model), want) < 2e-6
    veneer.activate(model, ["a", "b"])
    assert torch.equal(outputs(model), want)


def test_cat_keeps_the_factors_themselves():
    model = zoo({"up": LoRA(rank=2, alpha=6)}, name="a")
    zoo({"up": LoRA(rank=3)}, name="b", model=model)
    report = combine(model, {"a": 0.5, "b": 2}, "ab", how="cat")
    (_, a), (_, b), (_, ab) = (attached(model, name)[0] for name in ("a", "b", "ab"))
    assert torch.equal(ab.A, torch.cat([a.A, b.A]))
    assert torch.equal(ab.B, torch.cat([1.5 * a.B, 2 * b.B], dim=1))
    assert report.ranks == {"up": 5}


def test_sum_needs_no_more_rank_than_there_is():
    model = zoo({"up": LoRA(rank=3)}, name="a")
    combine(model, {"a": 2}, "b")
    assert combine(model, {"a": 1, "b": 1}, "c").ranks == {"up": 3}
    zoo({"up": method("randlora")}, name="r", model=model)
    with pytest.raises(VeneerError, match=r"the change of 'up' by LoRA\(rank=3\) \+ RandLoRA"):
        combine(model, {"a": 1, "r": 1}, "d")


@pytest.mark.parametrize("how", ["sum", "svd"])
def test_cut_to_a_rank_it_is_the_nearest(how):
    model = three("lora", "loha-dense", "lokr")
    want = wanted(model)
    report = combine(model, FACTORS, "abc", how, 2)
    for name, got in plain(model, "abc").items():
        values = torch.linalg.svdvals(want[name])
        best = float(values[..., 2:].square().sum() / values.square().sum()) ** 0.5
        assert relative(got, want[name]) == pytest.approx(best, abs=1e-6), name
        assert report.errors[name] == pytest.approx(best, abs=1e-6), name
        assert report.ranks[name] == 2
    share = combine(model, FACTORS, "share", how, 0.8)
    assert 0 < share.error <= 0.2 ** 0.5


def test_the_union_of_the_weights():
    model = zoo({"embed": LoRA(rank=2), "up": LoRA(rank=2)}, name="a")
    zoo({"up": method("lokr"), "experts.w": method("loha")}, name="b", model=model)
    want = wanted(model, {"a": 2, "b": 3})
    report = combine(model, {"b": 3, "a": 2}, "ab", rank="exact")
    assert set(report.ranks) == {"embed", "up", "experts.w"}
    assert all(relative(got, want[name]) < 1e-6 for name, got in plain(model, "ab").items())
    report = combine(model, {"b": 0, "a": 2}, "only a")
    assert set(report.ranks) == {"embed", "up"}


def test_biases_and_dropout():
    model = zoo({"up": LoRA(rank=2, bias=True, dropout=0.5), "conv": LoRA(rank=2, dropout=0.5)}, name="a").eval()
    zoo({"up": LoRA(rank=2, bias=True, dropout=0.5), "conv": LoRA(rank=2)}, name="b", model=model).eval()
    bias = {n: attached(model, n)[0].adapter.bias.detach() for n in "ab"}
    combine(model, {"a": 0.25, "b": 2}, "ab")
    made = {weight.name: adapter for weight, adapter in attached(model, "ab")}
    assert made["up"].method == LoRA(rank=4, bias=True, dropout=0.5)
    assert made["conv"].method == LoRA(rank=4)
    torch.testing.assert_close(made["up"].bias.detach(), 0.25 * bias["a"] + 2 * bias["b"])


def test_a_tied_weight_and_the_widest_dtype():
    model = scatter(veneer.attach(Net(tied=True), {"embed": LoRA(rank=2, dtype=torch.bfloat16)}, name="a"), "a")
    scatter(veneer.attach(model, {"embed": LoRA(rank=1)}, name="b"), "b")
    want = plain(model, "a")["embed"] + plain(model, "b")["embed"]
    combine(model, {"a": 1, "b": 1}, "ab")
    assert relative(plain(model, "ab")["embed"], want) < 1e-6
    assert model.embed.adapters["ab"]["weight"] is model.lm_head.adapters["ab"]["weight"]
    assert attached(model, "ab")[0].adapter.A.dtype == torch.float32
    combine(model, {"a": 3}, "three")
    assert attached(model, "three")[0].adapter.method == LoRA(rank=2, dtype=torch.bfloat16)


@pytest.mark.parametrize("how", ["sum", "ties", "dare"])
def test_what_is_combined_is_saved_merged_and_trained_like_any_lora(how, tmp_path):
    model = three("lora", "lokr", "loha")
    combine(model, FACTORS, "abc", how, 3, density=None if how == "sum" else 0.5)
    want = outputs(model)
    veneer.save(model, tmp_path, name="abc")
    torch.manual_seed(4)
    other = Zoo()
    veneer.load(other, tmp_path)
    assert torch.equal(outputs(other), want)
    veneer.merge(model)
    assert relative(outputs(model), want) < 2e-6
    veneer.unmerge(model)
    before = adapter_state(model, "abc")
    optimizer = torch.optim.SGD([p for _, a in attached(model, "abc") for p in a.parameters()], lr=0.01)
    model(IDS).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(t, before[k]) for k, t in adapter_state(model, "abc").items())
    veneer.detach(model, "abc")
    veneer.activate(model, "a")


# -- thinning -----------------------------------------------------------------------------------------------
class Two(nn.Module):
    """One linear weight whose changes are written down: identity factors, so that B is ΔW itself."""

    def __init__(self, **changes) -> None:
        super().__init__()
        rows, columns = next(iter(changes.values())).shape
        self.layer = nn.Linear(columns, rows, bias=False)
        for name, change in changes.items():
            veneer.attach(self, {"layer": LoRA(rank=columns)}, name=name)
            adapter = attached(self, name)[0].adapter
            adapter.unpack({"A": torch.eye(columns), "B": change})

    def forward(self, x):
        return self.layer(x)


def combined(model, factors, how, **options):
    combine(model, factors, "out", how, "exact", **options)
    got = plain(model, "out")["layer"]
    veneer.detach(model, "out")
    return got


A = torch.tensor([[5.0, -1.0, 2.0, 0.5], [-3.0, 4.0, 0.0, -6.0]])
B = torch.tensor([[-1.0, -2.0, 8.0, 3.0], [1.0, 5.0, -4.0, -7.0]])


def close(got, want):
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), atol=1e-5, rtol=1e-5)


def test_magnitude_prune():
    # the four largest of each: 5 -6 4 -3, and 8 -7 5 -4
    close(combined(Two(a=A, b=B), {"a": 1, "b": 2}, "magnitude_prune", density=0.5),
          [[5, 0, 16, 0], [-3, 14, -8, -20]])
    got = combined(Two(a=A, b=B), {"a": 1, "b": 2}, "magnitude_prune", density=1.0)
    torch.testing.assert_close(got, (A + 2 * B).double(), atol=1e-5, rtol=1e-5)


def test_ties():
    model = Two(a=A, b=B)
    # all entries kept: signs of the sums + - + + / - + - -, and the mean of those that agree
    close(combined(model, {"a": 1, "b": 1}, "ties", density=1.0), [[5, -1.5, 5, 1.75], [-3, 4.5, -4, -6.5]])
    # the paper's λ is the factor, here 2
    close(combined(model, {"a": 2, "b": 2}, "ties", density=0.5), [[10, 0, 16, 0], [-6, 9, -8, -13]])
    # a negative factor votes for the other sign: a - b is 6 1 -6 -2.5 / -4 -1 4 1
    close(combined(model, {"a": 1, "b": -1}, "ties", density=1.0), [[3, 2, -8, -3], [-2, -5, 4, 7]])


def test_ties_by_frequency():
    model = Two(a=A, b=B, c=torch.full((2, 4), 0.25))
    # two of three against the greater sum; where it is one to one (the third is zero) the greater sum decides
    by_sum = combined(model, {"a": 1, "b": 1, "c": 1}, "ties", density=1.0)
    by_count = combined(model, {"a": 1, "b": 1, "c": 1}, "ties", density=1.0, majority_sign="frequency")
    assert by_sum[1, 0] == pytest.approx(-3, abs=1e-5)
    assert by_count[1, 0] == pytest.approx((1 + 0.25) / 2, abs=1e-5)
    assert by_count[0, 0] == pytest.approx((5 + 0.25) / 2, abs=1e-5)
    assert combined(model, {"a": 1, "b": 1}, "ties", density=1.0, majority_sign="frequency")[1, 0] == pytest.approx(-3)
    opposite = Two(a=A, b=-A)
    assert combined(opposite, {"a": 1, "b": 1}, "ties", density=1.0, majority_sign="frequency").abs().max() < 1e-6


def test_dare_is_seeded_rescaled_and_right_on_average():
    model = Two(a=A, b=B)
    keep = {n: torch.rand(A.shape, generator=seeded_generator(f"5/{n}/layer"), dtype=torch.float64) < 0.5 for n in "ab"}
    want = A * keep["a"] / 0.5 + 3 * B * keep["b"] / 0.5
    got = combined(model, {"a": 1, "b": 3}, "dare", density=0.5, seed=5)
    torch.testing.assert_close(got, want.double(), atol=1e-5, rtol=1e-5)
    assert torch.equal(combined(model, {"a": 1, "b": 3}, "dare", density=0.5, seed=5), got)
    assert not torch.equal(combined(model, {"a": 1, "b": 3}, "dare", density=0.5, seed=6), got)
    mean = sum(combined(model, {"a": 1, "b": 3}, "dare", density=0.5, seed=i) for i in range(400)) / 400
    assert relative(mean, (A + 3 * B).double()) < 0.1
    close(combined(model, {"a": 1, "b": 1}, "dare_ties", density=1.0), [[5, -1.5, 5, 1.75], [-3, 4.5, -4, -6.5]])


@pytest.mark.parametrize("how", ["magnitude_prune", "ties", "dare", "dare_ties"])
def test_on_every_layout_and_method(how):
    """Against the same in words, one matrix at a time, from the dense changes."""
    model = three("lora", "lokr", "vblora")
    dense = {name: deltas(model, name) for name in FACTORS}
    combine(model, FACTORS, "abc", how, "exact", density=0.4, seed=3)
    for key, got in plain(model, "abc").items():
        thin = {}
        for name, factor in FACTORS.items():
            delta = dense[name][key]
            if how.startswith("dare"):
                draw = torch.rand(delta.shape, generator=seeded_generator(f"3/{name}/{key}"), dtype=torch.float64)
                thin[name] = factor * delta * (draw < 0.4) / 0.4
            else:
                flat = delta.abs().reshape(-1, delta[..., :, :].shape[-2] * delta.shape[-1])
                least = flat.sort(descending=True).values[:, round(0.4 * flat.shape[1]) - 1]
                thin[name] = factor * delta * (delta.abs() >= least.reshape(-1, 1, 1).expand(
                    delta.reshape(-1, *delta.shape[-2:]).shape).reshape(delta.shape))
        stack = torch.stack(list(thin.values()))
        want = stack.sum(0)
        if how.endswith("ties"):
            agree = (stack.sign() == want.sign()) & (stack != 0)
            want = torch.where(agree, stack, 0).sum(0) / agree.sum(0).clamp_min(1)
        assert relative(got, want) < 2e-6, key


# -- what is refused ----------------------------------------------------------------------------------------
def _refused(words, *args, model=None, **options):
    model = model or zoo({"up": LoRA(rank=2)}, name="a")
    before = [(n, id(p)) for n, p in model.named_parameters()]
    with pytest.raises(VeneerError) as caught:
        combine(model, *args, **options)
    assert str(caught.value) == words
    assert [(n, id(p)) for n, p in model.named_parameters()] == before


@pytest.mark.parametrize(("args", "options", "words"), [
    (({}, "x"), {}, 'combine: weights must map adapters to their factors, {"a": 0.7, "b": 0.3}, got {}'),
    ((["a"], "x"), {}, 'combine: weights must map adapters to their factors, {"a": 0.7, "b": 0.3}, got [\'a\']'),
    (({"a": "1"}, "x"), {}, "combine: the factor of 'a' must be a finite number, got '1'"),
    (({"a": float("inf")}, "x"), {}, "combine: the factor of 'a' must be a finite number, got inf"),
    (({"a": 0.0}, "x"), {}, "combine: all factors are zero, so nothing would be left"),
    (({"aa": 1}, "x"), {}, "combine: no adapter named 'aa' on this model; did you mean 'a'? It has: 'a'"),
    (({"a": 1}, "a"), {}, "combine: this model already has an adapter 'a'; detach(model, 'a') first, or give the new "
                          "one another name"),
    (({"a": 1}, "x"), {"how": "tie"}, "combine: unknown how 'tie'; did you mean 'ties'? Known: sum, cat, svd, "
                                      "magnitude_prune, ties, dare, dare_ties"),
    (({"a": 1}, "x"), {"how": "linear"}, "combine: unknown how 'linear'. Known: sum, cat, svd, magnitude_prune, ties, "
                                         "dare, dare_ties"),
    (({"a": 1}, "x"), {"rank": 0}, "combine: rank must be a whole number of at least 1, a share of the squared norm "
                                   'above 0 and below 1, "exact" or None, got 0'),
    (({"a": 1}, "x"), {"how": "svd"}, "combine: how='svd' cuts the sum to a rank: give one (8), or a share of the "
                                      "squared norm to keep (0.99)"),
    (({"a": 1}, "x"), {"how": "cat", "rank": 4}, "combine: how='cat' keeps all factors; how='sum' cuts to rank=4"),
    (({"a": 1}, "x"), {"how": "ties"}, "combine: how='ties' needs the share of entries to keep, density above 0 and up "
                                       "to 1, got None"),
    (({"a": 1}, "x"), {"how": "dare", "density": 1.5}, "combine: how='dare' needs the share of entries to keep, "
                                                       "density above 0 and up to 1, got 1.5"),
    (({"a": 1}, "x"), {"density": 0.5}, "combine: density is for magnitude_prune, ties, dare, dare_ties; how='sum' "
                                        "keeps every entry"),
    (({"a": 1}, "x"), {"how": "ties", "density": 1, "majority_sign": "totall"},
     "combine: unknown majority_sign 'totall'; did you mean 'total'? Known: total, frequency"),
])
def test_bad_arguments(args, options, words):
    _refused(words, *args, **options)


@pytest.mark.parametrize(("method_", "text"), [(DoRA(LoRA(rank=2)), "DoRA(LoRA(rank=2))"), (Full(), "Full()"),
                                               (Rows([1, 3]), "Rows(ids=(1, 3))")])
def test_what_is_not_added_cannot_be_combined(method_, text):
    weight = "embed" if isinstance(method_, Rows) else "up"
    model = zoo({weight: method_}, name="d")
    zoo({"up": LoRA(rank=2)}, name="a", model=model)
    want = outputs(veneer.activate(model, "d")) if weight == "embed" else None
    _refused(f"combine: 'd' has {text} on {weight!r}, whose change of W depends on W and cannot be added to others. "
             "Make it plain LoRA first: to_lora(model, rank, name='d', to=..., extract=True); biases and norms "
             "trained whole have no low rank and cannot be combined", {"a": 1, "d": 1}, "x", model=model)
    if want is not None:  # and that is a way
        from veneer.convert import to_lora

        to_lora(model, "exact", name="d", to="plain", extract=True)
        combine(model, {"plain": 1}, "x")
        assert relative(outputs(model), want) < 2e-6


def test_merged_and_nan():
    model = veneer.merge(zoo({"up": LoRA(rank=2)}, name="a"))
    _refused("combine: adapter 'a' is merged into the base weights; call veneer.unmerge(model) first", {"a": 1}, "x",
             model=model)
    model = zoo({"up": LoRA(rank=2)}, name="a")
    with torch.no_grad():
        attached(model, "a")[0].adapter.A[0, 0] = torch.nan
    _refused("combine: the adapter of 'up' holds NaN or infinite values; nothing was changed", {"a": 1}, "x",
             model=model)


def test_factors_that_overflow():
    model = zoo({"up": LoRA(rank=2, dtype=torch.float16)}, name="a")
    _refused("combine: factors of the change of 'up' are too large for torch.float16; nothing was changed", {"a": 1e7},
             "x", how="cat", model=model)


def test_the_report():
    model = zoo({"up": LoRA(rank=2)}, name="a")
    zoo({"up": method("loha")}, name="b", model=model)
    report = combine(model, {"a": 0.5, "b": -1}, "ab", rank=2)
    was = " + ".join(str(attached(model, name)[0].adapter.method) for name in "ab")
    assert str(report).splitlines() == [
        "'ab' = 0.5·'a' + -1·'b' by 'sum': 1 weights of rank 2, 42 parameters (before: 84), relative error "
        f"{report.error:.2g}",
        f"  weight  {'was'.ljust(len(was))}  rank    error",
        f"  up      {was}  2 of 9  {report.error:.2g}"]
