"""Adapters over a packed base: the numbers of a dense one, without its memory."""

from __future__ import annotations

import copy
import gc
import io
import json
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import veneer
from veneer import DoRA, Full, LoHa, LoKr, LoRA, RandLoRA, VBLoRA, VeRA
from veneer.io.fingerprint import Fingerprint, compare, fingerprint, held_otherwise
from veneer.method import VeneerError
from veneer.storage.packed import PackedLinear
from veneer.storage.recent import RECENT, keep_dense
from veneer.weights import scan

METHODS = {
    "lora": LoRA(rank=4), "dropout": LoRA(rank=4, dropout=0.3), "bias": LoRA(rank=4, bias=True),
    "dora": DoRA(LoRA(rank=4)), "loha": LoHa(rank=2), "lokr": LoKr(rank=4), "vera": VeRA(rank=8),
    "vblora": VBLoRA(rank=2, vector_length=8, num_vectors=16), "randlora": RandLoRA(rank=8), "full": Full(),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32, bias=False)
        self.lm_head = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(x + self.down(torch.tanh(self.up(x))))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def packed_and_dense(dtype: torch.dtype = torch.float32, scheme: str = "nf4") -> tuple[Net, Net]:
    """A packed net, and a dense one that holds what the packed one is read as."""
    packed, dense = net(dtype), net(dtype)
    veneer.quantize(packed, scheme)
    for name in ("up", "down"):
        getattr(dense, name).weight.data = getattr(packed, name).read()
    return packed, dense


def shake(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapters." in name:
                p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))


def test_quantize_leaves_head_and_reports() -> None:
    model = net()
    report = veneer.quantize(model, "nf4")
    assert isinstance(model.up, PackedLinear)
    assert isinstance(model.down, PackedLinear)
    assert type(model.lm_head) is nn.Linear
    assert report.weights == 2
    assert report.bytes_after < report.bytes_before / 4
    assert "2 weights held as nf4" in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_bare_packed_layer_is_the_dense_one(dtype: torch.dtype, grad: bool) -> None:
    packed, dense = packed_and_dense(dtype)
    x = torch.randn(5, 32, dtype=dtype)
    xs = [x.clone().requires_grad_(grad) for _ in range(2)]
    ys = [model(x) for model, x in zip((packed, dense), xs, strict=True)]
    assert torch.equal(*ys)
    if grad:
        for y in ys:
            y.square().sum().backward()
        assert torch.equal(xs[0].grad, xs[1].grad)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_over_packed_are_those_over_dense(name: str, dtype: torch.dtype) -> None:
    packed, dense = packed_and_dense(dtype)
    rules = {"up": METHODS[name], "down": METHODS[name]} if name != "bias" else {"up": METHODS[name]}
    grads = []
    for model in (packed, dense):
        veneer.attach(model, rules, seed=3)
        shake(model)
        torch.manual_seed(2)
        x = torch.randn(7, 32, dtype=dtype, requires_grad=True)
        torch.manual_seed(5)
        y = model(x)
        y.float().square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        grads.append({**found, "x": x.grad, "y": y.detach()})
    assert grads[0].keys() == grads[1].keys()
    for key, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][key], msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", METHODS)
def test_without_gradients_the_layers_own_forward_runs(name: str) -> None:
    packed, dense = packed_and_dense()
    rules = {"up": METHODS[name]}
    for model in (packed, dense):
        veneer.attach(model.eval(), rules)
        shake(model)
    calls = []
    own = PackedLinear.forward

    def spy(self: PackedLinear, x: torch.Tensor) -> torch.Tensor:
        calls.append(self)
        return own(self, x)

    x = torch.randn(3, 32)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedLinear, "forward", spy)
        torch.testing.assert_close(packed(x), dense(x))
    assert (packed.up in calls) == (name != "full")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_at_start_has_the_bases_bits(dtype: torch.dtype) -> None:
    packed, _ = packed_and_dense(dtype)
    x = torch.randn(9, 32, dtype=dtype)
    before = packed(x)
    veneer.attach(packed, LoRA(rank=4))
    assert torch.equal(packed(x.requires_grad_()), before)
    with torch.no_grad():
        assert torch.equal(packed(x), before)


def test_no_dense_weight_lives_between_forward_and_backward() -> None:
    packed, _ = packed_and_dense()
    veneer.attach(packed, LoRA(rank=2))
    alive: list[weakref.ref] = []
    own = PackedLinear.read

    def spy(self: PackedLinear, dtype: torch.dtype | None = None) -> torch.Tensor:
        gc.collect()
        assert all(ref() is None for ref in alive), "two dense weights at once"
        found = own(self, dtype)
        alive.append(weakref.ref(found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedLinear, "read", spy)
        y = packed(torch.randn(3, 32, requires_grad=True))
        gc.collect()
        assert all(ref() is None for ref in alive)
        assert len(alive) == 2
        y.sum().backward()
    assert len(alive) == 4


def test_recent_reads_serve_the_backward() -> None:
    packed, _ = packed_and_dense()
    veneer.attach(packed, LoRA(rank=2))
    reads = []
    own = PackedLinear.read
    keep_dense(1)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PackedLinear, "read", lambda self, dtype=None: reads.append(1) or own(self, dtype))
            packed(torch.randn(3, 32, requires_grad=True)).sum().backward()
        assert len(reads) == 2
        assert RECENT.size == 2 * 32 * 64 * 4
    finally:
        keep_dense(0)
    assert RECENT.size == 0
    with pytest.raises(VeneerError, match="at least 0"):
        keep_dense(-1)


@pytest.mark.parametrize("name", METHODS)
def test_merge_and_unmerge(name: str) -> None:
    packed, _ = packed_and_dense(torch.bfloat16)
    before = packed(torch.ones(2, 32, dtype=torch.bfloat16))
    state = {k: v.clone() for k, v in packed.state_dict().items()}
    veneer.attach(packed.eval(), {"up": METHODS[name]})
    shake(packed)
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        adapted = packed(x)
        veneer.merge(packed)
        torch.testing.assert_close(packed(x), adapted, atol=0.1, rtol=0.05)
        assert not torch.equal(packed(x), packed.lm_head(x + packed.down(torch.tanh(F.linear(x, packed.up.read(),
                                                                                             packed.up.bias)))))
        veneer.unmerge(packed)
        assert torch.equal(packed(x), adapted)
    veneer.detach(packed)
    assert type(packed.up) is PackedLinear
    assert all(torch.equal(v, state[k]) for k, v in packed.state_dict().items())
    assert torch.equal(packed(torch.ones(2, 32, dtype=torch.bfloat16)), before)


def test_final_merge_makes_an_ordinary_layer() -> None:
    packed, _ = packed_and_dense(torch.bfloat16)
    veneer.attach(packed.eval(), {"up": LoRA(rank=4)})
    shake(packed)
    x = torch.randn(4, 32, dtype=torch.bfloat16)
    with torch.no_grad():
        veneer.merge(packed, keep=False)
        merged = packed(x)
        veneer.detach(packed)
        assert torch.equal(packed(x), merged)
    assert type(packed.up) is nn.Linear
    assert packed.up.weight.dtype == torch.bfloat16
    assert not packed.up._buffers


def test_rows_go_their_own_ways() -> None:
    packed, dense = packed_and_dense()
    outs = []
    for model in (packed, dense):
        veneer.attach(model, {"up": LoRA(rank=4)}, name="a")
        veneer.attach(model, {"up": DoRA(LoRA(rank=2)), "down": LoKr(rank=2)}, name="b")
        shake(model)
        torch.manual_seed(0)
        x = torch.randn(4, 32)
        with veneer.route(model, ["a", None, "b", "a"]):
            outs.append(model(x))
    torch.testing.assert_close(*outs)


def test_copies_pickles_and_casts() -> None:
    packed, _ = packed_and_dense()
    veneer.attach(packed, LoRA(rank=4))
    shake(packed)
    x = torch.randn(3, 32)
    want = packed(x)
    assert torch.equal(copy.deepcopy(packed)(x), want)
    file = io.BytesIO()
    torch.save(packed, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), want)
    half = copy.deepcopy(packed).to(torch.bfloat16)
    assert half.up.packed_dtype == torch.bfloat16
    assert torch.equal(half.up.read(torch.float32), packed.up.read())


def test_state_dict_round_trip() -> None:
    packed, _ = packed_and_dense()
    other = net()
    with torch.no_grad():
        other.up.weight.zero_()
    veneer.quantize(other, "nf4")
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.up.read(), packed.up.read())


def test_save_and_load(tmp_path) -> None:
    packed, _ = packed_and_dense()
    veneer.attach(packed.eval(), LoRA(rank=4))
    shake(packed)
    veneer.save(packed, tmp_path)
    again, dense = packed_and_dense()
    veneer.load(again.eval(), tmp_path)
    x = torch.randn(3, 32)
    assert torch.equal(again(x), packed(x))
    veneer.load(dense, tmp_path)  # served on numbers that are read from it
    torch.testing.assert_close(dense(x), packed(x))
    veneer.load(net(), tmp_path)  # and on the original ones
    other = net()
    torch.manual_seed(9)
    nn.init.normal_(other.up.weight)
    with pytest.raises(VeneerError, match="another base model: 1 of"):
        veneer.load(other, tmp_path)


def test_autocast() -> None:
    packed, dense = packed_and_dense()
    for model in (packed, dense):
        veneer.attach(model, LoRA(rank=4))
        shake(model)
    x = torch.randn(3, 32)
    with torch.autocast("cpu", torch.bfloat16):
        ys = [model(x) for model in (packed, dense)]
        assert ys[0].dtype == ys[1].dtype
        torch.testing.assert_close(*ys, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(("call", "message"), [
    (lambda m: veneer.quantize(m, "nf4_"), "unknown scheme 'nf4_'; did you mean 'nf4'?"),
    (lambda m: veneer.quantize(m, "nf4", "upp"), "no adaptable weight matches 'upp'; nearest: 'up'"),
    (lambda m: veneer.quantize(m, "nf4", blocks=3), "has no option 'blocks'; did you mean 'block'?"),
    (lambda m: veneer.quantize(veneer.attach(m, LoRA()), "nf4"), "this model has adapters"),
    (lambda m: veneer.attach(m, {"odd": LoRA()}), "stored as Parameter of torch.int8, which cannot be read"),
])
def test_errors(call, message: str) -> None:
    model = net()
    model.odd = nn.Linear(4, 4)
    model.odd.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    if "int8" not in message:
        del model.odd
    with pytest.raises(VeneerError, match=message.replace("(", r"\(").replace("?", r"\?")):
        call(model)


class Foreign(nn.Module):
    """A linear layer of a library that nothing here knows."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 16
        self.register_buffer("qweight", torch.zeros(1, 16, dtype=torch.int32))


def test_a_weight_nobody_can_read() -> None:
    model = nn.ModuleDict({"proj": Foreign(), "lm_head": nn.Linear(4, 4)})
    text = "'proj' is a Foreign with its weight in a form that nothing here reads .qweight: torch.int32.; read are"
    with pytest.raises(VeneerError, match=text):
        veneer.plan(model, LoRA())
    with pytest.raises(VeneerError, match=text):
        veneer.plan(model, {"proj": LoRA()})
    model["up"] = nn.Linear(4, 8)
    with pytest.warns(veneer.method.VeneerWarning, match="left alone: 'proj' is a Foreign"):
        assert [e.name for e in veneer.plan(model, LoRA()).entries] == ["up"]


def test_a_start_that_rewrites_a_weight_which_is_packed_already() -> None:
    model, _ = packed_and_dense()
    before = model.up.read()
    for method in (LoRA(rank=2, init="pissa", residual="base"), LoRA(rank=2, init={"init": "loftq", "bits": 2})):
        with pytest.raises(VeneerError, match="'up' is held as nf4 already, which would round"):
            veneer.attach(model, {"up": method})
    assert torch.equal(model.up.read(), before)
    assert type(model.up) is PackedLinear


def test_loading_says_when_the_base_is_held_in_other_bits(tmp_path) -> None:
    packed, dense = packed_and_dense()
    veneer.attach(packed, LoRA(rank=4))
    veneer.save(packed, tmp_path)
    report = veneer.load(dense, tmp_path)
    text = ("2 base weights ('up' is one) were held as nf4 (read as float32) when this adapter was trained and are "
            "held as float32 here. ")
    assert [note for note in report.notes if text in note]
    again, _ = packed_and_dense()
    assert not veneer.load(again, tmp_path).notes
    veneer.detach(dense)
    eight, _ = packed_and_dense(scheme="nf8")
    veneer.attach(dense, {"up": LoRA(rank=4)})
    veneer.save(dense, tmp_path / "one")
    report = veneer.load(eight, tmp_path / "one")
    text = ("2 base weights ('up' is one) were held as float32 when this adapter was trained and are held as nf8 (read "
            "as float32) here. ")
    assert [note for note in report.notes if text in note]


@pytest.mark.parametrize(("scheme", "then", "alike"), [
    ("nf4", "nf4", True), ("nf4", "nf2, nf4, nf8", True), ("nf8", "nf2, nf4, nf8", True), ("nf8", "nf4", False),
    ("nf4", "hqq", False)])
def test_the_fingerprint_names_how_a_weight_is_held(scheme: str, then: str, alike: bool) -> None:
    """Adapters of before had one name for all normal floats, and fit what is held in any of them."""
    model, _ = packed_and_dense(scheme=scheme)
    weights = scan(model)
    print_ = fingerprint(weights, {})
    assert {sample.dtype for sample in print_.samples.values()} >= {f"{scheme} as float32"}
    plain = json.loads(json.dumps(print_.to_dict()).replace(f"{scheme} as ", f"{then} as "))
    saved = Fingerprint.from_dict(plain)
    assert (held_otherwise(saved, weights) is None) == alike
    name = next(name for name, sample in saved.samples.items() if sample.packed)
    values = saved.samples[name].values
    assert values is not None
    values += values.abs().max() / 10  # near enough for what is held otherwise
    assert (compare(saved, weights) != []) == alike


@pytest.mark.parametrize("other", ["dtype", "scales"])
def test_a_base_quantised_with_other_settings_is_the_same_with_a_note(other: str, tmp_path) -> None:
    packed = net(torch.bfloat16)
    veneer.quantize(packed, "nf4")
    veneer.attach(packed, LoRA(rank=4))
    veneer.save(packed, tmp_path)
    again = net(torch.float32 if other == "dtype" else torch.bfloat16)
    veneer.quantize(again, "nf4", double=other == "dtype")
    notes = veneer.load(again, tmp_path).notes
    assert [note for note in notes if "held as when this adapter was trained, but not with the same numbers" in note]
    tuned = net(torch.bfloat16)
    with torch.no_grad():
        tuned.up.weight.add_(0.1 * tuned.up.weight.std() * torch.randn_like(tuned.up.weight))
    veneer.quantize(tuned, "nf4")
    with pytest.raises(VeneerError, match="another base model: 1 of 5 base weights differ: base weight 'up'"):
        veneer.load(tuned, tmp_path)
