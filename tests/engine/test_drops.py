"""What LoHa and LoKr drop of their change in training: single outputs, or all of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import veneer
from conformance.models import Experts
from veneer import DoRA, LoHa, LoKr
from veneer.attach import attached
from veneer.method import Adapter, Method

from .nets import scatter


@dataclass(frozen=True)
class Place:
    """A layer, an input of few rows, and along which dimension of its output the outputs of ΔW lie."""

    make: Callable[[], nn.Module]
    input: Tensor
    outputs: int = -1


PLACES = {
    "linear": Place(lambda: nn.Linear(12, 16), torch.linspace(-2, 3, 24).reshape(2, 12)),
    "conv": Place(lambda: nn.Conv1d(6, 16, 3), torch.linspace(-2, 3, 48).reshape(2, 6, 4), outputs=1),
    "embedding": Place(lambda: nn.Embedding(12, 16), torch.tensor([[1, 5], [7, 0]])),
    "experts": Place(lambda: Experts(turned=True), torch.linspace(-2, 3, 16).reshape(2, 8)),
}
#: with a pair of factors, with a product, and without a form
METHODS = {"loha-pair": LoHa, "loha-dense": LoHa, "lokr": LoKr}


def method(kind: str, **drops) -> Method:
    if kind == "lokr":
        return LoKr(rank=2, **drops)
    return LoHa(rank=1 if kind == "loha-pair" else 3, **drops)


def layer(place: str, made: Method) -> tuple[nn.Module, Adapter]:
    """The layer alone in a model, and its trained-looking adapter."""
    torch.manual_seed(1)
    model = nn.Sequential(PLACES[place].make())
    veneer.attach(model, {"0.w" if place == "experts" else "0.weight": made})
    ((_, adapter),) = attached(model, "default")
    return scatter(model, by=0.7), adapter


def change(model: nn.Module, place: str) -> Tensor:
    """What the adapter adds, (…, outputs)."""
    x = PLACES[place].input
    with veneer.disabled(model):
        plain = model(x)
    return (model(x) - plain).movedim(PLACES[place].outputs, -1)


CELLS = [(place, kind) for place in PLACES for kind in METHODS]
LAYERS = [cell for cell in CELLS if cell[0] != "experts"]  # of experts, the sum is bent after ΔW


@pytest.mark.parametrize(("place", "kind"), LAYERS)
@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", ""])
@torch.no_grad()
def test_rank_dropout_leaves_out_whole_outputs(place, kind, rescale):
    model, _ = layer(place, method(kind, rank_dropout=0.4, rank_dropout_scale=rescale))
    whole = change(model.eval(), place)
    model.train()
    shares = []
    for _ in range(40):
        now = change(model, place)
        ratio = (now / whole).reshape(-1, 16)
        kept = ratio.abs() > 1e-3
        assert bool((kept == kept[0]).all())  # in every row and position alike
        assert bool((now.reshape(-1, 16)[:, ~kept[0]] == 0).all())
        share = float(kept[0].float().mean())
        if share:
            want = 1 / share if rescale else 1.0
            torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], want), rtol=3e-3, atol=0)
        shares.append(share)
    assert sum(shares) / 40 == pytest.approx(0.6, abs=5 * math.sqrt(0.24 / 640))
    assert len(set(shares)) > 3


@pytest.mark.parametrize(("place", "kind"), LAYERS)
@torch.no_grad()
def test_the_mean_over_many_forwards_is_the_whole_change(place, kind):
    model, _ = layer(place, method(kind, rank_dropout=0.5))
    whole = change(model.eval(), place)
    model.train()
    times = 400
    mean = sum(change(model, place) for _ in range(times)) / times
    # an output is 0 or about twice itself: the mean of that has a deviation of 1/√times
    assert float(((mean - whole) / whole).abs().max()) < 5 / math.sqrt(times)


@pytest.mark.parametrize(("place", "kind"), CELLS)
@torch.no_grad()
def test_module_dropout_is_all_or_nothing(place, kind):
    model, _ = layer(place, method(kind, module_dropout=0.3))
    whole = change(model.eval(), place)
    model.train()
    gone = 0
    for _ in range(200):
        now = change(model, place)
        if bool((now == 0).all()):
            gone += 1
        else:
            torch.testing.assert_close(now, whole, rtol=1e-5, atol=1e-6)
    assert gone / 200 == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 200))


@pytest.mark.parametrize(("place", "kind"), CELLS)
def test_both_together(place, kind):
    """As if the weight had what is kept of ΔW added to it, in values and gradients."""
    model, adapter = layer(place, method(kind, rank_dropout=0.5, module_dropout=0.2))
    param = "w" if place == "experts" else "weight"
    layout, stored = model[0].veneer.layouts[param], model[0]._parameters[param]
    x = PLACES[place].input
    params = veneer.trainable(model)
    for seed in range(8):
        torch.manual_seed(seed)
        y = model(x)
        torch.manual_seed(seed)
        keep = adapter.keep().unsqueeze(-2 if place == "embedding" else -1)
        new = layout.stored(layout.matrix(stored) + adapter.delta() * keep)
        with veneer.disabled(model):
            want = torch.func.functional_call(model, {f"0.{param}": new}, (x,))
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
        for got, own in zip(*(torch.autograd.grad(out.square().sum(), params) for out in (y, want)), strict=True):
            torch.testing.assert_close(got, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("place", "kind"), CELLS)
@torch.no_grad()
def test_nothing_is_dropped_outside_of_training(place, kind):
    x = PLACES[place].input
    plain, _ = layer(place, method(kind))
    model, _ = layer(place, method(kind, rank_dropout=0.9, module_dropout=0.9))
    before = torch.get_rng_state()
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert torch.equal(torch.get_rng_state(), before)  # not even a number drawn
    # merged in training mode: the whole of ΔW is in the weight, and stays there
    want = plain(x)
    veneer.merge(model.train())
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(model(x), model(x))
    veneer.unmerge(model)
    torch.testing.assert_close(model.eval()(x), want)


@pytest.mark.parametrize(("place", "kind"), CELLS)
def test_what_is_dropped_has_gradients_of_zero(place, kind):
    model, _ = layer(place, method(kind, module_dropout=1 - 1e-9))
    model(PLACES[place].input).square().sum().backward()
    for param in veneer.trainable(model):
        assert param.grad is not None
        assert not param.grad.any()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", METHODS)
def test_under_dora(place, kind):
    """ΔW is dropped below the gain, whose norm is that of the whole W + ΔW."""
    model, adapter = layer(place, DoRA(method(kind, rank_dropout=0.5)))
    param = "w" if place == "experts" else "weight"
    layout, stored = model[0].veneer.layouts[param], model[0]._parameters[param]
    x, matrix = PLACES[place].input, layout.matrix(stored)
    dim = -2 if place == "embedding" else -1
    params = veneer.trainable(model)
    for seed in range(4):
        torch.manual_seed(seed)
        y = model(x)
        torch.manual_seed(seed)
        keep = adapter.keep().unsqueeze(dim)
        delta = adapter.inner.delta()
        norm = torch.linalg.vector_norm(matrix + delta.detach(), dim=dim, keepdim=True)
        new = layout.stored((matrix + delta * keep) * adapter.magnitude.unsqueeze(dim) / norm)
        with veneer.disabled(model):
            want = torch.func.functional_call(model, {f"0.{param}": new}, (x,))
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
        for got, own in zip(*(torch.autograd.grad(out.square().sum(), params) for out in (y, want)), strict=True):
            torch.testing.assert_close(got, own, rtol=1e-3, atol=1e-4)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_rows_of_a_batch_share_what_a_forward_drops():
    model, _ = layer("linear", method("loha-pair", rank_dropout=0.5, rank_dropout_scale=False))
    veneer.attach(model, {"0": method("lokr", module_dropout=0.5)}, name="other")
    scatter(model, "other", by=0.7)
    x = PLACES["linear"].input[:1].expand(6, -1)
    with veneer.route(model, ["default", "default", "other", "other", None, "default"]), torch.no_grad():
        for _ in range(10):
            y = model(x)
            assert torch.equal(y[0], y[1])
            assert torch.equal(y[0], y[5])
            assert torch.equal(y[2], y[3])


def test_checkpointing_drops_the_same_again():
    from torch.utils.checkpoint import checkpoint

    model, _ = layer("linear", method("lokr", rank_dropout=0.5))
    x = PLACES["linear"].input.clone().requires_grad_()
    grads = []
    for run in (lambda: model(x), lambda: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(run().square().sum(), [x, *veneer.trainable(model)]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("place", "kind"), [("linear", "lokr"), ("conv", "loha-pair"), ("embedding", "lokr"),
                                              ("linear", "loha-dense")])
def test_compiled_in_one_graph(place, kind):
    torch._dynamo.reset()
    model, _ = layer(place, method(kind, rank_dropout=0.4, module_dropout=0.3))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = PLACES[place].input
    with veneer.disabled(model):
        plain = model(x)
    whole = change(model.eval(), place).detach()
    model.train()
    shares = []
    for _ in range(60):
        y = compiled(x)
        ratio = ((y - plain).movedim(PLACES[place].outputs, -1).detach() / whole).reshape(-1, 16)
        kept = ratio.abs() > 1e-3
        assert bool((kept == kept[0]).all())
        shares.append(float(kept[0].float().mean()))
    assert len(set(shares)) > 4
    assert shares.count(0.0) / 60 == pytest.approx(0.3, abs=0.3)
    grads = torch.autograd.grad(y.sum(), veneer.trainable(model))
    assert all(bool(g.isfinite().all()) for g in grads)
    torch._dynamo.reset()
