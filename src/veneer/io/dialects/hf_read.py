"""PEFT's config and tensors → Veneer's records."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from veneer.io.dialects.hf_config import check, method_for
from veneer.io.dialects.hf_names import hits_saved, hits_target, is_target
from veneer.io.dialects.hf_write import PREFIX, rescaled
from veneer.io.records import BaseMap, Record, Site, near
from veneer.method import Method, VeneerError
from veneer.methods import DoRA, Full, LoRA, Rows

_MATRIX_PARTS = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias",
                 "magnitude": "lora_magnitude_vector"}
_EMBEDDING_PARTS = {"A": "lora_embedding_B", "B": "lora_embedding_A"}
_LORA_KEY = re.compile(r"(?P<path>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
                       r"lora_magnitude_vector)(?P<tail>\.weight|\.bias|)")
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass
class Reading:
    """The records while they are being put together; base: tensors of the base found in the file, by path."""

    config: dict[str, Any]
    map: BaseMap
    prefix: str
    tensors: Mapping[str, Tensor]
    records: dict[str, Record] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    base: dict[str, Tensor] = field(default_factory=dict)
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # second places of tied weights

    def record(self, site: Site, method: Method) -> Record:
        return self.records.setdefault(site.name, Record(site.name, method, {}))

    def put(self, site: Site, method: Method, part: str, tensor: Tensor, key: str) -> None:
        record = self.record(site, method)
        name = _full_name(method, part)
        record.tensors[name] = tensor
        record.keys[name] = key

    def expect(self, site: Site, method: Method, stem: str, parts: Mapping[str, str]) -> None:
        """Under what keys the file should have the parts of a record, for the message when it has not."""
        record = self.record(site, method)
        for part, tail in parts.items():
            record.keys.setdefault(_full_name(method, part), stem + tail)


def _full_name(method: Method, part: str) -> str:
    return f"inner.{part}" if isinstance(method, DoRA) and part != "magnitude" else part


def decode(config: Mapping[str, Any], tensors: Mapping[str, Tensor],
           base: BaseMap) -> Reading:
    """PEFT's files → records, problems, notes, and the base weights that the file carries, by path.

    Raises `VeneerError` for what would compute something else here than in PEFT.
    """
    prefix = PREFIX if any(key.startswith(PREFIX) for key in tensors) else ""
    reading = Reading(check(config), base, prefix, tensors)
    for key, tensor in tensors.items():
        if prefix and not key.startswith(prefix):
            reading.problems.append(f"unexpected: {key!r} (the others begin with {prefix!r})")
        else:
            _read_key(reading, key, key.removeprefix(prefix), tensor)
    _missing_modules(reading)
    _missing_others(reading)
    _check_ties(reading)
    return reading


def _read_key(reading: Reading, key: str, name: str, tensor: Tensor) -> None:
    match = _LORA_KEY.fullmatch(name)
    if match:
        _read_low_rank(reading, key, match["path"], match["part"] + match["tail"], tensor)
    elif name.endswith(_TOKENS):
        _read_rows(reading, key, name.removesuffix(_TOKENS), tensor)
    else:
        _read_plain(reading, key, name, tensor)


# -- LoRA and DoRA ------------------------------------------------------------------------------------------
def _read_low_rank(reading: Reading, key: str, path: str, part: str, tensor: Tensor) -> None:
    module = re.sub(r"(\.base_layer)+(?=\.|$)", "", path)
    depth = len(re.search(r"((?:\.base_layer)*)$", path)[1]) // len(".base_layer")  # type: ignore[index]
    grouped = _target_parameters(reading).get(module)
    if grouped is not None:
        if depth >= len(grouped):
            reading.problems.append(f"unexpected: {key!r}: {module!r} has {len(grouped)} target_parameters")
        else:
            _read_parameter(reading, key, grouped[-1 - depth], part, tensor)
        return
    site = reading.map.by_path.get(f"{module}.weight") or reading.map.by_path.get(f"{module}.in_proj_weight")
    if site is None:
        reading.problems.append(f"unexpected: {key!r}: no module {module!r} here"
                                f"{near(module, reading.map.modules, reading.problems)}")
        return
    kind = next(spot.kind for spot in site.spots if spot.module == module)
    named = module.removesuffix(".out_proj") if kind == "out_proj" else module  # PEFT knows both by the parent
    method = method_for(reading.config, named, bool(reading.config["use_dora"]), bool(reading.config["lora_bias"]))
    if kind == "out_proj":
        method = _out_proj(reading, path, method)
    elif kind in ("attention", "parameter"):
        method = _without_dropout(method)  # as in PEFT, which adapts their weights and not their inputs
    _refuse(reading, site, kind, method)
    if len(site.spots) > 1 and kind != "embedding":
        reading.heads.setdefault(site.name, {})[part] = tensor
        return
    _put(reading, site, kind, method, part, tensor, key)


def _put(reading: Reading, site: Site, kind: str, method: Method, part: str, tensor: Tensor, key: str) -> None:
    inner = method.inner if isinstance(method, DoRA) else method
    assert isinstance(inner, LoRA)
    shape = site.layout.shape
    reading.expect(site, method, key.removesuffix(part), _EMBEDDING_PARTS if kind == "embedding" else _MATRIX_PARTS)
    if part == "lora_embedding_A" and kind == "embedding":
        reading.put(site, method, "B", tensor.mT, key)
    elif part == "lora_embedding_B" and kind == "embedding":
        reading.put(site, method, "A", tensor.mT, key)
    elif part == "lora_A.weight":
        flat = kind == "conv" and tensor.shape[1:] == site.layout.native[1:]
        reading.put(site, method, "A", tensor.reshape(-1, shape.in_) if flat else tensor, key)
    elif part == "lora_B.weight":
        flat = kind == "conv" and tensor.numel() == tensor.shape[0] * tensor.shape[1]
        reading.put(site, method, "B", tensor.reshape(tensor.shape[:2]) if flat else tensor, key)
    elif part == "lora_B.bias":
        B = reading.tensors.get(key.removesuffix("bias") + "weight", tensor)
        reading.put(site, method, "bias", rescaled(tensor, inner.scale, B.dtype), key)
    elif part.startswith("lora_magnitude_vector"):
        reading.put(site, method, "magnitude", tensor.reshape(-1), key)
    else:
        reading.problems.append(f"unexpected: {key!r} on a weight of kind {kind}")


def _out_proj(reading: Reading, path: str, method: Method) -> Method:
    """LoRA on the output projection of attention as PEFT trained it.

    PEFT up to 0.21 adds this change twice (huggingface/peft pull request 3774), in training and afterwards.
    """
    if not path.endswith(".base_layer.out_proj"):
        raise VeneerError(f"the file has LoRA on {path!r} itself; nn.MultiheadAttention never calls that layer, so "
                          "PEFT ignores it. Take these tensors out of the file")
    method = _without_dropout(method)
    version = re.match(r"(\d+)\.(\d+)", str(reading.config["peft_version"] or ""))
    if version and (int(version[1]), int(version[2])) > (0, 21):
        return method
    assert isinstance(method, LoRA)
    assert method.alpha is not None
    note = ("PEFT up to 0.21 applies LoRA on the out_proj of nn.MultiheadAttention twice; its alpha was doubled so "
            "that the adapter computes what was trained")
    if note not in reading.notes:
        reading.notes.append(note)
    return dataclasses.replace(method, alpha=2 * method.alpha)


def _without_dropout(method: Method) -> Method:
    return dataclasses.replace(method, dropout=0.0) if isinstance(method, LoRA) else method


def _refuse(reading: Reading, site: Site, kind: str, method: Method) -> None:
    if site.unusual:
        raise VeneerError(f"{site.name!r} is a convolution with {site.unusual}; PEFT's LoRA on it has no form as a "
                          "change of its weight and cannot be loaded")
    if len(site.spots) > 1 and isinstance(method, DoRA):
        raise VeneerError(f"{site.name!r} is tied, and PEFT's DoRA gives each of its places lengths of their own: it "
                          "cannot be loaded. Untie them first: give one a clone of the weight")
    if len(site.spots) > 1 and not reading.config["ensure_weight_tying"]:
        places = " and ".join(repr(spot.module) for spot in site.spots)
        raise VeneerError(f"{places} are one tied weight, and in this PEFT file only one of them is adapted "
                          "(ensure_weight_tying is false). Untie them first: give one a clone of the weight")


def _target_parameters(reading: Reading) -> dict[str, list[Site]]:
    """module → the sites of its target_parameters, in the module's order, which is that of the wrapping."""
    wanted = reading.config["target_parameters"] or []
    found: dict[str, list[Site]] = {}
    for path, site in reading.map.by_path.items():
        if any(hits_target(entry, path) for entry in wanted):
            found.setdefault(path.rpartition(".")[0], []).append(site)
    return found


def _read_parameter(reading: Reading, key: str, site: Site, part: str, tensor: Tensor) -> None:
    method = _without_dropout(method_for(reading.config, site.spots[0].path, dora=False, bias=False))
    assert isinstance(method, LoRA)
    batch = site.layout.shape.batch
    experts = batch[0] if batch else 1
    reading.expect(site, method, key.removesuffix(part), _MATRIX_PARTS)
    if part == "lora_A.weight":
        fits = tensor.dim() == 2 and tensor.shape[0] % experts == 0
        value = tensor.reshape(*batch, -1, tensor.shape[-1]) if fits else tensor
        reading.put(site, method, "A", value, key)
    elif part == "lora_B.weight":
        fits = bool(batch) and tensor.dim() == 2 and tensor.shape[1] % experts == 0
        value = tensor.reshape(tensor.shape[0], -1, experts).permute(2, 0, 1) if fits else tensor
        reading.put(site, method, "B", value, key)
    else:
        reading.problems.append(f"unexpected: {key!r} on a parameter")


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
def _missing_modules(reading: Reading) -> None:
    """Modules that the config targets and the file has nothing for."""
    for module in reading.map.modules:
        if not is_target(reading.config, module):
            continue
        site = reading.map.by_path.get(f"{module}.weight") or reading.map.by_path.get(f"{module}.in_proj_weight")
        if site is None or site.name in reading.records or site.name in reading.heads:
            continue
        letter = "lora_embedding_A" if site.spots[0].kind == "embedding" else "lora_A.weight"
        reading.problems.append(f"missing: target module {module!r} has no '{reading.prefix}{module}.{letter}' in "
                                "the file")


def _missing_others(reading: Reading) -> None:
    config = reading.config
    for path, site in reading.map.by_path.items():
        if site.name in reading.records or site.name in reading.heads:
            continue
        module = path.rpartition(".")[0]
        lora_only = config["bias"] == "lora_only" and is_target(config, module)
        if _is_saved(reading, path) or (path.endswith(".bias") and (config["bias"] == "all" or lora_only)):
            reading.problems.append(f"missing: trained parameter {path!r} has no '{reading.prefix}{path}' in the file")
    for module, sites in _target_parameters(reading).items():
        for site in sites:
            if site.name not in reading.records:
                reading.problems.append(f"missing: target parameter {site.spots[0].path!r} has no tensors under "
                                        f"'{reading.prefix}{module}' in the file")
    indices = config["trainable_token_indices"]
    for name in indices if isinstance(indices, Mapping) else ():
        if not any(isinstance(r.method, Rows) and hits_saved(name, r.keys["rows"].removesuffix(_TOKENS))
                   for r in reading.records.values()):
            reading.problems.append(f"missing: trainable_token_indices of {name!r} have no '{_TOKENS[1:]}' in the file")


def _check_ties(reading: Reading) -> None:
    """Both places of a tied weight must have got the same: here they are one tensor."""
    for name, parts in reading.heads.items():
        record = reading.records.get(name)
        have = {} if record is None else record.tensors
        pairs = {"lora_A.weight": "A", "lora_B.weight": "B", "weight": "weight"}
        for part, tensor in parts.items():
            mine = have.get(pairs.get(part, ""))
            if mine is None or mine.shape != tensor.shape or not torch.equal(mine, tensor):
                raise VeneerError(f"{name!r} is one tied weight here, and the PEFT file trains its two uses "
                                  "differently. Untie them first: give one a clone of the weight")
    for name, record in list(reading.records.items()):
        site = reading.map.sites[name]
        if (len(site.spots) > 1 and isinstance(record.method, Full) and name not in reading.heads
                and not reading.config["ensure_weight_tying"]):
            raise VeneerError(f"{name!r} is one tied weight here, and the PEFT file trains only one of its uses whole. "
                              "Untie them first: give one a clone of the weight")
