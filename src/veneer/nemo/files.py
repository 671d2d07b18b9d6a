"""NeMo AutoModel's adapter directories: adapter_model.safetensors, adapter_config.json, automodel_peft_config.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attach import detach
from veneer.attached import adapter_names, hosts
from veneer.io import store
from veneer.io.dialects import hf_config, hf_names, hf_types
from veneer.io.load import load
from veneer.io.manifest import read_json
from veneer.io.records import BaseMap, Record, base_map
from veneer.io.save import SaveReport, save
from veneer.method import Method, VeneerError
from veneer.nemo.apply import lay_on
from veneer.nemo.config import PeftConfig
from veneer.nemo.linear import show
from veneer.weights import scan
from veneer.wrappers import unwrap

SETTINGS = "automodel_peft_config.json"
#: what NeMo writes into adapter_config.json of every adapter
_ALWAYS = ("base_model_name_or_path", "bias", "lora_alpha", "peft_type", "r", "task_type")
#: what is written where it is not PEFT's default
_IF_SET = ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "target_parameters",
           "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "fan_in_fan_out")
#: settings of later versions than the files of the first one know, written where they are not the default
_LATER = {"use_dora": False, "moe_rank_scaling": False, "use_memory_efficient_lora": True,
          "expert_weight_format": "unquantized"}


def save_adapter(model: nn.Module, peft_config: PeftConfig, path: str | Path, name: str = "default") -> SaveReport:
    """Write the adapter `name` as NeMo does, beside them veneer.json, which NeMo and PEFT do not look at.

    All at once, as `veneer.save`. Raises `VeneerError` for an adapter that these files cannot hold.
    """
    peft_config.check()

    def dress(config: dict[str, Any], records: list[Record], base: BaseMap) -> tuple[dict[str, Any], dict[str, str]]:
        return worded(config, records, base, peft_config)

    return save(model, path, name, dress=dress)


def worded(config: Mapping[str, Any], records: list[Record], base: BaseMap,
           peft_config: PeftConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """PEFT's config as NeMo words it, and the text of automodel_peft_config.json by its name."""
    kept = {key: config[key] for key in _ALWAYS} | {key: config[key] for key in _IF_SET if config.get(key)}
    kept["target_modules"] = sorted(_modules(records, base))
    return dict(sorted(kept.items())), {SETTINGS: json.dumps(_settings(peft_config), indent=2, sort_keys=True)}


def _modules(records: list[Record], base: BaseMap) -> set[str]:
    """The adapted layers by their full names; experts go into target_parameters instead."""
    spots = (spot for record in records for spot in base.sites[record.name].spots)
    return {spot.module for spot in spots if spot.kind in ("linear", "conv1d")}


def _settings(config: PeftConfig) -> dict[str, Any]:
    """What automodel_peft_config.json holds: all but rank and alpha, which adapter_config.json has."""
    found = {key: value for key, value in config.to_dict().items()
             if key not in ("dim", "alpha") and _LATER.get(key, ...) != value}
    dtype = found["lora_dtype"]
    return {**found, "lora_dtype": str(dtype) if isinstance(dtype, torch.dtype) else dtype}


def read_config(path: str | Path) -> PeftConfig:
    """The PeftConfig of a directory that NeMo or `save_adapter` wrote.

    Without automodel_peft_config.json, the modules and settings that adapter_config.json has. Raises `VeneerError` when
    there is no adapter.
    """
    directory = store.find(Path(path)).parent
    if not (directory / store.PEFT_CONFIG).is_file():
        raise VeneerError(f"there is no {store.PEFT_CONFIG} in {directory}, so this is no adapter of NeMo's")
    config = read_json(directory / store.PEFT_CONFIG)
    given: dict[str, Any] = {"target_modules": config.get("target_modules") or [], "use_dora": config.get("use_dora"),
                             "dropout": config.get("lora_dropout"), "dropout_position": "pre"}
    if (directory / SETTINGS).is_file():
        given = read_json(directory / SETTINGS)
    given |= {"dim": config.get("r"), "alpha": config.get("lora_alpha")}
    return PeftConfig.from_dict({key: value for key, value in given.items() if value is not None})


def load_adapter(model: nn.Module, path: str | Path, name: str = "default") -> PeftConfig:
    """Put the adapter at `path` onto the model, trainable and live, as `apply_lora_to_linear_modules` would have laid
    it; returns its settings. A model that has an adapter `name` gets its values replaced.

    Raises `VeneerError`, with the model as it was, when the file does not fit it (see `veneer.load`).
    """
    model = unwrap(model)
    stored = store.read(path)
    config = read_config(path)
    fresh = name not in adapter_names(model)
    if fresh and stored.manifest is None:  # only then nobody has kept how it was trained
        _prepare(model, stored, config, name)
    try:
        load(model, path, name)
    except VeneerError:
        if fresh and name in adapter_names(model):
            detach(model, name)
        raise
    for _, host in hosts(model):
        if name in host.adapters:
            show(host, config.use_triton)
    return config


def _prepare(model: nn.Module, stored: store.Stored, config: PeftConfig, name: str) -> None:
    """Attach what the file has tensors for, with the settings it was trained with."""
    assert stored.config is not None
    checked = hf_config.check(stored.config, hf_types.file_type(stored.config))
    weights = scan(model)
    base = base_map(model, weights)
    if config.lora_dtype is None and stored.tensors:
        config = dataclasses.replace(config, lora_dtype=_dtype(stored.tensors))
    named = {n: weight for weight in weights for place in weight.places for n in place.names}
    chosen: dict[str, Method] = {}
    for module in base.modules:
        full = f"{module}.weight"
        if full in named and hf_names.is_target(checked, module):
            chosen[full] = config.method(named[full].dtype, _rank(checked, module))
    for path in base.by_path:
        if path in named and any(hf_names.hits_target(entry, path) for entry in checked["target_parameters"] or ()):
            chosen[path] = config.method(named[path].dtype, _rank(checked, path), dropout=False)
    if chosen:
        lay_on(model, weights, chosen, name, seed=0)


def _rank(config: dict[str, Any], name: str) -> int:
    return hf_names.pattern_value(config["rank_pattern"], name, config["r"])


def _dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    found = next(iter(tensors.values())).dtype
    for tensor in tensors.values():
        found = torch.promote_types(found, tensor.dtype)
    return found
