"""PEFT's config and tensors → Veneer's records: what all its files have in common."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from veneer.io.dialects.hf_base import PREFIX, FileType, Reading
from veneer.io.dialects.hf_config import check
from veneer.io.dialects.hf_names import hits_saved, is_target
from veneer.io.dialects.hf_types import file_type
from veneer.io.records import BaseMap, Site, near
from veneer.method import VeneerError
from veneer.methods import Full, Rows

TOKENS = ".token_adapter.trainable_tokens_delta"


def decode(config: Mapping[str, Any], tensors: Mapping[str, Tensor],
           base: BaseMap) -> Reading:
    """PEFT's files → records, problems, notes, and the base weights that the file carries, by path.

    Raises `VeneerError` for what would compute something else here than in PEFT.
    """
    kind = file_type(config)
    prefix = PREFIX if any(key.startswith(PREFIX) for key in tensors) else ""
    reading = Reading(check(config, kind), base, prefix, tensors)
    for key, tensor in tensors.items():
        if key in kind.shared:
            reading.share(kind.shared[key], key, tensor)
        elif prefix and not key.startswith(prefix):
            reading.problems.append(f"unexpected: {key!r} (the others begin with {prefix!r})")
        else:
            _read_key(reading, kind, key, key.removeprefix(prefix), tensor)
    kind.finish(reading)
    _missing_others(reading, kind)
    _check_ties(reading)
    return reading


def _read_key(reading: Reading, kind: FileType, key: str, name: str, tensor: Tensor) -> None:
    if kind.read(reading, key, name, tensor):
        return
    if name.endswith(TOKENS):
        _read_rows(reading, key, name.removesuffix(TOKENS), tensor)
    else:
        _read_plain(reading, key, name, tensor)


# -- rows, whole modules, biases, base weights --------------------------------------------------------------
def _read_rows(reading: Reading, key: str, module: str, tensor: Tensor) -> None:
    site = reading.map.by_path.get(f"{module}.weight")
    ids = _token_ids(reading.config["trainable_token_indices"], module)
    if site is None or ids is None:
        reading.problems.append(f"unexpected: {key!r}: no module {module!r} with trainable_token_indices"
                                f"{near(module, reading.map.modules, reading.problems)}")
        return
    if len(site.spots) > 1 and module != reading.map.tied_embedding:
        raise VeneerError(f"{module!r} shares a tied weight here, and PEFT trained its rows alone. Untie them first: "
                          "give one a clone of the weight")
    reading.put(site, Rows(ids), "rows", tensor, key)


def _token_ids(indices: Any, module: str) -> list[int] | None:
    if isinstance(indices, Mapping):
        return next((ids for name, ids in indices.items() if hits_saved(name, module)), None)
    return indices


def _read_plain(reading: Reading, key: str, name: str, tensor: Tensor) -> None:
    inside = ".base_layer" in name or ".original_module" in name
    path = re.sub(r"\.(base_layer|original_module|modules_to_save)(?=\.)", "", name)
    site = reading.map.by_path.get(path)
    if site is None:
        reading.problems.append(f"unexpected: {key!r}: no parameter {path!r} here"
                                f"{near(path, reading.map.by_path, reading.problems)}")
    elif _is_trained(reading, path, name, inside):
        _put_full(reading, site, path, tensor, key)
    else:
        reading.base[path] = tensor


def _is_trained(reading: Reading, path: str, name: str, inside: bool) -> bool:
    spots = reading.map.by_path[path].spots if reading.config["ensure_weight_tying"] else ()
    if _is_saved(reading, path) or any(_is_saved(reading, spot.path) for spot in spots):
        return not inside
    return path.endswith(".bias") and reading.config["bias"] != "none" and ".original_module" not in name


def _put_full(reading: Reading, site: Site, path: str, tensor: Tensor, key: str) -> None:
    if len(site.spots) > 1 and path != site.spots[0].path:
        reading.heads.setdefault(site.name, {})["weight"] = tensor
        return
    same = tuple(tensor.shape) == site.layout.native
    reading.put(site, Full(), "weight", site.layout.matrix(tensor) if same else tensor, key)


def _is_saved(reading: Reading, path: str) -> bool:
    parts = path.split(".")
    above = [".".join(parts[:i]) for i in range(1, len(parts))]
    return any(hits_saved(entry, module) for entry in reading.config["modules_to_save"] or [] for module in above)


# -- what should be there and is not ------------------------------------------------------------------------
def _missing_others(reading: Reading, kind: FileType) -> None:
    config = reading.config
    for path, site in reading.map.by_path.items():
        if site.name in reading.records or site.name in reading.heads:
            continue
        module = path.rpartition(".")[0]
        adapted_only = config["bias"] == kind.bias_only != "" and is_target(config, module)
        if _is_saved(reading, path) or (path.endswith(".bias") and (config["bias"] == "all" or adapted_only)):
            reading.problems.append(f"missing: trained parameter {path!r} has no '{reading.prefix}{path}' in the file")
    indices = config["trainable_token_indices"]
    for name in indices if isinstance(indices, Mapping) else ():
        if not any(isinstance(r.method, Rows) and hits_saved(name, r.keys["rows"].removesuffix(TOKENS))
                   for r in reading.records.values()):
            reading.problems.append(f"missing: trainable_token_indices of {name!r} have no '{TOKENS[1:]}' in the file")


def _check_ties(reading: Reading) -> None:
    """Both places of a tied weight must have got the same: here they are one tensor."""
    for name, parts in reading.heads.items():
        record = reading.records.get(name)
        have = {} if record is None else record.tensors
        for part, tensor in parts.items():
            mine = have.get(part)
            if mine is None or mine.shape != tensor.shape or not torch.equal(mine, tensor):
                raise VeneerError(f"{name!r} is one tied weight here, and the PEFT file trains its two uses "
                                  "differently. Untie them first: give one a clone of the weight")
    for name, record in list(reading.records.items()):
        site = reading.map.sites[name]
        if (len(site.spots) > 1 and isinstance(record.method, Full) and name not in reading.heads
                and not reading.config["ensure_weight_tying"]):
            raise VeneerError(f"{name!r} is one tied weight here, and the PEFT file trains only one of its uses whole. "
                              "Untie them first: give one a clone of the weight")
