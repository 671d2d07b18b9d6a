"""LoRA and DoRA out of PEFT's config and tensors."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from veneer.io.dialects.hf_base import Reading
from veneer.io.dialects.hf_lora_write import rescaled
from veneer.io.dialects.hf_names import hits_target, is_target, pattern_value
from veneer.io.records import Site, near
from veneer.method import Method, VeneerError
from veneer.methods import DoRA, LoRA

_MATRIX_PARTS = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias",
                 "magnitude": "lora_magnitude_vector"}
_EMBEDDING_PARTS = {"A": "lora_embedding_B", "B": "lora_embedding_A"}
#: starts that took a part of the base away which can be found again from the base alone: PEFT does so at each load
RESTARTS = {"pissa": ("linear", "conv1d"), "olora": ("linear",)}
_HEAD_PARTS = {"lora_A.weight": "A", "lora_B.weight": "B"}
_LORA_KEY = re.compile(r"(?P<path>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
                       r"lora_magnitude_vector)(?P<tail>\.weight|\.bias|)")


def piece(part: str, kind: str) -> str:
    """The last piece of the key of a part, "A" or "inner.A" of DoRA say, on a weight of this kind."""
    part = part.removeprefix("inner.")
    return (_EMBEDDING_PARTS if kind == "embedding" else {}).get(part) or _MATRIX_PARTS[part]


def restart(config: Mapping[str, Any]) -> str | None:
    """The start that must be made again for a file, since its tensors are relative to what that left of the base."""
    name = str(config["init_lora_weights"]).lower()
    return name if name in RESTARTS else None


def method_for(config: Mapping[str, Any], name: str, dora: bool, bias: bool) -> Method:
    """The method that a checked config means for the module or parameter `name`."""
    rank = pattern_value(config["rank_pattern"], name, config["r"])
    alpha = pattern_value(config["alpha_pattern"], name, config["lora_alpha"])
    init = restart(config) or ("gaussian" if config["init_lora_weights"] == "gaussian" else "kaiming")
    inner = LoRA(rank=rank, alpha=alpha, rank_stabilized=bool(config["use_rslora"]),
                 dropout=config["lora_dropout"], init=init, bias=bias)
    return DoRA(inner) if dora else inner


def read(reading: Reading, key: str, name: str, tensor: Tensor) -> bool:
    """Take a tensor of a LoRA; False when it is none."""
    match = _LORA_KEY.fullmatch(name)
    if match:
        _read_low_rank(reading, key, match["path"], match["part"] + match["tail"], tensor)
    return match is not None


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
    _refuse(reading, site, method)
    _refuse_restart(reading, site, kind)
    if len(site.spots) > 1 and kind != "embedding":
        reading.heads.setdefault(site.name, {})[_HEAD_PARTS.get(part, part)] = tensor
        return
    _put(reading, site, kind, method, part, tensor, key)


def _put(reading: Reading, site: Site, kind: str, method: Method, part: str, tensor: Tensor, key: str) -> None:
    inner = method.inner if isinstance(method, DoRA) else method
    assert isinstance(inner, LoRA)
    shape = site.layout.shape
    _expect(reading, site, method, key.removesuffix(part), _EMBEDDING_PARTS if kind == "embedding" else _MATRIX_PARTS)
    if part == "lora_embedding_A" and kind == "embedding":
        value, name = tensor.mT, "B"
    elif part == "lora_embedding_B" and kind == "embedding":
        value, name = tensor.mT, "A"
    elif part == "lora_A.weight":
        flat = kind == "conv" and tensor.shape[1:] == site.layout.native[1:]
        value, name = tensor.reshape(-1, shape.in_) if flat else tensor, "A"
    elif part == "lora_B.weight":
        flat = kind == "conv" and tensor.numel() == tensor.shape[0] * tensor.shape[1]
        value, name = tensor.reshape(tensor.shape[:2]) if flat else tensor, "B"
    elif part == "lora_B.bias":
        B = reading.tensors.get(key.removesuffix("bias") + "weight", tensor)
        value, name = rescaled(tensor, inner.scale, B.dtype), "bias"
    elif part.startswith("lora_magnitude_vector"):
        value, name = tensor.reshape(-1), "magnitude"
    else:
        reading.problems.append(f"unexpected: {key!r} on a weight of kind {kind}")
        return
    reading.put(site, method, _full_name(method, name), value, key)
    if inner.start_rule.moves:
        start = frozenset(_full_name(method, part) for part in ("start_A", "start_B"))
        reading.record(site, method).restarted = start


def _full_name(method: Method, part: str) -> str:
    return f"inner.{part}" if isinstance(method, DoRA) and part != "magnitude" else part


def _expect(reading: Reading, site: Site, method: Method, stem: str, parts: Mapping[str, str]) -> None:
    named = {_full_name(method, part): tail for part, tail in parts.items()}
    reading.expect(reading.record(site, method), stem, named)


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
    reading.note("PEFT up to 0.21 applies LoRA on the out_proj of nn.MultiheadAttention twice; its alpha was doubled "
                 "so that the adapter computes what was trained")
    return dataclasses.replace(method, alpha=2 * method.alpha)


def _without_dropout(method: Method) -> Method:
    return dataclasses.replace(method, dropout=0.0) if isinstance(method, LoRA) else method


def _refuse_restart(reading: Reading, site: Site, kind: str) -> None:
    start = restart(reading.config)
    if start is not None and (kind not in RESTARTS[start] or len(site.spots) > 1):
        what = "a tied weight" if len(site.spots) > 1 else f"a weight of kind {kind}"
        raise VeneerError(f"adapter_config.json: init_lora_weights={start!r} on {site.name!r}, {what}: what PEFT left "
                          "of such a weight cannot be made again here. Where it was trained, PEFT can make plain LoRA "
                          "of it: model.save_pretrained(…, path_initial_model_for_weight_conversion=…)")


def _refuse(reading: Reading, site: Site, method: Method) -> None:
    if site.unusual:
        raise VeneerError(f"{site.name!r} is a convolution with {', '.join(site.unusual)}; PEFT's LoRA on it has no "
                          "form as a change of its weight and cannot be loaded")
    if len(site.spots) > 1 and isinstance(method, DoRA):
        raise VeneerError(f"{site.name!r} is tied, and PEFT's DoRA gives each of its places lengths of their own: it "
                          "cannot be loaded. Untie them first: give one a clone of the weight")
    if len(site.spots) > 1 and not reading.config["ensure_weight_tying"]:
        places = " and ".join(repr(spot.module) for spot in site.spots)
        raise VeneerError(f"{places} are one tied weight, and in this PEFT file only one of them is adapted "
                          "(ensure_weight_tying is false). Untie them first: give one a clone of the weight")


# -- target_parameters --------------------------------------------------------------------------------------
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
    _refuse_restart(reading, site, "parameter")
    assert isinstance(method, LoRA)
    batch = site.layout.shape.batch
    experts = batch[0] if batch else 1
    _expect(reading, site, method, key.removesuffix(part), _MATRIX_PARTS)
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


# -- what should be there and is not ------------------------------------------------------------------------
def finish(reading: Reading) -> None:
    """Modules and parameters that the config targets and the file has nothing for."""
    for module in reading.map.modules:
        if not is_target(reading.config, module):
            continue
        site = reading.map.by_path.get(f"{module}.weight") or reading.map.by_path.get(f"{module}.in_proj_weight")
        if site is None or site.name in reading.records or site.name in reading.heads:
            continue
        letter = "lora_embedding_A" if site.spots[0].kind == "embedding" else "lora_A.weight"
        reading.problems.append(f"missing: target module {module!r} has no '{reading.prefix}{module}.{letter}' in "
                                "the file")
    for module, sites in _target_parameters(reading).items():
        for site in sites:
            if site.name not in reading.records:
                reading.problems.append(f"missing: target parameter {site.spots[0].path!r} has no tensors under "
                                        f"'{reading.prefix}{module}' in the file")
