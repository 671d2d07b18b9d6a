"""What the weights of one adapter share: a vector bank that is trained, random bases that a seed stands for."""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import veneer
import veneer.inspect
from veneer import DoRA, LoKr, LoRA, RandLoRA, VBLoRA, VeRA
from veneer.attach import attached, shared_states
from veneer.method import Method, Shared, VeneerError

from .nets import scatter

FROZEN = {
    "vera": VeRA(rank=6, seed=3),
    "randlora": RandLoRA(rank=3, alpha=2, seed=3),
    "sparse": RandLoRA(rank=3, alpha=2, seed=3, sparsity="sparse"),
    "very sparse": RandLoRA(rank=3, alpha=2, seed=3, sparsity="very_sparse"),
    "dora": DoRA(VeRA(rank=6, seed=3)),
}
TRAINED = {
    "vblora": VBLoRA(rank=2, num_vectors=9, vector_length=4, topk=3),
    "dora vblora": DoRA(VBLoRA(rank=2, num_vectors=9, vector_length=4, topk=3)),
}
METHODS = FROZEN | TRAINED
each = pytest.mark.parametrize("case", METHODS)
each_frozen = pytest.mark.parametrize("case", FROZEN)
each_trained = pytest.mark.parametrize("case", TRAINED)


class Halves(nn.Module):
    """Four weights in two parts: (20, 12), (8, 20), (20, 8), (12, 20)."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        halves = {"enc": nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)),
                  "dec": nn.Sequential(nn.Linear(8, 20), nn.Tanh(), nn.Linear(20, 12))}
        for name in reversed(halves) if turned else halves:
            setattr(self, name, halves[name])

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(self.enc(x))


X = torch.linspace(-1, 2, 36).reshape(3, 12)


def adapted(case: str, model: nn.Module | None = None, name: str = "default", seed: int = 0) -> nn.Module:
    model = Halves() if model is None else model
    return veneer.attach(model, {"*.0": METHODS[case], "*.2": METHODS[case]}, name=name, seed=seed)


def state(model: nn.Module, name: str = "default") -> Shared:
    """The one state that all weights of an adapter share."""
    (found,) = shared_states(model, name)
    assert all(adapter.shared_state() is found for _, adapter in attached(model, name))
    return found


def tensors(shared: Shared) -> dict[str, Tensor]:
    return {**dict(shared.named_parameters()), **dict(shared.named_buffers())}


def bits(shared: Shared) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (t.dtype, t.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes())
            for name, t in tensors(shared).items()}


# -- one for the whole model --------------------------------------------------------------------------------
@each
def test_it_is_counted_once_and_at_the_first_weight(case):
    model = adapted(case)
    shared = state(model)
    assert [name for name, module in model.named_modules(remove_duplicate=False) if module is shared] == [
        "enc.0.adapters.default.weight." + ("inner.shared" if "dora" in case else "shared")]
    own = [tensor for _, adapter in attached(model, "default") for tensor in adapter.parameters()]
    assert len(own) == len({id(p) for p in own}) == len(veneer.trainable(model))
    assert sum(p.numel() for p in own) == veneer.plan(Halves(), {"*.0": METHODS[case], "*.2": METHODS[case]}
                                                      ).trainable_parameters
    for param in shared.parameters():
        assert sum(p is param for p in veneer.trainable(model)) == 1
        assert sum(p is param for _, p in model.named_parameters(remove_duplicate=False)) == 1
    keys = [key for key in model.state_dict() if ".shared." in key]
    assert keys == [f"enc.0.adapters.default.weight.{'inner.' * ('dora' in case)}shared.bank"] * (case in TRAINED)


@each_trained
def test_every_weight_reads_the_bank(case):
    model = adapted(case)
    (bank,) = state(model).parameters()
    before = [adapter.new_weight(weight.tensor).detach() for weight, adapter in attached(model, "default")]
    with torch.no_grad():
        bank.add_(1.0)
    after = [adapter.new_weight(weight.tensor).detach() for weight, adapter in attached(model, "default")]
    assert not any(torch.allclose(a, b) for a, b in zip(before, after, strict=True))


@each_trained
def test_the_banks_gradient_is_the_sum_over_the_weights(case):
    """Of what each weight's own copy of the bank would get."""
    model = scatter(adapted(case))
    (bank,) = state(model).parameters()
    model(X).square().sum().backward()
    own = scatter_copies(model)
    model(X).square().sum().backward()
    torch.testing.assert_close(sum(copied.grad for copied in own), bank.grad, rtol=1e-5, atol=1e-6)


def scatter_copies(model: nn.Module) -> list[nn.Parameter]:
    """Give every weight a bank of its own, with the same values."""
    banks = []
    for _, adapter in attached(model, "default"):
        inner = getattr(adapter, "inner", adapter)
        inner.use(copy.deepcopy(inner.shared_state()))
        banks += inner.shared_state().parameters()
        banks[-1].grad = None
    return banks


# -- bits -----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def defaults(kind: str) -> Iterator[None]:
    """What is set for torch, and an attach must not depend on."""
    if kind == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(getattr(torch, kind))
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@each
@pytest.mark.parametrize("kind", ["float64", "bfloat16", "meta"])
def test_bits_do_not_depend_on_torchs_defaults(case, kind):
    want, model = bits(state(adapted(case))), Halves()
    with defaults(kind):
        adapted(case, model)
    assert bits(state(model)) == want
    torch.manual_seed(1234)
    with defaults(kind):
        twin = copy.deepcopy(model)
        assert bits(state(twin)) == want
        veneer.detach(twin)
        assert bits(state(adapted(case, twin))) == want


@each
def test_bits_do_not_depend_on_the_order_of_weights(case):
    assert bits(state(adapted(case, Halves(turned=True)))) == bits(state(adapted(case)))


@each
def test_an_attach_draws_nothing_from_torchs_generator(case):
    model = Halves()
    before = torch.get_rng_state()
    adapted(case, model)
    assert torch.equal(torch.get_rng_state(), before)


@each_frozen
def test_bases_depend_on_the_methods_seed_alone(case):
    want = bits(state(adapted(case)))
    assert bits(state(adapted(case, seed=5))) == want
    method = METHODS[case].inner if "dora" in case else METHODS[case]
    other = type(method).from_options({**{f: getattr(method, f) for f in ("rank", "dropout")}, "seed": 4})
    model = veneer.attach(Halves(), {"*.0": other, "*.2": other})
    assert bits(state(model)) != want
    # and on their size, which the largest weight sets, or the method says
    one = veneer.attach(Halves(), {"dec.0": None, "dec.2": DoRA(method) if "dora" in case else method})
    assert tensors(state(one))["B"].shape != tensors(state(adapted(case)))["B"].shape
    sized = type(method)(**{**vars(method), "bases": (20, 20)})
    again = veneer.attach(Halves(), {"dec.0": None, "dec.2": DoRA(sized) if "dora" in case else sized})
    assert bits(state(again)) == want


@each_frozen
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bases_are_the_same_numbers_over_a_base_of_any_dtype(case, dtype):
    want = tensors(state(adapted(case)))
    for name, got in tensors(state(adapted(case, Halves().to(dtype)))).items():
        assert got.dtype in (torch.float32, dtype)
        assert torch.equal(got.double(), want[name].double())


@each
def test_a_look_in_inference_mode_does_not_get_in_the_way_of_training(case):
    """Of a 16-bit base, for which bases may be kept in 16 bit."""
    model = adapted(case, Halves().bfloat16())
    x = X.bfloat16()
    with torch.inference_mode():
        want = model(x)
    assert torch.equal(model(x), want)
    model(x).sum().backward()
    assert all(p.grad is not None for p in veneer.trainable(model))


@each
def test_a_state_that_was_made_in_inference_mode(case):
    model = Halves().bfloat16()
    with torch.inference_mode():
        adapted(case, model)
        got = model(X.bfloat16())
    torch.testing.assert_close(got, adapted(case, Halves().bfloat16())(X.bfloat16()))


@each_frozen
@pytest.mark.parametrize("which", ["A", "B"])
@torch.no_grad()
def test_other_bases_are_seen_at_once(case, which):
    model = scatter(adapted(case, Halves().bfloat16()))
    x = X.bfloat16()
    before = model(x)
    tensors(state(model))[which].mul_(-2)
    twin = pickle.loads(pickle.dumps(model))
    assert not torch.allclose(model(x), before)
    assert torch.equal(model(x), twin(x))


@each_trained
def test_a_bank_depends_on_the_seed_of_the_attach(case):
    assert bits(state(adapted(case, seed=5))) != bits(state(adapted(case)))


def test_several_methods_have_states_of_their_own():
    rules = {"enc.0": METHODS["vblora"], "enc.2": METHODS["dora vblora"], "dec.0": METHODS["vera"],
             "dec.2": VBLoRA(rank=3, num_vectors=9, vector_length=4, topk=3)}
    model = veneer.attach(Halves(), rules)
    first, second, _, third = shared_states(model, "default")
    assert [type(s).__name__ for s in (first, second, third)] == ["VectorBank"] * 3
    assert len({tuple(s.bank.flatten().tolist()) for s in (first, second, third)}) == 3


# -- moved, cast, copied --------------------------------------------------------------------------------------
@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_keeps_the_bits_of_what_is_frozen(case, dtype):
    model = scatter(adapted(case))
    want = bits(state(model))
    truth = model(X).detach()
    model.to(dtype)
    shared = state(model)
    assert {name: value for name, value in bits(shared).items() if name != "bank"} == {
        name: value for name, value in want.items() if name != "bank"}
    assert all(p.dtype == dtype for p in shared.parameters())
    got = model(X.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), truth, rtol=0.1, atol=0.1)
    got.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in veneer.trainable(model))
    model.float()
    assert {name: value for name, value in bits(state(model)).items() if name != "bank"} == {
        name: value for name, value in want.items() if name != "bank"}


@each
def test_attached_on_meta_and_filled_later(case):
    want = adapted(case)
    with torch.device("meta"):
        model = Halves()
    adapted(case, model)
    assert all(t.is_meta for t in tensors(state(model)).values())
    model.to_empty(device="cpu")
    model.load_state_dict(Halves().state_dict(), strict=False)
    assert bits(state(model)) == bits(state(want))
    assert torch.equal(model(X), want(X))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@each
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_shares_within_itself_and_with_nothing_else(case, how):
    model = scatter(adapted(case))
    twin = COPIES[how](model)
    mine, its = state(model), state(twin)
    assert its is not mine
    assert bits(its) == bits(mine)
    assert {t.data_ptr() for t in tensors(mine).values()}.isdisjoint(t.data_ptr() for t in tensors(its).values())
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
    want = model(X).detach()
    assert torch.equal(twin(X), want)
    with torch.no_grad():
        for tensor in tensors(its).values():
            tensor.mul_(3)
    assert torch.equal(model(X), want)
    assert not torch.allclose(twin(X), want)
    twin(X).sum().backward()
    assert all(p.grad is not None for p in veneer.trainable(twin))
    assert all(p.grad is None for p in veneer.trainable(model))


@each
def test_a_state_dict_carries_what_is_trained(case):
    model, other = scatter(adapted(case)), adapted(case, seed=9)
    missing = other.load_state_dict(model.state_dict())
    assert not missing.missing_keys
    assert bits(state(other)) == bits(state(model))
    assert torch.equal(other(X), model(X))


# -- several adapters, and parts of a model -------------------------------------------------------------------
@each
def test_two_adapters_have_states_of_their_own(case):
    model = adapted(case)
    adapted(case, model, name="other")
    assert state(model) is not state(model, "other")
    scatter(model)
    veneer.activate(model, ["default"])
    want = model(X).detach()
    with torch.no_grad():
        for tensor in tensors(state(model, "other")).values():
            tensor.add_(1)
    assert torch.equal(model(X), want)
    veneer.activate(model, ["default", "other"])
    model(X).sum().backward()
    assert all(p.grad is not None for p in veneer.trainable(model))
    veneer.detach(model, "default")
    assert shared_states(model, "other") == [state(model, "other")]
    veneer.detach(model)
    assert torch.equal(model(X), Halves()(X))
    assert list(model.state_dict()) == list(Halves().state_dict())


@each
def test_a_part_cannot_be_detached_from_what_it_shares(case):
    model = scatter(adapted(case))
    want = model(X).detach()
    with pytest.raises(VeneerError, match=re.escape(
            "detach: adapter 'default' of '0' shares its state with weights outside the part of the model given; call "
            "this on the whole model")):
        veneer.detach(model.enc)
    assert torch.equal(model(X), want)
    assert all(adapter.shared_state() is state(model) for _, adapter in attached(model, "default"))
    veneer.detach(model)


@each
def test_a_part_alone(case):
    """Attached to a part, moved, trained, merged and taken off there."""
    model = Halves()
    veneer.attach(model.enc, {"0": METHODS[case], "2": METHODS[case]})
    scatter(model)
    shared = state(model)
    assert state(model.enc) is shared
    want = model(X).detach()
    model(X).sum().backward()
    assert all(p.grad is not None for p in veneer.trainable(model))
    veneer.merge(model.enc)
    torch.testing.assert_close(model(X), want, rtol=1e-4, atol=1e-5)
    veneer.unmerge(model.enc)
    veneer.attach(model.dec, {"0": LoRA(rank=2), "2": None}, name="other")
    assert torch.equal(model(X), want)
    veneer.detach(model.enc)
    assert torch.equal(model.enc(X), Halves().enc(X))


@each
def test_a_tied_weight_reads_the_state_like_any_other(case):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 12)
            self.up = nn.Linear(12, 12)
            self.head = nn.Linear(12, 16, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.up(self.embed(ids))))

    method: Method = METHODS[case]
    model = veneer.attach(Tied(), {"embed": method, "head": method, "up": method})
    scatter(model)
    shared = state(model)
    assert [type(m) for _, m in model.named_modules() if m is shared] == [type(shared)]
    assert len(attached(model, "default")) == 2
    ids = torch.tensor([[1, 5, 9], [3, 2, 15]])
    model(ids).sum().backward()
    assert all(p.grad is not None for p in veneer.trainable(model))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(ids), model(ids))
    assert state(twin) is not shared


def test_a_part_is_saved_with_what_it_shares(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))
    fresh = copy.deepcopy(model)
    veneer.attach(model, VBLoRA(rank=2, num_vectors=5, vector_length=4))
    veneer.save(model[1], tmp_path / "part")
    veneer.load(fresh[1], tmp_path / "part")
    x = torch.randn(3, 8)
    assert torch.equal(fresh[1](x), model[1](x))
    bank = model[0][0].adapters["default"]["weight"].shared.bank
    assert sum(p is bank for p in veneer.trainable(model[1])) == 1


def test_parts_with_states_of_their_own_are_not_saved_as_one(tmp_path):
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))
    for part in model:
        veneer.attach(part, VBLoRA(rank=2, num_vectors=5, vector_length=4))
    with pytest.raises(VeneerError, match="attached in parts, and '1\\.0' does not share"):
        veneer.save(model, tmp_path / "adapter")


def test_explain_draws_nothing():
    model = nn.Sequential(nn.Linear(8, 8))
    veneer.attach(model, {"0": LoKr(rank=2, rank_dropout=0.5)})
    before = torch.get_rng_state()
    veneer.inspect.explain(model.train())
    assert torch.equal(torch.get_rng_state(), before)
