"""AdaLoRA: the same ranks as PEFT's at every step, whoever drives the budget, and errors where nobody does."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import veneer
from veneer import AdaLoRA, DoRA, Full, LoRA
from veneer.allocate import update_and_allocate
from veneer.attach import attached, shared_states
from veneer.budget import steps
from veneer.budget.allocator import Allocator
from veneer.budget.arithmetic import Schedule, keep_best
from veneer.budget.orthogonality import gradients
from veneer.method import VeneerError, method_from_dict, method_to_dict
from veneer.methods.adalora import AdaLoRAAdapter

from .test_distributed import _free_port

NAMES = ("a", "b", "c")
TOTAL, START, FINAL, INIT, TARGET = 30, 4, 8, 6, 3


class Net(nn.Module):
    """Three layers; the loss is an attribute of what the forward returns, as PEFT wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="net", tie_word_embeddings=False)
        self.a, self.b, self.c = nn.Linear(10, 14), nn.Linear(14, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        out = self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))
        return SimpleNamespace(loss=((out - y.to(out.dtype)) ** 2).mean(), out=out)


def method(**options: Any) -> AdaLoRA:
    return AdaLoRA(**{"init_r": INIT, "target_r": TARGET, "tinit": START, "tfinal": FINAL, "total_step": TOTAL,
                      "alpha": 8.0, **options})


def adapted(**options: Any) -> Net:
    torch.manual_seed(0)
    return veneer.attach(Net(), dict.fromkeys(NAMES, method(**options)))  # type: ignore[return-value]


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 10, generator=generator).to(dtype), torch.randn(8, 6, generator=generator).to(dtype)


def parts(model: nn.Module, name: str = "default") -> dict[str, AdaLoRAAdapter]:
    """The AdaLoRA adapters by weight, out of DoRA's where they are in one."""
    found = {}
    for weight, adapter in veneer.adapters(model)[name].weights.items():
        inner = getattr(adapter, "inner", adapter)
        if isinstance(inner, AdaLoRAAdapter):
            found[weight] = inner
    return found


def allocator(model: nn.Module) -> Allocator:
    (state,) = shared_states(model, "default")
    assert isinstance(state, Allocator)
    return state


def kept(model: nn.Module) -> int:
    return sum(int(a.rank().sum()) for a in parts(model).values())


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "adapters" in key}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(veneer.trainable(model), lr=0.02, **options)


def train(model: Any, optimizer: Any, first: int = 1, last: int = TOTAL,
          after: Callable[[int], None] = lambda step: None) -> None:
    for step in range(first, last + 1):
        model(*batch(step)).loss.backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()


# -- the method ---------------------------------------------------------------------------------------------


def test_options() -> None:
    plain = AdaLoRA(total_step=100)
    assert plain.schedule == Schedule(start=10, end=70, total=100, every=1)
    assert (plain.scale, AdaLoRA(alpha=6).scale, AdaLoRA().schedule) == (1.0, 0.5, None)
    assert AdaLoRA(tinit=3).scheduled(50) == AdaLoRA(tinit=3, total_step=50)
    assert plain.scheduled(50) is plain
    assert DoRA(AdaLoRA()).scheduled(50) == DoRA(AdaLoRA(total_step=50))
    assert method_from_dict(method_to_dict(plain)) == plain
    assert str(AdaLoRA(init_r=4, target_r=2)) == "AdaLoRA(init_r=4, target_r=2)"


@pytest.mark.parametrize(("options", "words"), [
    ({"init_r": 4}, "target_r=8 is above init_r=4"),
    ({"init_r": 0}, "init_r must be a whole number of at least 1, got 0"),
    ({"target_r": True}, "target_r must be"),
    ({"tinit": 60, "tfinal": 40, "total_step": 100}, "no steps are left to cut ranks in: of total_step=100, the first "
                                                     "tinit=60 and the last tfinal=40 are"),
    ({"tfinal": 100, "total_step": 100}, "tfinal=100"),
    ({"tinit": -1}, "tinit must be a whole number of at least 0 or None, got -1"),
    ({"tfinal": 2.5}, "tfinal must be"),
    ({"total_step": 0}, "total_step must be"),
    ({"deltaT": 0}, "deltaT must be"),
    ({"beta1": 1.0}, "beta1 and beta2 must lie between 0 and 1"),
    ({"beta2": 0.0}, "beta1 and beta2 must lie between 0 and 1"),
    ({"orth_reg_weight": -0.1}, "orth_reg_weight must be at least 0"),
    ({"dropout": 1.0}, "dropout must be"),
    ({"alpha": "8"}, "alpha must be a finite number or None"),
])
def test_bad_options_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(VeneerError) as caught:
        AdaLoRA(**options)
    assert words in str(caught.value)


def test_a_schedule_that_does_not_fit_the_run_is_told() -> None:
    with pytest.raises(VeneerError, match="no steps are left to cut ranks in: of total_step=40"):
        AdaLoRA(tinit=30, tfinal=10).scheduled(40)


def test_start_is_the_base_and_does_not_depend_on_the_device_or_order() -> None:
    model = adapted()
    x, y = batch(0)
    torch.manual_seed(0)
    assert torch.equal(model(x, y).out, Net()(x, y).out)
    with torch.device("meta"):
        empty = Net()
    veneer.attach(empty, dict.fromkeys(reversed(NAMES), method()))
    empty.to_empty(device="cpu")
    assert equal(values(empty), values(model))
    assert all(a.mask.all() and not a.E.any() for a in parts(empty).values())
    assert 0.01 < float(parts(model)["a"].A.detach().std()) < 0.03


# -- the budget ---------------------------------------------------------------------------------------------


def test_the_budget_is_cubic_in_whole_numbers() -> None:
    plan = Schedule(start=2, end=12, total=15, every=3)
    # 10 + 30 (1 - k/10)³ by hand: 31.87, 25.36, 20.29, 16.48, 13.75, 11.92, 10.81, 10.24, 10.03
    expected = [40, 40, 31, 25, 20, 16, 13, 11, 10, 10, 10, 10, 10, 10]
    assert [plan.budget(step, 40, 10) for step in range(1, 15)] == expected
    assert [step for step in range(1, 15) if plan.allocates(step)] == [3, 6, 9]
    assert [plan.budget(step, 7, 7) for step in range(1, 15)] == [7] * 14


def test_exactly_the_budget_is_kept_and_ties_go_to_the_first() -> None:
    masks = keep_best([torch.tensor([[1.0, 2.0], [2.0, 2.0]]), torch.tensor([2.0, 3.0])], 4)
    assert [mask.tolist() for mask in masks] == [[[False, True], [True, True]], [False, True]]
    assert sum(int(m.sum()) for m in keep_best([torch.zeros(5), torch.zeros(3)], 0)) == 0


@pytest.mark.parametrize("every", [1, 3])
def test_after_every_cut_exactly_the_budget_is_left(every: int) -> None:
    model = adapted(deltaT=every)
    plan = method(deltaT=every).schedule
    assert plan is not None
    seen = []

    def look(step: int) -> None:
        if plan.allocates(step) or step >= plan.end:
            assert kept(model) == plan.budget(step, 3 * INIT, 3 * TARGET)
            assert all(not a.E[~a.mask].any() and a.E[a.mask].all() for a in parts(model).values())
            seen.append(kept(model))
        elif step <= START:
            assert kept(model) == 3 * INIT

    train(model, adamw(model), after=look)
    assert len(set(seen)) > 3
    assert seen[-1] == 3 * TARGET
    assert allocator(model).budget.step == TOTAL


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_ranks_and_values_are_those_of_peft(optimizer: str, by_hand: bool, weight: float, every: int) -> None:
    import peft

    torch.manual_seed(0)
    twin = Net()
    # PEFT divides by init_r + 1e-5
    model = adapted(deltaT=every, orth_reg_weight=weight, alpha=8 * INIT / (INIT + 1e-5))
    theirs = peft.get_peft_model(twin, peft.AdaLoraConfig(
        init_r=INIT, target_r=TARGET, tinit=START, tfinal=FINAL, deltaT=every, total_step=TOTAL, lora_alpha=8,
        orth_reg_weight=weight, target_modules=list(NAMES))).base_model  # PeftModel itself leaves the loss as it is
    pairs = {name: (mine, theirs.model.get_submodule(name)) for name, mine in parts(model).items()}
    with torch.no_grad():
        for mine, other in pairs.values():
            other.lora_A["default"].copy_(mine.A)
            other.lora_B["default"].copy_(mine.B)
    make: Any = {"sgd": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9),
                 "adamw": lambda p: torch.optim.AdamW(p, lr=0.02)}[optimizer]
    ours, other_optimizer = make(veneer.trainable(model)), make([p for p in theirs.parameters() if p.requires_grad])
    for step in range(1, TOTAL + 1):
        x, y = batch(step)
        model(x, y).loss.backward()
        ours.step()
        if by_hand:
            update_and_allocate(model, step)
        ours.zero_grad()
        theirs(x=x, y=y).loss.backward()
        other_optimizer.step()
        theirs.update_and_allocate(step)
        other_optimizer.zero_grad()
        pattern = theirs.peft_config["default"].rank_pattern
        for name, (mine, other) in pairs.items():
            E = other.lora_E["default"].view(-1)
            assert torch.equal(mine.E == 0, E == 0), f"step {step}, {name}"
            for got, wanted in ((mine.E, E), (mine.A, other.lora_A["default"]), (mine.B, other.lora_B["default"])):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
            if pattern:
                assert mine.mask.tolist() == next(v for k, v in pattern.items() if f".{name}." in f".{k}"), step
    assert kept(model) == 3 * TARGET


def test_without_cuts_nothing_is_cut() -> None:
    model = adapted(target_r=INIT)
    train(model, adamw(model))
    assert kept(model) == 3 * INIT
    assert all(a.E.all() for a in parts(model).values())


def test_the_shortest_schedule() -> None:
    model = adapted(tinit=None, tfinal=None, total_step=1)
    train(model, adamw(model), last=3)
    assert kept(model) == 3 * TARGET


# -- the orthogonality term -----------------------------------------------------------------------------------


def test_orthogonality_gradient_is_that_of_the_norm() -> None:
    P = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    Q = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(4, dtype=torch.float64)
    terms = [torch.linalg.matrix_norm(P @ P.mT - eye).sum(), torch.linalg.matrix_norm(Q.mT @ Q - eye)]
    wanted = torch.autograd.grad(0.7 * sum(terms), [P, Q])
    got = gradients([(P.detach(), False), (Q.detach(), True)], 0.7)
    for mine, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, true)
    (zero,) = gradients([(torch.eye(4, 9), False)], 0.7)
    assert torch.equal(zero, torch.zeros(4, 9))


def test_orthogonality_reaches_gradients_at_the_step_and_once() -> None:
    model = adapted()
    a = parts(model)["a"]
    optimizer = torch.optim.SGD(veneer.trainable(model), lr=0.0)
    model(*batch(1)).loss.backward()
    before = a.A.grad.clone()
    optimizer.step()
    (term,) = gradients([(a.A.detach(), False)], 0.5 / 6)
    torch.testing.assert_close(a.A.grad, before + term)
    optimizer.step()  # without a new backward: the term is in these gradients already
    torch.testing.assert_close(a.A.grad, before + term)
    assert allocator(model).budget.step == 2


# -- who steps ------------------------------------------------------------------------------------------------


def test_accumulated_gradients_are_one_step() -> None:
    whole, split = adapted(), adapted()
    one, many = adamw(whole), adamw(split)
    for step in range(1, TOTAL + 1):
        x, y = batch(step)
        whole(x, y).loss.backward()
        for i in range(0, 8, 2):
            (split(x[i:i + 2], y[i:i + 2]).loss / 4).backward()
        for optimizer in (one, many):
            optimizer.step()
            optimizer.zero_grad()
    assert allocator(split).budget.step == TOTAL
    for key, mine in parts(whole).items():
        assert torch.equal(mine.mask, parts(split)[key].mask)


def test_what_is_not_live_or_frozen_is_left_alone() -> None:
    model = adapted()
    veneer.attach(model, {"a": LoRA(rank=2)}, name="other")
    optimizer = adamw(model)
    before = values(model)
    train(model, optimizer, last=10)
    assert allocator(model).budget.step == 0
    assert all(torch.equal(v, before[k]) for k, v in values(model).items() if ".other." not in k)
    veneer.activate(model, "default")
    parts(model)["a"].requires_grad_(False)
    optimizer = adamw(model)
    train(model, optimizer)
    assert int(parts(model)["a"].rank()) == INIT, "its E is not trained, so it has no part in the budget"
    assert kept(model) == INIT + 2 * TARGET


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_skips_steps_and_scales_gradients(fused: bool) -> None:
    plain, scaled = adapted(), adapted()
    one, two = adamw(plain, fused=fused), adamw(scaled, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
    for step in range(1, TOTAL + 1):
        if step == 9:
            scaler.scale(scaled(*batch(step)).loss * float("inf")).backward()
            before, counted = values(scaled), allocator(scaled).budget.step
            scaler.step(two)
            scaler.update()
            two.zero_grad()
            assert equal(values(scaled), before)
            assert allocator(scaled).budget.step == counted
        plain(*batch(step)).loss.backward()
        one.step()
        scaler.scale(scaled(*batch(step)).loss).backward()
        scaler.step(two)
        scaler.update()
        for optimizer in (one, two):
            optimizer.zero_grad()
    for key, mine in parts(plain).items():
        other = parts(scaled)[key]
        assert torch.equal(mine.mask, other.mask)
        torch.testing.assert_close(mine.A, other.A, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_the_same_step(keyword: bool) -> None:
    plain, closed = adapted(), adapted()
    train(plain, adamw(plain))
    optimizer = adamw(closed)
    for step in range(1, TOTAL + 1):
        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = closed(*batch(step)).loss
            loss.backward()
            return loss

        loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert isinstance(loss, Tensor)
    assert equal(values(plain), values(closed))


def test_many_closures_in_one_step() -> None:
    model = adapted()
    optimizer = torch.optim.LBFGS(veneer.trainable(model), lr=0.1, max_iter=3)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = model(*batch(1)).loss
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert len(calls) > 3
    assert allocator(model).budget.step == 3


class Outer(torch.optim.Optimizer):
    """An optimizer that steps others on parts of its parameters."""

    def __init__(self, inner: list[torch.optim.Optimizer]) -> None:
        self.inner = inner
        super().__init__([p for o in inner for g in o.param_groups for p in g["params"]], {})

    def step(self, closure: Any = None) -> None:
        for optimizer in self.inner:
            optimizer.step()


def test_a_step_within_a_step_counts_once() -> None:
    plain, nested = adapted(), adapted()
    train(plain, adamw(plain))
    params = veneer.trainable(nested)
    outer = Outer([torch.optim.AdamW(params[:4], lr=0.02), torch.optim.AdamW(params[4:], lr=0.02)])
    train(nested, outer)
    assert equal(values(plain), values(nested))


def test_two_optimizers_count_the_step_of_the_one_with_E() -> None:
    plain, two = adapted(), adapted()
    train(plain, adamw(plain))
    first = torch.optim.AdamW([a.E for a in parts(two).values()], lr=0.02)
    second = torch.optim.AdamW([p for a in parts(two).values() for p in (a.A, a.B)], lr=0.02)
    order = SimpleNamespace(step=lambda: (second.step(), first.step()), zero_grad=two.zero_grad)
    train(two, order)
    assert equal(values(plain), values(two))


def test_an_optimizer_with_some_of_the_adapters_is_told() -> None:
    model = adapted()
    optimizer = torch.optim.SGD([*parts(model)["a"].parameters()], lr=0.1)
    model(*batch(1)).loss.backward()
    with pytest.raises(VeneerError, match=r"holds E of 1 weights and not that of 'b' and 1 more, .*one budget"):
        optimizer.step()


def test_optimizers_without_E_are_told() -> None:
    model = adapted()
    optimizer = torch.optim.SGD([p for a in parts(model).values() for p in (a.A, a.B)], lr=0.1)
    with pytest.raises(VeneerError, match="3 steps were taken by optimizers with A or B and not E"):
        train(model, optimizer)


def test_an_unknown_number_of_steps_is_told_before_anything_moves() -> None:
    model = adapted(total_step=None)
    before = values(model)
    model(*batch(1)).loss.backward()
    with pytest.raises(VeneerError, match=r"AdaLoRA\(total_step=…\), or use `veneer train`"):
        adamw(model).step()
    with pytest.raises(VeneerError, match="total_step"):
        update_and_allocate(model, 1)
    assert equal(values(model), before)


def test_an_optimizer_without_our_parameters_is_left_alone() -> None:
    model = adapted()
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    other(torch.randn(2, 3)).sum().backward()
    model(*batch(1)).loss.backward()
    optimizer.step()
    assert optimizer in steps._strangers
    assert allocator(model).budget.step == 0
    optimizer.add_param_group({"params": veneer.trainable(model)})
    optimizer.step()
    assert allocator(model).budget.step == 1


# -- by hand --------------------------------------------------------------------------------------------------


class Manual:
    """No optimizer of torch's: nobody sees its steps."""

    def __init__(self, model: nn.Module) -> None:
        self.params = veneer.trainable(model)

    def step(self) -> None:
        for p in self.params:
            p.data -= 0.1 * p.grad

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None


@pytest.mark.parametrize("late", [1, 7])
def test_by_hand_nothing_is_counted_twice(late: int) -> None:
    plain, hand = adapted(), adapted()
    train(plain, adamw(plain))
    train(hand, adamw(hand), after=lambda step: update_and_allocate(hand, step) if step >= late else None)
    assert equal(values(plain), values(hand))


def test_by_hand_steps_are_numbered_by_the_caller() -> None:
    model = adapted()
    train(model, adamw(model), last=START + 1, after=lambda step: update_and_allocate(model, step - 1))
    assert allocator(model).budget.step == START
    assert kept(model) == 3 * INIT, "what the hook had cut in the first step is as it was"
    model = adapted(tinit=0)
    train(model, adamw(model), last=1, after=lambda step: update_and_allocate(model, 0))
    assert kept(model) == 3 * INIT
    assert all(a.E.all() for a in parts(model).values())


def test_by_hand_with_any_optimizer() -> None:
    model = adapted()
    train(model, Manual(model), after=lambda step: update_and_allocate(model, step))
    assert kept(model) == 3 * TARGET


def test_by_hand_errors() -> None:
    model = adapted()
    with pytest.raises(VeneerError, match=r"at step 1 no E has a gradient to judge by: call .* before its gradients"):
        update_and_allocate(model, 1)
    with pytest.raises(VeneerError, match=r"no adapter named 'defualt'.*did you mean 'default'"):
        update_and_allocate(model, 1, name="defualt")
    with pytest.raises(VeneerError, match="global_step must be a whole number"):
        update_and_allocate(model, 1.5)  # type: ignore[arg-type]
    other = veneer.attach(Net(), {"a": LoRA(rank=2)})
    with pytest.raises(VeneerError, match="adapter 'default' has no budget of ranks"):
        update_and_allocate(other, 1)


# -- a budget that does not move --------------------------------------------------------------------------------


def test_steps_that_nobody_sees_are_an_error() -> None:
    model = adapted()
    done: list[int] = []
    with pytest.raises(VeneerError, match=r"its budget has not moved: E has changed between backward passes 3 times"):
        train(model, Manual(model), after=done.append)
    assert done == [1, 2, 3]


def test_calls_that_cease_are_an_error() -> None:
    model = adapted()
    done: list[int] = []
    with pytest.raises(VeneerError, match="the last call by hand was for step 3, and 11 steps have followed"):
        train(model, adamw(model), after=lambda step: (done.append(step),
                                                       update_and_allocate(model, step) if step < 4 else None))
    assert done[-1] == 13


def test_no_false_alarm() -> None:
    model = adapted()
    kept_values = model.state_dict()
    for step in range(1, 8):  # gradients that are only looked at, values loaded in between, evaluation, recomputation
        model(*batch(step)).loss.backward()
        model.eval()
        model(*batch(step))
        model.train()
        loss = checkpoint(lambda x, y: model(x, y).loss, *batch(step), use_reentrant=False)
        loss.backward()
        model.zero_grad()
        model.load_state_dict({k: v + 0.01 if k.endswith(".E") else v for k, v in kept_values.items()})
    optimizer = adamw(model)
    train(model, optimizer)
    for p in veneer.trainable(model):  # a model average that is swapped in between steps
        p.data.mul_(0.9)
    train(model, optimizer, last=5)


# -- copies, files, resuming ----------------------------------------------------------------------------------


def _copies(model: nn.Module) -> list[Any]:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]


def test_copies_train_on_by_themselves() -> None:
    model = adapted()
    optimizer = adamw(model)
    train(model, optimizer, last=12)
    state = copy.deepcopy(optimizer.state_dict())
    others = _copies(model)
    for other in others:
        assert allocator(other) is not allocator(model)
        assert allocator(other).budget.adapters() == list(parts(other).values())
        twin = adamw(other)
        twin.load_state_dict(copy.deepcopy(state))
        train(other, twin, first=13)
        assert allocator(model).budget.step == 12, "the copy's steps are not the original's"
        assert kept(other) == 3 * TARGET
    train(model, optimizer, first=13)
    assert all(equal(values(model), values(other)) for other in others)
    for other in _copies(adapted()):  # whose backward passes are seen too
        with pytest.raises(VeneerError, match="has not moved"):
            train(other, Manual(other))


@pytest.mark.parametrize(("wrap", "layout"), [(lambda m: m, "peft"), (DoRA, "native")], ids=["adalora", "dora"])
@pytest.mark.parametrize("at", [2, 9, 25])
def test_a_resumed_run_goes_on_bit_for_bit(at: int, wrap: Any, layout: str, tmp_path: Any) -> None:
    rule = dict.fromkeys(NAMES, wrap(method(deltaT=2)))

    def fresh() -> Net:
        torch.manual_seed(0)
        return veneer.attach(Net(), rule, seed=3)  # type: ignore[return-value]

    whole = fresh()
    optimizer = adamw(whole)
    train(whole, optimizer, last=at)
    report = veneer.save(whole, tmp_path / "adapter")
    progress = {key: tensor.clone() for key, tensor in allocator(whole).progress().items()}
    state = copy.deepcopy(optimizer.state_dict())
    assert report.format == layout  # PEFT's has no rows of what is cut away
    assert any("schedule was not through" in note for note in report.notes) == (at < 22)
    train(whole, optimizer, first=at + 1)
    again = fresh()
    veneer.load(again, tmp_path / "adapter")
    allocator(again).resume(progress)
    other = adamw(again)
    other.load_state_dict(state)
    train(again, other, first=at + 1)
    assert equal(values(whole), values(again))


def test_progress_of_other_weights_is_refused() -> None:
    model = adapted()
    train(model, adamw(model), last=6)
    progress = allocator(model).progress()
    other = veneer.attach(Net(), dict.fromkeys("ab", method()))
    with pytest.raises(VeneerError, match="not that of 2 weights"):
        allocator(other).resume(progress)
    model = adapted(init_r=INIT + 1)
    with pytest.raises(VeneerError, match=r"'mask' is \(6,\) there and \(7,\) in the adapter of 'a'"):
        allocator(model).resume(progress)
    assert allocator(model).budget.step == 0


def test_an_unfinished_schedule_is_noted_and_ranks_are_shown(tmp_path: Any) -> None:
    model = adapted()
    optimizer = adamw(model)
    assert veneer.save(model, tmp_path / "new").notes == ()
    train(model, optimizer, last=10)
    (note,) = veneer.save(model, tmp_path / "middle").notes
    left = kept(model)
    assert note == f"AdaLoRA's schedule was not through: after step 10 of 30, {left} of 18 triplets are left, and 9 " \
                   "are to be in the end"
    train(model, optimizer, first=11)
    assert veneer.save(model, tmp_path / "end").notes == ()
    ranks = sorted(int(a.rank()) for a in parts(model).values())
    shown = str(veneer.info(model))
    for rank in set(ranks):
        assert f"rank {rank} of 6 on {ranks.count(rank)} weights" in shown
    # in a file of the native layout, and within DoRA
    torch.manual_seed(0)
    wrapped = veneer.attach(Net(), dict.fromkeys(NAMES, DoRA(method())))
    train(wrapped, adamw(wrapped))
    veneer.save(wrapped, tmp_path / "native")
    assert veneer.info(tmp_path / "native").adapters[0].details == veneer.info(wrapped).adapters[0].details
    assert sum(veneer.info(wrapped).adapters[0].details.values()) == 3


def test_a_finished_adapter_keeps_its_ranks_when_trained_on(tmp_path: Any) -> None:
    model = adapted()
    train(model, adamw(model))
    veneer.save(model, tmp_path / "end")
    torch.manual_seed(0)
    other = Net()
    veneer.load(other, tmp_path / "end")
    ranks = {name: a.mask.clone() for name, a in parts(other).items()}
    before = parts(other)["a"].E.clone()
    train(other, adamw(other), last=12)
    assert all(torch.equal(a.mask, ranks[name]) for name, a in parts(other).items())
    assert all(not a.E[~a.mask].any() for a in parts(other).values())
    assert not torch.equal(parts(other)["a"].E, before)


def test_nothing_is_left_after_a_detach() -> None:
    model = adapted()
    train(model, adamw(model), last=3)
    gone = [weakref.ref(allocator(model)), *map(weakref.ref, parts(model).values())]
    veneer.detach(model)
    gc.collect()
    assert all(ref() is None for ref in gone)


# -- together with the rest -----------------------------------------------------------------------------------


def test_within_dora_the_budget_is_the_same() -> None:
    torch.manual_seed(0)
    model = veneer.attach(Net(), dict.fromkeys(NAMES, DoRA(method())))
    train(model, adamw(model))
    assert kept(model) == 3 * TARGET
    assert all(not a.E[~a.mask].any() for a in parts(model).values())


def test_experts_compete_with_each_other() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 6, 10) * 0.3)

        def forward(self, x: Tensor, y: Tensor) -> Any:
            out = torch.einsum("ti,eoi->teo", x, self.w)
            weight = torch.tensor([1.0, 0.1, 3.0])  # so that they matter differently
            return SimpleNamespace(loss=(((out - y.unsqueeze(1)) ** 2).mean((0, 2)) * weight).sum())

    model = veneer.attach(Experts(), {"w": method()})
    train(model, adamw(model))
    (adapter,) = parts(model).values()
    assert adapter.rank().shape == (3,)
    assert int(adapter.rank().sum()) == 3 * TARGET
    assert len(set(adapter.rank().tolist())) > 1
    assert f"ranks {min(adapter.rank())} to {max(adapter.rank())} of 6 on 1 weights" in str(veneer.info(model))


def test_bf16_base_and_a_plan_of_many_methods() -> None:
    torch.manual_seed(0)
    model = Net().to(torch.bfloat16)
    rules = {"a": method(), "b": method(init_r=4, target_r=2), "c": LoRA(rank=2), "c.bias": Full()}
    veneer.attach(model, rules)
    states = shared_states(model, "default")
    assert len(states) == 2, "one budget for each method"
    optimizer = adamw(model)
    for step in range(1, TOTAL + 1):
        model(*batch(step, torch.bfloat16)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {name: int(a.rank()) for name, a in parts(model).items()} == {"a": TARGET, "b": 2}
    assert parts(model)["a"].E.dtype == torch.float32
    assert next(iter(parts(model)["a"].averages.values()), (torch.zeros(1),))[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_adapters_are_judged_in_fp32(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    train(model, torch.optim.SGD(veneer.trainable(model), lr=0.5, momentum=0.9), last=8)
    assert {t.dtype for a in parts(model).values() for pair in a.averages.values() for t in pair} == {torch.float32}
    assert kept(model) == method().schedule.budget(8, 18, 9)  # type: ignore[union-attr]


def test_a_compiled_model() -> None:
    plain, model = adapted(), adapted()
    train(plain, adamw(plain))
    torch._dynamo.reset()
    train(torch.compile(model, backend="aot_eager"), adamw(model))
    torch._dynamo.reset()
    for key, mine in parts(plain).items():
        assert torch.equal(mine.mask, parts(model)[key].mask)


def _ddp(rank: int, port: int, kind: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    alone, model = adapted(), adapted()
    wrapped: Any = model
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for name in NAMES:
            fully_shard(model.get_submodule(name), mesh=mesh)
        fully_shard(model, mesh=mesh)
    one, two = adamw(alone), adamw(model)
    mine = slice(4 * rank, 4 * rank + 4)
    for step in range(1, TOTAL + 1):
        x, y = batch(step)
        alone(x, y).loss.backward()
        wrapped(x[mine], y[mine]).loss.backward()
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()
        for key, adapter in parts(model).items():
            masks = [torch.empty_like(adapter.mask) for _ in range(2)]
            dist.all_gather(masks, adapter.mask)
            assert torch.equal(*masks), f"step {step}: the processes keep different triplets of {key}"
            assert torch.equal(adapter.mask, parts(alone)[key].mask)
    E = parts(model)["b"].E
    torch.testing.assert_close(E.full_tensor() if kind == "fsdp2" else E, parts(alone)["b"].E, rtol=1e-3, atol=1e-5)
    progress = allocator(model).progress()
    assert progress["0.A.cut"].shape == (INIT - int(parts(model)["a"].rank()), 10)
    allocator(model).resume(progress)
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_keep_the_same_triplets(kind: str) -> None:
    mp.spawn(_ddp, args=(_free_port(), kind), nprocs=2)


def test_a_state_dict_brings_the_step_along():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))
    veneer.attach(model, {"*": AdaLoRA(init_r=4, target_r=2, total_step=20)})
    start = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(5, 12)

    def train(steps):
        optimizer = torch.optim.SGD(veneer.trainable(model), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return sum(int(a.mask.sum()) for _, a in attached(model, "default"))

    assert train(20) == 4
    model.load_state_dict(start)  # from the beginning once more: the schedule too
    assert train(8) < 8
    halfway = {key: value.clone() for key, value in model.state_dict().items()}
    left = train(2)
    model.load_state_dict(halfway)
    assert train(2) <= left + 1
    assert train(10) == 4
