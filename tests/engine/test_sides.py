"""The sides of the fused op against the plain operations in fp64, and when which of them is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer import DoRA, LoHa, LoKr, LoRA, RandLoRA, VBLoRA, VeRA, ops
from veneer.attach import attached
from veneer.forms import Factors, Kronecker
from veneer.inspect.explain import explain
from veneer.ops import Term, sides
from veneer.ops.dropout import Dropped
from veneer.ops.fused import FusedLinear

from .nets import assert_as_good, scatter

OUT, IN = 12, 20
F64 = torch.float64


def leaf(*size: int, about: float = 0.0) -> Tensor:
    return (torch.randn(size, dtype=F64) * 0.3 + about).requires_grad_()


def factors(rank: int, mid: bool = False, out: bool = False) -> Factors:
    return Factors(leaf(rank, IN), leaf(OUT, rank), 0.7, leaf(rank) if mid else None, leaf(OUT) if out else None)


def kronecker() -> Kronecker:
    return Kronecker(leaf(3, 4), leaf(4, 5), 0.7)


def gradients(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    pull = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), pull), strict=True))


def compare(x: Tensor, weight: Tensor, bias: Tensor | None, terms: list[Term], op: str) -> None:
    """Output and every gradient are those of the plain operations."""
    named = {"x": x, "weight": weight, "bias": bias}
    for i, term in enumerate(terms):
        named |= {f"{i}.{name}": getattr(term.form, name) for name in term.form._fields if name != "scale"}
        named |= {f"{i}.{name}": getattr(term, name) for name in ("gain", "bias", "keep")}
    leaves = {name: t for name, t in named.items() if t is not None and t.requires_grad}
    assert ops.choose(x, weight, terms).op == op
    y = ops.linear(x, weight, bias, terms)
    with ops.use("reference"):
        truth = ops.linear(x, weight, bias, terms)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    got, want = gradients(y, leaves), gradients(truth, leaves)
    for name in leaves:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


each_bias = pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
each_gain = pytest.mark.parametrize("gain", [False, True], ids=["", "gain"])
each_diagonal = pytest.mark.parametrize(("mid", "out"), [(False, False), (True, False), (False, True), (True, True)],
                                        ids=["", "mid", "out", "mid and out"])


def base(bias: bool, rows: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    x = leaf(rows, IN) if rows else leaf(5, 3, IN)
    return x, leaf(OUT, IN), leaf(OUT) if bias else None


def freeze(frozen: str, x: Tensor, form: Factors | Kronecker) -> None:
    for name in frozen.split():
        (x if name == "x" else getattr(form, name)).requires_grad_(False)


# -- the pair beside the weight ---------------------------------------------------------------------------
@each_bias
@each_gain
@each_diagonal
@pytest.mark.parametrize("keep", [0, 1, OUT], ids=["", "all or nothing", "keep"])
@pytest.mark.parametrize("rows", [0, 600])
def test_low_rank(bias, gain, mid, out, keep, rows):
    x, weight, b = base(bias, rows)
    term = Term(factors(3, mid, out), gain=leaf(OUT, about=1) if gain else None, bias=leaf(OUT),
                keep=torch.rand(keep, dtype=F64) if keep else None)
    compare(x, weight, b, [term], "fused")


@pytest.mark.parametrize("rank", [3, 30])  # `out` is multiplied into the smaller of B and the gradient
@pytest.mark.parametrize("frozen", ["A B", "A B mid", "A B out", "A mid out", "B mid out", "mid out", "A B x",
                                    "A B mid x", "A B out x", "A mid out x", "B mid out x", "A B mid out"])
def test_low_rank_with_some_of_it_frozen(frozen, rank):
    """No gradient is computed for what needs none, and the others do not change by it."""
    x, weight, b = base(True)
    form = factors(rank, True, True)
    freeze(frozen, x, form)
    compare(x, weight.requires_grad_(False), b.requires_grad_(False), [Term(form)], "fused")


# -- the pair spread out over the weight ------------------------------------------------------------------
@each_bias
@each_gain
@each_diagonal
@pytest.mark.parametrize("keep", [0, 1, OUT], ids=["", "all or nothing", "keep"])
def test_dense(bias, gain, mid, out, keep):
    x, weight, b = base(bias, rows=700)
    term = Term(factors(64, mid, out), gain=leaf(OUT, about=1) if gain else None, bias=leaf(OUT),
                keep=torch.rand(keep, dtype=F64) if keep else None)
    compare(x, weight, b, [term], "dense")


@pytest.mark.parametrize("frozen", ["A", "B", "mid", "A mid", "B mid", "B out", "A mid x", "B out x", "A B mid out"])
def test_dense_with_some_of_it_frozen(frozen):
    x, weight, b = base(True, rows=2000)
    form = factors(64, True, True)
    freeze(frozen, x, form)
    compare(x, weight.requires_grad_(False), b.requires_grad_(False), [Term(form)], "dense")


def test_dense_is_as_exact_as_dense_arithmetic():
    x, weight, b = (t.detach().float() for t in base(True, rows=700))
    pair = factors(64, True).detach().to(torch.float32)
    term = Term(pair)
    assert ops.choose(x, weight, [term]).op == "dense"
    truth = ops.reference.linear(x.double(), weight.double(), b.double(), [Term(pair.to(F64))])
    own = nn.functional.linear(x, weight + pair.dense(), b)
    assert_as_good(ops.linear(x, weight, b, [term]), own, truth, torch.float32)


# -- the Kronecker product ----------------------------------------------------------------------------------
@each_bias
@each_gain
@pytest.mark.parametrize("rows", [0, 1, 256, 600])  # the backward takes 256 at a time
def test_product(bias, gain, rows):
    x, weight, b = base(bias, rows)
    compare(x, weight, b, [Term(kronecker(), gain=leaf(OUT, about=1) if gain else None, bias=leaf(OUT))], "fused")


@each_bias
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_product_all_or_nothing(bias, keep):
    x, weight, b = base(bias)
    compare(x, weight, b, [Term(kronecker(), keep=torch.tensor([keep], dtype=F64))], "fused")


@each_bias
@pytest.mark.parametrize("rows", [[1, 0, 1, 1, 0], [0, 0, 0, 0, 0]])
def test_product_for_some_rows(bias, rows):
    x, weight, b = base(bias)
    mask = torch.tensor(rows, dtype=torch.float32)
    compare(x, weight, b, [Term(kronecker(), bias=leaf(OUT), rows=mask)], "fused")
    many = leaf(5 * 120, IN)
    compare(many, weight, b, [Term(kronecker(), rows=mask)], "fused")


@pytest.mark.parametrize("frozen", ["left", "right", "x", "x left", "x right", "left right"])
def test_product_with_some_of_it_frozen(frozen):
    x, weight, b = base(True, rows=300)
    form = kronecker()
    freeze(frozen, x, form)
    compare(x, weight.requires_grad_(False), b.requires_grad_(False), [Term(form)], "fused")


@pytest.mark.parametrize("form", ["product", "dense", "low rank"])
def test_inputs_and_gradients_that_are_not_contiguous(form):
    weight = leaf(OUT, IN)
    term = Term(kronecker() if form == "product" else factors(64 if form == "dense" else 2, True, True))
    x = torch.randn(IN, 700, dtype=F64).T.requires_grad_()
    compare(x, weight, None, [term], "dense" if form == "dense" else "fused")
    x = torch.randn(100, 7, IN, dtype=F64).transpose(0, 1).requires_grad_()
    y = ops.linear(x, weight, None, [term])
    got = torch.autograd.grad(y.sum(), x)[0]  # the gradient is one number, expanded
    with ops.use("reference"):
        want = torch.autograd.grad(ops.linear(x, weight, None, [term]).sum(), x)[0]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["product", "low rank"])
def test_an_empty_batch(form):
    term = Term(kronecker() if form == "product" else factors(2, True))
    compare(leaf(0, IN), leaf(OUT, IN), leaf(OUT), [term], "fused")


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("form", ["product", "low rank", "two diagonals"])
@pytest.mark.parametrize("rows", [False, True], ids=["", "rows"])
def test_dropout_on_the_input(form, rows, p):
    """With the dropped elements known, the op is the plain operations on the dropped input."""
    x, weight, bias = base(True, rows=300)
    pair = kronecker() if form == "product" else factors(3, True)
    side, tensors = ((sides.Product, (pair.left, pair.right)) if form == "product" else
                     (sides.LowRank, (pair.A, pair.B, pair.mid, pair.out)))
    dropped = Dropped(p, x.shape, x.device)
    mask = (torch.arange(300) % 3 > 0).to(F64).unsqueeze(1) if rows else None
    run = sides.Run(pair.scale * dropped.scale, dropped,
                    mask if form == "product" or mask is None else mask.expand(300, 3))
    y = FusedLinear.apply(x, weight, bias, None, side, run, None, *tensors)
    inner = x * (dropped.apply(torch.ones_like(x)) * dropped.scale)
    truth = nn.functional.linear(x, weight, bias) + pair.apply(inner) * (1 if mask is None else mask)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    leaves = dict(enumerate([x, weight, bias, *(t for t in tensors if t is not None)]))
    for got, want in zip(gradients(y, leaves).values(), gradients(truth, leaves).values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


def test_several_terms_of_different_scales_and_diagonals():
    x, weight, bias = base(True)
    terms = [Term(factors(2, True)), Term(factors(3)._replace(scale=2.0)), Term(factors(1, True, True))]
    compare(x, weight, bias, terms, "fused")
    masks = [torch.tensor(m, dtype=torch.float32) for m in ([1, 0, 1, 0, 0], [0, 1, 0, 0, 0], [1, 1, 1, 0, 1])]
    compare(x, weight, bias, [replace(t, rows=m, bias=leaf(OUT)) for t, m in zip(terms, masks, strict=True)], "fused")
    kept = [replace(t, keep=torch.rand(OUT, dtype=F64)) for t in terms]
    compare(x, weight, bias, kept, "fused")


# -- which is chosen ------------------------------------------------------------------------------------------
def layer(method, width: int = 128, dtype: torch.dtype = torch.float32) -> nn.Module:
    return scatter(veneer.attach(nn.Sequential(nn.Linear(width, width).to(dtype)), {"0": method}))


@pytest.fixture
def calls(monkeypatch):
    """Which sides ran."""
    seen = []
    for side in (sides.Dense, sides.LowRank, sides.Product):
        def forward(*args, _side=side, _own=side.forward):
            seen.append(_side.__name__)
            return _own(*args)

        monkeypatch.setattr(side, "forward", staticmethod(forward))
    return seen


def choice(model: nn.Module, x: Tensor) -> ops.Choice:
    ((_, adapter),) = attached(model, "default")
    return ops.choose(x, model[0].weight, [model[0].term(adapter, model[0].weight)])


def test_a_high_rank_is_spread_out_in_fp32_over_many_rows(calls):
    model, x = layer(RandLoRA(rank=8)), torch.randn(2000, 128)
    model(x)
    assert calls == ["Dense"]
    assert choice(model, x) == ("dense", "a rank of 128 costs more per row than W + ΔW does once")
    with torch.no_grad():
        model(x.view(4, 500, 128))
    assert calls == ["Dense", "Dense"]


@pytest.mark.parametrize(("method", "rows", "dtype"), [
    (RandLoRA(rank=8), 2000, torch.bfloat16),  # W' would round away what the products keep
    (RandLoRA(rank=8), 8, torch.float32),
    (RandLoRA(rank=8, dropout=0.1), 2000, torch.float32),
    (VeRA(rank=60), 2000, torch.float32),
    (LoRA(rank=16), 2000, torch.float32),
    (VBLoRA(rank=8, vector_length=32), 2000, torch.float32),
])
def test_everything_else_goes_by_its_factors(method, rows, dtype, calls):
    model, x = layer(method, dtype=dtype), torch.randn(rows, 128, dtype=dtype)
    model(x)
    assert calls == ["LowRank"]
    assert choice(model, x) == ("fused", "one product accumulates on the other")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_goes_by_its_two_factors(dtype, calls):
    model, x = layer(LoKr(), dtype=dtype), torch.randn(2000, 128, dtype=dtype)
    model(x)
    assert calls == ["Product"]
    assert choice(model, x).op == "fused"


def test_a_high_rank_under_autocast_is_not_spread_out(calls):
    model, x = layer(RandLoRA(rank=8)), torch.randn(2000, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert calls == ["LowRank"]


@pytest.mark.parametrize(("trained", "gradients_on", "least"), [
    ("A", True, 43),  # 128·128 + rows·128 for A's gradient, against 4·rows·128
    ("B", True, 65),  # two products of every row for B's
    ("", True, 33),
    ("AB", False, 65),  # 128·128 against 2·rows·128
])
def test_from_how_many_rows_on_it_pays(trained, gradients_on, least):
    weight = torch.randn(128, 128)

    def op(rank: int, rows: int) -> str:
        pair = Factors(torch.randn(rank, 128, requires_grad="A" in trained),
                       torch.randn(128, rank, requires_grad="B" in trained))
        with torch.set_grad_enabled(gradients_on):
            return ops.choose(torch.randn(rows, 128), weight, [Term(pair)]).op

    assert (op(128, least - 1), op(128, least)) == ("fused", "dense")
    assert (op(63, 10**4), op(64, 10**4)) == ("fused", "dense")


# -- what is said of it ----------------------------------------------------------------------------------------
def said(model: nn.Module) -> tuple[str, str]:
    """Path and reason of the first layer's weight."""
    line = explain(model).splitlines()[1]
    name, path, why = line.split("  ")[0], *[part.strip() for part in line.split("  ") if part.strip()][1:3]
    assert name == "0.weight"
    return path, why


@pytest.mark.parametrize(("method", "path", "why"), [
    (VeRA(rank=8), "fused", "one product accumulates on the other"),
    (VBLoRA(rank=2, vector_length=32), "fused", "one product accumulates on the other"),
    (RandLoRA(rank=8), "fused", "one product accumulates on the other"),
    (LoKr(), "fused", "one product accumulates on the other"),
    (LoHa(rank=4), "fused", "one product accumulates on the other"),
    (LoHa(rank=8), "weight space", "LoHaAdapter has no shortcut here"),
    (DoRA(LoKr()), "fused", "one product accumulates on the other"),
    (DoRA(LoHa(rank=8)), "weight space", "DoRAAdapter has no shortcut here"),
    (LoKr(rank_dropout=0.5), "reference", "outputs of a Kronecker product are dropped one by one"),
    (LoKr(module_dropout=0.5), "fused", "one product accumulates on the other"),
])
def test_explain(method, path, why):
    model = layer(method)
    assert said(model) == (path, why)
    if path == "reference":
        assert said(model.eval()) == ("fused", "one product accumulates on the other")


def test_explain_several():
    model = layer(LoRA(rank=2))
    for name, method in (("vera", VeRA(rank=8)), ("lokr", LoKr()), ("loha", LoHa(rank=8)), ("dora", DoRA(LoRA()))):
        veneer.attach(model, {"0": method}, name=name)
    veneer.activate(model, ["default", "vera"])
    assert said(model) == ("fused", "2 adapters concatenated into one call")
    veneer.activate(model, ["default", "lokr"])
    assert said(model) == ("reference", "several live adapters, one of them a Kronecker product")
    veneer.activate(model, ["vera", "dora"])
    assert said(model) == ("reference", "several live adapters, one of them with a row gain (DoRA)")
    veneer.activate(model, ["vera", "loha"])
    assert said(model) == ("weight space", "LoHaAdapter has no shortcut here")
    with veneer.route(model, ["lokr", None]):
        assert said(model) == ("fused", "one product accumulates on the other")
    with veneer.route(model, ["vera", "default"]):
        assert said(model) == ("fused", "2 adapters concatenated into one call")
