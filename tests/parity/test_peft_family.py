"""The family against PEFT's layers: the same numbers, gradients, counts of parameters and random bases."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import veneer
from veneer import AdaLoRA, LoHa, LoKr, RandLoRA, VBLoRA, VeRA
from veneer.method import Adapter, Method
from veneer.methods.lokr import split
from veneer.weights import Weight

from .compare import (
    BAR,
    CONV1D,
    CONV1D_OF_TRANSFORMERS,
    CONV2D,
    LAYERS,
    LINEAR,
    assert_equal_layers,
    attach,
    copy_into,
    layers,
    relative,
)

peft = pytest.importorskip("peft", reason="the family is compared with PEFT's layers")
HadaWeightCP = pytest.importorskip("peft.tuners.loha.layer").HadaWeightCP

MATRICES = LINEAR + CONV1D_OF_TRANSFORMERS
RENAMED = {"vera_lambda_d": "d", "vera_lambda_b": "b", "vblora_logits_A": "logits_A", "vblora_logits_B": "logits_B",
           "vblora_vector_bank": "bank", "randlora_lambda": "lambda_", "randlora_gamma": "gamma", "lora_A": "A",
           "lora_E": "E", "lora_B": "B"}


# -- how many numbers each method trains, from the sizes alone ----------------------------------------------
@dataclass(frozen=True)
class Size:
    """Of a weight: outputs, input channels that one output reads, positions of the kernel."""

    out: int
    channels: int
    positions: int

    @property
    def in_(self) -> int:
        return self.channels * self.positions


def loha_count(r: int, effective: bool) -> Callable[[Size], int]:
    def count(s: Size) -> int:
        if effective and s.positions > 1:
            return 2 * r * (s.out + s.channels) + 2 * r * r * s.positions
        return 2 * r * (s.out + s.in_)

    return count


def lokr_count(r: int, factor: int = -1, both: bool = False, effective: bool = False) -> Callable[[Size], int]:
    def count(s: Size) -> int:
        (o1, o2), (i1, i2) = pair(s.out, factor), pair(s.channels, factor)
        first = r * (o1 + i1) if both and 2 * r < max(o1, i1) else o1 * i1
        if 2 * r >= max(o2, i2):
            return first + o2 * i2 * s.positions
        if effective and s.positions > 1:
            return first + r * (o2 + i2) + r * r * s.positions
        return first + r * (o2 + i2 * s.positions)

    return count


def pair(size: int, factor: int) -> tuple[int, int]:
    """The factor and the rest where it divides the size, else the largest divisor up to it and not above the rest."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    small = max(m for m in range(1, size + 1) if size % m == 0 and m <= size // m and (factor < 0 or m <= factor))
    return small, size // small


def randlora_count(r: int) -> Callable[[Size], int]:
    def count(s: Size) -> int:
        bases = math.ceil(min(s.out, s.in_) / r)
        return r * bases + bases * min(s.out, s.in_)

    return count


# -- the cases ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """One method with one set of options: ours, PEFT's, and the number of trained parameters of a weight."""

    method: Method
    config: Callable[..., peft.PeftConfig]
    names: tuple[str, ...]
    count: Callable[[Size], int]
    shared: int = 0
    spread: float = 0.5


def _loha(names: tuple[str, ...], rank: int, alpha: float, effective: bool = False, spread: float = 0.5) -> Case:
    return Case(LoHa(rank=rank, alpha=alpha, effective_conv=effective),
                partial(peft.LoHaConfig, r=rank, alpha=alpha, use_effective_conv2d=effective), names,
                loha_count(rank, effective), spread=spread)


def _lokr(names: tuple[str, ...], rank: int, alpha: float, both: bool = False, factor: int = -1,
          effective: bool = False) -> Case:
    return Case(LoKr(rank=rank, alpha=alpha, decompose_both=both, decompose_factor=factor, effective_conv=effective),
                partial(peft.LoKrConfig, r=rank, alpha=alpha, decompose_both=both, decompose_factor=factor,
                        use_effective_conv2d=effective), names, lokr_count(rank, factor, both, effective), spread=1.0)


def _randlora(rank: int, alpha: float, sparsity: str | None = None) -> Case:
    return Case(RandLoRA(rank=rank, alpha=alpha, seed=5, sparsity=sparsity),
                partial(peft.RandLoraConfig, r=rank, randlora_alpha=alpha, projection_prng_key=5,
                        sparse=sparsity == "sparse", very_sparse=sparsity == "very_sparse"),
                MATRICES, randlora_count(rank))


CASES = {
    "loha": _loha(LINEAR + CONV1D + CONV2D, rank=3, alpha=6),
    "loha-1": _loha(LINEAR + CONV1D + CONV2D, rank=1, alpha=1, spread=1.0),  # small enough for a pair of factors
    "loha-conv": _loha(CONV1D + CONV2D, rank=3, alpha=6, effective=True),
    "lokr": _lokr(LINEAR + CONV1D + CONV2D, rank=1, alpha=2),
    # without Conv1d, where PEFT puts a whole W₂ together otherwise: see below
    "lokr-whole": _lokr(LINEAR + CONV2D, rank=8, alpha=8),
    "lokr-both": _lokr(LINEAR + CONV1D + CONV2D, rank=1, alpha=2, both=True),
    "lokr-factor": _lokr(LINEAR + CONV2D, rank=2, alpha=2, factor=3),
    "lokr-conv": _lokr(CONV2D, rank=1, alpha=1, effective=True),  # PEFT's raises on Conv1d, from torch.kron
    "lokr-conv-factor": _lokr(CONV1D + CONV2D, rank=2, alpha=2, factor=2, effective=True),
    "vera": Case(VeRA(rank=40, seed=5), partial(peft.VeraConfig, r=40, projection_prng_key=5), MATRICES,
                 lambda s: 40 + s.out, spread=0.3),
    "vblora": Case(VBLoRA(rank=3, num_vectors=11, vector_length=4, topk=3),
                   partial(peft.VBLoRAConfig, r=3, num_vectors=11, vector_length=4, topk=3), MATRICES,
                   lambda s: 11 * 3 * (s.in_ // 4 + s.out // 4), shared=11 * 4),
    "randlora": _randlora(rank=5, alpha=2),
    "randlora-sparse": _randlora(rank=4, alpha=2, sparsity="sparse"),
    "randlora-very-sparse": _randlora(rank=12, alpha=4, sparsity="very_sparse"),  # some weights have one base
    # PEFT divides by the rank plus 1e-5: at rank 4 that is a relative 2.5e-6, and part of the bar
    "adalora": Case(AdaLoRA(init_r=4, target_r=2, total_step=10, alpha=4),
                    partial(peft.AdaLoraConfig, init_r=4, target_r=2, total_step=10, lora_alpha=4),
                    MATRICES + CONV2D[:3], lambda s: 4 * (s.in_ + s.out + 1)),
}
CELLS = [(case, layer) for case, c in CASES.items() for layer in c.names]


@pytest.fixture(autouse=True)
def _as_meant(monkeypatch):
    """Two things of PEFT's that depend on the machine or are wrong."""
    # It draws RandLoRA's bases in bfloat16 only where accelerate says that some device has it, and in float16
    # elsewhere. Ours are always bfloat16, which torch has on every CPU.
    monkeypatch.setattr("peft.tuners.randlora.model.is_bf16_available", lambda *args, **kwargs: True)
    # The backward that is written by hand for LoHa's decomposed kernels takes the other factor's core for the
    # gradients of w1_a and w2_a (see below): its own forward is differentiated by autograd instead.
    forward = partial(HadaWeightCP.forward, SimpleNamespace(save_for_backward=lambda *tensors: None))
    monkeypatch.setattr("peft.tuners.loha.layer.make_weight_cp", forward)


def peft_model(config: Callable[..., peft.PeftConfig], model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D and Linear side by side
        return peft.get_peft_model(model, config(target_modules=[name for name, _ in model.named_children()]))


def renamed(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters of one of PEFT's layers by our names."""
    found = {}
    for name, param in layer.named_parameters():
        own = name.removesuffix(".default")
        if param.requires_grad:
            found[RENAMED.get(own, own.removeprefix("hada_").removeprefix("lokr_"))] = param
    return found


@dataclass(frozen=True)
class Pair:
    """A PEFT model and ours with the same trained values, and the bare layers."""

    base: nn.ModuleDict
    theirs: nn.Module
    ours: nn.ModuleDict
    adapters: dict[str, tuple[Weight, Adapter]]

    def their(self, name: str) -> nn.Module:
        return self.theirs.base_model.model[name]


@cache
def pair_of(case: str) -> Pair:
    c = CASES[case]
    ours, theirs = layers(c.names), peft_model(c.config, layers(c.names))
    found = Pair(layers(c.names), theirs, ours, attach(ours, c.method))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in theirs.parameters():
            if param.requires_grad:
                param.copy_(torch.randn(param.shape, generator=generator) * c.spread)
    for name, (_, adapter) in found.adapters.items():
        copy_into(adapter, renamed(found.their(name)))
    return found


# -- numbers ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("case", "layer"), CELLS)
def test_outputs_and_gradients(case, layer):
    both = pair_of(case)
    their = both.their(layer)
    assert_equal_layers(both.base[layer], their, renamed(their), both.ours[layer], both.adapters[layer][1],
                        LAYERS[layer].input)


@pytest.mark.parametrize(("case", "layer"), CELLS)
def test_changes_of_the_weight(case, layer):
    both = pair_of(case)
    weight, adapter = both.adapters[layer]
    with torch.no_grad():
        want = both.their(layer).get_delta_weight("default")
        assert relative(weight.layout.stored(adapter.delta()), want) < BAR


@pytest.mark.parametrize("case", CASES)
def test_counts(case):
    c, both = CASES[case], pair_of(case)
    total = c.shared
    for name, (weight, adapter) in both.adapters.items():
        positions = torch.Size(weight.layout.shape.kernel).numel()
        count = c.count(Size(weight.layout.shape.out, weight.layout.shape.in_ // positions, positions))
        assert sum(p.numel() for n, p in adapter.named_parameters() if not n.startswith("shared.")) == count, name
        total += count
    assert sum(p.numel() for p in both.theirs.parameters() if p.requires_grad) == total
    assert sum(p.numel() for p in veneer.trainable(both.ours)) == total
    rules = {f"{name}.weight": c.method for name in c.names}
    assert veneer.plan(layers(c.names), rules).trainable_parameters == total


def test_how_sizes_are_split():
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 300):
        for factor in (-1, *range(1, 40)):
            assert split(size, factor) == factorization(size, factor) == pair(size, factor)


def test_a_whole_second_factor_on_conv1d():
    """PEFT's Conv1d multiplies W₁ with a whole W₂ along other axes than its Conv2d does. We do on both as Conv2d."""
    torch.manual_seed(0)
    flat, square = nn.Conv1d(12, 16, 3), nn.Conv2d(12, 16, (3, 1))
    base = nn.ModuleDict({"flat": flat, "square": square})
    theirs = peft_model(partial(peft.LoKrConfig, r=8, alpha=8), base)
    with torch.no_grad():
        values = {name: torch.randn(p.shape) for name, p in renamed(theirs.base_model.model["square"]).items()}
        changes = []
        for name in ("flat", "square"):
            layer = theirs.base_model.model[name]
            for key, param in renamed(layer).items():
                param.copy_(values[key].reshape(param.shape))
            changes.append(layer.get_delta_weight("default").reshape(16, 12, 3))
        ours = nn.ModuleDict({"flat": nn.Conv1d(12, 16, 3)})
        (weight, adapter), = attach(ours, LoKr(rank=8, alpha=8)).values()
        copy_into(adapter, values)
        mine = weight.layout.stored(adapter.delta())
    assert relative(mine, changes[1]) < BAR
    assert relative(mine, changes[0]) > 0.5


def test_gradients_of_a_decomposed_loha_are_slopes(monkeypatch):
    """Of PEFT's own function in fp64, by central differences along every parameter."""
    monkeypatch.setattr("peft.tuners.loha.layer.make_weight_cp", HadaWeightCP.apply)
    base = layers(("conv2d",)).double()
    (_, adapter), = attach(base, CASES["loha-conv"].method).values()
    theirs = peft_model(CASES["loha-conv"].config, layers(("conv2d",)).double()).double()
    layer = theirs.base_model.model["conv2d"]
    with torch.no_grad():
        for param in renamed(layer).values():
            param.normal_()
    copy_into(adapter, renamed(layer))
    x = torch.randn(LAYERS["conv2d"].input, dtype=torch.float64)
    base["conv2d"](x).square().sum().backward()
    for name, param in renamed(layer).items():
        way = torch.randn_like(param)
        values = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                param.add_(way, alpha=step)
                values.append(float(layer(x).square().sum()))
            param.add_(way, alpha=1e-5)
        slope = float((adapter.get_parameter(name).grad * way).sum())
        assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6), name


# -- random bases -----------------------------------------------------------------------------------------------
def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """`want` is fp32: PEFT's layers hold what was drawn in bfloat16 in the dtype of the base."""
    assert got.shape == want.shape
    assert torch.equal(got.float().contiguous().view(torch.int32), want.contiguous().view(torch.int32))


@pytest.mark.parametrize("rank", [1, 7, 64])
@pytest.mark.parametrize("seed", [0, 3, 2**40])
@pytest.mark.parametrize(("sizes", "bases"), [(((24, 8), (12, 20)), (20, 24)), (((33, 33),), (33, 33)),
                                              (((5, 130), (130, 6)), (130, 130))])
@pytest.mark.parametrize("kind", ["vera", "randlora", "sparse", "very_sparse"])
def test_bases_have_the_bits_of_pefts(kind, sizes, bases, seed, rank):
    def model() -> nn.ModuleDict:
        return nn.ModuleDict({f"l{i}": nn.Linear(*size) for i, size in enumerate(sizes)})

    if kind == "vera":
        method, prefix = VeRA(rank=rank, seed=seed), "vera"
        config = partial(peft.VeraConfig, r=rank, projection_prng_key=seed)
    else:
        method, prefix = RandLoRA(rank=rank, seed=seed, sparsity=None if kind == "randlora" else kind), "randlora"
        flags = {} if kind == "randlora" else {kind: True}
        config = partial(peft.RandLoraConfig, r=rank, projection_prng_key=seed, **flags)
    theirs, ours = peft_model(config, model()), model()
    adapters = attach(ours, method)
    (settled,) = {adapter.method for _, adapter in adapters.values()}
    assert settled.bases == bases
    shared = adapters["l0"][1].shared_state()
    assert_same_bits(shared.A, getattr(theirs.base_model, f"{prefix}_A")["default"])
    assert_same_bits(shared.B, getattr(theirs.base_model, f"{prefix}_B")["default"])


# -- starts -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("case", "method", "config"), [
    ("linear", LoHa(rank=8), partial(peft.LoHaConfig, r=8, alpha=8)),
    ("conv2d", LoHa(rank=8, effective_conv=True),
     partial(peft.LoHaConfig, r=8, alpha=8, use_effective_conv2d=True)),
    ("linear", LoKr(rank=3, decompose_both=True),
     partial(peft.LoKrConfig, r=3, alpha=3, decompose_both=True)),
    ("linear", LoKr(rank=3, init="lycoris"), partial(peft.LoKrConfig, r=3, alpha=3, init_weights="lycoris")),
    ("conv2d", LoKr(rank=3, effective_conv=True),
     partial(peft.LoKrConfig, r=3, alpha=3, use_effective_conv2d=True)),
    ("linear", VeRA(d_initial=0.3), partial(peft.VeraConfig, d_initial=0.3)),
    ("linear", VBLoRA(vector_length=16), partial(peft.VBLoRAConfig, vector_length=16)),
    ("linear", RandLoRA(), peft.RandLoraConfig),
    ("linear", AdaLoRA(), partial(peft.AdaLoraConfig, total_step=10)),
])
def test_starts(case, method, config):
    """Of one distribution: the same zeros and constants, and about the same mean square and largest value."""
    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"l": nn.Linear(96, 160) if case == "linear" else nn.Conv2d(96, 160, 3)})

    torch.manual_seed(0)
    theirs = renamed(peft_model(config, model()).base_model.model["l"])
    (_, adapter), = attach(model(), method).values()
    own = {name.removeprefix("shared."): p.detach() for name, p in adapter.named_parameters()}
    assert set(own) == set(theirs)
    for name, want in theirs.items():
        want, got = want.detach().flatten(), own[name].flatten()
        if bool((want == want[0]).all()):
            assert torch.equal(got, want), name
        else:
            assert float(got.std() / want.std()) == pytest.approx(1, abs=8 / math.sqrt(want.numel())), name
            assert float(got.abs().max() / want.abs().max()) == pytest.approx(1, abs=0.25), name
