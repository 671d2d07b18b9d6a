"""adapter_config.json: which keys a `peft_type` understands, which it may pass over, and which it must refuse.

Names and defaults are those of PEFT 0.21's config classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from veneer.io.dialects.hf_base import FileType
from veneer.method import VeneerError, nearest

#: understood in all files, with PEFT's defaults
COMMON: dict[str, Any] = {
    "peft_type": "LORA", "target_modules": None, "layers_to_transform": None, "layers_pattern": None,
    "modules_to_save": None, "peft_version": None,
}
#: what the types without these keys do
_ABSENT: dict[str, Any] = {
    "bias": "none", "exclude_modules": None, "target_parameters": None, "trainable_token_indices": None,
    "ensure_weight_tying": False,
}
#: without influence on what a loaded adapter computes
_PASSED_OVER = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "fan_in_fan_out"}


def check(config: Mapping[str, Any], kind: FileType) -> dict[str, Any]:
    """The understood keys with their values or defaults.

    Raises `VeneerError` naming the key for one that would change the result and is not understood, or whose value
    cannot be.
    """
    known = {**COMMON, **kind.keys}
    for key, value in config.items():
        empty = value is None or value is False or value in ([], {}, "")
        if key in known or key in _PASSED_OVER or key in kind.passed_over or empty:
            continue
        if key in kind.refused:
            raise VeneerError(f"adapter_config.json: {key}={value!r} is not supported: {kind.refused[key]}, so the "
                              "adapter would compute something else without it")
        raise VeneerError(f"adapter_config.json: unknown key {key!r} (= {value!r})"
                          f"{nearest(key, [*known, *kind.refused])} It may change what the adapter computes; remove it "
                          "from the file if you know that it does not")
    found = {**_ABSENT, **known, **{key: config[key] for key in known if config.get(key) is not None}}
    _check_patterns(found)
    words = ["none", "all", kind.bias_only] if kind.bias_only else ["none"]
    if found["bias"] not in words:
        raise VeneerError(f"adapter_config.json: bias={found['bias']!r}; possible: {', '.join(words)}")
    kind.check(found)
    return found


def _check_patterns(found: Mapping[str, Any]) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in found.get(key) or ():
            _check_regex(key, pattern)
    for key in ("target_modules", "exclude_modules"):
        if isinstance(found[key], str):
            _check_regex(key, found[key])


def _check_regex(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise VeneerError(f"adapter_config.json: {key}: {pattern!r} is no regular expression: {error}") from None
