"""A config and a bare model → what the engine is to attach."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from veneer.io.dialects.hf_family import Family
from veneer.io.records import BaseMap, Site, base_map, base_weights
from veneer.method import Method, VeneerError
from veneer.methods import Full
from veneer.notices import say
from veneer.peft.config import PeftConfig, config_class
from veneer.peft.remembered import recall
from veneer.peft.replicate import check_replicated
from veneer.peft.targeted import Targeted
from veneer.peft.targets import find_targets, settle_targets
from veneer.peft.trained_whole import biases, saved, tokens
from veneer.peft.types import PeftType
from veneer.statistics import Statistics
from veneer.weights import Weight
from veneer.wrappers import unwrap

#: settings that AdaLoRA inherits from LoRA and does nothing with, in PEFT too
_IGNORED_BY_ADALORA = {"use_rslora": False, "lora_bias": False, "alpha_pattern": {}, "target_parameters": None}


@dataclass(frozen=True)
class Translation:
    """rules: parameter's full name in the bare model → method, or None for what is left alone on purpose; empty where
    nothing is to be attached. config: what stands in `peft_config` afterwards, a copy with its targets resolved as PEFT
    resolves them. statistics: for a start from data. modules, parameters: what was targeted, in the model's order."""

    rules: dict[str, Method | None]
    config: PeftConfig
    statistics: Statistics | None = None
    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


@dataclass
class _Draft:
    """chosen: weight name → its method; why: by which field; hit: the places of it that the config names."""

    base: BaseMap
    chosen: dict[str, Method] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    hit: dict[str, set[str]] = field(default_factory=dict)

    def put(self, path: str, method: Method, why: str) -> None:
        """Raises `VeneerError` where the weight has another method already."""
        site = self.base.by_path[path]
        there = self.chosen.get(site.name)
        if there is not None and (there != method or why != self.why[site.name]):
            if isinstance(method, Full) and isinstance(there, Full):
                return
            raise VeneerError(f"{path!r} is named twice: {self.why[site.name]} gives it {there}, {why} gives it "
                              f"{method}; in Veneer a weight has one of them in each adapter")
        self.chosen[site.name], self.why[site.name] = method, why
        self.hit.setdefault(site.name, set()).add(path)


def translate(model: nn.Module, config: PeftConfig, name: str = "default", *, given: bool = False) -> Translation:
    """What `config` means for the bare model `model`, which may have other adapters and whose layers were
    replicated already, if `layer_replication` says so; nothing of the model is changed. name: of the adapter, for
    messages. given: the adapter's values come from a file, so that nothing starts from weights or data.

    Raises `ValueError` (most as `VeneerError`) for a config that fits nothing of the model, contradicts itself, or asks
    for what Veneer does not have (`NotInVeneerError`); `TypeError` where `config` is none of this package's.
    """
    _check_class(config, name)
    model, config = unwrap(model), copy.deepcopy(config)
    options: Any = config
    _check_ignored(options)
    if getattr(options, "layer_replication", None):
        check_replicated(model, options.layer_replication)
    weights = base_weights(model)
    base = base_map(model, weights)
    settle_targets(model, base, options)
    found = find_targets(base, options)
    statistics = None if given else _statistics(model, options)
    targeted = Targeted(model, base, options, given)
    draft = _Draft(base)
    for module in found.modules:
        _put_module(draft, targeted, module)
    for path in found.parameters:
        for method in targeted.parameter(path).values():
            draft.put(path, method, "target_parameters")
    for why, chosen in (("modules_to_save", saved(model, base, options.modules_to_save or ())),
                        ("trainable_token_indices", tokens(model, base, options)),
                        ("bias", biases(base, options, found.modules, targeted.kind))):
        for path, method in chosen:
            draft.put(path, method, why)
    _settle_ties(draft, options, isinstance(targeted.kind, Family), given)
    _settle_fan(options, base, found.modules, given)
    return Translation(_rules(weights, draft.chosen), config, statistics, tuple(found.modules), tuple(found.parameters))


def _put_module(draft: _Draft, targeted: Targeted, module: str) -> None:
    for name, method in targeted.module(module).items():
        spots = draft.base.sites[name].spots
        mine = next((spot for spot in spots if spot.module == module), spots[0])  # an out_proj goes by its parent
        draft.put(mine.path, method, "target_modules")


def _rules(weights: Iterable[Weight], chosen: dict[str, Method]) -> dict[str, Method | None]:
    """What is not chosen is left alone on purpose: matrices, which would be reported as forgotten, and biases, which
    `Full` on the weight beside them would cover."""
    rules: dict[str, Method | None] = {}
    for weight in weights if chosen else ():
        full = weight.places[0].names[-1]
        if weight.name in chosen:
            rules[full] = chosen[weight.name]
        elif not weight.layout.shape.is_vector or full.endswith(".bias"):
            rules[full] = None
    return rules


# -- before --------------------------------------------------------------------------------------------------
def _check_class(config: Any, name: str) -> None:
    if not isinstance(config, PeftConfig):
        hint = " of the original peft; build it from veneer.peft" if type(config).__module__.startswith("peft.") else ""
        raise TypeError(f"adapter {name!r}: a config of veneer.peft is needed (LoraConfig, say), got a "
                        f"{type(config).__name__}{hint}")
    kind = config_class(config.peft_type) if config.peft_type is not None else PeftConfig
    if kind is PeftConfig or not isinstance(config, kind):
        raise TypeError(f"adapter {name!r}: a {type(config).__name__} does not say how to adapt; use LoraConfig or "
                        "another config of the family")


def _check_ignored(config: Any) -> None:
    runtime = getattr(config, "runtime_config", None)
    if runtime is not None and runtime.ephemeral_gpu_offload:
        say("ephemeral_gpu_offload has no effect: Veneer computes nothing of DoRA's start on another device")
    if config.peft_type != PeftType.ADALORA:
        return
    for name, default in _IGNORED_BY_ADALORA.items():
        if (getattr(config, name) or default) != default:
            raise VeneerError(f"AdaLoraConfig: AdaLoRA has no {name} (= {getattr(config, name)!r}), neither here nor "
                              "in PEFT; leave it at its default")
    if config.start not in ("True", "False"):
        say(f"AdaLoraConfig: init_lora_weights={config.init_lora_weights!r} has no effect: AdaLoRA begins in its own "
            "way")


def _statistics(model: nn.Module, config: Any) -> Statistics | None:
    """What a start from data needs, or None. Raises `VeneerError` where it was never collected."""
    start = config.start if config.peft_type == PeftType.LORA else ""
    if start == "eva":
        say("init_lora_weights='eva': the adapter begins as with True until initialize_lora_eva_weights(model, "
            "dataloader) is called; low_cpu_mem_usage saves nothing here, with or without it", UserWarning)
    if start not in ("corda", "lora_ga"):
        return None
    found = recall(model, start)
    if found is None:
        run = {"corda": "preprocess_corda(model, lora_config, run_model)",
               "lora_ga": "preprocess_loraga(model, lora_config, train_step)"}[start]
        raise VeneerError(f"init_lora_weights={start!r} starts from data, and none was collected of this model; please "
                          f"run {run} on it first")
    return found


# -- after ---------------------------------------------------------------------------------------------------
def _settle_ties(draft: _Draft, config: Any, family: bool, given: bool) -> None:
    """A tied weight is one weight here. Warn where PEFT would train its places apart, or refuse where that cannot
    stand for it."""
    asked = bool(getattr(config, "ensure_weight_tying", False))
    tied = [site for site in map(draft.base.sites.__getitem__, draft.chosen) if len(site.spots) > 1]
    if asked and not any(len(site.spots) > 1 for site in draft.base.sites.values()):
        say("ensure_weight_tying=True, and this model has no tied weights", UserWarning)
    for site in tied:
        why, all_hit = draft.why[site.name], len(draft.hit[site.name]) == len(site.spots)
        places = " and ".join(repr(spot.module) for spot in site.spots)
        if family and why == "target_modules":
            raise VeneerError(f"{places} are one tied weight, and PEFT's {type(config).__name__} adapts each of its "
                              "places apart, which its files cannot say of one. Take it out of target_modules, or "
                              "untie it first: give one a clone of the weight")
        if asked or why == "bias" or (why == "trainable_token_indices" and _is_tied_embedding(draft, site)):
            continue
        if given and not all_hit:
            raise VeneerError(f"{places} are one tied weight, and this adapter was trained on {_hit(draft, site)} "
                              "alone (ensure_weight_tying is false). Untie them first: give one a clone of the weight")
        if not given:
            apart = "trains each of them apart" if all_hit else f"adapts {_hit(draft, site)} alone"
            say(f"{places} are one tied weight. PEFT {apart} here; Veneer adapts the weight in all its "
                f"places and keeps the tie, as with ensure_weight_tying=True ({why}). Untie them first, by "
                "giving one a clone of the weight, where that is not meant")
            if "ensure_weight_tying" in vars(config):
                config.ensure_weight_tying = True


def _hit(draft: _Draft, site: Site) -> str:
    return " and ".join(repr(path.rpartition(".")[0]) for path in sorted(draft.hit[site.name]))


def _is_tied_embedding(draft: _Draft, site: Site) -> bool:
    """PEFT keeps the tie of trained rows where the input embedding itself is named."""
    return any(path == f"{draft.base.tied_embedding}.weight" for path in draft.hit[site.name])


def _settle_fan(config: Any, base: BaseMap, modules: Sequence[str], given: bool) -> None:
    """fan_in_fan_out as the layers have it; says where the config had it otherwise."""
    if "fan_in_fan_out" not in vars(config):
        return
    for module in modules:
        site = base.by_path.get(f"{module}.weight")
        kind = next((spot.kind for spot in site.spots if spot.module == module), "") if site else ""
        if kind not in ("linear", "conv1d") or config.fan_in_fan_out == (kind == "conv1d"):
            continue
        config.fan_in_fan_out = kind == "conv1d"
        if not given:
            what = "torch.nn.Linear" if kind == "linear" else "Conv1D"
            say(f"fan_in_fan_out is set to {not config.fan_in_fan_out} but the target module is `{what}`. "
                f"Setting fan_in_fan_out to {config.fan_in_fan_out}", UserWarning)
