"""PeftMixedModel: adapters of several methods on one model, several active at a time."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.peft_door import nets
from torch import Tensor, nn

import veneer
import veneer.peft as ours
from veneer.peft.tuners.mixed import COMPATIBLE_TUNER_TYPES, MixedModel

TARGETS = ["q_proj", "v_proj"]
OTHERS = {
    "loha": lambda: ours.LoHaConfig(r=2, target_modules=["v_proj", "down_proj"]),
    "lokr": lambda: ours.LoKrConfig(r=2, target_modules=["v_proj", "down_proj"]),
    "adalora": lambda: ours.AdaLoraConfig(total_step=5, target_modules=["v_proj"]),
    "vera": lambda: ours.VeraConfig(r=2, target_modules=["q_proj"]),
    "vblora": lambda: ours.VBLoRAConfig(r=2, vector_length=8, num_vectors=4, target_modules=["q_proj"]),
    "randlora": lambda: ours.RandLoraConfig(r=2, target_modules=["q_proj"]),
}


def lora(**options: Any) -> ours.LoraConfig:
    return ours.LoraConfig(**{"r": 2, "target_modules": TARGETS, **options})


def mixed(other: str = "loha") -> Any:
    model = ours.get_peft_model(nets.decoder(), lora(), "first", mixed=True)
    model.add_adapter("second", OTHERS[other]())
    randomise(model)
    return model


def randomise(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        if ".first" in name or ".second" in name or "default" in name:
            param.data.add_(torch.randn_like(param) * 0.1)


def outputs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(**nets.inputs_for(nets.decoder())).logits


@pytest.mark.parametrize("other", OTHERS)
def test_both_active_is_the_base_with_both_changes(other: str) -> None:
    model = mixed(other)
    base = copy.deepcopy(nets.decoder()).state_dict()
    changes: dict[str, Tensor] = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        merged = copy.deepcopy(model).merge_and_unload().state_dict()
        for key, value in merged.items():
            changes[key] = changes.get(key, torch.zeros_like(value)) + value - base[key]
    expected = nets.decoder()
    expected.load_state_dict({key: base[key] + change for key, change in changes.items()})
    model.set_adapter(["first", "second"])
    assert model.active_adapters == ["first", "second"]
    torch.testing.assert_close(outputs(model), outputs(expected), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs(model), outputs(nets.decoder()), atol=1e-3)


def test_it_is_made_by_get_peft_model_and_shares_what_a_peft_model_has(capsys: pytest.CaptureFixture) -> None:
    model = mixed()
    assert isinstance(model, ours.PeftMixedModel)
    assert isinstance(model.base_model, MixedModel)
    assert list(model.peft_config) == ["first", "second"]
    assert model.active_adapter == "first"
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,d} || all params: {total:,d}" in capsys.readouterr().out
    assert {status.name.rpartition(".")[2]: status.module_type for status in model.get_layer_status()} == {
        "q_proj": "lora.Linear", "v_proj": "lora.Linear", "down_proj": "loha.Linear"}


def test_set_adapter_says_what_is_trained() -> None:
    model = mixed()
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert trained
    assert all(".first" in name for name in trained)
    model.set_adapter(["first", "second"])
    assert {name.rsplit(".first")[0].rsplit(".second")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert any(".second" in name for name, param in model.named_parameters() if param.requires_grad)
    model.set_adapter("second", inference_mode=True)
    assert not any(param.requires_grad for param in model.parameters())
    with pytest.raises(ValueError, match=r"Adapter\(s\) \['third'\] not found, .*: \['first', 'second'\]"):
        model.set_adapter(["first", "third"])


def test_disable_merge_unmerge_unload() -> None:
    model = mixed()
    base = outputs(nets.decoder())
    model.set_adapter(["first", "second"])
    both = outputs(model)
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model), base, rtol=0, atol=0)
    model.merge_adapter()
    torch.testing.assert_close(outputs(model), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(outputs(model), both, rtol=0, atol=0)
    torch.testing.assert_close(outputs(copy.deepcopy(model).merge_and_unload()), both, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs(copy.deepcopy(model).merge_and_unload(adapter_names=["first"])),
                               outputs_of(model, "first"), rtol=1e-4, atol=1e-5)
    bare = model.unload()
    torch.testing.assert_close(outputs(bare), base, rtol=0, atol=0)
    assert type(bare.model.layers[0].self_attn.q_proj) is nn.Linear


def outputs_of(model: Any, *names: str) -> Tensor:
    model.set_adapter(list(names))
    return outputs(model)


def test_delete_adapter() -> None:
    model = mixed()
    both = outputs_of(model, "second")
    model.set_adapter(["first", "second"])
    model.delete_adapter("first")
    assert list(model.peft_config) == model.active_adapters == ["second"]
    torch.testing.assert_close(outputs(model), both, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"Adapter\(s\) \['first'\] not found, available adapters: \['second'\]"):
        model.delete_adapter(["second", "first"])
    assert list(model.peft_config) == ["second"]


def test_loading_adapters_of_two_methods(tmp_path: Path) -> None:
    found = {}
    for name, config in (("lora", lora(task_type="CAUSAL_LM")), ("loha", OTHERS["loha"]())):
        model = ours.get_peft_model(nets.decoder(), config)
        randomise(model)
        model.save_pretrained(tmp_path / name)
        found[name] = outputs(model)
    model = ours.PeftMixedModel.from_pretrained(nets.decoder(), tmp_path / "lora", "lora")
    assert type(model) is ours.PeftMixedModel
    torch.testing.assert_close(outputs(model), found["lora"])
    model.load_adapter(tmp_path / "loha", "loha")
    torch.testing.assert_close(outputs(model), found["lora"])
    model.set_adapter("loha")
    torch.testing.assert_close(outputs(model), found["loha"])
    trainable = ours.PeftMixedModel.from_pretrained(nets.decoder(), tmp_path / "lora", is_trainable=True)
    assert any(param.requires_grad for param in trainable.parameters())
    with pytest.raises(ValueError, match="must be a PeftConfig"):
        ours.PeftMixedModel.from_pretrained(nets.decoder(), tmp_path / "lora", config={"r": 2})


def test_each_adapter_can_be_saved_by_veneer(tmp_path: Path) -> None:
    model = mixed()
    with pytest.raises(NotImplementedError, match=r"veneer.save\(model.get_base_model\(\), path, name\)"):
        model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="Model card creation is not supported"):
        model.create_or_update_model_card(str(tmp_path))
    veneer.save(model.get_base_model(), tmp_path / "second", "second")
    again = ours.PeftModel.from_pretrained(nets.decoder(), tmp_path / "second")
    torch.testing.assert_close(outputs(again), outputs_of(model, "second"))


def test_what_is_refused() -> None:
    model = mixed()
    with pytest.raises(ValueError, match="Adapter with name 'first' already exists"):
        model.add_adapter("first", lora())
    with pytest.raises(ValueError, match=r"is not compatible with the `PeftMixedModel`. Compatible types are: LORA"):
        model.add_adapter("third", ours.PeftConfig(peft_type="IA3"))
    with pytest.raises(NotImplementedError, match=r"veneer\.combine"):
        model.add_weighted_adapter(["first"], [1.0], "new")
    with pytest.raises(TypeError, match="MixedModel takes configs of LORA"):
        model.base_model.add("third", ours.PeftConfig(peft_type="IA3"))
    assert set(COMPATIBLE_TUNER_TYPES) == set(ours.PEFT_TYPE_TO_MIXED_MODEL_MAPPING)
    plain = ours.get_peft_model(nets.decoder(), lora())
    with pytest.raises(ValueError, match=r"get_peft_model\(model, config, mixed=True\) can"):
        plain.add_adapter("other", OTHERS["loha"]())
