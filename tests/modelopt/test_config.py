"""The configs: ModelOpt's own tables of what is valid, defaults, JSON, schema, and how patterns add up."""

from __future__ import annotations

import functools
import inspect
import json
import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from veneer.modelopt import ExportPEFTConfig, PEFTAttributeConfig, PEFTConfig
from veneer.modelopt.config import attributes

from .nets import META


def outcome(make):
    try:
        return ["ok", make()]
    except ValidationError:
        return ["error", "ValidationError"]


@pytest.mark.parametrize("name", META["attr_validation"])
def test_attributes(name):
    given, want = META["attr_validation"][name]
    assert outcome(lambda: PEFTAttributeConfig(**given).model_dump(mode="json")) == want[:2]


@pytest.mark.parametrize(("name", "given"), [
    ("kaiming_uniform_", torch.nn.init.kaiming_uniform_), ("lambda", lambda t: t),
    ("deprecated kaiming_uniform", torch.nn.init.kaiming_uniform),
    ("partial", functools.partial(torch.nn.init.kaiming_uniform_, a=1))])
def test_functions_as_initialisers(name, given):
    want = META["attr_validation_callables"][name]
    assert outcome(lambda: PEFTAttributeConfig(lora_a_init=given).model_dump(mode="json")) == want[:2]


@pytest.mark.parametrize("field", ["lora_dtype", "lora_init_method"])
def test_spellings(field):
    for given, want in META[field].items():
        value = None if given == "None" else given
        assert outcome(lambda: getattr(PEFTAttributeConfig(**{field: value}), field)) == want[:2]  # noqa: B023


def test_the_whole_config():
    table = META["peft_config"]
    assert PEFTConfig().model_dump(mode="json") == table["default_json"]
    assert outcome(lambda: PEFTConfig(adapter_cfg={}).model_dump(mode="json")) == table["empty"]
    assert ExportPEFTConfig().model_dump(mode="json") == table["export_json"]
    bad = {"type": {"adapter_type": "dora"}, "extra": {"alpha": 1}, "bad_nested": {"adapter_cfg": {"*": {"rank": 0}}},
           "none_value": {"adapter_cfg": {"*": None}}, "int_key": {"adapter_cfg": {3: {}}}}
    for name, given in bad.items():
        assert outcome(lambda: PEFTConfig(**given)) == table[name][:2], name  # noqa: B023
    called = PEFTConfig(adapter_cfg={str.isidentifier: {}})
    assert ["ok", len(called.adapter_cfg)] == table["callable_key_valid"]
    with pytest.raises(ValueError, match="Unable to serialize unknown type"):
        called.model_dump_json()
    with pytest.raises(ValidationError):
        ExportPEFTConfig(anything=1)


def test_assignment_is_validated():
    config = PEFTAttributeConfig()
    with pytest.raises(ValidationError):
        config.rank = -1
    config.lora_b_init = "torch.nn.init.ones_"
    assert config.lora_b_init is torch.nn.init.ones_


def test_json_there_and_back_keeps_what_is_unset():
    config = PEFTConfig(adapter_name="a", adapter_cfg={"*": {"rank": 4, "lora_dtype": "bfloat16"}, "fc": {}})
    text = config.model_dump_json(exclude_unset=True)
    assert json.loads(text) == {"adapter_name": "a", "adapter_cfg": {"*": {"rank": 4, "lora_dtype": "bf16"}, "fc": {}}}
    again = PEFTConfig.model_validate_json(text)
    assert again == config
    assert again.adapter_cfg["*"].model_fields_set == {"rank", "lora_dtype"}
    assert PEFTConfig.model_validate_json(PEFTConfig().model_dump_json()) == PEFTConfig()


def test_the_schema_has_the_documented_defaults():
    schema = PEFTConfig.model_json_schema()
    attribute = schema["$defs"]["PEFTAttributeConfig"]["properties"]
    assert {name: said["default"] for name, said in attribute.items()} == META["peft_config"]["default_json"][
        "adapter_cfg"]["*"]
    assert attribute["lora_a_init"]["type"] == "string"
    assert attribute["lora_a_init"]["examples"] == ["torch.nn.init.zeros_", "torch.nn.init.kaiming_uniform_"]
    plain = {name: said.get("default") for name, said in schema["properties"].items() if name != "adapter_cfg"}
    assert plain == {key: value for key, value in META["peft_config"]["default_json"].items() if key != "adapter_cfg"}
    assert all("description" in said for said in (*attribute.values(), *schema["properties"].values()))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: PEFTAttributeConfig(lora_a_init="torch.nn.init.one_"),
     r"no in-place function of torch.nn.init; did you mean 'ones_'\? Give its dotted name"),
    (lambda: PEFTAttributeConfig(rank=0), "greater than 0"),
    (lambda: PEFTConfig(adapter_cfg={3: {}}),
     r"a pattern is a string, in which \* \? \[\] are wildcards, or a callable \(name\) → bool, got 3"),
    (lambda: PEFTConfig(adapter_typ="lora"), "Extra inputs are not permitted"),
])
def test_what_is_said_for_bad_input(make, message):
    with pytest.raises(ValidationError, match=message):
        make()


def test_what_is_set_adds_up_in_the_order_of_the_patterns():
    def got(patterns, name="fc", bare=True):
        found = attributes(PEFTConfig(adapter_cfg=patterns).adapter_cfg, {name: bare})
        return None if found is None else found.model_dump(mode="json", exclude_unset=True)

    assert got({"*": {"rank": 4, "scale": 3.0}, "f*": {"rank": 2}}) == {"rank": 2, "scale": 3.0}
    assert got({"f*": {"rank": 2}, "*": {"rank": 4}}) == {"rank": 4}
    assert got({"*": {"enable": False}, "fc": {"rank": 8}}) == {"enable": False, "rank": 8}
    assert got({"g*": {"rank": 8}}) is None
    assert got({str.isupper: {"rank": 1}, "F?": {"scale": 2}}, "FC") == {"rank": 1, "scale": 2.0}
    assert got({"*": {"rank": 1}}, bare=False) is None
    assert got({"*c": {"rank": 1}}, bare=False) == {"rank": 1}


def test_pydantic_is_imported_in_one_file_and_its_absence_is_named():
    code = ("import sys; sys.modules['pydantic'] = None\n"
            "import veneer.nemo\n"
            "try:\n    import veneer.modelopt\nexcept ImportError as error:\n    print(error)")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ("veneer.modelopt needs the library 'pydantic', which is not installed. Install it "
                                    "with: pip install 'veneer[modelopt]'")


def test_no_other_optional_library_is_imported():
    code = ("import sys, torch\n"
            "before = set(sys.modules)\n"
            "import veneer.modelopt\n"
            "optional = {'transformers', 'triton', 'bitsandbytes', 'torchao', 'peft', 'modelopt'}\n"
            "print(sorted(optional & (set(sys.modules) - before)))")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_positional_names_are_modelopts():
    import veneer.modelopt as mtpeft

    assert list(inspect.signature(mtpeft.disable_adapters).parameters) == ["model", "layers_to_disable",
                                                                           "adapters_to_disable"]
    assert list(inspect.signature(mtpeft.enable_adapters).parameters) == ["model", "layers_to_enable",
                                                                          "adapters_to_enable"]
    assert list(inspect.signature(mtpeft.freeze_lora_weights).parameters) == ["model", "layer_patterns",
                                                                              "adapter_patterns"]
