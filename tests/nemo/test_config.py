"""PeftConfig: fields, defaults, to_dict and from_dict, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from veneer import DoRA, LoRA
from veneer.method import VeneerError, VeneerWarning
from veneer.nemo import PeftConfig

from .nets import META

F32, BF16 = torch.float32, torch.bfloat16


def test_defaults_are_nemos():
    found = PeftConfig().to_dict()
    later = {"use_dora": False, "moe_rank_scaling": False, "use_memory_efficient_lora": True,
             "expert_weight_format": "unquantized"}
    assert found == {**META["peft_config_default"], **later}
    assert PeftConfig(["q"], ["o"], True, 4, 8).to_dict()["alpha"] == 8, "the order of the fields is part of the API"


def test_a_round_trip_keeps_every_field():
    config = PeftConfig(target_modules=["a"], exclude_modules=[], match_all_linear=False, dim=3, alpha=5, dropout=0.25,
                        dropout_position="pre", lora_A_init="uniform", lora_dtype=BF16, use_triton=True, use_dora=True,
                        moe_rank_scaling=True, use_memory_efficient_lora=False)
    assert all(getattr(config, f.name) != f.default for f in dataclasses.fields(config)
               if f.name not in ("target_modules", "exclude_modules", "match_all_linear", "expert_weight_format"))
    assert PeftConfig.from_dict(config.to_dict()) == config
    assert PeftConfig.from_dict({}) == PeftConfig()


def test_what_is_no_field_is_passed_over_and_named():
    assert PeftConfig.from_dict({"_target_": "nemo.PeftConfig", "dim": 4, "nothing": None}) == PeftConfig(dim=4)
    with pytest.warns(VeneerWarning, match="PeftConfig has no field 'dropuot'; did you mean 'dropout'"):
        assert PeftConfig.from_dict({"dropuot": 0.1}) == PeftConfig()


def test_each_option_reaches_the_method():
    base = PeftConfig()
    assert base.method(F32) == LoRA(rank=8, alpha=32, init="xavier", dropout_on="output")
    for given, want in [
        ({"dim": 3}, {"rank": 3}), ({"alpha": 5}, {"alpha": 5}), ({"dropout": 0.5}, {"dropout": 0.5}),
        ({"dropout_position": "pre"}, {"dropout_on": "input"}), ({"lora_A_init": "uniform"}, {"init": "kaiming"}),
        ({"lora_A_init": "kaiming"}, {"init": "kaiming"}), ({"lora_dtype": "bf16"}, {"dtype": BF16}),
    ]:
        assert PeftConfig(**given).method(F32) == dataclasses.replace(base.method(F32), **want)
    assert PeftConfig(use_dora=True).method(F32) == DoRA(base.method(F32))
    assert base.method(BF16).dtype == BF16, "an adapter is of its layer's dtype, as in NeMo"
    assert PeftConfig(lora_dtype="float32").method(BF16).dtype is None, "which is fp32 here"


@pytest.mark.parametrize(("name", "dtype"), META["edge"]["lora_dtype_names"].items())
def test_names_of_dtypes(name, dtype):
    assert PeftConfig(lora_dtype=name).method(torch.float64).dtype == getattr(torch, dtype.removeprefix("torch."))


@pytest.mark.parametrize(("given", "message"), [
    ({"dim": 0}, "PeftConfig: dim must be a whole number of at least 1, got 0"),
    ({"dim": 2.5}, "dim must be a whole number"), ({"alpha": "8"}, "alpha must be a finite number, got '8'"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ({"dropout_position": "psot"}, "unknown dropout_position 'psot'; did you mean 'post'"),
    ({"lora_A_init": "pissa"}, "unknown lora_A_init 'pissa'. Known: xavier, uniform, kaiming"),
    ({"lora_dtype": "bf17"}, "unknown lora_dtype 'bf17'; did you mean 'bf16'"),
    ({"lora_dtype": 16}, "unknown lora_dtype 16"), ({"use_triton": 1}, "use_triton must be True or False, got 1"),
    ({"match_all_linear": "yes"}, "match_all_linear must be True or False"),
    ({"expert_weight_format": "mxfp4"}, "unknown expert_weight_format 'mxfp4'. Known: unquantized"),
    ({"target_modules": {"a": 1}}, "target_modules must be a string or a list of strings"),
])
def test_what_cannot_be(given, message):
    with pytest.raises(VeneerError, match=message):
        PeftConfig(**given)


def test_a_field_set_later_is_looked_at_when_it_is_used():
    config = PeftConfig()
    config.dropout_position = "behind"
    with pytest.raises(VeneerError, match="unknown dropout_position 'behind'"):
        config.method(F32)
