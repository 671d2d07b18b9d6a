"""Options of a wrong type are refused where they are written down, and nothing of the caller's is drawn from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer import Full, LoRA, Rows
from veneer.inspect import explain
from veneer.method import VeneerError
from veneer.ops.dropout import Dropped


@pytest.mark.parametrize(("make", "words"), [
    (lambda: LoRA(bias="none"), r"LoRA: bias must be True or False, got 'none'.*\{\"\*\.bias\": Full\(\)\}"),
    (lambda: LoRA(bias=1), r"LoRA: bias must be True or False, got 1$"),
    (lambda: LoRA(rank_stabilized="false"), r"LoRA: rank_stabilized must be True or False, got 'false'"),
    (lambda: LoRA(alpha=True), r"LoRA: alpha must be a finite number or None, got True"),
    (lambda: LoRA(alpha="16"), r"LoRA: alpha must be a finite number or None, got '16'"),
    (lambda: LoRA(alpha=float("nan")), r"LoRA: alpha must be a finite number or None, got nan"),
    (lambda: LoRA(dropout=False), r"LoRA: dropout must be a finite number, got False"),
    (lambda: LoRA(init=["kaiming"]), r"LoRA: unknown init \['kaiming'\].*Known: kaiming"),
    (lambda: LoRA(dtype="bfloat17"), r"unknown dtype 'bfloat17'; use float32"),
    (lambda: LoRA(dtype=torch.int64), r"LoRA: dtype must be float32, .* or None, got torch.int64"),
    (lambda: LoRA(dtype=float), r"LoRA: dtype must be float32, .* or None, got <class 'float'>"),
    (lambda: Full(dtype=torch.int8), r"Full: dtype must be float32, .* or None, got torch.int8"),
    (lambda: Rows([1], dtype=16), r"Rows: dtype must be float32, .* or None, got 16"),
    (lambda: Rows([1.7]), r"Rows: ids must be distinct row numbers .*got \[1.7\]"),
    (lambda: Rows("12"), r"Rows: ids must be distinct row numbers .*got '12'"),
    (lambda: Rows(12), r"Rows: ids must be distinct row numbers .*got 12"),
    (lambda: Rows([True]), r"Rows: ids must be distinct row numbers .*got \[True\]"),
    (lambda: Rows(torch.tensor([False, True])), r"Rows: ids must be distinct row numbers"),
    (lambda: Rows(torch.tensor([1.0])), r"Rows: ids must be distinct row numbers"),
    (lambda: Rows([]), r"Rows: ids must be distinct row numbers .*got \[\]"),
    (lambda: Rows([2, 2]), r"Rows: ids must be distinct row numbers .*got \[2, 2\]"),
    (lambda: Rows([-1]), r"Rows: ids must be distinct row numbers .*got \[-1\]"),
])
def test_wrong_types_are_refused(make, words):
    with pytest.raises(VeneerError, match=words):
        make()


def test_names_of_dtypes_and_all_kinds_of_whole_numbers_are_taken():
    for text in ("bfloat16", "torch.bfloat16"):
        assert LoRA(dtype=text) == LoRA(dtype=torch.bfloat16)
        assert Full(dtype=text) == Full(dtype=torch.bfloat16)
        assert Rows([1], dtype=text) == Rows([1], dtype=torch.bfloat16)
    model = veneer.attach(nn.Sequential(nn.Linear(3, 3)), {"0": LoRA(rank=2, dtype="bfloat16", alpha=4)})
    assert {p.dtype for p in veneer.trainable(model)} == {torch.bfloat16}
    assert Rows(torch.tensor([3, 1])) == Rows(range(3, 0, -2)) == Rows(i for i in (3, 1))
    assert all(type(i) is int for i in Rows(torch.tensor([3, 1])).ids)


@pytest.fixture(params=["bfloat16", "float64", "meta"])
def defaults(request):
    """Other defaults of torch than its own."""
    if request.param == "meta":
        with torch.device("meta"):
            yield
        return
    torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def expected():
    return _first_values(), _dropped()


def _first_values():
    found = []
    for init in ("kaiming", "gaussian", "xavier"):
        model = nn.Sequential(nn.Linear(6, 5, dtype=torch.float32, device="cpu"))
        veneer.attach(model, {"0": LoRA(rank=3, init=init)}, seed=4)
        adapter = model[0].adapters["default"]["weight"]
        # where the adapter itself was made on the default device, it is filled as `to_empty` has it filled
        found.append((adapter.to_empty(device="cpu") if adapter.on_meta() else adapter).A.detach().clone())
    return found


def _dropped():
    torch.manual_seed(5)
    size, cpu = torch.Size([40, 30]), torch.device("cpu")
    return [Dropped(0.1, size, cpu).positions, Dropped(0.4, size, cpu).keep]


def test_draws_do_not_depend_on_torchs_defaults(expected, defaults):
    for want, got in zip((*expected[0], *expected[1]), (*_first_values(), *_dropped()), strict=True):
        assert got.device.type == "cpu"
        assert torch.equal(got, want)


def _table(method, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 4, **options))
    veneer.attach(model, {"0": method})
    with torch.no_grad():
        for p in veneer.trainable(model):
            p.add_(torch.randn_like(p))
    return model


@pytest.mark.parametrize("method", [LoRA(rank=2), Rows([1, 4]), Full()], ids=str)
def test_scale_grad_by_freq_is_refused(method):
    with pytest.raises(VeneerError, match="set scale_grad_by_freq=False"):
        _table(method, scale_grad_by_freq=True)


@pytest.mark.parametrize("method", [LoRA(rank=2), veneer.DoRA(LoRA(rank=2)), Rows([4, 1]), Full()], ids=str)
def test_a_table_with_sparse_gradients_trains_like_another(method):
    ids = torch.randint(0, 11, (3, 5))
    found = []
    for sparse in (False, True):
        model = _table(method, sparse=sparse)
        y = model(ids)
        y.pow(2).sum().backward()
        found.append([y.detach(), *(p.grad for p in veneer.trainable(model))])
        torch.optim.AdamW(veneer.trainable(model)).step()
    for dense, sparse in zip(*found, strict=True):
        assert torch.equal(dense, sparse)


class _NoTable(torch.utils._python_dispatch.TorchDispatchMode):
    """No operation may put out a tensor as large as the table."""

    def __init__(self, numel):
        super().__init__()
        self.numel = numel

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            assert out.numel() < self.numel, f"{func} made a tensor of {tuple(out.shape)}"
        return out


@pytest.mark.parametrize("padding", [None, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_rows_are_looked_up_without_the_new_table(padding, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(500, 4, padding_idx=padding, dtype=dtype))
    rows = [4, 1, 499, 0, 30]
    veneer.attach(model, {"0": Rows(rows)})
    veneer.attach(model, {"0": LoRA(rank=2)}, name="other")
    with torch.no_grad():
        for p in veneer.trainable(model):
            p.add_(torch.randn_like(p))
    table = model[0].adapters["default"]["weight"]
    ids = torch.randint(0, 500, (3, 9), dtype=torch.int32)
    ids[:, :5] = torch.tensor(rows)
    veneer.activate(model, ["default"])
    with _NoTable(500 * 4):
        got = model(ids)
        got.sum().backward()
    grad, table.rows.grad = table.rows.grad, None
    want = nn.functional.embedding(ids, table.new_weight(model[0].weight), padding)
    want.sum().backward()
    assert got.dtype == dtype
    assert torch.equal(got, want)
    assert torch.equal(grad, table.rows.grad)
    assert "rows" in explain(model).split()
    veneer.activate(model, ["default", "other"])
    with _NoTable(500 * 4):
        both = model(ids)
    low = model[0].adapters["other"]["weight"].delta()[ids].to(dtype)
    torch.testing.assert_close(both, want + low, rtol=torch.finfo(dtype).eps * 4, atol=torch.finfo(dtype).eps * 4)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: LoRA(r=8), r"LoRA has no option 'r'; it is 'rank' here\. Options: rank, alpha"),
    (lambda: LoRA(lora_dropout=0.1), r"LoRA has no option 'lora_dropout'; it is 'dropout' here\."),
    (lambda: LoRA(rnak=8), r"LoRA has no option 'rnak'; did you mean 'rank'\?"),
    (lambda: veneer.DoRA(LoRA(), weight=1), r"DoRA has no option 'weight'\. Options: inner"),
])
def test_an_option_that_is_none_names_the_one_that_was_meant(make, words: str) -> None:
    with pytest.raises(VeneerError, match=words):
        make()
    with pytest.raises(TypeError, match=words):  # what Python itself raises for such a call
        make()
