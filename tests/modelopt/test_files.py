"""save, restore and export: every adapter, every unset field, what is off and what is frozen."""

from __future__ import annotations

import json

import pytest
import torch

import veneer
from veneer.inspect.summary import adapters
from veneer.method import VeneerError, VeneerWarning
from veneer.modelopt import (
    ExportPEFTConfig,
    disable_adapters,
    export,
    freeze_lora_weights,
    is_peft_model,
    peft_state_dict,
    restore,
    save,
    update_model,
)
from veneer.modelopt.state import state_of

from .nets import Toy, golden, requires_grad, structure
from .test_update import A, two


def bare():
    return golden()[0]


def test_everything_comes_back(tmp_path):
    model, data = two()
    disable_adapters(model, "*fc1", "a")
    freeze_lora_weights(model, layer_patterns="*proj")
    reports = save(model, tmp_path)
    assert {name: report.format for name, report in reports.items()} == {"a": "peft", "b": "peft"}
    other = restore(bare(), tmp_path)
    assert torch.equal(other(data["x"]), model(data["x"]))
    assert structure(other) == structure(model)
    assert requires_grad(other) == requires_grad(model)
    assert state_of(other).configs == state_of(model).configs
    for name, config in state_of(model).configs.items():
        again = state_of(other).configs[name]
        assert again.model_fields_set == config.model_fields_set
        assert {p: said.model_fields_set for p, said in again.adapter_cfg.items()} == {
            p: said.model_fields_set for p, said in config.adapter_cfg.items()}


def test_what_is_unset_is_not_written(tmp_path):
    save(update_model(Toy(), {"adapter_cfg": {"*": {"rank": 2}, "*fc1": {}}}), tmp_path)
    said = json.loads((tmp_path / "modelopt_state.json").read_text())["modelopt_state_dict"]
    assert said[0][1]["config"] == {"adapter_cfg": {"*": {"rank": 2}, "*fc1": {}}}


def test_callable_patterns_are_written_as_the_layers_they_hit(tmp_path):
    model = update_model(Toy(), {"adapter_cfg": {
        "mlp.linear_fc2": {"rank": 2}, "*fc*": {"rank": 4}, lambda name: name.endswith("2"): {"scale": 0.5}}})
    save(model, tmp_path)
    other = restore(Toy(), tmp_path)
    assert structure(other) == structure(model)
    assert structure(model)["mlp.linear_fc2"]["default"] == {"rank": 4, "scale": 0.5, "enable": True}
    patterns = state_of(other).configs["default"].adapter_cfg
    assert {name: said.model_dump(exclude_unset=True) for name, said in patterns.items()} == {
        "*fc*": {"rank": 4}, "mlp.linear_fc2": {"rank": 4, "scale": 0.5}}
    # laid on another model of the same names, the written patterns mean the same
    again = update_model(Toy(), state_of(other).configs["default"])
    assert structure(again) == structure(model)


def test_an_adapter_without_a_layer_and_the_freezing_of_the_base_come_back(tmp_path):
    model = update_model(Toy(), {**A, "freeze_base_model": False})
    with pytest.warns(VeneerWarning, match="lies on no layer"):
        update_model(model, {"adapter_name": "none", "adapter_cfg": {}})
    assert list(save(model, tmp_path)) == ["a"]
    other = restore(Toy(), tmp_path)
    assert requires_grad(other) == requires_grad(model)
    assert list(state_of(other).configs) == ["a", "none"]


def test_beside_an_adapter_that_is_there(tmp_path):
    model, data = two()
    save(model, tmp_path)
    other = update_model(bare(), {"adapter_name": "c", "adapter_cfg": {"*fc1": {"rank": 1}}})
    restore(other, tmp_path)
    assert set(adapters(other)) == {"a", "b", "c"}
    torch.testing.assert_close(other(data["x"]), model(data["x"]))


def test_a_restore_that_fails_leaves_the_model(tmp_path):
    model, data = two()
    save(model, tmp_path)
    other = update_model(bare(), {"adapter_name": "c", "adapter_cfg": {"*fc1": {"rank": 1}},
                                  "freeze_base_model": False})
    before, grads = structure(other), requires_grad(other)
    file = tmp_path / "b" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(VeneerError, match="not a complete safetensors file"):
        restore(other, tmp_path)
    assert (structure(other), requires_grad(other)) == (before, grads)
    assert torch.equal(other(data["x"]), bare()(data["x"]))


def test_another_base_and_taken_names_are_refused(tmp_path):
    model, _ = two()
    save(model, tmp_path)
    with pytest.raises(VeneerError, match="another base model"):
        restore(Toy(), tmp_path)
    with pytest.raises(VeneerError, match="Adapter 'a' already exists"):
        restore(update_model(bare(), A), tmp_path)
    with pytest.raises(VeneerError, match=r"there is no modelopt_state.json in"):
        restore(Toy(), tmp_path / "a")
    (tmp_path / "modelopt_state.json").write_text("{}")
    with pytest.raises(VeneerError, match=r"modelopt_state.json is damaged: KeyError"):
        restore(Toy(), tmp_path)


def test_only_converted_models_and_names_of_directories(tmp_path):
    for call in (lambda: save(Toy(), tmp_path), lambda: export(Toy())):
        with pytest.raises(VeneerError, match="the model must be a PEFT model"):
            call()
    model = update_model(Toy(), {**A, "adapter_name": "x/y"})
    with pytest.raises(VeneerError, match="the adapter 'x/y' cannot be saved: its name is to be that of a directory"):
        save(model, tmp_path)
    assert not list(tmp_path.iterdir())


# -- export -------------------------------------------------------------------------------------------------
def test_merged_the_model_is_ordinary_and_computes_what_it_did():
    model, data = two()
    disable_adapters(model, "*fc1", "a")
    want, keys = model(data["x"]), set(bare().state_dict())
    assert export(model) == {}
    assert set(model.state_dict()) == keys
    assert type(model.mlp["linear_fc1"]) is torch.nn.Linear
    torch.testing.assert_close(model(data["x"]), want)
    assert not is_peft_model(model)


def test_merging_leaves_out_what_is_off_and_an_adapter_that_is_off_everywhere():
    model, data = two()
    disable_adapters(model, adapters_to_disable="a")
    export(model, ExportPEFTConfig())
    torch.testing.assert_close(model(data["x"]), data["only_b.y"])
    model, data = two()
    veneer.activate(model, [])
    export(model, {})
    torch.testing.assert_close(model(data["x"]), data["all_off.y"])
    model, data = two()
    veneer.activate(model, ["b"])
    export(model)
    torch.testing.assert_close(model(data["x"]), data["only_b.y"])


def test_split_off_each_adapter_is_one_that_peft_loads(tmp_path):
    model, data = two()
    state = {key: tensor.clone() for key, tensor in peft_state_dict(model).items()}
    reports = export(model, split_to=tmp_path)
    assert {name: report.format for name, report in reports.items()} == {"a": "peft", "b": "peft"}
    torch.testing.assert_close(model(data["x"]), data["all_off.y"])
    assert set(model.state_dict()) == set(bare().state_dict())
    veneer.load(model, tmp_path / "b", "b")
    torch.testing.assert_close(model(data["x"]), data["only_b.y"])
    adapter = adapters(model)["b"].weights["mlp.linear_fc1"]
    assert torch.equal(adapter.A, state["mlp.linear_fc1.lora_a_b.weight"])
    peft = pytest.importorskip("peft")
    other = peft.PeftModel.from_pretrained(bare(), tmp_path / "b")
    torch.testing.assert_close(other(data["x"]), data["only_b.y"])


def test_an_adapter_beside_them_stays():
    model, _ = two()
    veneer.attach(model, {"*fc1": veneer.LoRA(rank=1), "*fc2": None}, name="mine")
    veneer.activate(model, ["a", "b"])
    export(model)
    assert list(adapters(model)) == ["mine"]
