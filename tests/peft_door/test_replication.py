"""layer_replication: layers several times over, once, undone where what follows fails, and known in copies."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from veneer.inspect.summary import adapters
from veneer.method import VeneerError
from veneer.peft import LoraConfig, PeftModel, get_peft_model
from veneer.peft.replicate import replicate_layers
from veneer.peft.translate import translate

from . import nets

peft = pytest.importorskip("peft", reason="the layers' names are compared with PEFT's")

MAP = [[0, 2], [1, 3]]


def q(**options: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["q_proj"], **options})


def test_replicated_layers_have_adapters_of_their_own_over_the_same_numbers():
    options = {"layer_replication": [[0, 2], [1, 3]], "target_modules": ["q_proj"], "r": 2}
    model = nets.decoder()
    before = list(model.model.layers)
    other = peft.get_peft_model(nets.decoder(), peft.LoraConfig(**options)).base_model
    replicate_layers(model, options["layer_replication"])
    found = translate(model, LoraConfig(**options))
    assert list(found.modules) == other.targeted_module_names
    assert [layer for layer in model.model.layers if layer in before] == before
    first, second = (model.get_submodule(f"model.layers.{i}.self_attn.q_proj") for i in (1, 2))
    assert first.weight is not second.weight
    assert first.weight.data_ptr() == second.weight.data_ptr()
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert model.config.num_hidden_layers == 4
    assert model.model.layers[2].self_attn.config is model.config
    inputs = nets.inputs_for(model)
    torch.testing.assert_close(model(**inputs).logits, other.model(**inputs).logits)
    again = translate(model, LoraConfig(**options))
    assert again.modules == found.modules
    veneer.attach(model, found.rules)
    assert len(adapters(model)["default"].weights) == 4
    cached = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(cached, model.generate(**inputs, max_new_tokens=3, do_sample=False, use_cache=False))


def test_kinds_of_layers_are_replicated_too():
    config = nets.transformers.Gemma2Config(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, layer_types=["sliding_attention", "full_attention"])
    model = nets.transformers.Gemma2ForCausalLM(config)
    replicate_layers(model, [[0, 2], [1, 2]])
    assert model.config.layer_types == ["sliding_attention", "full_attention", "full_attention"]
    model.eval().generate(torch.tensor([[1, 2]]), max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize(("ranges", "says"), [
    ([[0, 4]], "must name layers from 0 to 3"), ([[0, 2, 3]], r"a list of ranges \[start, end\], got"),
    ([[2, 2]], "must name layers"),
])
def test_ranges_that_are_none(ranges, says):
    model = nets.decoder()
    with pytest.raises(VeneerError, match=says):
        replicate_layers(model, ranges)
    assert len(model.model.layers) == 3


def test_layers_are_replicated_once_and_before_adapters():
    model = nets.decoder()
    replicate_layers(model, [[0, 3], [0, 1]])
    replicate_layers(model, [[0, 1], [1, 3], [0, 1]])  # the same layers in other words
    assert len(model.model.layers) == 4
    with pytest.raises(VeneerError, match=r"were replicated by .* already"):
        replicate_layers(model, [[0, 2]])
    model = nets.decoder()
    veneer.attach(model, translate(model, q()).rules)
    with pytest.raises(VeneerError, match="has adapters on its layers already"):
        replicate_layers(model, [[0, 2]])
    with pytest.raises(VeneerError, match="no list of layers was found in this Linear"):
        replicate_layers(nn.Linear(2, 2), [[0, 2]])


def test_translating_changes_no_layers():
    model = nets.decoder()
    with pytest.raises(VeneerError, match="layers of this model are not replicated yet; call replicate_layers"):
        translate(model, q(layer_replication=[[0, 2], [1, 3]]))
    assert len(model.model.layers) == 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_replicated_model_is_one_too(copied):
    model = nets.decoder()
    replicate_layers(model, [[0, 2], [1, 3]])
    twin = copied(model)
    replicate_layers(twin, [(0, 2), (1, 3)])
    assert len(twin.model.layers) == 4
    inputs = nets.inputs_for(model)
    assert torch.equal(twin(**inputs).logits, model(**inputs).logits)
    with pytest.raises(VeneerError, match=r"were replicated by \[\(0, 2\), \(1, 3\)\] already; load it anew"):
        replicate_layers(twin, [[0, 4]])


def layers_of(model: Any) -> tuple[Any, ...]:
    """All that replication touches: the list and what is in it, the numbers of layers, the config."""
    inner = model.model
    numbers = [getattr(module, "layer_idx", None) for module in model.modules()]
    return inner.layers, list(inner.layers), list(inner._modules), numbers, model.config.to_dict()


GEMMA = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
         "head_dim": 4, "num_key_value_heads": 1,
         "layer_types": ["sliding_attention", "full_attention", "full_attention"]}


def test_replicating_is_undone_exactly():
    model = nets.transformers.Gemma2ForCausalLM(nets.transformers.Gemma2Config(**GEMMA)).eval()
    before = layers_of(model)
    undo = replicate_layers(model, [[1, 3], [0, 1], [1, 2]])
    assert layers_of(model) != before
    again = replicate_layers(model, [[1, 3], [0, 1], [1, 2]])
    again()  # it has done nothing, and has nothing to undo
    assert len(model.model.layers) == 4
    assert not any(module.training for module in model.modules())
    undo()
    assert layers_of(model) == before
    replicate_layers(model, [[0, 2]])  # not marked any more
    undo()
    assert len(model.model.layers) == 2


def test_a_config_that_takes_no_number_leaves_the_layers(monkeypatch):
    model = nets.decoder()
    before = layers_of(model)

    def refuse(self: Any, name: str, value: Any) -> None:
        if name == "num_hidden_layers" and value == 4:
            raise RuntimeError("frozen")
        object.__setattr__(self, name, value)

    monkeypatch.setattr(type(model.config), "__setattr__", refuse)
    with pytest.raises(RuntimeError, match="frozen"):
        replicate_layers(model, [[0, 2], [1, 3]])
    assert layers_of(model) == before


# -- through get_peft_model and from_pretrained --------------------------------------------------------------
@pytest.mark.parametrize(("options", "says"), [
    ({"target_modules": ["no_such"]}, "Target modules {'no_such'} not found"),
    ({"target_modules": "dummy-target-modules"}, "its config adapts nothing"),
    ({"init_lora_weights": "corda"}, "starts from data, and none was collected"),
])
def test_a_config_that_fails_leaves_the_model_as_it_was(options, says):
    model = nets.decoder()
    before, inputs = layers_of(model), nets.inputs_for(model)
    logits = model(**inputs).logits
    with pytest.raises(ValueError, match=says):
        get_peft_model(model, q(layer_replication=MAP, **options))
    assert layers_of(model) == before
    assert torch.equal(model(**inputs).logits, logits)


def saved(path: Path) -> PeftModel:
    model = get_peft_model(nets.decoder(), q(layer_replication=MAP, r=2))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.normal_()
    model.save_pretrained(path)
    return model.eval()  # type: ignore[return-value]


def test_an_adapter_of_another_base_leaves_the_model_as_it_was(tmp_path):
    saved(tmp_path)
    config = nets.decoder().config
    config.hidden_size = 8
    model = nets.transformers.LlamaForCausalLM(config).eval()
    before = layers_of(model)
    with pytest.raises(VeneerError, match=r"shape|another base"):
        PeftModel.from_pretrained(model, tmp_path)
    assert layers_of(model) == before


def test_a_copy_of_a_replicated_base_takes_its_adapter(tmp_path):
    """Replicated twice by [[0, 2], [1, 3]], layers 0, 1, 1, 2 would be 0, 1, 1, 1."""
    model = saved(tmp_path)
    (tmp_path / "veneer.json").unlink()
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")  # as PEFT writes it: nothing of the base in it
    base = copy.deepcopy(model).unload()
    inputs = nets.inputs_for(base)
    again = PeftModel.from_pretrained(base, tmp_path)
    assert len(again.get_base_model().model.layers) == 4
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_a_second_adapter_lies_on_the_same_layers(tmp_path):
    model = saved(tmp_path)
    layers = model.get_base_model().model.layers
    model.add_adapter("b", q(layer_replication=MAP))
    with pytest.raises(VeneerError, match="already; load it anew for another map"):
        model.add_adapter("c", q(layer_replication=[[0, 4], [0, 4]]))
    model.load_adapter(tmp_path, "d")
    assert model.get_base_model().model.layers is layers
    assert len(layers) == 4
