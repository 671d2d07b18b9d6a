"""What `print(model)` says of a layer with adapters."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import veneer.peft as ours
from veneer.peft.printed import describe

from . import nets


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.words, self.head = nn.Linear(16, 8), nn.Embedding(10, 16), nn.Linear(8, 3)


def layers(door: Any, kind: str, options: dict[str, Any], more: dict[str, Any] | None = None) -> nn.Module:
    model = door.get_peft_model(Net(), getattr(door, kind)(**options))
    if more is not None:
        model.add_adapter("more", getattr(door, kind)(**more))
    return model.get_base_model()


@pytest.mark.parametrize(("options", "more", "names"), [
    ({"r": 4, "target_modules": ["up"]}, None, ["up"]),
    ({"r": 4, "target_modules": ["up"], "lora_dropout": 0.1, "modules_to_save": ["head"]},
     {"r": 2, "target_modules": ["up"], "lora_bias": True}, ["up", "head"]),
    ({"r": 4, "target_modules": [], "target_parameters": ["up.weight"]}, None, ["up"]),
], ids=["one", "two", "a parameter"])
def test_as_pefts_layers_print(options: dict[str, Any], more: dict[str, Any] | None, names: list[str]) -> None:
    theirs = layers(pytest.importorskip("peft"), "LoraConfig", options, more)
    mine = layers(ours, "LoraConfig", options, more)
    for name in names:
        text = describe(mine.get_submodule(name))  # type: ignore[arg-type]
        expected = repr(theirs.get_submodule(name))
        if "target_parameters" in options:
            expected = expected.replace("ParamWrapper", "Linear").replace("  parameter_name='weight',\n", "")
        assert text == expected


@pytest.mark.parametrize(("kind", "options", "says"), [
    ("AdaLoraConfig", {"target_r": 2, "init_r": 4, "total_step": 10, "tfinal": 1}, ["adalora.SVDLinear(", "(lora_E)"]),
    ("LoHaConfig", {}, ["loha.Linear(", "(hada_w1_a): ParameterDict("]),
    ("VeraConfig", {"r": 4}, ["vera.Linear(", "(vera_dropout)", "(vera_lambda_b)"]),
])
def test_layers_of_the_family(kind: str, options: dict[str, Any], says: list[str]) -> None:
    text = describe(layers(ours, kind, {"target_modules": ["up"], **options}).up)  # type: ignore[arg-type]
    for part in ["  (base_layer): Linear(in_features=16, out_features=8, bias=True)", *says]:
        assert part in text
    assert "dapte" not in text  # neither `adapters` nor a class of the engine


def test_rows_of_an_embedding() -> None:
    base = layers(ours, "LoraConfig", {"target_modules": ["up"], "trainable_token_indices": {"words": [1, 2]}})
    text = describe(base.words)  # type: ignore[arg-type]
    assert text.startswith("TrainableTokensWrapper(\n  (base_layer): Embedding(10, 16)\n  (token_adapter): ")
    assert "[torch.FloatTensor of size 2x16]" in text


def test_several_parameters_of_one_module_stand_in_one_another() -> None:
    config = ours.LoraConfig(r=2, target_modules=[], target_parameters=["gate_up_proj", "down_proj"])
    model = ours.get_peft_model(nets.experts(), config)
    text = describe(model.get_submodule("base_model.model.model.layers.0.mlp.experts"))  # type: ignore[arg-type]
    lines = text.split("\n")
    assert lines[:4] == ["lora.ParamWrapper(", "  parameter_name='down_proj',", "  (base_layer): lora.ParamWrapper(",
                         "    parameter_name='gate_up_proj',"]
    assert lines[4].startswith("    (base_layer): MixtralExperts(")
    assert [line for line in lines if "(lora_A)" in line] == ["    (lora_A): ModuleDict(", "  (lora_A): ModuleDict("]
