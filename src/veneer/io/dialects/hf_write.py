"""Veneer's records → PEFT's config and tensors: what all its files have in common."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, cast

from torch import Tensor

from veneer.io.dialects.hf_base import PREFIX, Draft, FileType, Inexpressible
from veneer.io.dialects.hf_names import hits_saved, shorten, target_entries
from veneer.io.dialects.hf_types import LORA, OF_METHOD
from veneer.io.records import BaseMap, Record
from veneer.methods import DoRA, Full, Rows

#: PEFT's own name for "no adapted module at all, only modules_to_save and the like" (peft/utils/constants.py)
NO_TARGETS = "dummy-target-modules"


def encode(records: list[Record], base: BaseMap) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Records → (adapter_config.json, tensors by PEFT's keys, notes on what its config cannot keep).

    Raises `Inexpressible` when PEFT would compute something else or could not load it.
    """
    draft = Draft(records, base)
    groups: dict[type, list[Record]] = defaultdict(list)
    for record in records:
        inner = record.method.inner if isinstance(record.method, DoRA) else record.method
        groups[type(inner)].append(record)
    full, rows = groups.pop(Full, []), groups.pop(Rows, [])
    kind = _file_type(groups)
    for same in groups.values():
        kind.place(draft, same)
    saved, biases = _full(draft, full)
    tokens = _rows(draft, rows)
    bias = _bias(draft, biases, saved, kind)
    config = _config(draft, kind, bias, saved, tokens)
    return config, draft.tensors, draft.notes


def _file_type(groups: dict[type, list[Record]]) -> FileType:
    """What kind of file can hold these methods: one kind at a time."""
    kinds: dict[str, tuple[FileType, Record]] = {}
    for method, records in groups.items():
        kind = OF_METHOD.get(method)
        for record in records:
            if kind is None or (isinstance(record.method, DoRA) and kind is not LORA):
                raise Inexpressible(f"{record.name!r} has {record.method}, which PEFT does not have")
            kinds.setdefault(kind.peft_type, (kind, record))
    if len(kinds) > 1:
        several = " and ".join(f"{record.method} on {record.name!r}" for _, record in kinds.values())
        raise Inexpressible(f"{several}: a PEFT file has one method")
    return next((kind for kind, _ in kinds.values()), LORA)


# -- Full, Rows, biases -------------------------------------------------------------------------------------
def _full(draft: Draft, records: list[Record]) -> tuple[list[str], list[Record]]:
    """modules_to_save, and the records of biases outside of them."""
    base, full = draft.base, {record.name for record in records}
    saved: list[str] = []
    biases = []
    for record in records:
        site = base.sites[record.name]
        modules = [spot.module for spot in site.spots]
        inside = [path for path in base.by_path if path.startswith(f"{modules[0]}.")] if modules[0] else []
        if not inside or any(base.by_path[path].name not in full for path in inside):
            if site.spots[0].path.endswith(".bias"):
                biases.append(record)
                continue
            raise Inexpressible(f"Full() on {record.name!r} is only a part of its module; modules_to_save takes whole "
                                "modules")
        if modules[0] in base.buffered:
            raise Inexpressible(f"{modules[0]!r} has buffers, which modules_to_save would save too")
        if len(modules) > 1:
            draft.tie(site)
        saved += [module for module in modules[:1] if module not in saved]
        for spot in site.spots:  # PEFT's loader wants a tied weight under both names
            draft.tensors[PREFIX + spot.path] = site.layout.stored(record.tensors["weight"])
    return saved, biases


def _rows(draft: Draft, records: list[Record]) -> dict[str, list[int]]:
    found = {}
    for record in records:
        site, method = draft.base.sites[record.name], cast(Rows, record.method)
        spot = site.spots[0]
        if spot.kind not in ("embedding", "linear") or f"{spot.module}.bias" in draft.base.by_path:
            raise Inexpressible(f"PEFT trains rows only of embeddings and of linear layers without bias, not of "
                                f"{record.name!r}")
        if len(site.spots) > 1:
            draft.tie(site)
        found[spot.module] = list(method.ids)
        draft.tensors[f"{PREFIX}{spot.module}.token_adapter.trainable_tokens_delta"] = record.tensors["rows"]
    return found


def _bias(draft: Draft, records: list[Record], saved: list[str], kind: FileType) -> str:
    """What the key `bias` says; puts the tensors of the trained biases."""
    if not records:
        return "none"
    if not kind.bias_only:
        raise Inexpressible(f"PEFT trains no biases beside {kind.peft_type} ({records[0].name!r})")
    trained = set()
    for record in records:
        path = draft.base.sites[record.name].spots[0].path
        trained.add(path)
        draft.tensors[draft.path(path)] = draft.base.sites[record.name].layout.stored(record.tensors["weight"])
    every = {path for path in draft.base.by_path
             if path.endswith(".bias") and not any(path.startswith(f"{m}.") for m in saved)}
    if not draft.base.everything:
        raise Inexpressible("whether the trained biases are all of the model's is not known without the model (base)")
    if trained == every:
        return "all"
    if trained == {f"{module}.bias" for module in draft.modules} & every:
        return kind.bias_only
    raise Inexpressible(f"the trained biases ({len(trained)}) are neither all of the model's nor just those of the "
                        "adapted layers")


# -- the config ---------------------------------------------------------------------------------------------
def _config(draft: Draft, kind: FileType, bias: str, saved: list[str], tokens: dict[str, list[int]]) -> dict[str, Any]:
    base = draft.base
    found: dict[str, Any] = {
        "auto_mapping": None, "base_model_name_or_path": base.name_or_path, "inference_mode": True,
        "layers_pattern": None, "layers_to_transform": None, "modules_to_save": _saved_entries(draft, saved),
        "peft_type": kind.peft_type, "revision": None,
        "target_modules": target_entries(draft.modules, draft.known(base.modules)) if draft.modules else
        ([] if draft.parameters else NO_TARGETS),
        "task_type": "CAUSAL_LM" if base.is_causal_lm else None, **kind.config(draft),
    }
    if kind.bias_only:
        found["bias"] = bias
    if draft.modules and all(draft.kind(module) == "conv1d" for module in draft.modules):
        found["fan_in_fan_out"] = True
    if tokens:
        found["trainable_token_indices"] = {_only(draft, module): ids for module, ids in tokens.items()}
    if draft.tied:
        found["ensure_weight_tying"] = True
    for key in ("trainable_token_indices", "ensure_weight_tying"):
        if key in found and key not in kind.keys:
            raise Inexpressible(f"PEFT has no {key} beside {kind.peft_type}")
    return found


def _saved_entries(draft: Draft, saved: list[str]) -> list[str] | None:
    if not saved:
        return None
    entries = shorten(saved, draft.known(draft.base.modules), hits_saved)
    if entries is None:
        raise Inexpressible("modules_to_save matches by the end of a name, and another module's name ends like "
                            + " or ".join(map(repr, saved)))
    for module in draft.modules:
        if any(re.match(rf"(^|.*\.){entry}($|\..*)", module) for entry in entries):
            raise Inexpressible(f"modules_to_save={entries} would take {module!r} from the adapted modules")
    return entries


def _only(draft: Draft, module: str) -> str:
    entries = shorten([module], draft.known(draft.base.modules), hits_saved)
    if entries is None:
        raise Inexpressible(f"trainable_token_indices matches by the end of a name, and another module's name ends "
                            f"like {module!r}")
    return entries[0]
