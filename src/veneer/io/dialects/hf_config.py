"""adapter_config.json: which keys Veneer understands, which it may pass over, and which it must refuse.

Names and defaults are those of `peft.LoraConfig` 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from veneer.io.dialects.hf_names import pattern_value
from veneer.method import Method, VeneerError, nearest
from veneer.methods import DoRA, LoRA

#: understood, with PEFT's default where the key is left out
READ: dict[str, Any] = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
    "lora_bias": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "target_modules": None,
    "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None, "target_parameters": None,
    "modules_to_save": None, "trainable_token_indices": None, "ensure_weight_tying": False,
    "init_lora_weights": True, "peft_version": None,
}
#: without influence on what a loaded adapter computes
PASSED_OVER = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "fan_in_fan_out", "megatron_core", "runtime_config", "qalora_group_size", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config",
}
#: with influence: refused unless null, false or empty; name → what it does
REFUSED = {
    "layer_replication": "it repeats layers of the base",
    "alora_invocation_tokens": "the adapter is live only after certain tokens",
    "use_qalora": "it pools the input of A",
    "arrow_config": "it routes every token among several adapters",
    "kasa_config": "it changes the base weights",
    "monteclora_config": "it samples the weights",
    "velora_config": "it compresses activations",
    "use_bdlora": "its factors are block-diagonal",
    "megatron_config": "it is for Megatron's layers",
}
#: starts that leave the base as it is; the others subtract from it, and the file is relative to that residue
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica", None)


def check(config: Mapping[str, Any]) -> dict[str, Any]:
    """The understood keys with their values or defaults.

    Raises `VeneerError` naming the key for another kind of adapter, a key that would change the result and is
    not understood, or a start that changed the base weights.
    """
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise VeneerError(f"adapter_config.json: peft_type is {kind!r}; Veneer reads 'LORA' files (with rsLoRA, DoRA, "
                          "modules_to_save, biases and token rows)")
    for key, value in config.items():
        empty = value is None or value is False or value in ([], {}, "")
        if key in READ or key in PASSED_OVER or empty:
            continue
        if key in REFUSED:
            raise VeneerError(f"adapter_config.json: {key}={value!r} is not supported: {REFUSED[key]}, so the adapter "
                              "would compute something else without it")
        raise VeneerError(f"adapter_config.json: unknown key {key!r} (= {value!r}){nearest(key, [*READ, *REFUSED])} "
                          "It may change what the adapter computes; remove it from the file if you know that it "
                          "does not")
    found = {**READ, **{key: config[key] for key in READ if config.get(key) is not None}}
    if found["init_lora_weights"] not in _PLAIN_STARTS:
        raise VeneerError(f"adapter_config.json: init_lora_weights={found['init_lora_weights']!r} changed the base "
                          "weights when training began, and this file is relative to the changed ones. Convert it with "
                          "PEFT: model.save_pretrained(..., path_initial_model_for_weight_conversion=...)")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in found[key]:
            _check_regex(key, pattern)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(found[key], str):
            _check_regex(key, found[key])
    if found["bias"] not in ("none", "all", "lora_only"):
        raise VeneerError(f"adapter_config.json: bias={found['bias']!r}; possible: none, all, lora_only")
    return found


def _check_regex(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise VeneerError(f"adapter_config.json: {key}: {pattern!r} is no regular expression: {error}") from None


def method_for(config: Mapping[str, Any], name: str, dora: bool, bias: bool) -> Method:
    """The method that a checked config means for the module or parameter `name`."""
    rank = pattern_value(config["rank_pattern"], name, config["r"])
    alpha = pattern_value(config["alpha_pattern"], name, config["lora_alpha"])
    init = "gaussian" if config["init_lora_weights"] == "gaussian" else "kaiming"
    inner = LoRA(rank=rank, alpha=alpha, rank_stabilized=bool(config["use_rslora"]),
                 dropout=config["lora_dropout"], init=init, bias=bias)
    return DoRA(inner) if dora else inner
