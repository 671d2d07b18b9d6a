"""ModelOpt's PEFT mode in files: the config that stands beside an adapter in a directory of veneer.modelopt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from veneer.formats.content import META_MODELOPT, Content
from veneer.inits.random import TorchInit
from veneer.io.dialects.hf_base import Inexpressible, way_out
from veneer.io.manifest import parse_json, read_json
from veneer.io.records import Record
from veneer.method import VeneerError
from veneer.methods import LoRA

#: the kind of the entries of modelopt_state.json that are adapters, and the name of one whose config has none
MODE, DEFAULT = "peft", "default"
_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def name_of(content: Content) -> str | None:
    """The name that an adapter had in ModelOpt; None where it did not come from there."""
    mode = _known_mode(content)
    return None if mode is None else mode["config"].get("adapter_name", DEFAULT)


def _known_mode(content: Content) -> dict[str, Any] | None:
    if META_MODELOPT not in content.header:
        return None
    mode = parse_json(content.header[META_MODELOPT], f"{META_MODELOPT} in the tensor file's header")
    if not isinstance(mode.get("config"), dict) or not isinstance(mode["config"].get("adapter_name", DEFAULT), str):
        raise VeneerError(f"{META_MODELOPT} in the tensor file's header is damaged: it has no config with a name")
    return mode


def other_modes(file: Path, name: str) -> list[Any]:
    """The entries of a modelopt_state.json but that of the adapter `name`; none where there is no such file.

    Raises `VeneerError` for a file that is damaged.
    """
    if not file.is_file():
        return []
    try:
        modes = read_json(file)["modelopt_state_dict"]
        return [mode for mode in modes if mode[1].get("config", {}).get("adapter_name", DEFAULT) != name
                or mode[0] != MODE]
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise VeneerError(f"{file} is damaged: {type(error).__name__}: {error}; nothing was written") from error


def mode_of(content: Content, name: str) -> tuple[dict[str, Any], list[str]]:
    """An entry of modelopt_state.json for an adapter under this name, and notes.

    Raises `Inexpressible` for what ModelOpt's config has no words for.
    """
    known = _known_mode(content)
    if known is not None:
        if name_of(content) != name:
            known["config"]["adapter_name"] = name
        return known, []
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
        raise Inexpressible(f"{record.name!r} has {method}; ModelOpt has LoRA alone"
                            f"{way_out(method, with_dora=False)}")
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
