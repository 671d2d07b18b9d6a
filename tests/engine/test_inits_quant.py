"""LoftQ and SVDQuant: what is left of the quantisation error, on matrices and on models."""

import itertools

import pytest
import torch
from torch import nn

import veneer
from veneer import LoRA
from veneer.inits import LoftQ, SVDQuant, make_init
from veneer.inits.quant import alternate, nearest_pair
from veneer.method import VeneerError, VeneerWarning
from veneer.storage.normal_float import encode
from veneer.storage.packed import PackedLinear

SIZES = [(96, 64), (64, 96), (48, 48)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def weight(out=96, in_=64, seed=0):
    """A few large singular values over noise, as trained weights have."""
    g = generator(seed)
    return 0.02 * (torch.randn(out, in_, generator=g)
                   + torch.randn(out, 6, generator=g) @ torch.randn(6, in_, generator=g))


def quantize(W):
    return encode(W, 4, 64, double=False)


def begun(init, W, rank=8, scale=2.0):
    return init.factors(W, tuple(W.shape), rank, scale, generator(), None)


def left(init, W, rank=8, scale=2.0):
    started = begun(init, W, rank, scale)
    return float((W - started.base - scale * started.B @ started.A).norm())


def product(pair, scale):
    return scale * pair[1] @ pair[0]


# -- the nearest pair ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, 2.5, -0.5])
def test_the_pair_is_the_nearest_of_its_rank(size, scale):
    M = weight(*size)
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    A, B = nearest_pair(M, 5, scale, generator())
    assert A.shape == (5, size[1])
    assert B.shape == (size[0], 5)
    best = (U[:, :5] * S[:5] @ Vh[:5]).float()
    assert torch.allclose(product((A, B), scale), best, atol=2e-5 * float(S[0]))
    assert torch.allclose(A.norm(dim=1), (S[:5] / abs(scale)).sqrt().float(), rtol=1e-4)  # half on each side
    assert torch.allclose(B.norm(dim=0), A.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
def test_the_pair_of_very_small_and_very_large_numbers(magnitude):
    M = weight().double()
    pair = nearest_pair((M * magnitude).float(), 8, 1.0, generator())
    expected = nearest_pair(M.float(), 8, 1.0, generator())
    assert torch.allclose((product(pair, 1.0).double() / magnitude).float(), product(expected, 1.0), atol=1e-5)


def test_what_has_no_singular_value_starts_as_kaiming_does():
    A, B = nearest_pair(torch.zeros(12, 10), 3, 1.0, generator())
    assert (B == 0).all()
    assert torch.equal(A, make_init("kaiming").factors(None, (12, 10), 3, 1.0, generator(), None).A)
    M = weight(12, 10)
    A, B = nearest_pair(M, 14, 1.0, generator())
    assert torch.allclose(B @ A, M, atol=1e-5)
    assert (B[:, 10:] == 0).all()
    assert A[10:].abs().min() > 0


def test_autocast_does_not_reach_in():
    W = weight()
    expected = begun(LoftQ(iterations=2), W)
    with torch.autocast("cpu", torch.bfloat16):
        found = begun(LoftQ(iterations=2), W)
    assert torch.equal(found.A, expected.A)
    assert torch.equal(found.base, expected.base)


# -- LoftQ --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("first", ["quantize", "svd"])
def test_loftq_lies_below_plain_quantisation_and_never_rises(size, bits, first):
    W = weight(*size)
    alone = float((W - encode(W, bits, double=False).decode()).norm())
    errors = [left(LoftQ(bits=bits, iterations=n, first=first), W) for n in (1, 2, 3, 5, 8)]
    assert errors[0] < alone
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_the_best_step_is_kept_where_a_later_one_is_worse():
    W = weight()
    steps = list(alternate(W, 8, 1.0, quantize, 40, generator()))
    errors = [step.error for step in steps]
    assert min(errors) < errors[-1]  # else this would show nothing
    assert left(LoftQ(iterations=40), W, scale=1.0) == pytest.approx(min(errors), rel=1e-4)


def test_steps_tell_the_error_they_leave():
    W = weight()
    for first in ("quantize", "svd"):
        for step in alternate(W, 4, -3.0, quantize, 3, generator(), first):
            true = (W - step.packed.decode() + 3.0 * step.B @ step.A).norm()
            assert step.error == pytest.approx(float(true), rel=1e-4)
            assert torch.equal(step.base, step.packed.decode())


def test_quantising_first_is_one_svd_of_the_error():
    W = weight()
    started = begun(LoftQ(), W)
    Q = quantize(W).decode()
    assert torch.equal(started.base, Q)
    assert torch.allclose(product(started, 2.0), product(nearest_pair(W - Q, 8, 2.0, generator()), 2.0), atol=1e-6)


def test_the_pair_first_is_the_weights_own_and_the_base_what_it_leaves():
    W = weight()
    started = begun(LoftQ(first="svd"), W)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(product(started, 2.0), U[:, :8] * S[:8] @ Vh[:8], atol=1e-5)
    assert torch.equal(started.base, quantize(W - product(started, 2.0)).decode())
    assert left(LoftQ(first="svd", iterations=3), W) < left(LoftQ(iterations=3), W)


@pytest.mark.parametrize("scale", [0.25, 4.0, -1.0])
def test_the_scale_is_divided_out(scale):
    """PEFT's LoftQ is right for a scale of 1 alone."""
    W = weight()
    assert left(LoftQ(iterations=2), W, scale=scale) == pytest.approx(left(LoftQ(iterations=2), W, scale=1.0), rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"double": True}, {"bits": 8, "block": 32}])
def test_the_packed_base_stands_for_the_same_numbers(options):
    started = begun(LoftQ(**options), weight())
    assert torch.equal(started.packed.decode(), started.base)
    assert (started.packed.outer is not None) == bool(options.get("double"))
    assert started.packed.bits == options.get("bits", 4)
    assert begun(LoftQ(packed=False), weight()).packed is None


def test_the_weight_is_left_alone_and_the_start_is_the_same_each_time():
    W = weight()
    before = W.clone()
    first, second = begun(LoftQ(iterations=3), W), begun(LoftQ(iterations=3), W)
    assert torch.equal(W, before)
    assert torch.equal(first.A, second.A)
    assert torch.equal(first.B, second.B)
    assert torch.equal(first.base, second.base)


# -- SVDQuant -----------------------------------------------------------------------------------------------
def test_svdquant_is_one_step_of_loftq():
    W = weight()
    ours, theirs = begun(SVDQuant(bits=4), W), begun(LoftQ(), W)
    assert torch.equal(ours.A, theirs.A)
    assert torch.equal(ours.B, theirs.B)
    assert torch.equal(ours.base, theirs.base)
    assert torch.equal(ours.packed.codes, theirs.packed.codes)


def test_svdquant_without_a_quantiser_starts_at_zero_and_says_what_to_do():
    model, x = nn.Sequential(nn.Linear(16, 12)), torch.randn(3, 16, generator=generator())
    before = model(x)
    with pytest.warns(VeneerWarning, match=r"no quantiser is known.*SVDQuant\(bits=4\).*replace_lora_weights_loftq"):
        veneer.attach(model, LoRA(rank=4, init="svdquant"))
    assert torch.equal(model(x), before)
    state = {key: tensor for key, tensor in model.state_dict().items() if "adapters" in key}
    assert sorted(key.rsplit(".", 1)[-1] for key in state) == ["A", "B"]  # no starting pair to carry
    plain = veneer.attach(nn.Sequential(nn.Linear(16, 12)), LoRA(rank=4)).state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in state.items())


# -- on models ----------------------------------------------------------------------------------------------
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 96), nn.Linear(96, 32)
        with torch.no_grad():
            self.first.weight.copy_(weight(96, 64))
            self.last.weight.copy_(weight(32, 96, seed=1))
            self.first.bias.zero_()
            self.last.bias.zero_()

    def forward(self, x):
        return self.last(torch.relu(self.first(x)))


@pytest.mark.parametrize("init", [
    "loftq", LoftQ(iterations=5), {"init": "loftq", "first": "svd"}, LoftQ(bits=8, double=True), SVDQuant(bits=4),
    LoftQ(packed=False)])
def test_a_model_started_so_is_nearer_than_a_quantised_one(init):
    model, quantised = Net(), Net()
    x = torch.randn(50, 64, generator=generator())
    before = model(x).detach()
    veneer.attach(model, LoRA(rank=8, alpha=20, init=init))
    veneer.quantize(quantised, f"nf{getattr(init, 'bits', 4)}", double=getattr(init, "double", False))
    found, plain = (float((m(x) - before).detach().norm()) for m in (model, quantised))
    assert 0 < found < 0.97 * plain
    kept = isinstance(init, LoftQ) and not init.packed
    assert isinstance(model.first, PackedLinear) != kept
    if kept:
        assert torch.equal(model.first.weight, encode(model.first.weight, double=False).decode())


def test_in_16_bits_the_pair_still_fits():
    model = Net().bfloat16()
    x = torch.randn(50, 64, generator=generator())
    before = Net()(x).detach()
    plain = Net().bfloat16()
    veneer.quantize(plain, "nf4", double=False)
    veneer.attach(model, LoRA(rank=16, init=LoftQ(iterations=3)))
    found, other = (float((m(x.bfloat16()).float() - before).detach().norm()) for m in (model, plain))
    assert found < 0.9 * other


def test_it_trains_and_the_base_stays():
    model = Net()
    veneer.attach(model, LoRA(rank=8, init="loftq"))
    codes, x = model.first.weight.clone(), torch.randn(8, 64, generator=generator())
    model(x).square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 4
    assert all(bool(grad.any()) for grad in grads)
    assert torch.equal(model.first.weight, codes)


def test_what_holds_no_packed_weight_takes_it_as_numbers():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Embedding(40, 24))
    kernel = model[0].weight.detach().clone()
    veneer.attach(model, {"*": LoRA(rank=4, init="loftq")})
    found = model[0].weight.detach()
    assert not torch.equal(found, kernel)
    assert torch.equal(found.flatten(1), encode(kernel.flatten(1), double=False).decode())


def test_a_base_that_is_quantised_already_is_warned_of():
    model = Net()
    veneer.quantize(model, "nf4", double=False)
    with pytest.warns(VeneerWarning, match="LoftQ: quantising changes nothing.*replace_lora_weights_loftq"):
        veneer.attach(model, LoRA(rank=8, init="loftq"))


def test_a_weight_of_zeros_starts_without_a_word():
    model = nn.Sequential(nn.Linear(16, 12))
    nn.init.zeros_(model[0].weight)
    veneer.attach(model, LoRA(rank=4, init="loftq"))
    assert torch.equal(model(torch.ones(2, 16)), model[0].bias.expand(2, -1))


# -- refusals -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("init", "said"), [
    ({"init": "loftq", "bits": 3}, "LoftQ: bits must be one of 2, 4, 8, got 3"),
    ({"init": "loftq", "bit": 4}, "no option 'bit'; did you mean 'bits'"),
    ({"init": "loftq", "iterations": 0}, "LoftQ: iterations must be a whole number of at least 1, got 0"),
    ({"init": "loftq", "first": "quantise"}, "LoftQ: unknown first 'quantise'; did you mean 'quantize'"),
    ({"init": "loftq", "packed": 1}, "LoftQ: packed must be True or False, got 1"),
    ({"init": "loftq", "double": "yes"}, "LoftQ: double must be True or False, got 'yes'"),
    ({"init": "loftq", "block": 63}, "LoftQ: a block must fill whole bytes, and block=63 at 4 bits does not"),
    ({"init": "svdquant", "bits": 5}, "SVDQuant: bits must be one of 2, 4, 8, got 5"),
    ({"init": "svdquant", "block": -1}, "SVDQuant: block must be a whole number of at least 1, got -1"),
    ({"init": "svdquant", "packed": None}, "SVDQuant: packed must be True or False, got None"),
])
def test_options_that_cannot_be(init, said):
    with pytest.raises(VeneerError, match=said):
        LoRA(init=init)


@pytest.mark.parametrize("init", [LoftQ(), SVDQuant(bits=4)])
def test_a_scale_of_zero_is_refused(init):
    with pytest.raises(VeneerError, match=r"with a scale of 0 \(alpha=0\) the pair cannot hold a part of the weight"):
        veneer.attach(Net(), LoRA(alpha=0, init=init))


def test_a_weight_with_nan_is_refused_with_its_place():
    model = Net()
    with torch.no_grad():
        model.last.weight[3, 7] = torch.nan
    with pytest.raises(VeneerError, match=r"holds nan at \(3, 7\)"):
        veneer.attach(model, LoRA(init="loftq"))
