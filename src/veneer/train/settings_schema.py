"""The JSON schema of the config file, for editors."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from veneer.inits import init_names
from veneer.inits.base import init_class
from veneer.method import method_class, method_names
from veneer.train import quantised
from veneer.train.schema import json_schema
from veneer.train.settings import SECTIONS, ModelSettings


def settings_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of the config file."""
    section = json_schema(ModelSettings)
    section["properties"]["quantize"]["anyOf"] = quantised.schemas()
    model = {"anyOf": [{"type": "string"}, section]}
    properties = {"model": model, "adapter": _adapter_schema()}
    properties |= {name: json_schema(cls) for name, cls in SECTIONS.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "veneer train",
        "type": "object",
        "additionalProperties": False,
        "required": ["model", "adapter", "data"],
        "properties": properties,
    }


def _adapter_schema() -> dict[str, Any]:
    """One alternative for each registered method, and one for rules."""
    shared = {"name": {"type": "string", "default": "default"}, "seed": {"type": "integer", "default": 0}}
    targets = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    alternatives: list[dict[str, Any]] = []
    methods: list[dict[str, Any]] = []
    for key in method_names():
        options: dict[str, Any] = {f.name: {} for f in fields(method_class(key))}
        if "init" in options:
            options["init"] = _init_schema()
        described = {"method": {"const": key}, **options}
        methods.append(_object(described, ["method"]))
        alternatives.append(_object({**shared, "targets": targets, **described}, ["method"]))
    rule = {"anyOf": [{"type": "null"}, {"enum": method_names()}, *methods]}
    rules = {"type": "object", "additionalProperties": rule, "minProperties": 1}
    alternatives.append(_object({**shared, "rules": rules}, ["rules"]))
    return {"anyOf": alternatives}


def _init_schema() -> dict[str, Any]:
    """A start by its name (dotted names of torch.nn.init too), or with its options."""
    starts = []
    for key in init_names():
        named = {"init": {"const": key}, **{f.name: {} for f in fields(init_class(key))}}
        starts.append(_object(named, ["init"]))
    return {"anyOf": [{"type": "string", "examples": init_names()}, *starts]}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}
