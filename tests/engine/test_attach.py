"""attach and detach: what is laid on, what is frozen, what comes back; copies; several adapters."""

from __future__ import annotations

import copy
import pickle
import time
from collections import OrderedDict

import pytest
import torch
from torch import nn

import veneer
from veneer import DoRA, Full, LoRA, Rows
from veneer.inspect.summary import update_norms
from veneer.method import VeneerError

from .nets import Net, adapter_state, scatter, tiny_llama

RULES = {"*.q_proj": LoRA(rank=2), "*.up": DoRA(LoRA(rank=3)), "*.down": Full(), "embed": Rows([1, 4])}


def ids(rows=4):
    return torch.randint(0, 13, (rows, 5))


def test_names_classes_and_keys():
    model = Net()
    base = list(model.state_dict())
    veneer.attach(model, {"*.up": DoRA(LoRA(rank=3))}, name="a")
    up = model.layers[0].up
    assert isinstance(up, nn.Linear)
    assert type(up).__name__ == "AdaptedLinear"
    assert [k for k in model.state_dict() if ".adapters." not in k] == base
    assert [k for k in model.state_dict() if k.startswith("layers.0.up.adapters")] == [
        f"layers.0.up.adapters.a.weight.{p}" for p in ("magnitude", "inner.A", "inner.B")]
    assert type(up) is type(model.layers[1].up), "the class is made once"


def test_attach_returns_the_same_model_and_freezes_the_base():
    model = Net()
    assert veneer.attach(model, LoRA(rank=2)) is model
    assert {k for k, p in model.named_parameters() if p.requires_grad} == {
        k for k, _ in model.named_parameters() if ".adapters." in k}
    assert veneer.trainable(model) == [p for p in model.parameters() if p.requires_grad]


def test_detach_gives_requires_grad_back_as_it_was():
    model = Net()
    model.layers[1].requires_grad_(False)
    before = {k: p.requires_grad for k, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    veneer.attach(model, RULES, name="a")
    veneer.attach(model, LoRA(rank=1), name="b")
    veneer.detach(model, "a")
    assert not any(p.requires_grad for k, p in model.named_parameters() if ".adapters." not in k)
    veneer.detach(model, "b")
    assert {k: p.requires_grad for k, p in model.named_parameters()} == before
    assert [type(m) for m in model.modules()] == kinds
    assert veneer.adapters(model) == {}


def test_a_second_adapter_leaves_the_first_as_it_was():
    model = veneer.attach(Net(), LoRA(rank=2), name="a")
    a = {k: p for k, p in model.named_parameters() if ".adapters.a." in k}
    half = list(a)[::2]
    for key in half:
        a[key].requires_grad_(False)
    veneer.attach(model, LoRA(rank=3), name="b")
    assert {k for k, p in a.items() if not p.requires_grad} == set(half)
    veneer.activate(model, ["a"])
    with veneer.disabled(model):
        assert {k for k, p in a.items() if not p.requires_grad} == set(half)
    veneer.detach(model, "b")
    assert {k for k, p in a.items() if not p.requires_grad} == set(half)


def test_only_the_newest_is_live_and_activate_adds_up():
    model = Net()
    x = ids()
    y0 = model(x).detach()
    scatter(veneer.attach(model, {"lm_head": LoRA(rank=2)}, name="a"), "a")
    ya = model(x).detach()
    scatter(veneer.attach(model, {"lm_head": LoRA(rank=3)}, name="b"), "b")
    yb = model(x).detach()
    assert veneer.adapters(model)["b"].live
    assert not veneer.adapters(model)["a"].live
    veneer.activate(model, ["a", "b"])
    torch.testing.assert_close(model(x), ya + yb - y0)
    veneer.activate(model, "a")
    assert torch.equal(model(x), ya)
    veneer.activate(model, [])
    assert torch.equal(model(x), y0)


@pytest.mark.parametrize("kind", [LoRA(rank=2), DoRA(LoRA(rank=2)), Full()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_several_live_adapters_in_weight_space(kind, dtype):
    """W + Σ (W_i − W), whatever the methods: LoRA beside each of them."""
    layer = nn.Linear(6, 5).to(dtype)
    model = nn.Sequential(OrderedDict(up=layer))
    base = layer.weight.detach().double().clone()
    bias = layer.bias.detach().double().clone()
    news, biases = [], []
    for name, method in (("a", LoRA(rank=3)), ("b", kind)):
        scatter(veneer.attach(model, {"up": method}, name=name), name)
        parts = {k.split(f"adapters.{name}.")[1]: p.detach().double() for k, p in model.named_parameters()
                 if f"adapters.{name}." in k}
        biases.append(parts.get("bias.weight", bias.unsqueeze(1)).squeeze(1))
        if "weight.weight" in parts:
            news.append(parts["weight.weight"])
            continue
        inner = "inner." if "weight.magnitude" in parts else ""
        new = base + parts[f"weight.{inner}B"] @ parts[f"weight.{inner}A"]
        if inner:
            new = parts["weight.magnitude"].unsqueeze(1) * new / new.norm(dim=1, keepdim=True)
        news.append(new)
    veneer.activate(model, ["a", "b"])
    x = torch.randn(7, 6, dtype=dtype)
    want = x.double() @ (base + sum(n - base for n in news)).mT + bias + sum(b - bias for b in biases)
    torch.testing.assert_close(model(x), want.to(dtype))
    with torch.no_grad():
        torch.testing.assert_close(model(x), want.to(dtype))
    veneer.merge(model)
    torch.testing.assert_close(model(x), want.to(dtype))


def test_names():
    model = Net()
    for bad in ("", "a.b", "pop", "training", "keys", None, 3):
        with pytest.raises(VeneerError, match="an adapter name must be a non-empty string without dots"):
            veneer.attach(model, LoRA(), name=bad)
    assert veneer.adapters(model) == {}
    for odd in ("weight", "ä β", "a/b", "a-1", "1"):
        veneer.attach(model, {"*.q_proj": LoRA(rank=1)}, name=odd)
    assert list(veneer.adapters(model)) == ["weight", "ä β", "a/b", "a-1", "1"]
    with pytest.raises(VeneerError, match=r"already has an adapter 'a-1'; detach\(model, 'a-1'\) first"):
        veneer.attach(model, {"*.up": LoRA()}, name="a-1")
    veneer.detach(model)


def test_a_parameter_whose_name_cannot_hold_adapters():
    class Memory(nn.Module):
        def __init__(self):
            super().__init__()
            self.keys = nn.Parameter(torch.randn(4, 3))
            self.values = nn.Parameter(torch.randn(4, 3))

    model = Memory()
    with pytest.raises(VeneerError, match=r"cannot adapt 'keys' .*attribute of nn.ModuleDict; rename the parameter"):
        veneer.attach(model, {"keys": LoRA()})
    assert type(model) is Memory
    assert model.keys.requires_grad


@pytest.mark.parametrize("call", [
    lambda m: veneer.detach(m, "frist"), lambda m: veneer.activate(m, ["frist"]), lambda m: veneer.merge(m, "frist"),
    lambda m: veneer.route(m, ["frist", None]).__enter__()])
def test_unknown_adapters(call):
    model = veneer.attach(Net(), {"*.q_proj": LoRA()}, name="first")
    with pytest.raises(VeneerError) as caught:
        call(model)
    assert str(caught.value) == ("no adapter named 'frist' on this model; did you mean 'first'? It has: 'first'")
    bare = Net()
    with pytest.raises(VeneerError, match="It has: none"):
        call(bare)


def test_summaries():
    model = veneer.attach(Net(tied=True), {"embed": LoRA(rank=2), "*.q_proj": LoRA(rank=1)}, name="a")
    summary = veneer.adapters(model)["a"]
    assert (summary.parameters, summary.trainable) == (2 * (13 + 8) + 3 * 16, 2 * (13 + 8) + 3 * 16)
    assert list(summary.weights) == ["embed", *(f"layers.{i}.q_proj" for i in range(3))]
    model.embed.adapters["a"].requires_grad_(False)
    assert veneer.adapters(model)["a"].trainable == 3 * 16
    assert str(veneer.adapters(model)["a"]) == "a: live, 4 weights, 90 parameters, 48 trainable"
    assert len(veneer.trainable(model)) == 6
    veneer.activate(model, [])
    assert "not live" in str(veneer.adapters(model)["a"])


def test_update_norms():
    model = veneer.attach(Net(), {**RULES, "layers.0.q_proj": None, "lm_head": LoRA(rank=3, alpha=6)})
    assert all(v == 0 for v in update_norms(model).values())
    scatter(model)
    norms = update_norms(model)
    state = model.state_dict()
    W = state["lm_head.weight"]
    dW = 2 * state["lm_head.adapters.default.weight.B"] @ state["lm_head.adapters.default.weight.A"]
    assert norms["lm_head"] == pytest.approx(float(dW.norm() / W.norm()), rel=1e-5)
    W, new = state["layers.1.down.weight"], state["layers.1.down.adapters.default.weight.weight"]
    assert norms["layers.1.down"] == pytest.approx(float((new - W).norm() / W.norm()), rel=1e-5)
    p = "layers.1.up.adapters.default.weight."
    V = state["layers.1.up.weight"] + state[p + "inner.B"] @ state[p + "inner.A"]
    new = state[p + "magnitude"].unsqueeze(1) * V / V.norm(dim=1, keepdim=True)
    W = state["layers.1.up.weight"]
    assert norms["layers.1.up"] == pytest.approx(float((new - W).norm() / W.norm()), rel=1e-5)
    assert "layers.0.q_proj" not in norms


def test_a_model_with_adapters_copies_and_pickles():
    model = tiny_llama(tied=True)
    veneer.attach(model, {"*_proj": DoRA(LoRA(rank=2)), "*.embed_tokens": LoRA(rank=2), "*norm*": Full()})
    scatter(model)
    tokens = torch.randint(0, 29, (2, 7))
    want = model(tokens).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(tokens).logits, want)
        assert other.lm_head.weight is other.model.embed_tokens.weight
        mine = other.model.embed_tokens.adapters["default"]["weight"]
        assert other.lm_head.adapters["default"]["weight"] is mine
        other(tokens).logits.sum().backward()
        assert len(veneer.trainable(other)) == len(veneer.trainable(model))
        with veneer.disabled(other):
            assert not torch.equal(other(tokens).logits, want)
        assert torch.equal(model(tokens).logits, want), "the copy's route is not its own"
        veneer.detach(other)
        assert type(other) is type(model)
        assert list(other.state_dict()) == list(tiny_llama(tied=True).state_dict())


@pytest.mark.parametrize("method", [LoRA(rank=2, init=i) for i in ("kaiming", "gaussian", "xavier")]
                         + [DoRA(LoRA(rank=2))], ids=str)
def test_bits_depend_on_seed_and_name_alone(method):
    torch.manual_seed(5)
    base = Net()
    rules = {"*.q_proj": method, "*.up": method, "embed": method}
    whole = adapter_state(veneer.attach(copy.deepcopy(base), rules, seed=7))
    torch.manual_seed(99)
    turned = adapter_state(veneer.attach(copy.deepcopy(base), dict(reversed(rules.items())), seed=7))
    part = adapter_state(veneer.attach(copy.deepcopy(base), {"*.up": method}, seed=7))
    assert turned.keys() == whole.keys()
    assert part
    for key, value in {**turned, **part}.items():
        assert torch.equal(value, whole[key]), key
    other = adapter_state(veneer.attach(copy.deepcopy(base), rules, seed=8))
    assert not any(torch.equal(other[k], whole[k]) for k in whole if k.endswith(".A"))
    As = [v for k, v in whole.items() if k.endswith("q_proj.adapters.default.weight.A")
          or k.endswith("q_proj.adapters.default.weight.inner.A")]
    assert len(As) == 3
    assert not torch.equal(As[0], As[1])


def test_attach_draws_nothing_from_the_global_generator():
    model = Net()
    before = torch.get_rng_state()
    veneer.attach(model, RULES)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("dtype", "wanted"), [
    (torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32),
    (torch.float64, torch.float64)])
def test_dtypes_of_adapters(dtype, wanted):
    model = veneer.attach(Net().to(dtype), RULES)
    assert {p.dtype for p in veneer.trainable(model)} == {wanted}
    half = veneer.attach(Net().to(dtype), {"*.q_proj": LoRA(dtype=torch.bfloat16)})
    assert {p.dtype for p in veneer.trainable(half)} == {torch.bfloat16}
    assert half(ids()).dtype == dtype


def llama_8b_on_meta():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8)
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.mark.parametrize("method", [LoRA(rank=16), DoRA(LoRA(rank=16))], ids=str)
def test_attach_to_8b_on_meta_takes_a_second_and_touches_nothing(method):
    model = llama_8b_on_meta()
    versions = {k: (id(p), p._version) for k, p in model.named_parameters()}
    taken = []
    for name in ("a", "b", "c"):
        started = time.process_time()
        veneer.attach(model, method, name=name)
        taken.append(time.process_time() - started)
    assert min(taken) <= 1.0
    summary = veneer.adapters(model)["a"]
    assert len(summary.weights) == 7 * 32
    sizes = 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)) * 16
    assert summary.parameters == sizes + (0 if isinstance(method, LoRA) else 32 * (4096 * 3 + 1024 * 2 + 14336 * 2))
    assert all(p.is_meta for p in model.parameters())
    assert {k: (id(p), p._version) for k, p in model.named_parameters() if ".adapters." not in k} == versions


@pytest.mark.parametrize("loaded_by", ["load_state_dict", "assign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meta_then_to_empty_equals_an_attach_on_the_cpu(dtype, loaded_by):
    torch.manual_seed(2)
    real = Net().to(dtype)
    weights = copy.deepcopy(real.state_dict())
    with torch.device("meta"):
        model = Net().to(dtype)
    veneer.attach(model, RULES, seed=4)
    veneer.attach(real, RULES, seed=4)
    model.to_empty(device="cpu")
    if loaded_by == "assign":
        missing = model.load_state_dict(weights, strict=False, assign=True).missing_keys
    else:
        missing = model.load_state_dict(weights, strict=False).missing_keys
    assert all(".adapters." in key for key in missing)
    x = ids()
    assert torch.equal(model(x), real(x))  # what starts from a weight is filled at its first use
    want = adapter_state(real)
    for key, value in adapter_state(model).items():
        assert torch.equal(value, want[key]), key
    model(x).sum().backward()
    assert all(p.grad is not None for p in veneer.trainable(model))


def test_adapters_loaded_before_the_first_use_are_kept():
    real = scatter(veneer.attach(Net(), RULES))
    with torch.device("meta"):
        model = veneer.attach(Net(), RULES)
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict())
    x = ids()
    assert torch.equal(model(x), real(x))


@pytest.mark.parametrize("act", ["merge", "save", "norms"])
def test_what_is_pending_is_filled_before_anything_reads_it(act, tmp_path):
    torch.manual_seed(2)
    weights = Net().state_dict()
    with torch.device("meta"):
        model = veneer.attach(Net(), {"*.up": DoRA(LoRA(rank=2)), "*.down": Full()})
    model.to_empty(device="cpu")
    model.load_state_dict(weights, strict=False)
    if act == "merge":
        veneer.merge(model)
        for key in ("layers.0.up.weight", "layers.0.down.weight"):
            torch.testing.assert_close(model.get_parameter(key), weights[key])
    elif act == "save":
        veneer.save(model, tmp_path / "a")
        other = Net()
        other.load_state_dict(weights)
        veneer.load(other, tmp_path / "a")
        x = ids()
        assert torch.equal(other(x), model(x))
    else:
        assert max(update_norms(model).values()) < 1e-6


def test_parts_adapted_before_they_were_put_together():
    parts = [scatter(veneer.attach(nn.Sequential(OrderedDict(q=nn.Linear(8, 8))), {"q": LoRA()})) for _ in range(2)]
    model = nn.Sequential(*parts)
    x = torch.randn(3, 8)
    want = model(x)
    with veneer.disabled(model):
        bare = model(x)
    assert not torch.equal(bare, want)
    veneer.activate(model, [])
    assert torch.equal(model(x), bare)
    veneer.detach(model)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), bare)


def test_train_and_eval_reach_the_adapters():
    model = veneer.attach(Net().eval(), {"*.q_proj": LoRA(dropout=0.5)})
    x = ids()
    scatter(model)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
