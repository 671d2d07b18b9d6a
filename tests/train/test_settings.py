from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from veneer import DoRA, LoRA
from veneer.train.config_file import parse_value, read
from veneer.train.schema import ConfigError
from veneer.train.settings import load_settings, parse_settings
from veneer.train.settings_schema import settings_schema

GOOD: dict[str, Any] = {"model": "m", "adapter": {"method": "lora"}, "data": {"train": "a.jsonl"}}


def parse(**changes: Any) -> Any:
    return parse_settings({**GOOD, **changes}, Path("."))


def test_defaults_and_shorthand() -> None:
    settings = parse()
    assert settings.model.name == "m"
    assert settings.adapter.rules == LoRA()
    assert settings.training.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"learing_rate": 1}}, r"unknown key 'learing_rate' in training; did you mean 'learning_rate'\?"),
        ({"trainin": {}}, r"unknown section 'trainin' in the config; did you mean 'training'\? Sections: model"),
        ({"zzz": {}}, r"unknown section 'zzz' in the config\. Sections: model"),
        ({"learning_rate": 1e-4}, r"'learning_rate' stands at the top .*; it belongs into the section training"),
        ({"batch_size": 4}, r"belongs into the section calibration or training or evaluation"),
        ({"rank": 4}, r"belongs into the section adapter"),
        ({"training": {"zzz": 1}}, r"unknown key 'zzz' in training\. Known keys: epochs"),
        ({"training": {"optimizer": "adamwx"}}, r"training.optimizer is 'adamwx'; .*did you mean 'adamw_torch'\?"),
        ({"adapter": {"method": "lora", "rnak": 8}}, r"adapter: method 'lora' .* 'rnak'; did you mean 'rank'"),
        ({"adapter": {"method": "lara"}}, r"adapter: unknown method 'lara'; did you mean 'lora'\?"),
        ({"adapter": {"rank": 8}}, r"adapter needs 'method' \(one of .*lora.*\) or 'rules'"),
        ({"training": {"batch_size": "eight"}}, r"training.batch_size must be a whole number, got 'eight'"),
        ({"training": {"batch_size": True}}, r"training.batch_size must be a whole number, got True"),
        ({"training": {"batch_size": 0}}, r"training.batch_size must be at least 1, got 0"),
        ({"training": {"warmup_ratio": 1.5}}, r"training.warmup_ratio must be at most 1.0, got 1.5"),
        ({"training": {"learning_rate": float("nan")}}, r"training.learning_rate must be a finite number"),
        ({"training": {"schedule": "cosin"}}, r"training.schedule is 'cosin'; possible: .*did you mean 'cosine'\?"),
        ({"training": [1]}, r"training must be a mapping of keys to values, got \[1\]"),
        ({"data": {"train": 5}}, r"data.train must be text or a list, got 5"),
        ({"data": {}}, r"data needs exactly one of 'train' \(files\) and 'generator'"),
        ({"data": {"train": "a", "generator_options": {"x": 1}}}, r"generator_options has no effect without"),
        ({"data": {"train": "a", "heldout": "b", "heldout_share": 0.1}}, r"exclude each other"),
        ({"evaluation": {"keep_best": True}}, r"keep_best needs evaluation.every and training.save_every"),
        ({"evaluation": {"every": 5}}, r"evaluation.every needs held-out data"),
        ({"model": {"dtype": "float32"}}, r"model.name is missing"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**changes)


def test_a_missing_section_is_named() -> None:
    with pytest.raises(ConfigError, match="no section 'adapter'; needed: model, adapter, data"):
        parse_settings({"model": "m", "data": {"train": "a"}}, Path("."))


def test_rules_and_targets() -> None:
    dora = {"method": "dora", "inner": {"method": "lora", "rank": 4}}
    rules = {"*.q_proj": {"method": "lora", "rank": 16}, "*.mlp.*": dora, "lm_head": None}
    found = parse(adapter={"rules": rules}).adapter.rules
    assert found == {"*.q_proj": LoRA(rank=16), "*.mlp.*": DoRA(LoRA(rank=4)), "lm_head": None}
    two = parse(adapter={"method": "lora", "rank": 2, "targets": ["*.q_proj", "*.v_proj"]}).adapter.rules
    assert two == {"*.q_proj": LoRA(rank=2), "*.v_proj": LoRA(rank=2)}


def test_rules_beside_a_method_are_refused() -> None:
    with pytest.raises(ConfigError, match="adapter has 'rules', so 'rank' belongs inside one of its rules"):
        parse(adapter={"rules": {"*": "lora"}, "rank": 4})


def test_yaml_numbers_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: m\nadapter: {method: lora}\ndata: {train: a.jsonl}\ntraining: {learning_rate: 1e-4}\n")
    assert load_settings(path).training.learning_rate == 1e-4
    overrides = ["training.learning_rate=3e-3", "model.dtype=float32", "data.train=[x.jsonl, y.csv]", "adapter.rank=2"]
    settings = load_settings(path, overrides)
    assert settings.training.learning_rate == 3e-3
    assert (settings.model.name, settings.model.dtype) == ("m", "float32")
    assert settings.data.train == ["x.jsonl", "y.csv"]
    assert settings.adapter.rules == LoRA(rank=2)
    with pytest.raises(ConfigError, match="unknown key 'bathc_size' in training; did you mean 'batch_size'"):
        load_settings(path, ["training.bathc_size=3"])
    with pytest.raises(ConfigError, match="--set needs KEY=VALUE with a dotted key, got 'training'"):
        load_settings(path, ["training"])
    with pytest.raises(ConfigError, match=r"--set data\.train\.x: 'train' holds 'a\.jsonl', which has no keys"):
        load_settings(path, ["data.train.x=1"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("2E5", 2e5), ("-3e+2", -300.0), (".5e1", 5.0), ("7", 7), ("true", True), ("null", None),
     ("e5", "e5"), ("1e", "1e"), ("a b", "a b")],
)  # fmt: skip
def test_values_of_set(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value
    assert type(found) is type(value)


def test_config_file_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: 1\nb:\n  x: 1\n  x: 2\n")
    with pytest.raises(ConfigError, match=r"key 'x' stands twice in the same mapping, the second time in line 4"):
        read(path)
    path.write_text("a: [1\n")
    with pytest.raises(ConfigError, match=r"c.yaml is not valid YAML: .*line 2"):
        read(path)
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="must hold a mapping of keys to values, got list"):
        read(path)
    with pytest.raises(ConfigError, match=r"no config file '.*d.yaml'; YAML files there: c.yaml"):
        read(tmp_path / "d.yaml")


def test_schema_names_every_key_and_is_plain_json() -> None:
    schema = json.loads(json.dumps(settings_schema()))
    assert schema["required"] == ["model", "adapter", "data"]
    training = schema["properties"]["training"]
    assert training["additionalProperties"] is False
    assert training["properties"]["batch_size"] == {
        "type": "integer", "minimum": 1, "default": 8, "description": "Examples in one forward pass, per device.",
    }  # fmt: skip
    kinds = schema["properties"]["adapter"]["anyOf"]
    lora = next(kind for kind in kinds if kind["properties"].get("method") == {"const": "lora"})
    assert {"rank", "alpha", "dropout", "targets", "name"} <= set(lora["properties"])
    undescribed = [
        f"{section}.{key}"
        for section in ("data", "training", "evaluation", "output")
        for key, entry in schema["properties"][section]["properties"].items()
        if not entry.get("description")
    ]
    assert undescribed == []
