"""get_layer_status and get_model_status: every field, beside the installed PEFT where that can be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.peft_door import nets
from torch import nn

import veneer
import veneer.peft as ours
from veneer.method import VeneerError
from veneer.peft.peft_model import TunerLayerStatus, TunerModelStatus

TARGETS = ["q_proj", "v_proj"]


def lora(**options: Any) -> Any:
    return ours.get_peft_model(nets.decoder(), ours.LoraConfig(**{"r": 2, "target_modules": TARGETS, **options}))


class Mixed(nn.Module):
    """A layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(10, 8)
        self.conv = nn.Conv2d(2, 4, 3)
        self.lin = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(self.emb(x))


CONFIGS = {
    "lora": ("LoraConfig", {"r": 2, "target_modules": ["emb", "conv", "lin"]}),
    "adalora": ("AdaLoraConfig", {"total_step": 5, "target_modules": ["lin"]}),
    "loha": ("LoHaConfig", {"r": 2, "target_modules": ["conv", "lin"]}),
    "lokr": ("LoKrConfig", {"r": 2, "target_modules": ["conv", "lin"]}),
    "vera": ("VeraConfig", {"r": 2, "target_modules": ["lin"]}),
    "vblora": ("VBLoRAConfig", {"r": 2, "vector_length": 4, "num_vectors": 8, "target_modules": ["lin"]}),
    "randlora": ("RandLoraConfig", {"r": 2, "target_modules": ["lin"]}),
    "saved": ("LoraConfig", {"r": 2, "target_modules": ["lin"], "modules_to_save": ["emb"]}),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.filterwarnings("ignore")
def test_the_same_as_pefts(config: str) -> None:
    theirs = pytest.importorskip("peft")
    kind, options = CONFIGS[config]
    found = []
    for library in (ours, theirs):
        torch.manual_seed(1)
        model = library.get_peft_model(Mixed(), getattr(library, kind)(**options))
        layers = {status.name: dataclasses.asdict(status) for status in model.get_layer_status()}
        whole = dataclasses.asdict(model.get_model_status())
        found.append((layers, whole))
    (mine, all_mine), (other, all_other) = found
    assert list(mine) == list(other)
    for name in mine:
        assert mine[name] == other[name]
    if config == "adalora":
        all_other["total_params"] -= 1  # how many triplets are left, which PEFT holds as a parameter
    assert all_mine == all_other


def test_rows_that_are_trained() -> None:
    model = ours.get_peft_model(Mixed(), ours.LoraConfig(target_modules=["lin"], trainable_token_indices={"emb": [1]}))
    found = {status.name: status.module_type for status in ours.get_layer_status(model)}
    assert found == {"model.emb.token_adapter": "TrainableTokensLayer", "model.lin": "lora.Linear"}


def test_fields_are_pefts() -> None:
    theirs = pytest.importorskip("peft.peft_model")
    for mine, other in ((TunerLayerStatus, theirs.TunerLayerStatus), (TunerModelStatus, theirs.TunerModelStatus)):
        assert [f.name for f in dataclasses.fields(mine)] == [f.name for f in dataclasses.fields(other)]


def test_names_and_numbers_of_a_model() -> None:
    model = lora()
    status = model.get_model_status()
    assert (status.base_model_type, status.adapter_model_type) == ("LlamaForCausalLM", "LoraModel")
    assert status.peft_types == {"default": "LORA"}
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.num_adapter_layers == len(model.get_layer_status()) == 6
    assert model.get_layer_status()[0].name == "model.model.layers.0.self_attn.q_proj"
    assert status.devices == {"default": ["cpu"]}


def test_what_is_enabled_active_and_trained() -> None:
    model = lora()
    model.add_adapter("other", ours.LoraConfig(r=2, target_modules=["q_proj"]))
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.available_adapters) == (True, ["default"],
                                                                                  ["default", "other"])
    assert status.requires_grad == {"default": True, "other": False}
    model.set_adapter("other")
    status = model.get_model_status()
    assert (status.active_adapters, status.requires_grad) == (["other"], {"default": False, "other": True})
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
        assert not any(layer.enabled for layer in model.get_layer_status())
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.enable_adapters(False)
    assert model.get_model_status().enabled == "irregular"


def test_irregular_gradients_of_a_layer_and_of_a_model() -> None:
    model = lora()
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.lora_A["default"].weight.requires_grad_(False)
    assert model.get_layer_status()[0].requires_grad == {"default": "irregular"}
    assert model.get_layer_status()[1].requires_grad == {"default": True}
    assert model.get_model_status().requires_grad == {"default": "irregular"}
    layer.lora_B["default"].weight.requires_grad_(False)
    assert model.get_layer_status()[0].requires_grad == {"default": False}
    assert model.get_model_status().requires_grad == {"default": "irregular"}


def test_what_is_merged() -> None:
    model = lora()
    assert model.get_model_status().merged_adapters == []
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    assert model.get_layer_status()[0].merged_adapters == ["default"]
    model.get_base_model().model.layers[1].self_attn.v_proj.unmerge()
    assert model.get_model_status().merged_adapters == "irregular"


def test_active_adapters_of_parts_put_together() -> None:
    first, second = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    for part, name in ((first, "a"), (second, "b")):
        ours.inject_adapter_in_model(ours.LoraConfig(r=2, target_modules=["0"]), part, name)
    status = ours.get_model_status(nn.Sequential(first, second))
    assert status.active_adapters == "irregular"


def test_devices() -> None:
    model = ours.get_peft_model(Mixed(), ours.LoraConfig(target_modules=["lin"]))
    model.to("meta")
    assert model.get_model_status().devices == {"default": ["meta"]}


def test_models_without_a_peft_model() -> None:
    model = ours.inject_adapter_in_model(ours.LoraConfig(r=2, target_modules=TARGETS), nets.decoder())
    status = ours.get_model_status(model)
    assert (status.base_model_type, status.adapter_model_type, status.peft_types) == ("LlamaForCausalLM", "None", {})
    assert ours.get_layer_status(model)[0].name == "model.layers.0.self_attn.q_proj"
    plain = veneer.attach(Mixed(), {"lin": veneer.LoRA(rank=2)})
    status = ours.get_model_status(plain)
    assert (status.base_model_type, status.num_adapter_layers, status.trainable_params) == ("other", 1, 32)
    assert ours.get_layer_status(plain)[0].module_type == "lora.Linear"


def test_a_compiled_model_is_looked_through() -> None:
    model = lora()
    compiled: Any = torch.compile(model)
    assert ours.get_model_status(compiled) == model.get_model_status()


@pytest.mark.parametrize(("scheme", "expected"), [("nf4", "nf4"), ("hqq-4", "hqq")])
def test_the_storage_of_quantised_weights(scheme: str, expected: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    if scheme == "hqq-4":
        pytest.importorskip("hqq")
    veneer.quantize(model, scheme)
    found = ours.get_peft_model(model, ours.LoraConfig(r=2, target_modules=["0"]))
    assert found.get_layer_status()[0].quantization_backend == expected
    assert found.get_model_status().quantization_backend == expected
    half = nn.Sequential(model, nn.Linear(64, 64))
    ours.inject_adapter_in_model(ours.LoraConfig(r=2, target_modules=["1"]), half, "more")
    assert ours.get_model_status(half).quantization_backend == "irregular"


def test_bitsandbytes_has_pefts_name() -> None:
    pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64))
    veneer.quantize(model, "bnb-nf4")
    found = ours.get_peft_model(model, ours.LoraConfig(r=2, target_modules=["0"]))
    assert found.get_layer_status()[0].quantization_backend == "bnb 4bit"


def test_no_adapters() -> None:
    for ask in (ours.get_layer_status, ours.get_model_status):
        with pytest.raises(VeneerError, match="No adapter layers found in the model"):
            ask(nets.decoder())
