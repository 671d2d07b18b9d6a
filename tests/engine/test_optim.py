"""LoRA+ and LoRA-FA: exact learning rates, the projected gradient against dense algebra, and both beside PEFT's."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import veneer
from veneer import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, RandLoRA, Rows, VBLoRA, VeRA
from veneer.attach import attached
from veneer.method import Method, VeneerError
from veneer.optim import lora_fa, lora_plus_groups

from .nets import Net, scatter, tiny_llama

LINEAR = {"*.q_proj": LoRA(rank=2), "*.up": LoRA(rank=2), "*.down": LoRA(rank=2)}


def rates(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    """Parameter name → (learning rate, weight decay); fails where a parameter is in two groups."""
    names = {p: key for key, p in model.named_parameters()}
    found = [(names[p], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found))
    return dict(found)


# -- LoRA+ ------------------------------------------------------------------------------------------------
def test_every_parameter_has_its_own_rate():
    model = veneer.attach(Net(blocks=1), {"embed": LoRA(rank=2), "layers.0.up": LoRA(rank=2, bias=True),
                                          "layers.0.down": DoRA(LoRA(rank=2)), "lm_head": Full()})
    found = rates(model, lora_plus_groups(model, 0.01, ratio=8, weight_decay=0.1, embedding_lr=0.003))
    at = "{}.adapters.default.weight.{}".format
    assert found == {
        at("embed", "A"): (0.003, 0.1), at("embed", "B"): (0.003, 0.1),
        at("layers.0.up", "A"): (0.01, 0.1), at("layers.0.up", "B"): (0.08, 0.1),
        at("layers.0.up", "bias"): (0.08, 0.0),
        at("layers.0.down", "magnitude"): (0.08, 0.0),
        at("layers.0.down", "inner.A"): (0.01, 0.1), at("layers.0.down", "inner.B"): (0.08, 0.1),
        at("lm_head", "weight"): (0.01, 0.1),
    }


def test_the_defaults_are_those_of_the_authors_code():
    model = veneer.attach(Net(blocks=1), {"embed": LoRA(rank=2), "layers.0.up": LoRA(rank=2)})
    found = rates(model, lora_plus_groups(model, 1e-4))
    assert found["embed.adapters.default.weight.A"] == (1e-6, 0.0)
    assert found["layers.0.up.adapters.default.weight.A"] == (1e-4, 0.0)
    assert found["layers.0.up.adapters.default.weight.B"] == (1.6e-3, 0.0)


@pytest.mark.parametrize(("method", "fast"), [
    (AdaLoRA(init_r=2, target_r=1), {"B"}),
    (LoHa(rank=2), {"w1_a", "w2_a"}),
    (LoKr(rank=1, decompose_both=True), {"w1_a", "w2_a"}),
    (LoKr(rank=1), {"w2_a"}),
    (VeRA(rank=4), {"b"}),
    (DoRA(LoHa(rank=2)), {"magnitude", "inner.w1_a", "inner.w2_a"}),
], ids=lambda x: str(x) if isinstance(x, Method) else "")
def test_a_method_declares_its_own_side(method, fast):
    model = veneer.attach(nn.Sequential(nn.Linear(24, 24)), {"0": method})
    found = rates(model, lora_plus_groups(model, 1.0, ratio=4))
    assert {key.rpartition("weight.")[2] for key, (lr, _) in found.items() if lr == 4.0} == fast
    assert len(found) == sum(p.requires_grad for p in model.parameters())


def test_scaling_vectors_do_not_decay():
    model = veneer.attach(nn.Sequential(nn.Linear(6, 4)), {"0": VeRA(rank=3)})
    assert {decay for _, decay in rates(model, lora_plus_groups(model, 1.0, weight_decay=0.1)).values()} == {0.0}


def test_a_vector_of_every_expert_is_no_matrix():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 4, 5))

        def forward(self, x):
            return torch.einsum("eoi,bi->beo", self.stack, x)

    model = veneer.attach(Experts(), {"stack": DoRA(LoRA(rank=2))})
    found = rates(model, lora_plus_groups(model, 1.0, ratio=2, weight_decay=0.1))
    assert {key.rpartition("stack.")[2]: kind for key, kind in found.items()} == {
        "magnitude": (2.0, 0.0), "inner.A": (1.0, 0.1), "inner.B": (2.0, 0.1)}


def test_a_shared_bank_is_no_part_of_the_embedding_that_holds_it():
    bank = VBLoRA(rank=2, num_vectors=8, vector_length=4)
    model = veneer.attach(Net(blocks=1), {"embed": bank, "layers.0.up": bank, "layers.0.down": LoRA(rank=2)})
    found = rates(model, lora_plus_groups(model, 0.01, embedding_lr=0.003))
    assert found["embed.adapters.default.weight.shared.bank"][0] == 0.01
    assert found["embed.adapters.default.weight.logits_A"][0] == 0.01  # no two sides, so no rate of an embedding


def test_a_name_takes_that_adapter_alone_and_no_name_all_that_trains():
    model = veneer.attach(Net(blocks=1), {"layers.0.up": LoRA(rank=2)}, name="one")
    veneer.attach(model, {"layers.0.up": LoRA(rank=3)}, name="two")
    model.lm_head.weight.requires_grad_()
    one = rates(model, lora_plus_groups(model, 0.01, name="one"))
    assert {key.split(".")[3] for key in one} == {"adapters"}
    assert {key.split(".")[4] for key in one} == {"one"}
    everything = rates(model, lora_plus_groups(model, 0.01))
    assert len(everything) == 5
    assert everything["lm_head.weight"] == (0.01, 0.0)


def test_frozen_parameters_are_left_out():
    model = veneer.attach(Net(blocks=1), LINEAR)
    frozen = [p for key, p in model.named_parameters() if key.endswith(".A")]
    for p in frozen:
        p.requires_grad_(False)
    groups = lora_plus_groups(model, 0.01)
    assert len(groups) == 1
    assert not {id(p) for p in groups[0]["params"]} & {id(p) for p in frozen}


OPTIMIZERS = [each for each in vars(torch.optim).values()
              if inspect.isclass(each) and issubclass(each, torch.optim.Optimizer)
              and each.__name__ not in ("Optimizer", "SparseAdam", "LBFGS")]  # dense gradients, several groups


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_any_optimizer_takes_the_groups(kind):
    model = veneer.attach(nn.Sequential(nn.Linear(6, 6)), LoRA(rank=2))
    if kind.__name__ == "Muon":  # takes matrices alone, which these are
        assert all(p.dim() == 2 for p in veneer.trainable(model))
    optimizer = kind(lora_plus_groups(model, 1e-3, ratio=4), lr=7.0)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 4e-3]
    model(torch.randn(3, 6)).square().sum().backward()
    optimizer.step()


def test_plain_descent_moves_the_b_side_by_its_own_rate():
    model = scatter(veneer.attach(nn.Sequential(nn.Linear(6, 5)), LoRA(rank=2)))
    adapter = attached(model, "default")[0].adapter
    model(torch.randn(3, 6)).square().sum().backward()
    before = {key: p.detach().clone() for key, p in adapter.named_parameters()}
    torch.optim.SGD(lora_plus_groups(model, 0.01, ratio=5), lr=1.0).step()
    for key, rate in (("A", 0.01), ("B", 0.05)):
        parameter = adapter.get_parameter(key)
        torch.testing.assert_close(parameter, before[key] - rate * parameter.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", [Full(), Rows([1]), RandLoRA(rank=2), LoKr(rank=8),
                                  VBLoRA(rank=2, num_vectors=8, vector_length=4)], ids=str)
def test_no_b_side_is_an_error_that_says_why(rule):
    model = veneer.attach(nn.Sequential(nn.Linear(6, 6)), {"0": rule})
    with pytest.raises(VeneerError, match=rf"{type(rule).__name__}.* on '0' has no B side .* inputs are only the rank"):
        lora_plus_groups(model, 0.01)


def test_a_frozen_b_side_is_an_error_that_says_so():
    model = veneer.attach(Net(blocks=1), LINEAR)
    for key, p in model.named_parameters():
        if key.endswith(".B"):
            p.requires_grad_(False)
    with pytest.raises(VeneerError, match=r"B side of 'layers.0.q_proj' .* is frozen"):
        lora_plus_groups(model, 0.01)


@pytest.mark.parametrize("make", [lora_plus_groups, lora_fa])
def test_what_is_not_there_is_named(make):
    with pytest.raises(VeneerError, match=f"{make.__name__}: this model has no adapter"):
        make(Net(), lr=0.01)
    model = veneer.attach(Net(), LINEAR, name="style")
    with pytest.raises(VeneerError, match=r"no adapter named 'stile'.* did you mean 'style'"):
        make(model, lr=0.01, name="stile")
    for lr in (-1.0, float("nan"), "0.1", True):
        with pytest.raises(VeneerError, match=f"{make.__name__}: lr must be a finite number of at least 0"):
            make(model, lr=lr)


# -- LoRA+ and LoRA-FA beside PEFT ------------------------------------------------------------------------
TARGETS = ["q_proj", "v_proj", "down_proj"]


def both(ours, **theirs):
    """The same tiny model with our adapter and with PEFT's, of equal numbers."""
    peft = pytest.importorskip("peft")
    model = veneer.attach(tiny_llama(), {f"*.{name}": ours for name in TARGETS})
    wrapped = peft.get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=TARGETS, **theirs))
    pairs = {}
    for key, p in wrapped.named_parameters():
        if ".lora_" not in key:
            continue
        module, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
        inner = "inner." if theirs.get("use_dora") else ""
        own = "magnitude" if kind.startswith("magnitude") else inner + kind[0]
        pairs[f"{module}.adapters.default.weight.{own}"] = p
    mine = dict(model.named_parameters())
    assert pairs.keys() == {key for key, p in mine.items() if p.requires_grad}
    with torch.no_grad():
        for key, p in pairs.items():
            p.copy_(mine[key])
    return model, wrapped, pairs


@pytest.mark.parametrize("dora", [False, True])
def test_lora_plus_has_the_rates_of_peft(dora):
    method = LoRA(rank=4, alpha=8)
    model, wrapped, pairs = both(DoRA(method) if dora else method, r=4, lora_alpha=8, use_dora=dora)
    from peft.optimizers import create_loraplus_optimizer

    theirs = create_loraplus_optimizer(wrapped, torch.optim.AdamW, lr=3e-4, loraplus_lr_ratio=12)
    expected = {p: group["lr"] for group in theirs.param_groups for p in group["params"]}
    found = rates(model, lora_plus_groups(model, 3e-4, ratio=12))
    assert {key: lr for key, (lr, _) in found.items()} == {key: expected[p] for key, p in pairs.items()}


def steps(model, optimizer, count=6):
    ids = torch.randint(29, (3, 9), generator=torch.Generator().manual_seed(5))
    for _ in range(count):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_lora_fa_takes_the_steps_of_peft(rank_stabilized, monkeypatch):
    method = LoRA(rank=4, alpha=12, rank_stabilized=rank_stabilized)
    model, wrapped, pairs = both(method, r=4, lora_alpha=12, use_rslora=rank_stabilized)
    from peft.optimizers import create_lorafa_optimizer, lorafa

    # PEFT projects in bfloat16 wherever the machine has it. And its Adam has the epsilon inside the bias correction,
    # torch's outside: with an epsilon of almost nothing they agree.
    monkeypatch.setattr(lorafa, "is_bf16_available", lambda: False)
    theirs = create_lorafa_optimizer(wrapped, r=4, lora_alpha=12, lr=1e-2)
    for group in theirs.param_groups:
        group["eps"] = 1e-30
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    steps(model, lora_fa(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.0, eps=1e-30))
    steps(wrapped, theirs)
    mine = dict(model.named_parameters())
    for key, p in pairs.items():
        assert torch.equal(before[key], mine[key]) == key.endswith(".A")
        torch.testing.assert_close(mine[key], p, rtol=0, atol=1e-5)


# -- LoRA-FA ----------------------------------------------------------------------------------------------
def dense_gradient(model: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    """The loss's gradient by the adapted weight itself, as full fine-tuning would have it."""
    merged = veneer.detach(veneer.merge(copy.deepcopy(model), keep=False))
    weight = merged.get_parameter(name)
    weight.requires_grad_()
    merged(x).square().sum().backward()
    return weight.grad


@pytest.mark.parametrize(("method", "width"), [(LoRA(rank=3, alpha=7), 8), (LoRA(rank=4, rank_stabilized=True), 8),
                                               (LoRA(rank=6), 4)], ids=["lora", "rslora", "rank above the width"])
def test_a_step_is_the_best_one_that_the_rows_of_a_allow(method, width):
    model = scatter(veneer.attach(nn.Sequential(nn.Linear(width, 5)).double(), method))
    x = torch.randn(7, width, dtype=torch.float64)
    full = dense_gradient(model, "0.weight", x)
    adapter = attached(model, "default")[0].adapter
    before = adapter.delta().detach()
    optimizer = lora_fa(model, torch.optim.SGD, lr=1e-3)
    model(x).square().sum().backward()
    optimizer.step()
    change = (adapter.delta().detach() - before) / -1e-3
    # Least squares: the C for which C·A is nearest to the full gradient, by a solver that knows nothing of (A Aᵀ)⁻¹.
    A = adapter.A.detach()
    best = torch.linalg.lstsq(A.mT, full.mT, driver="gelsd").solution.mT @ A
    torch.testing.assert_close(change, best, rtol=1e-9, atol=1e-9)
    if method.rank >= width:
        torch.testing.assert_close(change, full, rtol=1e-9, atol=1e-9)


def test_an_embedding_and_stacked_experts_are_projected_too():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 6)
            self.stack = nn.Parameter(torch.randn(3, 5, 6))

        def forward(self, ids):
            return torch.einsum("eoi,bi->beo", self.stack, self.embed(ids))

    model = scatter(veneer.attach(Both().double(), {"embed": LoRA(rank=2), "stack": LoRA(rank=2, alpha=5)}))
    full = {name: dense_gradient(model, f"{name}", torch.arange(7)) for name in ("embed.weight", "stack")}
    optimizer = lora_fa(model, torch.optim.SGD, lr=1.0)
    adapters = {item.weight.name: item.adapter for item in attached(model, "default")}
    before = {name: a.delta().detach() for name, a in adapters.items()}
    model(torch.arange(7)).square().sum().backward()
    optimizer.step()
    for name, dense in (("embed", full["embed.weight"]), ("stack", full["stack"])):
        A = adapters[name].A.detach()
        best = dense @ torch.linalg.pinv(A) @ A
        torch.testing.assert_close(before[name] - adapters[name].delta().detach(), best, rtol=1e-8, atol=1e-8)


def test_a_is_frozen_and_the_rest_is_trained():
    model = veneer.attach(Net(blocks=1), {"layers.0.up": DoRA(LoRA(rank=2)), "layers.0.down": LoRA(rank=2, bias=True)})
    optimizer = lora_fa(model, lr=0.1, betas=(0.8, 0.9))
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert {key.rpartition("weight.")[2] for key, p in model.named_parameters() if p.requires_grad} == {
        "magnitude", "inner.B", "B", "bias"}
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.arange(5)).square().sum().backward()
        optimizer.step()
    for key, p in model.named_parameters():
        assert torch.equal(before[key], p) != p.requires_grad


def test_doras_gain_does_not_turn_the_projection():
    model = scatter(veneer.attach(nn.Sequential(nn.Linear(8, 5)).double(), DoRA(LoRA(rank=3, alpha=7))))
    adapter = attached(model, "default")[0].adapter
    optimizer = lora_fa(model, torch.optim.SGD, lr=1.0)
    model(torch.randn(7, 8, dtype=torch.float64)).square().sum().backward()
    raw, before = adapter.inner.B.grad.clone(), adapter.inner.B.detach().clone()
    optimizer.step()
    A = adapter.inner.A.detach()
    torch.testing.assert_close(before - adapter.inner.B, raw @ torch.linalg.inv(A @ A.mT) / (7 / 3) ** 2)


def test_the_projection_follows_an_a_that_is_loaded_anew(tmp_path):
    model = veneer.attach(nn.Sequential(nn.Linear(8, 5)), LoRA(rank=3))
    veneer.save(scatter(copy.deepcopy(model), by=1.0), tmp_path)
    optimizer = lora_fa(model, torch.optim.SGD, lr=1.0)
    adapter = attached(model, "default")[0].adapter
    for load in (False, True):
        if load:
            veneer.load(model, tmp_path)
        optimizer.zero_grad()
        model(torch.randn(7, 8)).square().sum().backward()
        raw, before = adapter.B.grad.clone(), adapter.B.detach().clone()
        optimizer.step()
        A = adapter.A.detach()
        torch.testing.assert_close(before - adapter.B, raw @ torch.linalg.inv(A @ A.mT), rtol=1e-3, atol=1e-4)


def test_a_closure_is_projected_after_it_has_run():
    x = torch.randn(7, 8)
    found = []
    for how in ("before", "positional", "keyword"):
        torch.manual_seed(1)
        model = veneer.attach(nn.Sequential(nn.Linear(8, 5)), LoRA(rank=3))
        optimizer = lora_fa(model, torch.optim.SGD, lr=0.1)

        def closure(model=model):
            loss = model(x).square().sum()
            loss.backward()
            return loss

        if how == "before":
            closure()
            optimizer.step()
        else:
            loss = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
            assert loss > 0
        found.append(attached(model, "default")[0].adapter.B.detach())
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert found[0].abs().max() > 0


def test_16_bit_parameters_are_projected_in_fp32():
    model = veneer.attach(nn.Sequential(nn.Linear(32, 16)), LoRA(rank=8, dtype=torch.bfloat16))
    adapter = attached(model, "default")[0].adapter
    optimizer = lora_fa(model, torch.optim.SGD, lr=1.0)
    model(torch.randn(64, 32)).square().sum().backward()
    raw = adapter.B.grad.double()
    A = adapter.A.detach().double()
    optimizer.step()
    expected = raw @ torch.linalg.inv(A @ A.mT)
    assert (adapter.B.grad.double() - expected).norm() / expected.norm() < 2**-8


@pytest.mark.parametrize("rule", [LoHa(rank=2), LoKr(rank=2), VeRA(rank=2), RandLoRA(rank=2), Full(),
                                  AdaLoRA(init_r=2, target_r=1), DoRA(LoHa(rank=2)),
                                  VBLoRA(rank=2, num_vectors=8, vector_length=4)], ids=str)
def test_lora_fa_is_for_trained_pairs(rule):
    model = veneer.attach(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), {"0": LoRA(rank=2), "1": rule})
    with pytest.raises(VeneerError, match=rf"lora_fa: {type(rule).__name__}.* on '1' is no pair .*DoRA\(LoRA"):
        lora_fa(model, lr=0.1)
    assert all(p.requires_grad for p in veneer.trainable(model))
    assert any(key.endswith("0.adapters.default.weight.A") and p.requires_grad for key, p in model.named_parameters())


def test_lora_fa_says_what_leaves_nothing_to_do():
    model = veneer.attach(nn.Sequential(nn.Linear(6, 6)), LoRA(rank=2, alpha=0))
    with pytest.raises(VeneerError, match="has a scale of zero"):
        lora_fa(model, lr=0.1)
    model = veneer.attach(nn.Sequential(nn.Linear(6, 6)), LoRA(rank=2))
    attached(model, "default")[0].adapter.B.requires_grad_(False)
    with pytest.raises(VeneerError, match="every parameter but A is frozen"):
        lora_fa(model, lr=0.1)
