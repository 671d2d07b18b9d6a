"""Starts of LoRA's pair: what each gives, that the model is the same at the start, and that its bits do not depend on
what else is attached."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import veneer
from veneer import DoRA, LoRA
from veneer.inits import Gaussian, Init, LoftQ, PiSSA, TorchInit, init_names, make_init
from veneer.inits.svd import randomised_svd
from veneer.method import VeneerError, method_from_dict, method_to_dict, seeded_generator
from veneer.optim import lora_fa, lora_plus_groups

from .nets import Net, adapter_state, assert_as_good, scatter

BOTH = TorchInit(a="torch.nn.init.xavier_normal_", b="torch.nn.init.orthogonal_")
#: BA is not zero
MOVING = ["pissa", "pissa_niter_2", "olora", BOTH]
DATA_FREE = ["kaiming", "gaussian", "xavier", "orthogonal", "torch.nn.init.xavier_uniform_", *MOVING]


def weight(out=12, in_=9, seed=3):
    return torch.randn(out, in_, generator=torch.Generator().manual_seed(seed))


def start(init, W, rank=3, scale=1.0, key="0/w"):
    found = make_init(init).factors(W, tuple(W.shape), rank, scale, seeded_generator(key), None)
    return found.A, found.B


def adapted(init, rank=2, model=None, **options):
    torch.manual_seed(0)
    model = Net() if model is None else model
    return veneer.attach(model, {"*.up": LoRA(rank=rank, init=init, **options)})


def parts(model):
    return model.layers[0].up.adapters["default"]["weight"]


def ids():
    return torch.arange(15).remainder(13).reshape(3, 5)


# -- what the option takes ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("given", "kept"), [
    ("pissa", "pissa"), (PiSSA(), "pissa"), ({"init": "pissa"}, "pissa"), (PiSSA(iterations=4), "pissa_niter_4"),
    ({"init": "pissa", "iterations": 4}, "pissa_niter_4"), ("pissa_niter_16", "pissa_niter_16"),
    (Gaussian(), "gaussian"),
    ("torch.nn.init.normal_", "torch.nn.init.normal_"), (TorchInit(a="torch.nn.init.normal_"), "torch.nn.init.normal_"),
    ({"init": "loftq", "bits": 2}, LoftQ(bits=2)), (BOTH, BOTH),
], ids=str)
def test_one_spelling_of_each_start(given, kept):
    method = LoRA(init=given)
    assert method.init == kept
    assert method == LoRA(init=kept)
    assert hash(method) == hash(LoRA(init=kept))
    assert method.start_rule == make_init(given)
    assert method_from_dict(method_to_dict(method)) == method
    assert method_from_dict(method_to_dict(DoRA(method))) == DoRA(method)


@pytest.mark.parametrize("name", init_names())
def test_every_registered_start_can_be_written_down(name):
    rule = make_init(name)
    assert make_init(rule.to_config()) == rule
    assert make_init(LoRA(init=rule).init) == rule


@pytest.mark.parametrize(("build", "says"), [
    (lambda: LoRA(init="pisa"), r"LoRA: unknown init 'pisa'; did you mean 'pissa'\? Known: .*pissa_niter_N"),
    (lambda: LoRA(init="pissa_niter"), r"unknown init 'pissa_niter'; did you mean 'pissa_niter_4'"),
    (lambda: LoRA(init=True), r"LoRA: unknown init True\. Known: "),
    (lambda: LoRA(init={"bits": 4}), r"init as a mapping needs a key 'init' with a start's name, got \{'bits': 4\}"),
    (lambda: LoRA(init={"init": "pissa", "niter": 2}), r"init 'pissa' has no option 'niter'.*Options: iterations"),
    (lambda: LoRA(init={"init": "kaiming", "a": 2}), r"init 'kaiming' has no option 'a'\. Options: none"),
    (lambda: PiSSA(iterations=-1), r"init 'pissa': iterations must be None or a whole number of at least 0, got -1"),
    (lambda: LoRA(init="torch.nn.init.xavier_norml_"), r"'torch.nn.init.xavier_norml_' is no function of torch.nn.init"
                                                       r"; did you mean 'xavier_normal_'\?"),
    (lambda: TorchInit(b="xavier_normal_"), r"'xavier_normal_' is no function of torch.nn.init.*Give its dotted name"),
    (lambda: LoRA(init="torch.nn.init.constant_"), r"torch.nn.init.constant_ cannot fill a matrix .* by itself"),
    (lambda: LoRA(init="torch.nn.init.dirac_"), r"torch.nn.init.dirac_ cannot fill a matrix .* by itself"),
    (lambda: LoRA(init="torch.nn.init.zeros_"), r"A and B would both be zero"),
    (lambda: LoRA(residual="bas"), r"LoRA: unknown residual 'bas'; did you mean 'base'\?"),
])
def test_what_is_wrong_is_said_where_it_is_written(build, says):
    with pytest.raises(VeneerError, match=says):
        build()


# -- what each start gives ------------------------------------------------------------------------------------
def test_drawn_starts_have_the_bits_they_always_had():
    for batch in ((), (3,)):
        size = (*batch, 4, 9)
        wants = {"kaiming": torch.rand(size, generator=seeded_generator("7/w")).mul_(2 / 3).sub_(1 / 3),
                 "gaussian": torch.randn(size, generator=seeded_generator("7/w")).div_(4),
                 "xavier": torch.randn(size, generator=seeded_generator("7/w")).mul_(math.sqrt(2 / 13))}
        for name, want in wants.items():
            adapter = LoRA(rank=4, init=name).build(veneer.method.Shape(12, 9, batch), torch.float32)
            adapter.seed_key = "7/w"
            adapter.initialise(None)
            assert torch.equal(adapter.A, want)
            assert not adapter.B.any()
            assert adapter.start_A is None


@pytest.mark.parametrize("size", [(12, 9), (9, 12)])
@pytest.mark.parametrize("scale", [1.0, 2.5, -0.5])
def test_pissa_takes_the_largest_singular_values(size, scale):
    W, rank = weight(*size), 3
    A, B = start("pissa", W, rank, scale)
    singular = torch.linalg.svdvals(W.double())
    change = scale * (B.double() @ A.double())
    left = torch.linalg.svdvals(W.double() - change)
    assert abs(left[0] / singular[rank] - 1) < 1e-4
    assert torch.allclose(torch.linalg.svdvals(change)[:rank], singular[:rank], rtol=1e-5)
    # the roots of the singular values on both sides, with signs that do not depend on the library
    assert torch.allclose(A @ A.mT, torch.diag(singular[:rank] / abs(scale)).float(), atol=1e-5)
    assert torch.allclose(B.mT @ B, torch.diag(singular[:rank] / abs(scale)).float(), atol=1e-5)
    assert (A.gather(1, A.abs().argmax(1, keepdim=True)) > 0).all()


def test_randomised_pissa_comes_near_and_repeats_itself():
    W = weight(80, 60) * torch.logspace(0, -2, 60)  # a spectrum that falls, as those of trained weights do
    exact = torch.linalg.norm(W - (lambda A, B: B @ A)(*start("pissa", W, 6)))
    over = [float(torch.linalg.norm(W - (lambda A, B: B @ A)(*start(f"pissa_niter_{n}", W, 6))) / exact - 1)
            for n in (0, 2, 8)]
    assert over[0] > over[1] > over[2] - 1e-6
    assert over[0] < 0.2
    assert over[1] < 1e-3
    for first, second in zip(start("pissa_niter_2", W), start("pissa_niter_2", W), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(start("pissa_niter_0", W)[0], start("pissa_niter_0", W, key="0/other")[0])


def test_randomised_svd_of_a_low_rank_matrix_is_exact():
    W = weight(30, 4) @ weight(4, 20)
    U, S, Vh = randomised_svd(W, 4, 0, torch.Generator().manual_seed(0))
    assert torch.allclose((U * S) @ Vh, W, atol=1e-4)
    assert (S[:-1] >= S[1:]).all()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2"])
def test_where_the_weight_has_nothing_left_the_pair_can_still_learn(init):
    W = weight(12, 2) @ weight(2, 9)  # of rank 2
    A, B = start(init, W, rank=4)
    assert torch.allclose(B @ A, W, atol=1e-5)
    assert not B[:, 2:].any()
    assert (A[2:].abs().amax(1) > 0.05).all()
    A, B = start(init, torch.zeros(12, 9), rank=4)
    assert A.isfinite().all()
    assert A.any(1).all()
    assert not B.any()


@pytest.mark.parametrize("size", [(12, 9), (9, 12)])
def test_olora_has_orthonormal_columns(size):
    W, rank = weight(*size), 4
    A, B = start("olora", W, rank, scale=2.0)
    assert torch.allclose(B.mT @ B, torch.eye(rank), atol=1e-6)
    Q, R = torch.linalg.qr(W.double())
    assert torch.allclose((B @ A).double(), Q[:, :rank] @ R[:rank], atol=1e-5)
    assert torch.allclose(A[:, :rank].tril(-1), torch.zeros(rank, rank), atol=1e-5)
    assert (A.diagonal() > 0).all()


@pytest.mark.parametrize("rank", [2, 5, 8, 40])
def test_orthogonal_has_both_factors_and_no_product(rank):
    W = weight(200, 150)
    A, B = start("orthogonal", W, rank)
    assert (B @ A).abs().max() < 1e-6
    assert 0.09 < A.std() < 0.11
    assert 0.09 < B.std() < 0.11
    for mine, others in zip(start("orthogonal", W, rank), start("orthogonal", W, rank, key="0/other"), strict=True):
        assert not torch.equal(mine, others)


def test_torch_functions_fill_each_side():
    A, B = start(TorchInit(a="torch.nn.init.eye_", b="torch.nn.init.ones_"), weight(), 3)
    assert torch.equal(A, torch.eye(3, 9))
    assert torch.equal(B, torch.ones(12, 3))
    A, B = start("torch.nn.init.uniform_", weight(), 3)
    assert torch.equal(A, torch.rand(3, 9, generator=seeded_generator("0/w")))
    assert not B.any()
    assert LoRA(init=BOTH).start_rule.moves
    assert not LoRA(init="torch.nn.init.uniform_").start_rule.moves
    assert not LoRA(init=TorchInit(a="torch.nn.init.zeros_", b="torch.nn.init.normal_")).start_rule.moves


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_each_expert_has_its_own_decomposition(init):
    shape = veneer.method.Shape(12, 9, (2, 2))
    W = torch.stack([weight(seed=i) for i in range(4)]).unflatten(0, (2, 2))
    found = make_init(init).stack(W, shape, 3, 1.0, seeded_generator("0/w"), None)
    assert found.A.shape == (2, 2, 3, 9)
    assert found.B.shape == (2, 2, 12, 3)
    for i in range(2):
        for j in range(2):
            A, B = start(init, W[i, j])
            assert torch.equal(found.A[i, j], A)
            assert torch.equal(found.B[i, j], B)


@pytest.mark.parametrize(("init", "rank", "says"), [
    ("pissa", 9, r"LoRA cannot adapt 'layers.0.up' .*: init='pissa' can give a matrix of 16 × 8 a rank of 8 at most, "
                 r"and rank=9"),
    ("olora", 9, r"init='olora' can give a matrix of 16 × 8 a rank of 8"),
    ("orthogonal", 1, "needs a rank of at least 2"),
])
def test_ranks_that_a_start_cannot_give(init, rank, says):
    with pytest.raises(VeneerError, match=says):
        adapted(init, rank=rank)


def test_weights_that_cannot_be_decomposed_are_named():
    for value in (math.nan, math.inf):
        model = Net()
        model.layers[1].up.weight.data[2, 3] = value
        with pytest.raises(VeneerError, match=r"'layers.1.up': init='pissa' cannot decompose a weight that holds NaN"):
            adapted("pissa", model=model)
    with pytest.raises(VeneerError, match=r"'layers.0.up': init='pissa' divides by the scale, which alpha=0 makes 0"):
        adapted("pissa", alpha=0)


# -- the same bits whatever else there is ---------------------------------------------------------------------
@pytest.mark.parametrize("init", DATA_FREE, ids=str)
def test_the_same_bits_in_any_order_of_creation(init):
    torch.manual_seed(1)
    base = Net()
    rule = LoRA(rank=2, init=init)
    one = veneer.attach(copy.deepcopy(base), {"*.up": rule, "*.down": rule, "lm_head": rule})
    torch.rand(7)  # torch's own generator is not asked
    other = veneer.attach(copy.deepcopy(base), {"lm_head": rule, "layers.1.*": None, "*.down": rule, "*.up": rule})
    mine, theirs = adapter_state(one), adapter_state(other)
    for key, tensor in theirs.items():
        assert torch.equal(tensor, mine[key]), key
    alone = veneer.attach(copy.deepcopy(base), {"*.down": None, "layers.2.down": rule})
    for key, tensor in adapter_state(alone).items():
        assert torch.equal(tensor, mine[key]), key


@pytest.mark.parametrize("init", DATA_FREE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_same_bits_under_any_default_dtype(init, dtype):
    want = adapter_state(adapted(init))
    model = copy.deepcopy(veneer.detach(adapted(init)))
    torch.set_default_dtype(dtype)
    try:
        got = adapter_state(veneer.attach(model, {"*.up": LoRA(rank=2, init=init)}))
    finally:
        torch.set_default_dtype(torch.float32)
    assert want.keys() == got.keys()
    assert all(torch.equal(got[key], tensor) for key, tensor in want.items())


# -- exact start ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrap", [lambda m: m, DoRA], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("init", MOVING, ids=str)
def test_the_output_at_the_start_has_the_base_s_bits(init, dtype, wrap):
    torch.manual_seed(0)
    model = Net().to(dtype).requires_grad_(False)
    want, bits = model(ids()), {k: v.clone() for k, v in model.state_dict().items()}
    method = LoRA(rank=2, alpha=3, init=init, dropout=0.3)
    veneer.attach(model, {"*.up": wrap(method), "*.q_proj": method, "embed": wrap(method), "lm_head": method})
    adapter = model.layers[0].q_proj.adapters["default"]["weight"]
    assert adapter.A.any()
    assert adapter.B.any()
    assert torch.equal(model(ids()), want)
    assert torch.equal(model.eval()(ids()), want)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in bits.items()), "no byte of the base is written"
    veneer.merge(model)
    assert torch.equal(model(ids()), want)
    veneer.unmerge(model)


def test_the_change_is_what_training_moved():
    model = scatter(adapted("pissa", alpha=3))
    adapter = parts(model)
    moved = adapter.B @ adapter.A - adapter.start_B @ adapter.start_A
    assert torch.allclose(adapter.delta(), 1.5 * moved, atol=1e-6)
    form = adapter.form()
    assert form.A.shape == (4, 8)
    assert form.B.shape == (16, 4)
    assert torch.allclose(form.dense(), 1.5 * moved, atol=1e-6)


def test_small_changes_are_not_lost_in_16_bit():
    torch.manual_seed(2)
    layer = nn.Linear(64, 48, bias=False).to(torch.bfloat16)
    model = veneer.attach(nn.Sequential(layer), {"0": LoRA(rank=4, init="pissa")})
    scatter(model, by=1e-4)
    adapter = model[0].adapters["default"]["weight"]
    x = torch.randn(20, 64).to(torch.bfloat16)
    A, B, A0, B0 = (t.double() for t in (adapter.A, adapter.B, adapter.start_A, adapter.start_B))
    change = x.double() @ (B @ A - B0 @ A0).mT
    got = adapter.form().apply(x).double()
    naive = (x @ A.bfloat16().mT @ B.bfloat16().mT - x @ A0.bfloat16().mT @ B0.bfloat16().mT).double()
    assert (got - change).norm() < 0.02 * change.norm()
    assert (naive - change).norm() > change.norm(), "the two products in 16 bit lose all of it"


@pytest.mark.parametrize("residual", ["exact", "base"])
def test_gradients_reach_the_pair_and_not_its_start(residual):
    model = adapted("pissa", residual=residual)
    model(ids()).square().sum().backward()
    adapter = parts(model)
    assert [name for name, _ in adapter.named_parameters()] == ["A", "B"]
    assert adapter.A.grad.any()
    assert adapter.B.grad.any()
    assert adapter.start_A.grad is None
    assert adapter.fast_parameters() == ["B"]
    assert len(veneer.trainable(model)) == 6
    groups = lora_plus_groups(model, 1e-3, ratio=4)
    assert any(adapter.B is p for g in groups if g["lr"] == 4e-3 for p in g["params"])


def test_lora_fa_wants_the_pair_itself():
    with pytest.raises(VeneerError, match=r'with residual="base" where their start is not zero'):
        lora_fa(adapted("pissa"), lr=1e-3)
    model = adapted("pissa", residual="base")
    optimizer = lora_fa(model, lr=1e-3)
    assert [p for g in optimizer.param_groups for p in g["params"]] == [
        p for k, p in model.named_parameters() if k.endswith(".B")]


@pytest.mark.parametrize("wrap", [lambda m: m, DoRA], ids=["lora", "dora"])
def test_to_lora_makes_it_plain(wrap):
    torch.manual_seed(0)
    model = Net(width=32)
    rule = LoRA(rank=2, alpha=3, rank_stabilized=True, init="pissa")
    veneer.attach(model, {"*.up": wrap(rule)})
    want = scatter(model)(ids())
    assert veneer.to_lora(model).ranks == {f"layers.{i}.up": 4 for i in range(3)}
    assert torch.equal(model(ids()), want)
    assert not any("start_" in key for key in model.state_dict())
    veneer.to_lora(model, 3)
    assert not torch.equal(model(ids()), want)


def test_to_lora_leaves_a_pair_whose_start_is_in_the_base():
    model = scatter(adapted("pissa", residual="base"))
    want, method = model(ids()), parts(model).method
    assert veneer.to_lora(model).ranks["layers.0.up"] == 2
    assert parts(model).method == method
    assert veneer.to_lora(model, to="copy").ranks["layers.0.up"] == 2
    assert torch.equal(model(ids()), want)


def test_copies_and_state_dicts_take_the_start_along():
    model = scatter(adapted("pissa"))
    want = model(ids())
    assert torch.equal(copy.deepcopy(model)(ids()), want)
    keys = [k.rpartition(".")[2] for k in model.state_dict() if ".layers.0.up.adapters" in f".{k}"]
    assert keys == ["A", "B", "start_A", "start_B"]
    other = adapted("pissa", model=Net(), residual="exact")
    assert not torch.equal(other(ids()), want)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids()), want)


def test_a_cast_of_the_model_keeps_the_start_exact():
    model = adapted("pissa").to(torch.bfloat16)
    adapter = parts(model)
    assert adapter.start_A.dtype == torch.bfloat16
    assert torch.equal(model(ids()), veneer.detach(copy.deepcopy(model))(ids()))


def test_dora_starts_at_the_base_s_own_lengths():
    torch.manual_seed(0)
    model = Net()
    for residual in ("exact", "base"):
        lengths = model.layers[0].up.weight.detach().norm(dim=1)
        wrapped = veneer.attach(copy.deepcopy(model), {"*.up": DoRA(LoRA(rank=2, init="pissa", residual=residual))})
        adapter = parts(wrapped)
        assert torch.allclose(adapter.magnitude, lengths, rtol=1e-5)
        assert torch.allclose(wrapped(ids()), model(ids()), atol=1e-5)


def test_on_the_meta_device_it_starts_at_the_first_use():
    torch.manual_seed(0)
    real = Net()
    with torch.device("meta"):
        model = Net()
    veneer.attach(model, {"*.up": LoRA(rank=2, init="pissa")})
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict(), strict=False)
    assert torch.equal(model(ids()), real(ids()))
    want = adapter_state(veneer.attach(real, {"*.up": LoRA(rank=2, init="pissa")}))
    assert all(torch.equal(t, want[k]) for k, t in adapter_state(model).items())


# -- the classic form: the start is taken out of the base ------------------------------------------------------
@pytest.mark.parametrize("init", MOVING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_base_writes_the_rest_over_the_base(init, dtype):
    torch.manual_seed(0)
    model = Net().to(dtype).requires_grad_(False)
    base, want, W = copy.deepcopy(model), model(ids()), model.layers[0].up.weight.clone()
    adapted(init, model=model, residual="base", alpha=3)
    adapter = parts(model)
    assert torch.equal(adapter.A, adapter.start_A)
    rest = (W.float() - 1.5 * (adapter.B @ adapter.A)).to(dtype)
    assert torch.equal(model.layers[0].up.weight, rest)
    assert adapter.form().A is adapter.A
    with torch.no_grad():
        assert_as_good(model(ids()), want, base.double()(ids()), dtype)


def test_residual_base_refuses_a_weight_with_other_adapters():
    model = adapted("kaiming")
    with pytest.raises(VeneerError, match=r"rewrites the base weight 'layers.0.up', on which another adapter lies"):
        veneer.attach(model, {"*.up": LoRA(rank=2, init="pissa", residual="base")}, name="second")
    veneer.attach(model, {"*.up": LoRA(rank=2, init="pissa")}, name="second")  # this one writes nothing


@pytest.mark.parametrize("method", [LoRA(rank=2, init="pissa", residual="base"), DoRA(LoRA(rank=2, init="loftq"))])
def test_a_start_that_rewrites_the_weight_cannot_wait_for_it(method):
    with torch.device("meta"):
        model = Net()
    with pytest.raises(VeneerError, match=r"'layers.0.up', which is on the meta device.*load the base weights first"):
        veneer.attach(model, {"*.up": method})
    assert not any("adapters" in key for key, _ in model.named_parameters())


@pytest.mark.parametrize("method", [LoRA(rank=4, init="pissa", residual="base"), DoRA(LoRA(rank=4)),
                                    DoRA(LoRA(rank=4, init="olora", residual="base"))], ids=str)
def test_autocast_does_not_reach_a_start(method):
    torch.manual_seed(0)
    plain = Net()
    inside, later = copy.deepcopy(plain), None
    if not method.moves_base:
        with torch.device("meta"):
            later = Net()
        veneer.attach(later, {"*.up": method})
        later.to_empty(device="cpu").load_state_dict(plain.state_dict(), strict=False)
    veneer.attach(plain, {"*.up": method})
    with torch.autocast("cpu", torch.bfloat16):
        veneer.attach(inside, {"*.up": method})
        if later is not None:
            later(ids())
    for model in (inside, later):
        if model is not None:
            state = model.state_dict()
            assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())


def test_a_start_without_a_product_moves_nothing():
    for init in ("kaiming", "orthogonal"):
        method = LoRA(init=init, residual="base")
        assert not method.moves_base
        assert isinstance(method.start_rule, Init)
