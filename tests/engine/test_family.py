"""LoHa, LoKr, VeRA, VB-LoRA, RandLoRA and AdaLoRA: what their changes are, what they cost, what is in their files."""

from __future__ import annotations

import copy
import json
import re
import struct
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import veneer
from veneer import AdaLoRA, DoRA, LoHa, LoKr, LoRA, RandLoRA, VBLoRA, VeRA
from veneer.attach import attached, shared_states
from veneer.method import Adapter, Method, VeneerError

from .nets import scatter


def only(model: nn.Module) -> Adapter:
    """The one adapter on a model."""
    ((_, adapter),) = attached(model, "default")
    return adapter


def adapted(layer: nn.Module, method: Method, by: float = 0.5) -> nn.Module:
    return scatter(veneer.attach(nn.Sequential(layer), {"0": method}), by=by)


# -- ranks ----------------------------------------------------------------------------------------------------
def rank(matrix: Tensor) -> int:
    return int(torch.linalg.matrix_rank(matrix.detach()))


@pytest.mark.parametrize("r", [1, 2, 3, 4])
@pytest.mark.parametrize("layer", [nn.Linear(24, 30), nn.Linear(30, 24), nn.Conv2d(6, 25, 2)], ids=str)
@pytest.mark.parametrize("effective", [False, True], ids=["", "effective"])
def test_a_hadamard_product_has_the_square_of_the_rank(r, layer, effective):
    adapter = only(adapted(copy.deepcopy(layer).double(), LoHa(rank=r, effective_conv=effective)))
    assert rank(adapter.delta()) == r * r
    if (form := adapter.form()) is not None:
        torch.testing.assert_close(form.dense(), adapter.delta())
        assert form.A.shape[0] == r * r


def test_a_kronecker_product_multiplies_ranks():
    adapter = only(adapted(nn.Linear(36, 36).double(), LoKr(rank=2, decompose_both=True)))
    form = adapter.form()
    assert (rank(form.left), rank(form.right), rank(adapter.delta())) == (2, 2, 4)
    adapter = only(adapted(nn.Linear(36, 36).double(), LoKr(rank=2)))
    assert rank(adapter.delta()) == 12


def fit(model: nn.Module, sizes: tuple[int, int]) -> None:
    """A few steps towards random outputs."""
    x, target = torch.randn(64, sizes[0]), torch.randn(64, sizes[1])
    optimizer = torch.optim.Adam(veneer.trainable(model), lr=1e-2)
    losses = []
    for _ in range(6):
        losses.append((model(x) - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("sizes", [(24, 40), (40, 24), (24, 24)])
@pytest.mark.parametrize(("sparsity", "r"), [(None, 1), (None, 5), (None, 30), ("sparse", 20), ("very_sparse", 40)])
def test_random_bases_train_to_full_rank(sizes, sparsity, r):
    model = veneer.attach(nn.Sequential(nn.Linear(*sizes)), {"0": RandLoRA(rank=r, alpha=r, sparsity=sparsity)})
    adapter = only(model)
    assert rank(adapter.delta()) == 0
    fit(model, sizes)
    assert rank(adapter.double().delta()) == min(sizes)  # in fp64: rounding alone would be of full rank in fp32


@pytest.mark.parametrize("sparsity", ["sparse", "very_sparse"])
def test_few_sparse_bases_leave_some_inputs_out(sparsity):
    """A column of A that is zero in all r rows is read by no λ and γ: for full rank, r has to be large enough."""
    model = veneer.attach(nn.Sequential(nn.Linear(24, 40)), {"0": RandLoRA(rank=2, alpha=2, sparsity=sparsity)})
    fit(model, (24, 40))
    read = int(only(model).shared_state().A.any(0).sum())
    assert 0 < rank(only(model).double().delta()) <= read < 24


# -- what a step allocates --------------------------------------------------------------------------------------
class Large(TorchDispatchMode):
    """Counts tensors of at least `size` elements that any operation gives and that are not the weight's memory."""

    def __init__(self, size: int, weight: Tensor) -> None:
        super().__init__()
        self.size, self.weight = size, weight.untyped_storage().data_ptr()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.numel() >= self.size and \
                    tensor.untyped_storage().data_ptr() != self.weight:
                self.found.append(f"{func} → {tuple(tensor.shape)}")
        return out


SMALL = {
    "loha": LoHa(rank=4, alpha=2),
    "lokr": LoKr(rank=3, decompose_both=True),
    "lokr whole": LoKr(rank=8),
    "vera": VeRA(rank=20),
    "vblora": VBLoRA(rank=4, num_vectors=10, vector_length=32),
    "adalora": AdaLoRA(init_r=6, target_r=4, total_step=10),
}


def large(model: nn.Module, x: Tensor) -> list[str]:
    weight = model[0].weight
    with Large(weight.numel(), weight) as seen:
        model(x).sum().backward()
    return seen.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True], ids=["", "dora"])
@pytest.mark.parametrize("case", SMALL)
def test_no_step_forms_the_change(case, dora, dtype):
    """Of a layer of 96 × 128, with 10 rows: nothing of W's size exists beside W, forward and backward. Under DoRA the
    lengths of W's own rows are kept from the first forward on."""
    method = DoRA(SMALL[case]) if dora else SMALL[case]
    model = adapted(nn.Linear(128, 96).to(dtype), method)
    x = torch.randn(10, 128, dtype=dtype, requires_grad=True)
    model(x)
    assert large(model, x) == []
    assert x.grad is not None
    assert all(p.grad is not None for p in veneer.trainable(model))


@pytest.mark.parametrize("case", ["lokr", "lokr whole", "vera", "loha"])
def test_no_lookup_forms_the_change(case):
    model = adapted(nn.Embedding(96, 128), SMALL[case])
    assert large(model, torch.tensor([[3, 7, 95], [0, 1, 2]])) == []


def test_what_forms_the_change_is_seen():
    x = torch.randn(10, 128)
    assert any("(96, 128)" in line for line in large(adapted(nn.Linear(128, 96), LoHa(rank=5)), x))
    model = adapted(nn.Linear(128, 96), SMALL["lokr"])
    with Large(96 * 128, model[0].weight) as seen:
        only(model).delta()
    assert any("(96, 128)" in line for line in seen.found)


def test_random_bases_keep_nothing_of_their_size_for_the_backward():
    model = adapted(nn.Linear(128, 96), RandLoRA(rank=8))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        only(model).form()
    assert sorted(sizes) == [(8, 12), (8, 96), (12, 96)]


# -- files ------------------------------------------------------------------------------------------------------
class Net(nn.Module):
    """Weights (64, 32), (32, 64) and (32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.out = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.down(torch.tanh(self.up(x)))))


class Less(nn.Module):
    """A part of it."""

    def __init__(self) -> None:
        super().__init__()
        net = Net()
        self.down, self.out = net.down, net.out

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.down(x)))


NAMES = ("up", "down", "out")
X = torch.linspace(-2, 2, 160).reshape(5, 32)


def trained(method: Method) -> nn.Module:
    return scatter(veneer.attach(Net(), dict.fromkeys(NAMES, method)), by=0.5)


def header(path: Path) -> tuple[dict[str, dict], int]:
    """The tensors of the one tensor file by name, and how many bytes of numbers there are."""
    (file,) = path.glob("*.safetensors")
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    found = json.loads(raw[8:8 + length])
    found.pop("__metadata__", None)
    return found, len(raw) - 8 - length


def plan_of(path: Path) -> list[dict]:
    return json.loads((path / "veneer.json").read_text())["plan"]


@pytest.mark.parametrize(("vectors", "index"), [(40, 1), (255, 1), (256, 2)])
@pytest.mark.parametrize("topk", [1, 2, 5])
def test_bytes_of_a_vector_bank(vectors, index, topk, tmp_path):
    """The bank, and for each sub-vector k indices and k − 1 weights; all logits otherwise."""
    r, length = 4, 8
    pieces = sum(r * (size // length) for size in (32, 64, 64, 32, 32, 32))
    options = {"rank": r, "num_vectors": vectors, "vector_length": length, "topk": topk}
    veneer.save(trained(VBLoRA(**options, save_only_topk_weights=True)), tmp_path / "top")
    assert header(tmp_path / "top")[1] == 4 * vectors * length + pieces * (index * topk + 4 * (topk - 1))
    veneer.save(trained(VBLoRA(**options)), tmp_path / "all")
    assert header(tmp_path / "all")[1] == 4 * vectors * length + pieces * 4 * vectors
    veneer.save(trained(LoRA(rank=r)), tmp_path / "lora")
    assert header(tmp_path / "lora")[1] == 4 * r * (32 + 64 + 64 + 32 + 32 + 32)
    if vectors == 40 and topk <= 2:  # of a small model; of a large one the bank hardly counts
        assert header(tmp_path / "top")[1] < header(tmp_path / "lora")[1]


def test_a_vector_bank_is_a_smaller_file_than_lora(tmp_path):
    """The whole file, of ten weights of 128 × 128."""
    def size(method: Method, name: str) -> int:
        model = nn.ModuleDict({f"layer{i}": nn.Linear(128, 128) for i in range(10)})
        veneer.save(scatter(veneer.attach(model, {"layer*": method})), tmp_path / name)
        (file,) = (tmp_path / name).glob("*.safetensors")
        return file.stat().st_size

    bank = VBLoRA(rank=4, num_vectors=90, vector_length=32, save_only_topk_weights=True)
    assert size(bank, "vblora") < 0.7 * size(LoRA(rank=4), "lora")


TOP = VBLoRA(rank=2, num_vectors=11, vector_length=8, topk=3, save_only_topk_weights=True)
GONE = re.escape("this VB-LoRA adapter was loaded from its top k weights only (save_only_topk_weights): the other "
                 "logits are gone, so it can be used and merged, not trained; call model.eval(), or train on from a "
                 "file with all logits")


@pytest.mark.parametrize("method", [TOP, DoRA(TOP)], ids=str)
@pytest.mark.parametrize("existing", [False, True], ids=["", "existing"])
def test_a_file_of_top_k_weights(method, existing, tmp_path):
    """Gives the same outputs, merges and saves again; refuses to train."""
    model = trained(method)
    want = model(X).detach()
    veneer.save(model, tmp_path / "a")
    other = trained(method) if existing else Net()
    veneer.load(other, tmp_path / "a")
    with pytest.raises(VeneerError, match=GONE):
        other(X)
    with torch.no_grad():
        torch.testing.assert_close(other(X), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other.eval()(X), want, rtol=1e-5, atol=1e-6)
    veneer.save(other, tmp_path / "b")
    third = Net().eval()
    veneer.load(third, tmp_path / "b")
    torch.testing.assert_close(third(X), want, rtol=1e-5, atol=1e-6)
    veneer.merge(other.train())
    torch.testing.assert_close(other(X), want, rtol=1e-4, atol=1e-5)
    veneer.unmerge(other)
    # a copy of it, and its state in another, is no more to be trained than itself
    with pytest.raises(VeneerError, match=GONE):
        copy.deepcopy(other)(X)
    again = trained(method)
    again.load_state_dict(other.state_dict())
    with pytest.raises(VeneerError, match=GONE):
        again(X)
    # and with all logits it is as it was
    again.load_state_dict(trained(method).state_dict())
    again(X).sum().backward()


def test_a_file_of_all_logits_is_trained_on(tmp_path):
    method = VBLoRA(rank=2, num_vectors=11, vector_length=8)
    model = trained(method)
    veneer.save(model, tmp_path)
    other = Net()
    veneer.load(other, tmp_path)
    assert torch.equal(other(X), model(X))
    other(X).sum().backward()
    assert all(p.grad is not None for p in veneer.trainable(other))


def test_top_k_of_a_bank_of_k_loses_nothing(tmp_path):
    model = trained(VBLoRA(rank=2, num_vectors=3, vector_length=8, topk=3, save_only_topk_weights=True))
    veneer.save(model, tmp_path)
    other = Net()
    veneer.load(other, tmp_path)
    torch.testing.assert_close(other(X), model(X))
    other(X).sum().backward()


BASES = {"vera": VeRA(rank=6, seed=5), "randlora": RandLoRA(rank=5, alpha=1, seed=5),
         "sparse": RandLoRA(rank=5, alpha=1, seed=5, sparsity="sparse"),
         "dora": DoRA(VeRA(rank=6, seed=5)), "dora randlora": DoRA(RandLoRA(rank=5, alpha=1, seed=5))}


def holding(method: Method) -> Method:
    """The method with its bases in the file."""
    if isinstance(method, DoRA):
        return DoRA(holding(method.inner))
    return type(method)(**{**vars(method), "save_bases": True})


@pytest.mark.parametrize("case", BASES)
def test_bases_are_in_the_file_only_where_asked_for(case, tmp_path):
    model, full = trained(BASES[case]), trained(holding(BASES[case]))
    bare = veneer.save(model, tmp_path / "bare")
    assert bare.parameters == sum(p.numel() for p in veneer.trainable(model))
    assert header(tmp_path / "bare")[1] == 4 * bare.parameters
    names = set(header(tmp_path / "bare")[0])
    assert not any(re.search(r"(vera|randlora)_[AB]|shared", name) for name in names)
    (shared,) = shared_states(full, "default")
    saved = veneer.save(full, tmp_path / "full")
    assert saved.parameters == bare.parameters + sum(b.numel() for b in shared.buffers())
    more = {name: entry for name, entry in header(tmp_path / "full")[0].items()
            if re.search(r"(vera|randlora)_[AB]|shared\.[AB]", name)}
    assert {tuple(entry["shape"]) for entry in more.values()} >= {tuple(b.shape) for b in shared.buffers()}
    for name, source in (("bare", model), ("full", full)):
        other = Net()
        veneer.load(other, tmp_path / name)
        assert torch.equal(other(X), source(X))
        assert torch.equal(shared_states(other, "default")[0].B, shared.B)


def test_bases_of_the_file_are_used_not_the_drawn_ones(tmp_path):
    model = trained(holding(BASES["vera"]))
    (shared,) = shared_states(model, "default")
    shared.A.mul_(2)
    want = model(X).detach()
    veneer.save(model, tmp_path)
    other = Net()
    veneer.load(other, tmp_path)
    assert torch.equal(other(X), want)


def only_method(model: nn.Module) -> Method:
    (method,) = {adapter.method for _, adapter in attached(model, "default")}
    return method


@pytest.mark.parametrize("case", BASES)
def test_the_saved_plan_says_how_large_the_bases_are(case, tmp_path):
    method, model = BASES[case], Net()
    plan = veneer.plan(model, dict.fromkeys(NAMES, method))
    (settled,) = {entry.method for entry in plan.entries}
    inner = settled.inner if isinstance(settled, DoRA) else settled
    assert inner.bases == (64, 64)
    assert (method.inner if isinstance(method, DoRA) else method).bases is None
    scatter(veneer.attach(model, plan))
    assert only_method(model) == settled
    veneer.save(model, tmp_path)
    (entry,) = plan_of(tmp_path)
    assert entry.get("inner", entry)["bases"] == [64, 64]
    other = Net()
    veneer.load(other, tmp_path)
    assert only_method(other) == settled
    assert settled.settle({}) == settled  # of one part or another, it stays what it is


@pytest.mark.parametrize("case", [*BASES, "vblora"])
def test_a_part_of_the_weights_has_the_same_bases(case, tmp_path):
    """Loaded into a model that lacks the first and largest of them; a bank is in the file with the first weight."""
    method = BASES.get(case, VBLoRA(rank=2, num_vectors=11, vector_length=8))
    model = trained(method)
    hidden = torch.tanh(model.up(X)).detach()
    veneer.save(model, tmp_path)
    less = Less()
    report = veneer.load(less, tmp_path, strict=False)
    assert report.problems
    (want,), (got,) = shared_states(model, "default"), shared_states(less, "default")
    for name, tensor in got.state_dict().items() or got.named_buffers():
        assert torch.equal(tensor, want.get_parameter(name) if case == "vblora" else want.get_buffer(name))
    assert torch.equal(less(hidden), model(X))


# -- rows of a batch --------------------------------------------------------------------------------------------
MIXED = {
    "lora": LoRA(rank=3), "lokr": LoKr(rank=2), "vera": VeRA(rank=9), "randlora": RandLoRA(rank=5, alpha=1),
    "vblora": VBLoRA(rank=2, num_vectors=9, vector_length=8, init_vector_bank_bound=0.3),
    "loha in dora": DoRA(LoHa(rank=2)), "adalora": AdaLoRA(init_r=4, target_r=2, total_step=10),
    "loha": LoHa(rank=1), "lokr in dora": DoRA(LoKr(rank=8)),
}


def mixed(names: list[str]) -> nn.Module:
    model = Net()
    for name in names:
        scatter(veneer.attach(model, dict.fromkeys(NAMES, MIXED[name]), name=name), name, by=0.4)
    return model


def grads_by_name(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    return {name: g for name, g in zip(params, found, strict=True) if g is not None}


@pytest.mark.parametrize("names", [
    ["lora", "lokr", "vera", "vblora", "randlora", "loha in dora"],
    ["lora", "vera", "vblora", "randlora", "adalora", "loha"],  # pairs of factors only: one fused call
    ["lokr", "lokr in dora"],
    list(MIXED),
], ids=lambda names: f"{len(names)}")
def test_rows_through_different_methods(names):
    """Outputs and gradients are those of a run for each method with its rows alone."""
    model = mixed(names)
    rows = [*names, None, *reversed(names), names[0], None]
    x = torch.randn(len(rows), 7, 32)
    with veneer.route(model, rows):
        y = model(x)
    got = grads_by_name(model, y.square().sum())
    want: dict[str, Tensor] = {}
    for name in dict.fromkeys(rows):
        index = [i for i, row in enumerate(rows) if row == name]
        veneer.activate(model, [] if name is None else [name])
        alone = model(x[index])
        torch.testing.assert_close(y[index], alone, rtol=1e-4, atol=1e-5)
        if name is not None:
            want |= grads_by_name(model, alone.square().sum())
    assert set(got) == set(want)
    for name, grad in want.items():
        assert float((got[name] - grad).norm() / grad.norm()) < 1e-5, name


def test_rows_in_evaluation_after_training_others():
    """A row of one method does not change when another's numbers do."""
    names = ["vera", "lokr", "vblora"]
    model = mixed(names).eval()
    with veneer.route(model, names), torch.no_grad():
        before = model(X[:3])
        scatter(model, "lokr")
        after = model(X[:3])
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    assert torch.equal(before[2], after[2])


@pytest.mark.parametrize(("call", "says"), [
    (lambda m: veneer.route(m, ["vera", "loxr"]).__enter__(),
     "no adapter named 'loxr' on this model; did you mean 'lokr'? It has: 'lokr', 'vera'"),
    (lambda m: veneer.activate(m, ["vera", "verra"]), "no adapter named 'verra' on this model; did you mean 'vera'?"),
])
def test_rows_of_an_unknown_name(call, says):
    with pytest.raises(VeneerError, match=re.escape(says)):
        call(mixed(["lokr", "vera"]))


# -- what is refused ----------------------------------------------------------------------------------------------
NUMBER = "must be a finite number"
REFUSED = [
    *((cls, {field: value}, f"{field} must be a whole number of at least 1, got {value!r}")
      for cls, field in [(LoHa, "rank"), (LoKr, "rank"), (VeRA, "rank"), (VBLoRA, "rank"), (RandLoRA, "rank"),
                         (AdaLoRA, "init_r"), (AdaLoRA, "target_r"), (AdaLoRA, "deltaT"), (AdaLoRA, "total_step"),
                         (VBLoRA, "num_vectors"), (VBLoRA, "vector_length"), (VBLoRA, "topk")]
      for value in (0, -1, 2.0, "8", True)),
    *((cls, {"alpha": value}, f"alpha {NUMBER} or None, got {value!r}")
      for cls in (LoHa, LoKr, AdaLoRA) for value in ("16", float("nan"), float("inf"), True)),
    *((cls, {field: value}, f"{field} must be at least 0 and below 1, got {value!r}")
      for cls, field in [(LoHa, "rank_dropout"), (LoHa, "module_dropout"), (LoKr, "rank_dropout"),
                         (LoKr, "module_dropout"), (VeRA, "dropout"), (VBLoRA, "dropout"), (RandLoRA, "dropout"),
                         (AdaLoRA, "dropout")]
      for value in (1, -0.1, 1.5)),
    *((cls, {field: value}, f"{field} {NUMBER}, got {value!r}")
      for cls, field in [(LoHa, "rank_dropout"), (LoKr, "module_dropout"), (VeRA, "dropout"), (VeRA, "d_initial"),
                         (VBLoRA, "dropout"), (VBLoRA, "init_vector_bank_bound"), (VBLoRA, "init_logits_std"),
                         (RandLoRA, "dropout"), (RandLoRA, "alpha"), (AdaLoRA, "beta1"), (AdaLoRA, "beta2"),
                         (AdaLoRA, "orth_reg_weight")]
      for value in ("0.1", None, float("nan"))),
    *((cls, {field: value}, f"{field} must be True or False, got {value!r}")
      for cls, field in [(LoHa, "rank_dropout_scale"), (LoHa, "effective_conv"), (LoKr, "rank_dropout_scale"),
                         (LoKr, "effective_conv"), (LoKr, "decompose_both"), (VeRA, "save_bases"),
                         (RandLoRA, "save_bases"), (VBLoRA, "save_only_topk_weights")]
      for value in (1, "yes", None)),
    *((LoKr, {"decompose_factor": value}, f"must be a whole number of at least 1, or -1, got {value!r}")
      for value in (0, -2, 2.0, True, None)),
    (LoHa, {"init": "lycoris"}, "unknown init 'lycoris'"),
    (LoKr, {"init": "lycori"}, "unknown init 'lycori'; did you mean 'lycoris'? Known: kaiming, lycoris"),
    (RandLoRA, {"sparsity": "very-sparse"},
     "unknown sparsity 'very-sparse'; did you mean 'very_sparse'? Known: None, sparse, very_sparse"),
    (RandLoRA, {"sparsity": True}, "unknown sparsity True"),
    *((cls, {"seed": value}, f"seed must be a whole number of at least 0, got {value!r}")
      for cls in (VeRA, RandLoRA) for value in (-1, 1.0, "0", True, 2**63)),
    *((cls, {"bases": value}, f"bases must be two whole numbers (out, in) or None, got {value!r}")
      for cls in (VeRA, RandLoRA) for value in (8, (8,), (8, 0), (8, 8, 8), (8, 2.0), "88")),
    (VBLoRA, {"topk": 5, "num_vectors": 4}, "topk=5 of a bank of num_vectors=4"),
    (AdaLoRA, {"init_r": 4, "target_r": 5}, "target_r=5 is above init_r=4"),
    (AdaLoRA, {"beta1": 1.0}, "beta1 and beta2 must lie between 0 and 1, got 1.0 and 0.85"),
    (AdaLoRA, {"orth_reg_weight": -0.1}, "orth_reg_weight must be at least 0, got -0.1"),
    (AdaLoRA, {"tinit": -1}, "tinit must be a whole number of at least 0 or None, got -1"),
    (AdaLoRA, {"tfinal": 1.5}, "tfinal must be a whole number of at least 0 or None, got 1.5"),
    (AdaLoRA, {"total_step": 10, "tinit": 5, "tfinal": 5}, "no steps are left to cut ranks in: of total_step=10"),
    *((cls, {"dtype": value}, says) for cls in (LoHa, LoKr, VeRA, VBLoRA, RandLoRA, AdaLoRA) for value, says in [
        ("float33", "unknown dtype 'float33'"), (torch.int8, "dtype must be float32, bfloat16, float16, float64")]),
]


@pytest.mark.parametrize(("cls", "options", "says"), REFUSED, ids=lambda v: v.__name__ if isinstance(v, type) else "")
def test_options_that_are_refused(cls, options, says):
    with pytest.raises(VeneerError, match=re.escape(says)):
        cls(**options)


@pytest.mark.parametrize("cls", [LoHa, LoKr, VeRA, VBLoRA, RandLoRA, AdaLoRA])
def test_options_that_do_not_exist(cls):
    known = next(iter(vars(cls())))
    with pytest.raises(VeneerError, match=re.escape(f"has no option '{known}k'; did you mean '{known}'?")):
        cls.from_options({f"{known}k": 1})
    with pytest.raises(VeneerError, match="a vector has no low-rank change"):
        veneer.plan(nn.Sequential(nn.Linear(3, 3)), {"0.bias": cls()})


@pytest.mark.parametrize(("method", "says"), [
    (VeRA(bases=(6, 8)), "VeRA cannot adapt '0' (rule '0'): its 8 × 6 are more than the shared bases have, "
     "bases=(6, 8)"),
    (VeRA(bases=(8, 5)), "its 8 × 6 are more than the shared bases have, bases=(8, 5)"),
    (RandLoRA(bases=(7, 7)), "its 8 × 6 are more than the shared bases have, bases=(7, 7)"),
    (RandLoRA(bases=(8, 5)), "its 8 × 6 are more than the shared bases have, bases=(8, 5)"),
    (DoRA(VeRA(bases=(6, 8))), "DoRA cannot adapt '0' (rule '0'): its 8 × 6 are more than"),
])
def test_bases_too_small_for_a_weight(method, says):
    with pytest.raises(VeneerError, match=re.escape(says)):
        veneer.attach(nn.Sequential(nn.Linear(6, 8)), {"0": method})


def test_bases_turned_are_large_enough_for_randlora():
    """It lays the longer base along the longer side."""
    veneer.attach(nn.Sequential(nn.Linear(6, 8)), {"0": RandLoRA(bases=(6, 8))})


@pytest.mark.parametrize(("layer", "method"), [
    (nn.Linear(1, 4), RandLoRA(rank=1)), (nn.Linear(2, 2), RandLoRA(rank=1, sparsity="sparse")),
    (nn.Linear(4, 1), RandLoRA(rank=1, sparsity="very_sparse"))])
def test_bases_too_few_to_be_random(layer, method):
    """They would be divided by a deviation of zero."""
    model = nn.Sequential(layer)
    with pytest.raises(VeneerError, match=r"RandLoRA: the \d numbers of its random bases are all equal with seed=0"):
        veneer.attach(model, {"0": method})
    assert veneer.adapters(model) == {}


def test_bases_that_fit_the_small_but_not_the_large_weight():
    with pytest.raises(VeneerError, match=re.escape("VeRA cannot adapt 'up'")):
        veneer.attach(Net(), dict.fromkeys(NAMES, VeRA(bases=(32, 64))))


def test_dropout_where_there_is_no_input():
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

    for cls in (VeRA, VBLoRA, RandLoRA, AdaLoRA):
        with pytest.raises(VeneerError, match="there is no input to drop from; use dropout=0"):
            veneer.attach(Bare(), {"w": cls(dropout=0.1)})
    for cls in (LoHa, LoKr):  # theirs is of the outputs of the change
        veneer.attach(Bare(), {"w": cls(rank_dropout=0.1, module_dropout=0.1)})
