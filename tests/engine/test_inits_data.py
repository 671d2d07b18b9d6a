"""EVA, CorDA and LoRA-GA: what their papers promise, and what is said where it cannot be had."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import veneer
from veneer import DoRA, LoRA
from veneer.attached import adapter_names, attached
from veneer.eva import get_eva_state_dict, initialize_lora_eva_weights
from veneer.inits import EVA, CorDA, LoRAGA
from veneer.inits.corda import oriented_pair
from veneer.method import VeneerError, VeneerWarning, method_from_dict, method_to_dict, seeded_generator

from .calibrating import Attention, found, seen_by, tokens

NAMES = ("q", "k", "v", "o")


def rules(init, rank=3, names=NAMES, **options):
    return dict.fromkeys(names, LoRA(rank=rank, init=init, **options))


def adapters(model, name="default"):
    return {w.name: a for w, a in attached(model, name)}


def attached_with(init, rank=3, **options):
    model, batch = Attention(), tokens(20)
    statistics = found(model, [batch], rules(init, rank, **options))
    return veneer.attach(model, rules(init, rank, **options), statistics=statistics), batch, statistics


def message_of(function, *args, **kwargs):
    with pytest.raises(VeneerError) as caught:
        function(*args, **kwargs)
    return re.sub(r"\s+", " ", str(caught.value))


# -- what all of them promise -------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["eva", "corda", CorDA(mode="kpm"), "lora_ga"])
def test_the_model_says_at_the_start_what_the_base_says(init, dtype):
    model, batch = Attention().to(dtype), tokens(20)
    ids = {"input_ids": batch["input_ids"]}
    before = model(**ids)
    statistics = found(model, [batch], rules(init))
    veneer.attach(model, rules(init), statistics=statistics)
    assert torch.equal(model(**ids), before)
    loss = model(**batch)["loss"]
    loss.backward()
    assert all(param.grad is not None and bool(param.grad.any()) for name, param in model.named_parameters()
               if name.endswith((".B",)))


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_without_statistics(init):
    text = message_of(veneer.attach, Attention(), rules(init))
    assert "starts from statistics" in text
    assert "Collect them first: statistics = veneer.calibrate(model, batches, rules)" in text


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_statistics_of_another_kind(init):
    other = {"eva": "corda", "corda": "lora_ga", "lora_ga": "eva"}[init]
    model = Attention()
    statistics = found(model, [tokens(20)], rules(other))
    text = message_of(veneer.attach, model, rules(init), statistics=statistics)
    assert f"init={init!r} starts from the statistic" in text
    assert "found: " in text


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_saved_and_loaded(init, tmp_path):
    model, batch, _ = attached_with(init)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if ".adapters." in name:
                param.add_(torch.randn(param.shape) * 0.1)
    expected = model(batch["input_ids"])
    veneer.save(model, tmp_path)
    veneer.detach(model)
    veneer.load(model, tmp_path)
    assert torch.allclose(model(batch["input_ids"]), expected, atol=1e-5)


def test_by_a_mapping_as_a_config_file_has_it():
    method = LoRA(rank=4, init={"init": "eva", "rho": 1.5, "whiten": True})
    assert method.init == EVA(rho=1.5, whiten=True)
    assert method_from_dict(method_to_dict(method)) == method
    assert LoRA(init={"init": "corda", "mode": "ipm"}).init == "corda"
    assert LoRA(init=LoRAGA()).init == "lora_ga"
    assert "init 'eva' has no option 'rhoo'; did you mean 'rho'" in message_of(LoRA, init={"init": "eva", "rhoo": 2})


@pytest.mark.parametrize(("kind", "options", "text"), [
    (EVA, {"rho": 0.5}, "init 'eva': rho must be a number of at least 1, got 0.5"),
    (EVA, {"tau": 1.5}, "init 'eva': tau must be a number of at least 0 and at most 1, got 1.5"),
    (EVA, {"whiten": "no"}, "init 'eva': unknown whiten 'no'"),
    (CorDA, {"mode": "kmp"}, "init 'corda': unknown mode 'kmp'; did you mean 'kpm'"),
    (CorDA, {"damping": 0.0}, "init 'corda': damping must be above 0"),
    (CorDA, {"damping": True}, "init 'corda': damping must be a number of at least 0, got True"),
    (LoRAGA, {"gamma": 0}, "init 'lora_ga': gamma must be above 0"),
    (LoRAGA, {"gamma": float("nan")}, "init 'lora_ga': gamma must be a number of at least 0, got nan"),
])
def test_wrong_options(kind, options, text):
    assert text in message_of(kind, **options)


# -- EVA ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_eva_has_orthonormal_rows_and_spends_the_budget(rank):
    model, _, _ = attached_with("eva", rank)
    found_ = adapters(model)
    assert sum(a.A.shape[0] for a in found_.values()) == 4 * rank
    for name, adapter in found_.items():
        A = adapter.A.detach()
        assert torch.allclose(A @ A.T, torch.eye(len(A)), atol=1e-5), name
        assert not adapter.B.any()
        assert 1 <= len(A) <= 2 * rank


def test_eva_takes_the_leading_components():
    model, batch = Attention(), tokens(20)
    X = seen_by(model, "o", [{"input_ids": batch["input_ids"]}])
    statistics = found(model, [batch], rules(EVA(rho=1.0), 5))
    veneer.attach(model, rules(EVA(rho=1.0), 5), statistics=statistics)
    A = adapters(model)["o"].A.detach()
    _, _, V = torch.linalg.svd(X - X.mean(0), full_matrices=False)
    assert torch.allclose((A * V[:5]).sum(1).abs(), torch.ones(5), atol=1e-3)


def evidence(shares, in_=9):
    """Statistics of inputs of which each component explains such a share."""
    singular = torch.tensor(shares, dtype=torch.float32).sqrt()
    return {"components": torch.eye(len(shares), in_), "singular": singular, "mean": torch.zeros(in_),
            "total": torch.tensor(1.0), "count": torch.tensor(101), "sought": torch.tensor(len(shares))}


def test_ranks_go_where_components_explain_most():
    ranks = EVA().ranks({"a": evidence([.5, .3, .1, .05]), "b": evidence([.2, .04, .03, .02])}, 2)
    assert ranks == {"a": 3, "b": 1}
    capped = EVA(rho=1.5).ranks({"a": evidence([.5, .3, .1]), "b": evidence([.01, .001, .0])}, 2)
    assert capped == {"a": 3, "b": 1}, "no more than rho times the rank"
    assert EVA(rho=1.0).ranks({"a": evidence([.5, .3]), "b": evidence([.01, .001])}, 2) == {"a": 2, "b": 2}
    none = EVA().ranks({"a": evidence([.5, .3]), "b": evidence([.01, .001])}, 1)
    assert none == {"a": 2, "b": 0}, "a weight may get none"


def test_ties_go_to_first_components_and_then_in_order():
    assert EVA().ranks({"a": evidence([.5, .1]), "b": evidence([.1, .05])}, 1) == {"a": 1, "b": 1}
    same = evidence([.5, .2, .1, .1])
    assert EVA().ranks({"q": same, "k": same, "v": same}, 2) == {"q": 2, "k": 2, "v": 2}
    other = evidence([.9, .15, .01, .01])
    assert EVA().ranks({"q": same, "k": same, "v": same, "o": other}, 1) == {"q": 1, "k": 1, "v": 1, "o": 1}
    assert EVA().ranks({"q": same, "k": same, "o": evidence([.9, .3, .01, .01])}, 2) == {"q": 2, "k": 2, "o": 2}
    assert EVA().ranks({"q": same, "k": same, "o": evidence([.9, .3, .15, .01])}, 2) == {"q": 2, "k": 2, "o": 2}
    assert EVA().ranks({"q": same, "k": same, "o": evidence([.9, .8, .7, .6])}, 2) == {"q": 1, "k": 1, "o": 4}
    assert EVA(rho=1.5).ranks({"q": same, "k": same, "o": evidence([.9, .8, .7])}, 2) == {"q": 2, "k": 1, "o": 3}


def test_a_weight_without_a_rank_is_left_alone():
    model, statistics = Attention(), {"q": evidence([.5, .3], 12), "o": evidence([.01, .001], 12)}
    veneer.attach(model, rules("eva", 1, ("q", "o")), statistics=statistics)
    assert list(adapters(model)) == ["q"]
    assert adapters(model)["q"].A.shape == (2, 12)
    assert type(model.o) is nn.Linear


@pytest.mark.parametrize("options", [{}, {"alpha": 6.0}, {"alpha": 6.0, "rank_stabilized": True},
                                     {"rank_stabilized": True}])
def test_the_scale_stays_or_alpha_does(options):
    shares = {"a": evidence([.5, .3, .1, .05]), "b": evidence([.2, .04, .03, .02])}
    method = LoRA(rank=2, init="eva", **options)
    parts = method.portioned(shares)
    assert [part.rank for part in parts.values()] == [3, 1]
    assert all(part.scale == pytest.approx(method.scale) for part in parts.values())
    method = LoRA(rank=2, init=EVA(adjust_scaling=False), **options)
    for part in method.portioned(shares).values():
        assert part.alpha == (method.alpha or 2)
        assert part.scale == pytest.approx((method.alpha or 2) / part.rank ** (0.5 if options.get("rank_stabilized")
                                                                                 else 1))
    inner = DoRA(LoRA(rank=2, init="eva", **options)).portioned(shares)
    assert [part.inner.rank for part in inner.values()] == [3, 1]


def test_whitened_inputs_have_the_identity_as_covariance():
    model, batch = Attention(), tokens(20)
    method = rules(EVA(rho=1.0, whiten=True), 4)
    X = seen_by(model, "o", [{"input_ids": batch["input_ids"]}])
    veneer.attach(model, method, statistics=found(model, [batch], method))
    low = X @ adapters(model)["o"].A.detach().T
    assert torch.allclose(torch.cov(low.T), torch.eye(4), atol=1e-3)


def test_too_few_components():
    few = {"a": evidence([.5, .3]), "b": evidence([.5, .3])}
    text = message_of(EVA().ranks, few, 2)
    assert "the statistics hold 2 components of 'a', and EVA(rho=2) at rank 2 chooses among 4" in text
    for found_ in few.values():
        found_["sought"] = torch.tensor(6)  # looked for, and not there
    text = message_of(EVA().ranks, few, 3)
    assert "6 ranks are to be dealt out, and the inputs have fewer directions in all (2 in the 101 tokens of " in text
    text = message_of(EVA().factors, None, (4, 9), 3, 1.0, seeded_generator("x"), few["a"])
    assert "2 components of the inputs were found, and the rank is 3" in text
    model, method = Attention(), rules("eva", 3, ("o",))
    statistics = found(model, [tokens(1, 3)], method)
    assert "calibrate on more tokens" in message_of(veneer.attach, model, method, statistics=statistics)


# -- CorDA --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("size", [(9, 20), (20, 9), (12, 12)])
@pytest.mark.parametrize("scale", [1.0, 0.25, -2.0])
def test_corda_of_full_rank_recovers_the_weight(size, scale, largest):
    W = torch.randn(*size)
    X = torch.randn(500, size[1]) * torch.logspace(2, -2, size[1])  # far from round
    A, B = oriented_pair(W, X.T @ X, min(size), scale, largest=largest)
    assert torch.allclose(scale * B @ A, W, atol=1e-4)
    assert A.dtype == B.dtype == torch.float32


@pytest.mark.parametrize("size", [(9, 20), (20, 9)])
def test_corda_is_the_decomposition_of_its_paper(size):
    W, X = torch.randn(*size), torch.randn(300, size[1]) * torch.logspace(1, -1, size[1])
    C = (X.T @ X).double()
    C = C + 0.01 * C.diagonal().mean() * torch.eye(size[1])
    U, S, V = torch.linalg.svd(W.double() @ C, full_matrices=False)
    parts = {True: slice(0, 3), False: slice(-3, None)}
    for largest, part in parts.items():
        A, B = oriented_pair(W, X.T @ X, 3, 0.5, largest=largest)
        expected = U[:, part] * S[part] @ V[part] @ torch.linalg.inv(C)
        assert torch.allclose(0.5 * (B @ A).double(), expected, atol=1e-4)
        # half of every singular value on either side: B has orthogonal columns whose lengths are their roots
        gram = B.T @ B
        ratio = gram.diagonal() / gram.diagonal().max()
        assert torch.allclose(ratio.sort().values.double(), (S[part] / S[part].max()).sort().values, rtol=1e-3)
        assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-4 * float(gram.max()))


def test_the_two_modes_share_out_the_weight():
    W, X = torch.randn(8, 10), torch.randn(100, 10)
    A, B = oriented_pair(W, X.T @ X, 3, 1.0)
    A2, B2 = oriented_pair(W, X.T @ X, 5, 1.0, largest=False)
    assert torch.allclose(B @ A + B2 @ A2, W, atol=1e-4)


def test_corda_with_fewer_tokens_than_inputs():
    W, X = torch.randn(12, 12), torch.randn(3, 12)
    for largest in (True, False):
        A, B = oriented_pair(W, X.T @ X, 12, 1.0, largest=largest)
        assert torch.allclose(B @ A, W, atol=1e-4)


def test_corda_of_a_weight_of_small_rank():
    W, X = torch.randn(9, 2) @ torch.randn(2, 14), torch.randn(100, 14)
    for weight in (W, W.T):
        C = X.T @ X if weight.shape[1] == 14 else X[:, :9].T @ X[:, :9]
        A, B = oriented_pair(weight, C, 9, 1.0)
        assert torch.isfinite(A).all()
        assert torch.isfinite(B).all()
        assert torch.allclose(B @ A, weight, atol=1e-4)


def test_corda_cannot():
    eye, X = torch.eye(4), torch.zeros(4, 4)
    assert "the covariance of the inputs is zero" in message_of(oriented_pair, eye, X, 2, 1.0)
    assert "the weight is zero" in message_of(oriented_pair, X, eye, 2, 1.0)
    assert "the scale s is 0" in message_of(oriented_pair, eye, eye, 2, 0.0)
    text = message_of(veneer.plan, Attention(), rules("corda", 13))
    assert "init='corda' at rank 13 takes 13 singular vectors of a matrix (12, 12), which has 12" in text


# -- LoRA-GA ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gamma", [16.0, 1.0])
@pytest.mark.parametrize("compress", [True, False])
def test_lora_ga_has_the_stable_scale(gamma, compress):
    model, batch = Attention(), tokens(20)
    method = rules(LoRAGA(gamma=gamma), 3, alpha=7.0)
    statistics = found(model, [batch], method, compress=compress)
    veneer.attach(model, method, statistics=statistics)
    for name, adapter in adapters(model).items():
        out = model.get_submodule(name).out_features
        squared = out ** 0.5 / gamma
        for gram in (adapter.A @ adapter.A.T, adapter.B.T @ adapter.B):
            assert torch.allclose(gram, squared * torch.eye(3), atol=1e-4), name


def test_lora_ga_starts_along_the_gradient():
    model, batch = Attention(), tokens(20)
    model(**batch)["loss"].backward()
    U, _, V = torch.linalg.svd(model.o.weight.grad)
    model.zero_grad()
    statistics = found(model, [batch], rules("lora_ga"))
    veneer.attach(model, rules("lora_ga"), statistics=statistics)
    adapter = adapters(model)["o"]
    c = 12 ** 0.25 / 4
    assert torch.allclose((adapter.A / c * V[:3]).sum(1).abs(), torch.ones(3), atol=1e-3)
    assert torch.allclose((adapter.B / c * U[:, 3:6]).sum(0).abs(), torch.ones(3), atol=1e-3)


def test_the_first_step_of_lora_ga_is_the_best_of_its_rank():
    """Its change of the weight, B·dA + dB·A, is the gradient cut off after 2r singular values, up to a factor."""
    model, batch = Attention(), tokens(20)
    whole = found(model, [batch], rules("lora_ga"), compress=False)["o"]["gradient"]
    statistics = found(model, [batch], rules("lora_ga"))
    veneer.attach(model, rules("lora_ga"), statistics=statistics)
    model(**batch)["loss"].backward()
    adapter = adapters(model)["o"]
    A, B = adapter.A.detach(), adapter.B.detach()
    step = B @ adapter.A.grad + adapter.B.grad @ A
    U, S, V = torch.linalg.svd(whole)
    best = U[:, :6] * S[:6] @ V[:6]
    cosine = float((step * best).sum() / step.norm() / best.norm())
    assert cosine == pytest.approx(1, abs=1e-4)


def test_a_gradient_of_too_small_a_rank():
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(3, 8)
    method = LoRA(rank=2, init="lora_ga")
    statistics = found(model, [x], method, forward=lambda m, b: m(b).square().mean())
    text = message_of(veneer.attach, model, method, statistics=statistics)
    assert "'0': the gradient has a rank below 4, which LoRA-GA takes at rank 2; calibrate on more tokens" in text
    statistics = found(model, [torch.randn(30, 8)], LoRA(rank=1, init="lora_ga"),
                       forward=lambda m, b: m(b).square().mean())
    text = message_of(veneer.attach, model, method, statistics=statistics)
    assert "'0': the statistics hold 2 singular triplets of the gradient, and LoRA-GA at rank 2 takes 4" in text
    text = message_of(veneer.plan, model, LoRA(rank=5, init="lora_ga"))
    assert "init='lora_ga' at rank 5 takes 10 singular vectors of a matrix (8, 8), which has 8" in text


# -- the utilities ------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:.*had not settled")
def test_get_eva_state_dict():
    model, batch = Attention(), tokens(20)
    state = get_eva_state_dict(model, [batch], rules("eva"))
    assert type(model.o) is nn.Linear
    veneer.attach(model, rules("eva"), statistics=found(model, [batch], rules("eva")))
    assert list(state) == list(NAMES)
    assert sum(map(len, state.values())) == 12
    for name, adapter in adapters(model).items():
        assert torch.equal(state[name], adapter.A)
    dora = {"o": DoRA(LoRA(rank=2, init="eva"))}
    assert get_eva_state_dict(Attention(), [batch], dora)["o"].shape == (2, 12)
    text = message_of(get_eva_state_dict, Attention(), [batch], {"o": LoRA(rank=2), "q": LoRA(rank=2, init="eva")})
    assert "LoRA(rank=2) for 'o' does not start by EVA; give it init=\"eva\"" in text


@pytest.mark.filterwarnings("ignore:.*had not settled")
def test_initialize_lora_eva_weights():
    model, batch = Attention(), tokens(20)
    veneer.attach(model, rules("kaiming", 3, alpha=6.0), name="first")
    veneer.attach(model, {"q": LoRA(rank=1)}, name="other")
    veneer.activate(model, ["first", "other"])
    before = model(batch["input_ids"])
    assert initialize_lora_eva_weights(model, [batch], "first") is model
    found_ = adapters(model, "first")
    assert sum(len(a.A) for a in found_.values()) == 12
    for adapter in found_.values():
        assert torch.allclose(adapter.A @ adapter.A.T, torch.eye(len(adapter.A)), atol=1e-5)
        assert adapter.scale == 2.0
        assert adapter.A.requires_grad
    assert torch.equal(model(batch["input_ids"]), before)
    assert list(adapters(model, "other")) == ["q"]
    with torch.no_grad():
        adapters(model, "other")["q"].B.fill_(1.0)
        adapters(model, "first")["q"].B.fill_(1.0)
    both = model(batch["input_ids"])
    veneer.activate(model, "first")
    assert not torch.equal(model(batch["input_ids"]), both), "both are live, as before"


def test_initialize_lora_eva_weights_from_statistics():
    model, batch = Attention(), tokens(20)
    statistics = found(model, [batch], rules("eva"))
    veneer.attach(model, dict.fromkeys(NAMES, DoRA(LoRA(rank=3))))
    model.train()
    initialize_lora_eva_weights(model, statistics=statistics, init={"init": "eva", "rho": 1.0})
    assert all(a.inner.A.shape[0] == 3 for a in adapters(model).values())
    assert all(a.method.inner.init == EVA(rho=1.0) for a in adapters(model).values())


def test_initialize_lora_eva_weights_cannot():
    model, batch = veneer.attach(Attention(), {"q": LoRA(rank=2), "o": veneer.LoKr(rank=2)}, name="mine"), tokens()
    text = message_of(initialize_lora_eva_weights, model, [batch], "mino")
    assert "no adapter named 'mino' on this model; did you mean 'mine'" in text
    text = message_of(initialize_lora_eva_weights, model, [batch], "mine")
    assert "'o' has LoKr(rank=2), and only LoRA and DoRA(LoRA(…)) start by EVA" in text
    model = veneer.attach(Attention(), {"q": LoRA(rank=2)})
    assert "needs batches, or statistics" in message_of(initialize_lora_eva_weights, model)
    text = message_of(initialize_lora_eva_weights, model, [batch], init="pissa")
    assert "init must be 'eva', or EVA with options, got 'pissa'" in text
    before = adapters(model)["q"]
    other = found(model, [batch], rules("eva", 1, ("k",)))
    assert "there are none of 'q'" in message_of(initialize_lora_eva_weights, model, statistics=other)
    assert adapters(model)["q"] is before
    with pytest.warns(VeneerWarning, match="had not settled"):
        initialize_lora_eva_weights(model, [batch])


@pytest.mark.parametrize("fault", ["another model", "too few components", "interrupted"])
def test_initialize_lora_eva_weights_keeps_what_was_trained_after_an_error(fault, monkeypatch):
    model, batch = veneer.attach(Attention(), rules("kaiming"), name="first"), tokens(20)
    veneer.attach(model, {"q": LoRA(rank=1)}, name="other")
    veneer.activate(model, "first")
    with torch.no_grad():
        adapters(model, "first")["q"].B.fill_(1.0)
    statistics = found(Attention() if fault == "another model" else model, [batch], rules("eva"))
    if fault == "too few components":
        statistics._tensors["o"]["components"] = statistics["o"]["components"][:1]
    if fault == "interrupted":
        def stopped(model, name):
            if name == "first":
                raise KeyboardInterrupt
            return veneer.detach(model, name)

        monkeypatch.setattr("veneer.eva.detach", stopped)
    before, values = adapters(model, "first"), model(batch["input_ids"])
    with pytest.raises(KeyboardInterrupt if fault == "interrupted" else VeneerError):
        initialize_lora_eva_weights(model, name="first", statistics=statistics)
    assert adapters(model, "first") == before
    assert adapter_names(model) == ["first", "other"]
    assert torch.equal(model(batch["input_ids"]), values)
