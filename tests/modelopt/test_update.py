"""update_model against ModelOpt's own results: layers, what is trained, outputs and gradients; and each option."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import veneer
from veneer.inspect.summary import adapters
from veneer.method import VeneerError, VeneerWarning
from veneer.modelopt import (
    PEFTConfig,
    disable_adapters,
    enable_adapters,
    freeze_lora_weights,
    is_peft_model,
    load_peft_state_dict,
    peft_state_dict,
    unfreeze_lora_weights,
    update_model,
)

from .nets import LAYERS, META, Toy, golden, requires_grad, structure

A = {"adapter_name": "a", "adapter_cfg": {"*": {"rank": 4, "scale": 0.5, "enable": True},
                                          "*output_layer*": {"enable": False}}}
B = {"adapter_name": "b", "adapter_cfg": {"*mlp*": {"rank": 3, "scale": 2.0, "enable": True}}}
#: patterns that leave `enable` unset: true, as documented, where ModelOpt's code gives no adapter
DIFFER = {
    0: {layer: {"default": {"rank": 64, "scale": 1.0, "enable": True}} for layer in LAYERS},
    6: {layer: {"default": {"rank": 4, "scale": 2.0, "enable": True}} for layer in LAYERS},
}


def one(patterns, **options):
    model = Toy()
    return update_model(model, {"adapter_cfg": patterns, **options}, seed=0)


def two():
    """The golden model with both adapters and their golden values."""
    model, data, state = golden()
    update_model(update_model(model, A), B)
    load_peft_state_dict(model, state)
    return model, data


# -- ModelOpt's own results ---------------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(len(META["patterns"])))
@pytest.mark.filterwarnings("ignore::veneer.method.VeneerWarning")
def test_patterns(number):
    row = META["patterns"][number]
    model = one(row["adapter_cfg"])
    assert structure(model) == DIFFER.get(number, row["result"])
    assert is_peft_model(model) is row["is_peft"]


def test_callable_patterns():
    model = one({"*": {"rank": 4, "enable": True}, lambda name: name.endswith("fc2"): {"scale": 0.5}})
    assert structure(model) == META["callable_key"]


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_what_is_frozen(base, lora):
    model = one({"*": {"rank": 4}}, freeze_base_model=base, freeze_lora_weights=lora)
    assert requires_grad(model) == META["freeze"][f"base={base},lora={lora}"]


def test_freezing_afterwards():
    def model():
        return update_model(update_model(Toy(), {**A, "adapter_cfg": {"*": {"rank": 4}}}),
                            {"adapter_name": "b", "adapter_cfg": {"*attention*": {"rank": 4}}})

    first = model()
    freeze_lora_weights(first, layer_patterns="*mlp*")
    freeze_lora_weights(first, adapter_patterns="b")
    assert requires_grad(first) == META["freeze"]["after_freeze_api(mlp; adapter b)"]
    unfreeze_lora_weights(first, layer_patterns="*fc1")
    assert requires_grad(first) == META["freeze"]["after_unfreeze(fc1)"]


def test_two_adapters_are_summed_and_each_has_its_own_scale():
    model, data = two()
    assert structure(model) == META["two_adapters"]["structure"]
    keys = [key for key in META["two_adapters"]["state_dict_keys"] if ".lora_" in key]
    assert sorted(peft_state_dict(model)) == sorted(keys)
    y = model(data["x"])
    torch.testing.assert_close(y, data["two.y"])
    y.backward(data["grad_out"])
    _compare_gradients(model, data, "two")


def test_one_adapter():
    model, data, state = golden()
    update_model(model, A)
    load_peft_state_dict(model, {key: t for key, t in state.items() if "_b.weight" not in key})
    y = model(data["x"])
    torch.testing.assert_close(y, data["one.y"])
    y.backward(data["grad_out"])
    _compare_gradients(model, data, "one")


def _compare_gradients(model, data, key):
    want = {k.removeprefix(f"{key}.grad."): tensor for k, tensor in data.items() if k.startswith(f"{key}.grad.")}
    seen = {}
    for name, adapter in ((n, a) for n in adapters(model) for a in adapters(model)[n].weights.items()):
        layer, parts = adapter
        seen |= {f"{layer}.lora_{letter}_{name}.weight": getattr(parts, factor).grad
                 for letter, factor in (("a", "A"), ("b", "B"))}
    assert seen.keys() == want.keys()
    for name, grad in seen.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-5)


def test_switching_off():
    model, data = two()
    disable_adapters(model, adapters_to_disable="a")
    torch.testing.assert_close(model(data["x"]), data["only_b.y"])
    enable_adapters(model)
    torch.testing.assert_close(model(data["x"]), data["two.y"])
    disable_adapters(model, layers_to_disable=["*fc1"])
    torch.testing.assert_close(model(data["x"]), data["fc1_off.y"])
    disable_adapters(model)
    torch.testing.assert_close(model(data["x"]), data["all_off.y"])
    off = model(data["x"])
    with veneer.disabled(model):
        assert torch.equal(model(data["x"]), off)


def test_the_default_start_is_modelopts():
    model = nn.ModuleDict({"fc": nn.Linear(32, 32)})
    update_model(model, PEFTConfig())
    adapter, old = adapters(model)["default"].weights["fc"], META["default_init"]
    bound = math.sqrt(6 / 32)
    assert list(adapter.A.shape) == old["A_shape"]
    assert bound == pytest.approx(old["bound_sqrt(6/fan_in)"])
    assert 0.99 * bound < float(adapter.A.detach().abs().max()) <= bound
    assert not adapter.B.any()


# -- the example of the documentation, and each option ------------------------------------------------------
def test_three_patterns():
    model = one({"*": {"rank": 32, "scale": 1, "enable": True}, "*attention*": {"rank": 16}, "*output_layer*":
                {"enable": False}})
    got = structure(model)
    assert {layer: [d["rank"] for d in got[layer].values()] for layer in LAYERS} == {
        LAYERS[0]: [16], LAYERS[1]: [16], LAYERS[2]: [32], LAYERS[3]: [32], LAYERS[4]: []}


def weights(said, **options):
    return adapters(one({"*fc1": said, "*attention*": {"enable": False}}, **options))["default"].weights


def test_each_attribute_does_something():
    plain = weights({})["mlp.linear_fc1"]
    assert (plain.rank, plain.scale, plain.A.dtype) == (64, 1.0, torch.float32)
    assert weights({"rank": 3})["mlp.linear_fc1"].rank == 3
    assert weights({"rank": 3, "scale": 0.1})["mlp.linear_fc1"].scale == pytest.approx(0.1)
    assert torch.equal(weights({"lora_a_init": "torch.nn.init.ones_"})["mlp.linear_fc1"].A, torch.ones(64, 16))
    assert torch.equal(weights({"lora_b_init": torch.nn.init.ones_})["mlp.linear_fc1"].B, torch.ones(32, 64))
    for name, dtype in (("bf16", torch.bfloat16), ("float16", torch.float16), ("fp32", torch.float32)):
        assert weights({"lora_dtype": name})["mlp.linear_fc1"].A.dtype == dtype
    assert list(weights({"enable": True})) == ["mlp.linear_fc1"]
    with pytest.warns(VeneerWarning, match="adapter 'default' lies on no layer: adapter_cfg enables none"):
        assert not adapters(one({"*fc1": {"enable": False}}))


@pytest.mark.parametrize(("scale", "rank"), [(0.1, 3), (1.0, 64), (0.7, 7), (2.5, 48), (1e-3, 5), (3.3, 11)])
def test_the_scale_is_used_as_it_is_given(scale, rank):
    got = weights({"rank": rank, "scale": scale})["mlp.linear_fc1"].scale
    assert got == pytest.approx(scale, rel=3e-16), "off by more than the last bit of a float"


def test_b_that_is_not_zero_changes_the_output_from_the_start_as_in_modelopt():
    model = one({"*fc1": {"rank": 2, "scale": 0.5, "lora_b_init": "torch.nn.init.ones_"}})
    layer, adapter = model.mlp["linear_fc1"], adapters(model)["default"].weights["mlp.linear_fc1"]
    x = torch.randn(3, 16)
    want = x @ (layer.weight + 0.5 * torch.ones(32, 2) @ adapter.A).mT
    torch.testing.assert_close(layer(x), want)
    assert set(adapter.state_dict()) == {"A", "B"}


def test_the_dtype_is_the_layers_where_none_is_given():
    model = Toy().to(torch.bfloat16)
    update_model(model, PEFTConfig(adapter_cfg={"*": {"rank": 2}}))
    assert {p.dtype for p in veneer.trainable(model)} == {torch.bfloat16}


def test_svdquant_falls_back_with_a_warning():
    model = Toy()
    with pytest.warns(VeneerWarning, match="no quantiser is known"):
        update_model(model, {"adapter_cfg": {"*fc1": {"rank": 4, "lora_init_method": "svdquant"}}})
    adapter = adapters(model)["default"].weights["mlp.linear_fc1"]
    assert adapter.A.any()
    assert not adapter.B.any()


def test_an_initialiser_beside_svdquant_has_no_effect_and_that_is_said():
    with (pytest.warns(VeneerWarning, match="no quantiser is known"),
          pytest.warns(VeneerWarning, match="lora_a_init have no effect with lora_init_method='svdquant'")):
        one({"*fc1": {"lora_init_method": "svdquant", "lora_a_init": "torch.nn.init.ones_"}})


def test_adapter_name_and_seed():
    assert list(adapters(one({"*fc1": {}}, adapter_name="mine"))) == ["mine"]

    def A(manual, **options):
        torch.manual_seed(manual)
        seed = torch.initial_seed()
        model = Toy()
        torch.manual_seed(seed)
        return adapters(update_model(model, {"adapter_cfg": {"*fc1": {}}}, **options))["default"].weights[LAYERS[2]].A

    assert torch.equal(A(1), A(1))
    assert not torch.equal(A(1), A(2))
    assert torch.equal(A(1, seed=5), A(2, seed=5))
    assert not torch.equal(A(1, seed=5), A(1, seed=6))


def test_the_flags_of_a_second_update_count_too():
    model = update_model(Toy(), A)
    update_model(model, {**B, "freeze_lora_weights": True})
    got = requires_grad(model)
    assert got["mlp.linear_fc1.lora_a_a.weight"]
    assert not got["mlp.linear_fc1.lora_a_b.weight"]


# -- other layers -------------------------------------------------------------------------------------------
class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 4, 3)
        self.fc = nn.Linear(4, 5)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 4, 6))
        self.norm = nn.LayerNorm(5)


def test_star_means_linear_layers_and_experts_and_names_mean_any_layer():
    model = update_model(Mixed(), {"adapter_cfg": {"*": {"rank": 2}}})
    assert set(adapters(model)["default"].weights) == {"fc", "experts.up"}
    model = update_model(Mixed(), {"adapter_cfg": {
        "*": {"rank": 2}, "emb*": {"rank": 3}, "c*v": {}, "*up": {"rank": 1}}})
    assert {name: a.rank for name, a in adapters(model)["default"].weights.items()} == {
        "embed": 3, "conv": 64, "fc": 2, "experts.up": 1}
    model = update_model(Mixed(), {"adapter_cfg": {lambda name: name == "experts": {"rank": 1}}})
    assert set(adapters(model)["default"].weights) == {"experts.up"}


def test_each_expert_has_a_start_of_its_own_size():
    model = update_model(Mixed(), {"adapter_cfg": {"experts": {"rank": 64}}})
    adapter = adapters(model)["default"].weights["experts.up"]
    bound = math.sqrt(6 / 6)
    assert 0.95 * bound < float(adapter.A.detach().abs().max()) <= bound, "fan-in is an expert's, not rank · in"


def test_4_bit_layers():
    model = Toy()
    veneer.quantize(model, "nf4", targets="*fc1")
    x = torch.randn(2, 16)
    before = model(x)
    update_model(model, {"adapter_cfg": {"*fc1": {"rank": 2}}})
    assert torch.equal(model(x), before)


def test_a_tied_head_is_one_layer_with_its_embedding():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

    model = update_model(Tied(), {"adapter_cfg": {"*": {"rank": 2}}})
    assert len(adapters(model)["default"].weights) == 1
    assert len(peft_state_dict(model)) == 2
    with pytest.warns(VeneerWarning, match="lies on no layer"):
        update_model(Tied(), {"adapter_cfg": {"*": {}, "embed": {"enable": False}}})


# -- what cannot be -----------------------------------------------------------------------------------------
def test_what_is_said():
    model = update_model(Toy(), A)
    before = set(model.state_dict())
    with pytest.raises(VeneerError, match="Adapter 'a' already exists; this model has 'a'"):
        update_model(model, A)
    with pytest.raises(VeneerError, match=r"must be a non-empty string without dots"):
        update_model(model, {"adapter_name": "x.y"})
    with pytest.raises(VeneerError, match="A and B would both be zero"):
        one({"*": {"lora_a_init": "torch.nn.init.zeros_"}})
    assert set(model.state_dict()) == before
    with pytest.raises(VeneerError, match="disable_adapters: the model must be a PEFT model; call update_model"):
        disable_adapters(Toy())
    with pytest.raises(VeneerError, match="a pattern of adapter names is a string, or a list of them; got <function"):
        disable_adapters(model, adapters_to_disable=lambda name: True)
    with pytest.raises(VeneerError, match="a pattern of layer names is a string or a callable, or a list"):
        enable_adapters(model, layers_to_enable=[3])


def test_what_matches_nothing_is_said():
    with pytest.warns(VeneerWarning, match=r"'linear_fc1' of adapter_cfg match no layer of this model"):
        one({"*": {"rank": 4}, "linear_fc1": {"rank": 2}})
    model = update_model(Toy(), A)
    for call in (lambda: disable_adapters(model, ["attention"]), lambda: enable_adapters(model, None, "b"),
                 lambda: freeze_lora_weights(model, layer_patterns="fc1")):
        with pytest.warns(VeneerWarning, match=r"nothing matches layers .* and adapters .*; patterns match whole"):
            call()
    with pytest.warns(VeneerWarning, match="freeze_lora_weights: nothing matches"):
        freeze_lora_weights(Toy())


def test_patterns_may_be_bytes_lists_and_callables():
    model = update_model(Toy(), A)
    disable_adapters(model, [b"*fc1", lambda name: "proj" in name])
    off = {layer for layer, said in structure(model).items() for d in said.values() if not d["enable"]}
    assert off == {"mlp.linear_fc1", "self_attention.linear_proj"}


def test_a_model_that_was_detached_is_bare_and_can_be_converted_again():
    model = update_model(Toy(), A)
    veneer.detach(model)
    update_model(model, A)
    assert list(adapters(model)) == ["a"]
    assert not is_peft_model(Toy())


def test_adapters_that_were_put_to_sleep_are_woken_only_where_they_are_asked_for():
    model, data = two()
    want = model(data["x"])
    veneer.activate(model, ["a"])
    enable_adapters(model, "*fc2", "b")
    got = structure(model)
    assert (got["mlp.linear_fc1"]["b"]["enable"], got["mlp.linear_fc2"]["b"]["enable"]) == (False, True)
    enable_adapters(model)
    assert torch.equal(model(data["x"]), want)


def test_copies_and_pickles():
    model, data = two()
    disable_adapters(model, "*fc1")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(data["x"]), model(data["x"]))
        assert is_peft_model(other)
        with pytest.raises(VeneerError, match="Adapter 'a' already exists; this model has 'a', 'b'"):
            update_model(other, A)


def test_a_state_dict_that_does_not_fit_is_refused_whole():
    model, _ = two()
    state = {key: tensor.clone() for key, tensor in peft_state_dict(model).items()}
    first = "self_attention.linear_qkv.lora_a_a.weight"
    bad = {**state, "mlp.linear_fc3.lora_a_a.weight": torch.ones(1), first: torch.ones(2, 16)}
    bad["norm.weight"] = torch.ones(1)
    del bad["mlp.linear_fc1.lora_b_b.weight"]
    with pytest.raises(VeneerError) as caught:
        load_peft_state_dict(model, bad)
    lines = str(caught.value).split("\n  ")
    assert lines[1:] == ["missing: 'mlp.linear_fc1.lora_b_b.weight'",
                         "unexpected: 'mlp.linear_fc3.lora_a_a.weight'; did you mean 'mlp.linear_fc2.lora_a_a.weight'?",
                         f"wrong shape: '{first}' is (2, 16) and should be (4, 16)"]
    assert all(torch.equal(tensor, state[key]) for key, tensor in peft_state_dict(model).items())
