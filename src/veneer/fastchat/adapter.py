"""`LoraArguments` as a plan for the engine, or an adapter that is gone on from."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

import veneer
from veneer.attached import attached
from veneer.fastchat.arguments import LoraArguments
from veneer.method import Method, VeneerError, VeneerWarning, nearest
from veneer.methods import DoRA, Full, LoRA
from veneer.plan import Pattern
from veneer.train.adapter_files import find_adapter
from veneer.weights import Weight, scan

NAME = "default"
_ALL_LINEAR = "all-linear"


def attach_lora(model: nn.Module, lora: LoraArguments, given: Collection[str], seed: int) -> str:
    """Attach what the arguments say; returns what to tell of it.

    given: names of the flags that the command has. With `lora_weight_path` the adapter there decides, and a flag that
    was given and says something else is an error; only its dropout may be another. Raises `VeneerError`.
    """
    if lora.lora_weight_path:
        return _continued(model, lora, given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)  # what the plan warns of stands in its text
        plan = veneer.plan(model, lora_rules(model, lora))
    veneer.attach(model, plan, name=NAME, seed=seed)
    return "\n".join([str(plan), *_no_bias(model, lora)])


def lora_rules(model: nn.Module, lora: LoraArguments) -> dict[Pattern, Method | None]:
    """Pattern → method. Raises `VeneerError` for a name in `lora_target_modules` that is no layer of the model."""
    weights = scan(model)
    method = LoRA(rank=lora.lora_r, alpha=lora.lora_alpha, dropout=lora.lora_dropout)
    targets = _targets(weights, lora.lora_target_modules)
    rules: dict[Pattern, Method | None] = {_exactly(entry, names): method for entry, names in targets.items()}
    biases = _biases(weights, lora.lora_bias, _union(targets))
    if biases:
        rules[_exactly(f"biases: {lora.lora_bias}", biases)] = Full()
    return rules


def _exactly(text: str, names: Collection[str]) -> Pattern:
    """A pattern that hits these names and is shown as `text`."""
    wanted = frozenset(names)

    def pattern(name: str, module: nn.Module) -> bool:
        return name in wanted

    pattern.__name__ = text
    return pattern


def _targets(weights: list[Weight], entries: list[str]) -> dict[str, list[str]]:
    """The modules that each entry hits, by PEFT's rule: a whole name, or the end of one after a dot."""
    matrices = {place.module_name: weight for weight in weights for place in weight.places
                if place.param == "weight" and place.module_name and not weight.layout.shape.is_vector}
    found: dict[str, list[str]] = {}
    for entry in entries:
        if entry == _ALL_LINEAR:
            hit = [name for name, weight in matrices.items() if weight.is_linear and not weight.is_head]
        else:
            hit = [name for name in matrices if name == entry or name.endswith(f".{entry}")]
        if not hit and "," in entry:
            raise VeneerError(f"--lora_target_modules: names are separated by spaces: {' '.join(_parts(entries))}")
        if not hit:
            ends = list(dict.fromkeys(name.rpartition(".")[2] for name in matrices))
            raise VeneerError(f"--lora_target_modules: no layer is named {entry!r}{nearest(entry, ends) or '.'} Layers "
                              f"here: {', '.join(ends)}, or {_ALL_LINEAR}")
        found[entry] = hit
    return found


def _parts(entries: list[str]) -> list[str]:
    return [part.strip() for entry in entries for part in entry.split(",") if part.strip()]


def _union(targets: Mapping[str, list[str]]) -> set[str]:
    return {name for names in targets.values() for name in names}


def _biases(weights: list[Weight], which: str, modules: Collection[str]) -> list[str]:
    """Full names of the biases that are trained."""
    names = [weight.places[0].names[-1] for weight in weights]
    biases = [name for name in names if name.endswith(".bias") and which != "none"]
    return [name for name in biases if which == "all" or name.removesuffix(".bias") in modules]


def _no_bias(model: nn.Module, lora: LoraArguments) -> list[str]:
    """A warning where biases were asked for and there are none."""
    weights = scan(model)
    modules = {item.weight.places[0].module_name for item in attached(model, NAME)}
    if lora.lora_bias == "none" or _biases(weights, lora.lora_bias, modules):
        return []
    where = "this model" if lora.lora_bias == "all" else "none of the adapted layers"
    has = "has no bias" if lora.lora_bias == "all" else "has a bias"
    return [f"warning: --lora_bias {lora.lora_bias}: {where} {has}, so none is trained, and the adapter's config has "
            "bias: none"]


# -- going on from an adapter -----------------------------------------------------------------------------
def _continued(model: nn.Module, lora: LoraArguments, given: Collection[str]) -> str:
    path, remark = find_adapter(lora.lora_weight_path)
    try:
        report = veneer.load(model, path, name=NAME)
    except VeneerError as error:
        raise VeneerError(f"--lora_weight_path: {error}") from error
    methods = {item.weight.places[0].names[-1]: item.adapter.method for item in attached(model, NAME)}
    _check_given(model, methods, lora, given)
    if "lora_dropout" in given:
        changed = {name: _with_dropout(method, lora.lora_dropout) for name, method in methods.items()}
        veneer.detach(model, NAME)
        veneer.attach(model, changed, name=NAME)
        report = veneer.load(model, path, name=NAME)
    warned = _no_bias(model, lora) if "lora_bias" in given else []
    return "\n".join(filter(None, [remark, f"Adapter to go on from: {report}", *warned]))


def _with_dropout(method: Any, dropout: float) -> Method:
    """Raises `VeneerError` for a method that has none."""
    if isinstance(method, Full):  # a bias beside the pairs
        return method
    if isinstance(method, DoRA):
        return DoRA(_with_dropout(method.inner, dropout))
    if "dropout" not in {field.name for field in dataclasses.fields(method)}:
        raise VeneerError(f"--lora_dropout is {dropout:g}, and the adapter of --lora_weight_path is {method}, which "
                          "has no dropout; drop the flag")
    return dataclasses.replace(method, dropout=dropout)


def _check_given(model: nn.Module, methods: dict[str, Method | None], lora: LoraArguments,
                 given: Collection[str]) -> None:
    """Flags that say something else than the adapter does."""
    pairs = {name: method for name, method in methods.items() if not isinstance(method, Full)}
    for flag in ("lora_r", "lora_alpha"):
        for method in pairs.values() if flag in given else ():
            if not isinstance(method, LoRA):
                raise _differs(flag, "given", f"{method}, which it does not describe")
            there = {"lora_r": method.rank, "lora_alpha": method.scale * method.rank}[flag]
            if there != vars(lora)[flag]:
                raise _differs(flag, vars(lora)[flag], f"{there:g}")
    weights = scan(model)
    modules = {name.removesuffix(".weight") for name in pairs}
    if "lora_target_modules" in given and _union(_targets(weights, lora.lora_target_modules)) != modules:
        ends = sorted({name.rpartition(".")[2] for name in modules})
        raise _differs("lora_target_modules", " ".join(lora.lora_target_modules), " ".join(ends))
    trained = {name for name in methods if name not in pairs}
    if "lora_bias" in given and set(_biases(weights, lora.lora_bias, modules)) != trained:
        raise _differs("lora_bias", lora.lora_bias, f"{len(trained)} trained biases")


def _differs(flag: str, wanted: Any, there: Any) -> VeneerError:
    return VeneerError(f"--{flag} is {wanted}, and the adapter of --lora_weight_path has {there}; drop the flag, or "
                       "start a new adapter")
