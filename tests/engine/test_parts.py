"""Operations on a part of a model, odd orders, and what is refused because it would go wrong in silence."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer import DoRA, Full, LoRA, activate, attach, detach, disabled, merge, trainable, unmerge
from veneer.method import VeneerError


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.dec = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))

    def forward(self, x):
        return self.dec(self.enc(x))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(9, 6), nn.Tanh())
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.body[0].weight

    def forward(self, ids):
        return self.head(self.body(ids))


@torch.no_grad()
def stir(model):
    for param in trainable(model):
        param.add_(torch.randn_like(param) * 0.3)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Parts()


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def test_detaching_a_part_leaves_the_rest_live(model):
    attach(model, LoRA(rank=2))
    stir(model)
    want = model.dec(X)
    detach(model.enc)
    assert torch.equal(model.dec(X), want)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)
    detach(model)
    assert all(p.requires_grad for p in model.parameters())


def test_attaching_to_a_part_leaves_the_rest_live(model):
    attach(model, {"dec.*": LoRA(rank=2)}, name="a")
    stir(model)
    want = model.dec(X)
    attach(model.enc, LoRA(rank=2), name="b")
    assert torch.equal(model.dec(X), want)
    assert [a.live for a in veneer.adapters(model).values()] == [True, True]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_knows_its_own_parts(model, copied):
    attach(model, LoRA(rank=2))
    stir(model)
    twin = copied(model)
    want = twin.dec(X)
    detach(twin.enc)
    assert torch.equal(twin.dec(X), want)
    detach(twin)
    assert all(p.requires_grad for p in twin.parameters())
    assert set(veneer.adapters(model)) == {"default"}


def test_pickling_a_part_takes_only_the_part(model):
    model.extra = nn.Linear(300, 300)
    attach(model, LoRA(rank=2))
    assert len(pickle.dumps(model.enc[0])) < 50_000


def test_requires_grad_comes_back_after_the_parameters_were_replaced(model):
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    attach(model, LoRA(rank=2))
    model.load_state_dict({**model.state_dict(), **weights}, assign=True)
    detach(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("act", [merge, detach])
def test_a_part_of_a_tie_is_refused(act):
    model = Tied()
    attach(model, {"body.0": LoRA(rank=2)})
    stir(model)
    want = model(torch.arange(9))
    with pytest.raises(VeneerError, match=r"'0' is tied to one outside the part of the model given.*whole model"):
        act(model.body)
    assert torch.equal(model(torch.arange(9)), want)
    merge(model)
    with pytest.raises(VeneerError, match="unmerge: the weight of '0' is tied"):
        unmerge(model.body)
    unmerge(model)
    assert torch.equal(model(torch.arange(9)), want)


@pytest.mark.parametrize("other", [DoRA(LoRA(rank=2)), Full()])
def test_merging_beside_a_live_adapter_that_starts_from_the_base_is_refused(model, other):
    attach(model, LoRA(rank=2), name="a")
    stir(model)
    attach(model, other, name="b")
    stir(model)
    activate(model, ["a", "b"])
    want = model(X)
    with pytest.raises(VeneerError, match=r"'b' is live on enc.0.weight too.*merge all of them"):
        merge(model, "a")
    assert torch.equal(model(X), want)
    merge(model, ["a", "b"])
    torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-5)


def test_after_a_final_merge_the_model_goes_on(model):
    attach(model, LoRA(rank=2), name="a")
    stir(model)
    merge(model, "a", keep=False)
    want = model(X)
    with pytest.raises(VeneerError, match=r"merged into the base weights; for good \(keep=False\), so detach"):
        activate(model, [])
    detach(model, "a")
    assert torch.equal(model(X), want)
    attach(model, LoRA(rank=2), name="b")
    assert torch.equal(model(X), want)


def test_a_plan_of_another_model_is_refused(model):
    made = veneer.plan(Parts(), LoRA(rank=2))
    with pytest.raises(VeneerError, match=r"made for another model, or before 'enc.0' was replaced"):
        attach(model, made)
    assert all(p.requires_grad for p in model.parameters())


def test_dora_sees_what_is_written_through_data(model):
    attach(model, DoRA(LoRA(rank=2)))
    stir(model)
    with torch.no_grad():
        model(X)
        for param in trainable(model):
            param.data.copy_(param.data * 2)
        assert torch.equal(model(X), copy.deepcopy(model)(X))


def test_dora_keeps_its_magnitude_wide(model):
    attach(model, DoRA(LoRA(rank=2)))
    model.bfloat16()
    assert {p.dtype for n, p in model.named_parameters() if n.endswith("magnitude")} == {torch.float32}


def test_dora_norm_and_merge_take_no_part_in_autocast(model):
    attach(model, DoRA(LoRA(rank=2)))
    stir(model)
    with torch.no_grad():
        want = copy.deepcopy(model)(X)
        with torch.autocast("cpu", torch.bfloat16):
            model(X)
        assert torch.equal(model(X), want)
        with torch.autocast("cpu", torch.bfloat16):
            merge(model)
        torch.testing.assert_close(model(X), want, rtol=1e-5, atol=1e-5)


def run(model, reentrant):
    return checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_reference_without_gradients_is_no_obstacle_to_checkpointing(model, reentrant):
    attach(model, LoRA(rank=2))
    stir(model)
    for _ in range(2):
        out = run(model, reentrant)
        if not reentrant:
            with torch.no_grad(), disabled(model):
                model(X)
        out.sum().backward()
    assert all(p.grad is not None for p in trainable(model))


def test_two_checkpointed_routes_in_one_graph_are_refused(model):
    attach(model, LoRA(rank=2))
    stir(model)
    policy = run(model, reentrant=False)
    with disabled(model):
        reference = run(model, reentrant=False)
    with pytest.raises(VeneerError, match="other adapters were live in a forward pass since the last one"):
        (policy - 2 * reference).pow(2).sum().backward()


def test_two_reentrant_routes_in_one_graph_are_warned_of(model):
    attach(model, LoRA(rank=2))
    stir(model)
    policy = run(model, reentrant=True)
    with disabled(model):
        reference = run(model, reentrant=True)
    with pytest.warns(veneer.method.VeneerWarning, match="use_reentrant=False would let this be checked"):
        (policy - 2 * reference).pow(2).sum().backward()


def test_looking_does_not_disturb_a_forward_in_another_thread(model):
    attach(model, LoRA(rank=2))
    stir(model)
    with torch.no_grad():
        want = model(X)
        stop = threading.Event()

        def look():
            while not stop.is_set():
                veneer.adapters(model)

        thread = threading.Thread(target=look)
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        thread.start()
        try:
            assert all(torch.equal(model(X), want) for _ in range(500))
        finally:
            stop.set()
            thread.join()
            sys.setswitchinterval(before)


def test_trainable_refuses_what_would_train_everything_or_nothing(model):
    with pytest.raises(VeneerError, match="this model has no adapter, so that its whole base would be trained"):
        trainable(model)
    attach(model, LoRA(rank=2))
    merge(model)
    with pytest.raises(VeneerError, match=r"'default' is merged into the base weights and cannot be trained; call "
                                          r"veneer.unmerge\(model\) first"):
        trainable(model)
    unmerge(model)
    assert len(trainable(model)) == 8


def test_dora_takes_the_options_of_its_inner_lora():
    from veneer.method import method_from_dict

    assert method_from_dict({"method": "dora", "rank": 4, "alpha": 2}) == DoRA(LoRA(rank=4, alpha=2))
    with pytest.raises(VeneerError, match="method 'lora' has no option 'rnk'; did you mean 'rank'"):
        method_from_dict({"method": "dora", "rnk": 4})
