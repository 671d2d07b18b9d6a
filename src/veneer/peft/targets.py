"""Which modules and parameters of a bare model a config adapts, by PEFT's rules.

The rules of names are in `veneer.io.dialects.hf_names`; here is what stands around them (peft/tuners/tuners_utils.py,
`inject_adapter`): "all-linear", the targets of an architecture, and experts that transformers 5 has put together.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from veneer.io.dialects.hf_names import hits_target, is_target
from veneer.io.dialects.hf_write import NO_TARGETS
from veneer.io.records import BaseMap
from veneer.method import VeneerError
from veneer.notices import say
from veneer.peft.architectures import default_targets, fused_experts, known_architectures
from veneer.peft.errors import NoMatchingPeftModuleError
from veneer.peft.misses import could_be, hint, nothing, shown
from veneer.peft.types import SEQ_CLS_HEADS, PeftType, TaskType
from veneer.weights import base_modules

ALL_LINEAR = "all-linear"
#: a longer list of targets is made shorter
_MANY = 20


@dataclass(frozen=True)
class Found:
    """Names of modules and of parameters, in the model's order."""

    modules: list[str]
    parameters: list[str]


# -- what the config says, made explicit --------------------------------------------------------------------
def settle_targets(model: nn.Module, base: BaseMap, config: Any) -> None:
    """Write into `config` what its target_modules mean for this model: the architecture's own where it has none, names
    for "all-linear", the parameters that experts are in now, and a shorter list where it is long.

    Raises `ValueError` where the config has no targets and the architecture is unknown, for "all-linear" where nothing
    is, and for a regex that is none.
    """
    _check_patterns(config)
    if config.peft_type == PeftType.LORA:
        _settle_experts(model, base, config)
    if config.target_modules is None:
        _settle_default(model, base, config)
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        config.target_modules = set(linear_modules(model, base, config.task_type))
        if not config.target_modules and not getattr(config, "target_parameters", None):
            raise NoMatchingPeftModuleError(f"target_modules={targets!r}: this {type(model).__name__} has no linear "
                                            "layer beside its output head. Name the modules to adapt")
    if isinstance(config.target_modules, (list, set)) and len(config.target_modules) >= _MANY:
        config.target_modules = shortest(set(config.target_modules), base.modules)


def model_type(model: nn.Module) -> str | None:
    """The architecture's name in the model's own config, or None."""
    config = getattr(model, "config", None)
    return config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)


def _check_patterns(config: Any) -> None:
    for name in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
        value = getattr(config, name, None)
        patterns = [value] if isinstance(value, str) else list(value or ()) if name.endswith("_pattern") else []
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise VeneerError(f"{name}: {pattern!r} is no regular expression: {error}") from None


def _settle_default(model: nn.Module, base: BaseMap, config: Any) -> None:
    kind = model_type(model)
    found = default_targets(config.peft_type, kind)
    if found is None and not getattr(config, "target_parameters", None):
        what = "`target_modules` or `target_parameters`" if config.peft_type == PeftType.LORA else "`target_modules`"
        here = (f"model_type {kind!r}, but for {', '.join(known_architectures(config.peft_type))}" if kind else
                "a model without a model_type in its config")
        raise VeneerError(f"Please specify {what} in `peft_config`: none are known for {here}. "
                          f"{could_be(base, config)}; \"all-linear\" is every linear layer")
    config.target_modules = found


def linear_modules(model: nn.Module, base: BaseMap, task_type: Any) -> list[str]:
    """The modules of "all-linear": linear layers and Conv1D, without the output head of a language model or, for
    sequence classification, its classifier."""
    heads = _heads(model, task_type)
    found = []
    for name, module in base_modules(model):
        site = base.by_path.get(f"{name}.weight") if name else None
        linear = site is not None and (isinstance(module, nn.Linear) or site.is_linear)
        # nn.MultiheadAttention never calls its out_proj: PEFT's adapter on it would do nothing
        unread = site is not None and any(spot.module == name and spot.kind == "out_proj" for spot in site.spots)
        if linear and not unread and id(module) not in heads:
            found.append(name)
    return found


def _heads(model: nn.Module, task_type: Any) -> set[int]:
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    if head is None and callable(ask) and task_type == TaskType.SEQ_CLS:
        head = next((part for part in (getattr(model, name, None) for name in SEQ_CLS_HEADS) if part is not None), None)
    return {id(head)} if isinstance(head, nn.Module) else set()


def shortest(targets: set[str], modules: Iterable[str]) -> set[str]:
    """As few ends of names as hit the same modules; `targets` where that is no gain.

    Each name, those with the simplest last parts first, is covered by its shortest end that no other module has.
    """
    hit = {name for name in modules if not targets.isdisjoint(_ends(name))}
    foreign = {end for name in modules if name not in hit for end in _ends(name)}
    found: set[str] = set()
    for name in sorted(targets, key=_ends):
        if any(name.endswith(f".{end}") for end in found):
            continue
        end = next((end for end in _ends(name) if end not in found and end not in foreign), None)
        if end is not None:
            found.add(end)
    return found if found and len(found) < len(targets) else targets


def _ends(name: str) -> list[str]:
    """Every end of a dotted name, the shortest first."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


# -- experts ------------------------------------------------------------------------------------------------
def _settle_experts(model: nn.Module, base: BaseMap, config: Any) -> None:
    """Targets by the names that experts had before transformers 5 → the parameters that hold all of them now. Where
    two parts became one parameter, the pair has the rank and alpha of both together."""
    names = fused_experts(model_type(model))
    if config.target_modules is None or not names:
        return
    if not any(hits_target("gate_up_proj", path) for path in base.by_path):
        return  # a version of the model with its experts apart
    if isinstance(config.target_modules, str):
        ends = _ends_hit(model, base, config, names)
        if not ends:
            return
        config.target_modules = ends
    config.rank_pattern, config.alpha_pattern = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    old = {entry: name for entry in config.target_modules or () for name in names if hits_target(name, entry)}
    halves = {name for name, now in names.items() if now == "gate_up_proj"}
    asked = halves & set(old.values())
    if asked and asked != halves:
        raise VeneerError(f"target_modules has {', '.join(sorted(asked))} and not {', '.join(sorted(halves - asked))}: "
                          "since transformers 5 they are one parameter, gate_up_proj, and are adapted together")
    if asked:
        key = r".*\.gate_up_proj"
        config.rank_pattern[key], config.alpha_pattern[key] = config.r * len(halves), config.lora_alpha * len(halves)
    config.target_modules = {entry for entry in config.target_modules or () if entry not in old}
    config.target_parameters = sorted({*(config.target_parameters or ()), *(names[name] for name in old.values())})


def _ends_hit(model: nn.Module, base: BaseMap, config: Any, names: Mapping[str, str]) -> set[str]:
    """The last parts of the names that a regex or "all-linear" means, those that experts had among them."""
    if config.target_modules.lower() == ALL_LINEAR:
        return {name.rpartition(".")[2] for name in linear_modules(model, base, config.task_type)} | set(names)
    rules = _view(config)
    found = {name.rpartition(".")[2] for name in (*base.modules, *base.by_path) if is_target(rules, name)}
    for old, now in names.items():
        inside = {path.removesuffix(now) + old for path in base.by_path if path.endswith(f".{now}")}
        if any(is_target(rules, path) for path in inside):
            found.add(old)
    return found


# -- matching -----------------------------------------------------------------------------------------------
def find_targets(base: BaseMap, config: Any) -> Found:
    """What a config with settled targets adapts.

    Raises `NoMatchingPeftModuleError` where that is nothing, with the nearest match; warns (`UserWarning`) of
    exclusions and patterns that hit nothing.
    """
    if config.target_modules == NO_TARGETS:
        return Found([], _parameters(base, config))
    rules = _view(config)
    modules = [name for name in base.modules if is_target(rules, name)]
    excluded = [name for name in base.modules if _is_excluded(rules, name)]
    parameters = _parameters(base, config)
    if not modules and not parameters:
        raise NoMatchingPeftModuleError(nothing(base, config, rules, excluded))
    if getattr(config, "exclude_modules", None) and not excluded:
        say(f"exclude_modules={shown(config.exclude_modules)} was passed and no modules were excluded"
            f"{hint(config.exclude_modules, base.modules)}", UserWarning)
    elif config.target_modules and not modules:
        say(f"target_modules={shown(config.target_modules)} were set but no module was matched"
            f"{hint(config.target_modules, base.modules)}", RuntimeWarning)
    elif getattr(config, "target_parameters", None) and not parameters:
        say(f"target_parameters={shown(config.target_parameters)} were set but no parameter was matched"
            f"{hint(config.target_parameters, base.by_path)}", RuntimeWarning)
    _warn_of_patterns(config, [*modules, *parameters])
    return Found(modules, parameters)


def inspect_matched_modules(model: nn.Module, config: Any) -> dict[str, list[str]]:
    """Names of the model's modules, "matched" by the config's target_modules or "unmatched". Nothing is changed."""
    rules = _view(config)
    found: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for name, _ in base_modules(model):
        found["matched" if is_target(rules, name) else "unmatched"].append(name)
    return found


def _view(config: Any) -> dict[str, Any]:
    """What `hf_names` reads of a config."""
    keys = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    return {key: getattr(config, key, None) for key in keys}


def _is_excluded(rules: Mapping[str, Any], name: str) -> bool:
    """By exclude_modules or modules_to_save, whatever the targets are."""
    return not is_target({**rules, "target_modules": [name]}, name)


def _parameters(base: BaseMap, config: Any) -> list[str]:
    wanted = getattr(config, "target_parameters", None) or ()
    found = [path for path in base.by_path if any(hits_target(entry, path) for entry in wanted)]
    for path in found:
        if "." not in path:
            raise VeneerError(f"target_parameters: {path!r} belongs to the model itself and not to a module in it, and "
                              "PEFT's files cannot hold an adapter of it; use veneer.attach for it")
    return found


def _warn_of_patterns(config: Any, names: Collection[str]) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, field, None) or {}
        if config.peft_type == PeftType.ADALORA and field == "rank_pattern":
            continue  # there it is what training left, not a pattern
        unused = sorted(key for key in patterns if not any(re.match(rf"(.*\.)?({key})$", name) for name in names))
        if unused:
            say(f"{field}: {unused} did not match any targeted module and were ignored"
                f"{hint([re.sub(r'[^A-Za-z0-9_.]', '', key) for key in unused], names)}", RuntimeWarning)
