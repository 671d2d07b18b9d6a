"""Veneer's records → PEFT's config and tensors."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any, cast

import torch
from torch import Tensor

from veneer.io.dialects.hf_names import hits_saved, hits_target, patterns_for, shorten, target_entries
from veneer.io.records import BaseMap, Record, Site, Spot
from veneer.methods import DoRA, Full, LoRA, Rows

PREFIX = "base_model.model."
#: PEFT's own name for "no LoRA at all, only modules_to_save and the like" (peft/utils/constants.py)
NO_TARGETS = "dummy-target-modules"


class Inexpressible(Exception):
    """PEFT's config has no way to say this; the message says what."""


class Draft:
    """The file while it is being put together."""

    def __init__(self, records: list[Record], base: BaseMap) -> None:
        self.base = base
        self.records = {record.name: record for record in records}
        self.tensors: dict[str, Tensor] = {}
        self.notes: list[str] = []
        self.lora: dict[str, LoRA] = {}  # module or parameter that PEFT knows the adapter by → its LoRA
        self.dora: set[bool] = set()
        self.modules: list[str] = []  # target_modules
        self.parameters: list[str] = []  # target_parameters
        self.wrapped: Counter[str] = Counter()  # module → how many wrappers PEFT lays around it
        self.tied = False

    def path(self, name: str) -> str:
        """A module's or parameter's name once PEFT has wrapped what it is in."""
        parts = name.split(".")
        out: list[str] = []
        for i, part in enumerate(parts):
            out.append(part)
            if i < len(parts) - 1:
                out += ["base_layer"] * self.wrapped[".".join(parts[:i + 1])]
        return PREFIX + ".".join(out)


def encode(records: list[Record], base: BaseMap) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Records → (adapter_config.json, tensors by PEFT's keys, notes on what its config cannot keep).

    Raises `Inexpressible` when PEFT would compute something else or could not load it.
    """
    draft = Draft(records, base)
    groups: dict[type, list[Record]] = defaultdict(list)
    for record in records:
        inner = record.method.inner if isinstance(record.method, DoRA) else record.method
        if not isinstance(inner, (LoRA, Full, Rows)):
            raise Inexpressible(f"{record.name!r} has {record.method}, which PEFT's LoRA config does not know")
        groups[type(inner)].append(record)
    _targets(draft, groups[LoRA])
    for record in groups[LoRA]:
        _low_rank(draft, record)
    saved, biases = _full(draft, groups[Full])
    tokens = _rows(draft, groups[Rows])
    bias = _bias(draft, biases, saved)
    config = _config(draft, bias, saved, tokens)
    return config, draft.tensors, draft.notes


# -- LoRA and DoRA ------------------------------------------------------------------------------------------
def _lora(record: Record) -> LoRA:
    method = record.method.inner if isinstance(record.method, DoRA) else record.method
    assert isinstance(method, LoRA)
    return method


def _targets(draft: Draft, records: list[Record]) -> None:
    """Which modules and parameters PEFT is to target, and thereby how it will wrap them."""
    for record in records:
        site = draft.base.sites[record.name]
        draft.dora.add(isinstance(record.method, DoRA))
        for spot in _spots(draft, site, record):
            if spot.kind in ("linear", "conv1d", "conv", "embedding"):
                draft.modules.append(spot.module)
                draft.lora[spot.module] = _lora(record)
            else:
                draft.parameters.append(spot.path)
                draft.lora[spot.path] = _lora(record)
            draft.wrapped[spot.module] += 1
    if len(draft.dora) > 1:
        raise Inexpressible("some weights have DoRA and some LoRA; use_dora holds for all of a PEFT file")
    if len({m.bias for m in draft.lora.values()}) > 1:
        raise Inexpressible("some weights have LoRA(bias=True) and some not; lora_bias holds for all of a PEFT file")


def _spots(draft: Draft, site: Site, record: Record) -> tuple[Spot, ...]:
    """The places that PEFT adapts; refuses what it would adapt otherwise."""
    method, kinds = _lora(record), [spot.kind for spot in site.spots]
    dora = isinstance(record.method, DoRA)
    if not site.spots[0].module:
        raise Inexpressible(f"{site.name!r} belongs to the model itself, not to a module in it")
    if kinds[0] in ("attention", "out_proj"):
        raise Inexpressible("PEFT up to 0.21 applies LoRA on the out_proj of nn.MultiheadAttention twice, so what it "
                            f"computes depends on its version ({site.name!r})")
    if len(site.spots) > 1:
        _tied(draft, site)
    if site.unusual:
        raise Inexpressible(f"{site.name!r} is a convolution with {site.unusual}, on which PEFT's LoRA is another "
                            "function")
    if dora and len(kinds) > 1:
        raise Inexpressible(f"{site.name!r} is tied, and PEFT's DoRA gives each of its places lengths of their own")
    if dora and kinds[0] not in ("linear", "conv1d", "conv", "embedding"):
        raise Inexpressible(f"PEFT has no DoRA on {kinds[0]} weights ({site.name!r})")
    if method.bias and (dora or not set(kinds) <= {"linear", "conv1d", "conv"}):
        raise Inexpressible(f"PEFT has no lora_bias for {kinds[0]} weights or DoRA ({site.name!r})")
    return site.spots


def _low_rank(draft: Draft, record: Record) -> None:
    site = draft.base.sites[record.name]
    part = {key.removeprefix("inner."): tensor for key, tensor in record.tensors.items()}
    for spot in site.spots:
        if spot.path in draft.parameters:
            _put_parameter(draft, spot, site, part)
        elif spot.kind == "embedding":
            at = draft.path(spot.module)
            draft.tensors |= {f"{at}.lora_embedding_A": part["B"].mT, f"{at}.lora_embedding_B": part["A"].mT}
            if "magnitude" in part:
                draft.tensors[f"{at}.lora_magnitude_vector"] = part["magnitude"]
        else:
            _put_matrix(draft, spot, site, part, _lora(record))


def _put_matrix(draft: Draft, spot: Spot, site: Site, part: dict[str, Tensor], method: LoRA) -> None:
    at, A, B = draft.path(spot.module), part["A"], part["B"]
    magnitude = part.get("magnitude")
    if spot.kind == "conv":  # PEFT keeps a convolution by A's kernels and one of size 1
        ones = [1] * (len(site.layout.native) - 2)
        A, B = A.reshape(-1, *site.layout.native[1:]), B.reshape(*B.shape, *ones)
        magnitude = None if magnitude is None else magnitude.reshape(1, -1, *ones)
    draft.tensors |= {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}
    if magnitude is not None:
        draft.tensors[f"{at}.lora_magnitude_vector"] = magnitude
    if "bias" in part:
        draft.tensors[f"{at}.lora_B.bias"] = _unscaled(part["bias"], method.scale, site.name)


def _unscaled(bias: Tensor, scale: float, name: str) -> Tensor:
    """PEFT multiplies this bias by the scale: divided by it here, in the dtype that brings the same bits back."""
    for dtype in (bias.dtype, torch.float64):
        divided = bias.to(dtype) / scale
        if torch.equal(rescaled(divided, scale, bias.dtype), bias):
            return divided
    raise Inexpressible(f"PEFT multiplies lora_bias by the scale {scale:g}, and dividing {name!r}'s by it would round")


def rescaled(bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The inverse: in fp64, rounded once."""
    return (bias.double() * scale).to(dtype)


def _put_parameter(draft: Draft, spot: Spot, site: Site, part: dict[str, Tensor]) -> None:
    """PEFT stacks the experts' A by rows, (E·r, in), and interleaves their B by columns, (out, r·E)."""
    mine = [path for path in _in_order(draft, spot.module) if path in draft.parameters]
    depth = len(mine) - 1 - mine.index(spot.path)  # the module's last parameter is wrapped outermost
    at = draft.path(spot.module) + ".base_layer" * depth
    A, B = part["A"], part["B"]
    if site.layout.shape.batch:
        A = A.reshape(-1, A.shape[-1])
        B = B.permute(1, 2, 0).reshape(B.shape[1], -1)
    draft.tensors |= {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}


def _in_order(draft: Draft, module: str) -> list[str]:
    return [path for path, site in draft.base.by_path.items()
            if any(spot.module == module and spot.path == path for spot in site.spots)]


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
            _tied(draft, site)
        saved += [module for module in modules[:1] if module not in saved]
        for spot in site.spots:  # PEFT's loader wants a tied weight under both names
            draft.tensors[PREFIX + spot.path] = site.layout.stored(record.tensors["weight"])
    return saved, biases


def _tied(draft: Draft, site: Site) -> None:
    """PEFT ties what it trains between the input embedding and a linear head, where the model's config says so."""
    first, *others = site.spots
    if (first.kind, [spot.kind for spot in others]) != ("embedding", ["linear"]):
        raise Inexpressible(f"{site.name!r} is tied; PEFT keeps only an embedding and a head after it tied")
    if first.module != draft.base.tied_embedding:
        raise Inexpressible(f"{site.name!r} is tied, and the model's config does not say so (tie_word_embeddings): "
                            "PEFT would untie it")
    if f"{others[0].module}.bias" in draft.base.by_path:
        raise Inexpressible(f"{others[0].module!r} is tied and has a bias, which PEFT's tied copy of it would lose")
    draft.tied = True


def _rows(draft: Draft, records: list[Record]) -> dict[str, list[int]]:
    found = {}
    for record in records:
        site, method = draft.base.sites[record.name], cast(Rows, record.method)
        spot = site.spots[0]
        if spot.kind not in ("embedding", "linear") or f"{spot.module}.bias" in draft.base.by_path:
            raise Inexpressible(f"PEFT trains rows only of embeddings and of linear layers without bias, not of "
                                f"{record.name!r}")
        if len(site.spots) > 1:
            _tied(draft, site)
        found[spot.module] = list(method.ids)
        draft.tensors[f"{PREFIX}{spot.module}.token_adapter.trainable_tokens_delta"] = record.tensors["rows"]
    return found


def _bias(draft: Draft, records: list[Record], saved: list[str]) -> str:
    """none, all or lora_only; puts the tensors of the trained biases."""
    if not records:
        return "none"
    trained = set()
    for record in records:
        path = draft.base.sites[record.name].spots[0].path
        trained.add(path)
        draft.tensors[draft.path(path)] = draft.base.sites[record.name].layout.stored(record.tensors["weight"])
    every = {path for path in draft.base.by_path
             if path.endswith(".bias") and not any(path.startswith(f"{m}.") for m in saved)}
    if trained == every:
        return "all"
    if trained == {f"{module}.bias" for module in draft.modules} & every:
        return "lora_only"
    raise Inexpressible(f"the trained biases ({len(trained)}) are neither all of the model's nor just those of the "
                        "LoRA layers")


# -- the config ---------------------------------------------------------------------------------------------
def _config(draft: Draft, bias: str, saved: list[str], tokens: dict[str, list[int]]) -> dict[str, Any]:
    methods = list(draft.lora.values())
    stabilized = bool(methods) and all(m.rank_stabilized for m in methods)
    ranks = {name: m.rank for name, m in draft.lora.items()}
    alphas = {name: _alpha(m, stabilized) for name, m in draft.lora.items()}
    rank, alpha = Counter(zip(ranks.values(), alphas.values(), strict=True)).most_common(1)[0][0] if methods else (8, 8)
    base = draft.base
    config: dict[str, Any] = {
        "alpha_pattern": patterns_for(alphas, alpha), "auto_mapping": None,
        "base_model_name_or_path": base.name_or_path, "bias": bias,
        "fan_in_fan_out": bool(draft.modules) and all(_kind(base, m) == "conv1d" for m in draft.modules),
        "inference_mode": True,
        "init_lora_weights": "gaussian" if methods and all(m.init == "gaussian" for m in methods) else True,
        "layers_pattern": None, "layers_to_transform": None, "lora_alpha": alpha, "lora_dropout": _dropout(draft),
        "modules_to_save": _saved_entries(draft, saved), "peft_type": "LORA", "r": rank,
        "rank_pattern": patterns_for(ranks, rank), "revision": None,
        "target_modules": target_entries(draft.modules, base.modules) if draft.modules else
        ([] if draft.parameters else NO_TARGETS),
        "task_type": "CAUSAL_LM" if base.is_causal_lm else None, "use_dora": True in draft.dora,
        "use_rslora": stabilized,
    }
    if any(m.bias for m in methods):
        config["lora_bias"] = True
    if draft.parameters:
        config["target_parameters"] = _parameter_entries(draft)
    if tokens:
        config["trainable_token_indices"] = {_only(draft, module): ids for module, ids in tokens.items()}
    if draft.tied:
        config["ensure_weight_tying"] = True
    return config


def _kind(base: BaseMap, module: str) -> str:
    site = base.by_path.get(f"{module}.weight")
    return site.spots[0].kind if site else ""


def _alpha(method: LoRA, stabilized: bool) -> float:
    alpha = method.rank if method.alpha is None else method.alpha
    if method.rank_stabilized and not stabilized:
        alpha = method.scale * method.rank
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _dropout(draft: Draft) -> float:
    rates = Counter(method.dropout for method in draft.lora.values())
    if draft.parameters and set(rates) != {0.0}:
        draft.notes.append("lora_dropout is 0 in adapter_config.json, since PEFT has none for target_parameters; "
                           "veneer.json keeps the real ones")
        return 0.0
    common = rates.most_common(1)[0][0] if rates else 0.0
    if len(rates) > 1:
        draft.notes.append(f"lora_dropout is {common} in adapter_config.json, which has one value for all weights; "
                           "veneer.json keeps the real ones")
    return common


def _saved_entries(draft: Draft, saved: list[str]) -> list[str] | None:
    if not saved:
        return None
    entries = shorten(saved, draft.base.modules, hits_saved)
    if entries is None:
        raise Inexpressible("modules_to_save matches by the end of a name, and another module's name ends like "
                            + " or ".join(map(repr, saved)))
    for module in draft.modules:
        if any(re.match(rf"(^|.*\.){entry}($|\..*)", module) for entry in entries):
            raise Inexpressible(f"modules_to_save={entries} would take {module!r} from the LoRA modules")
    return entries


def _only(draft: Draft, module: str) -> str:
    entries = shorten([module], draft.base.modules, hits_saved)
    if entries is None:
        raise Inexpressible(f"trainable_token_indices matches by the end of a name, and another module's name ends "
                            f"like {module!r}")
    return entries[0]


def _parameter_entries(draft: Draft) -> list[str]:
    dora = True in draft.dora
    if dora or any(m.bias for m in draft.lora.values()) or any(_kind(draft.base, m) == "conv1d" for m in draft.modules):
        raise Inexpressible("target_parameters goes with neither DoRA, lora_bias nor Conv1D layers in a PEFT file")
    entries = shorten(draft.parameters, draft.base.by_path, hits_target)
    if entries is None:
        raise Inexpressible("target_parameters matches by the end of a name, and another parameter's name ends alike")
    return entries
