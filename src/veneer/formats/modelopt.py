"""ModelOpt's PEFT mode in files: the config that stands beside an adapter in a directory of veneer.modelopt."""

from __future__ import annotations

import json
from typing import Any

from veneer.formats.content import META_MODELOPT, Content
from veneer.inits.random import TorchInit
from veneer.io.dialects.hf_base import Inexpressible
from veneer.io.records import Record
from veneer.methods import LoRA

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def mode_of(content: Content, name: str) -> tuple[dict[str, Any], list[str]]:
    """An entry of modelopt_state.json for an adapter that has this name unless it came from ModelOpt, and notes.

    Raises `Inexpressible` for what ModelOpt's config has no words for.
    """
    if META_MODELOPT in content.header:
        return json.loads(content.header[META_MODELOPT]), []
    patterns: dict[str, Any] = {"*": {"enable": False}}
    for record in content.records:
        for layer, said in _patterns(record, content).items():
            patterns[layer] = said
    config = {"adapter_name": name, "adapter_cfg": patterns, "adapter_type": "lora"}
    methods = [record.method for record in content.records]
    notes = []
    if any(isinstance(m, LoRA) and m.dropout for m in methods):
        notes.append("ModelOpt's config has no dropout; veneer.json keeps it")
    if any(isinstance(m, LoRA) and not isinstance(m.start_rule, TorchInit) and m.init != "kaiming" for m in methods):
        notes.append("ModelOpt's config says its default start; veneer.json keeps the real one")
    return {"config": config, "metadata": {"layers": len(content.records), "off": [], "frozen": []}}, notes


def _patterns(record: Record, content: Content) -> dict[str, dict[str, Any]]:
    """The layers of a weight → their attributes."""
    method, site = record.method, content.base.sites[record.name]
    if not isinstance(method, LoRA):
        raise Inexpressible(f"{record.name!r} has {method}; ModelOpt has LoRA alone")
    if method.bias:
        raise Inexpressible(f"{record.name!r} has {method}; ModelOpt has no added bias")
    if method.scale <= 0:
        raise Inexpressible(f"{record.name!r} has a scale of {method.scale:g}; ModelOpt's is above 0")
    said: dict[str, Any] = {"enable": True, "rank": method.rank, "scale": method.scale}
    dtype = str(record.tensors["A"].dtype).removeprefix("torch.")
    if dtype not in _SHORT:
        raise Inexpressible(f"{record.name!r} is of {dtype}; ModelOpt has {', '.join(_SHORT)}")
    said["lora_dtype"] = _SHORT[dtype]
    if isinstance(method.start_rule, TorchInit):
        said |= {"lora_a_init": method.start_rule.a, "lora_b_init": method.start_rule.b}
    return {spot.module if spot.param == "weight" else spot.path: said for spot in site.spots}
