"""apply_lora_to_linear_modules: a PeftConfig on a whole model."""

from __future__ import annotations

import difflib
import warnings
from typing import Any

import torch
from torch import nn

from veneer.attach import attach
from veneer.attached import adapter_names
from veneer.method import Method, VeneerError, VeneerWarning
from veneer.nemo.config import PeftConfig
from veneer.nemo.experts import check_experts, expert_dim, expert_parameters
from veneer.nemo.linear import show
from veneer.nemo.match import ModuleMatcher, is_causal_lm, is_linear
from veneer.plan import resolve
from veneer.weights import Weight, base_modules, scan
from veneer.wrappers import unwrap


def apply_lora_to_linear_modules(model: nn.Module, peft_config: PeftConfig, quantization_config: Any = None,
                                 skip_freeze: bool = False, *, seed: int | None = None, name: str = "default") -> int:
    """Adapt the modules that `peft_config` means, in place; returns how many those are.

    quantization_config: not needed here, and not looked at: a packed weight is recognised by itself. skip_freeze: leave
    the base as trainable as it is. seed: of A, together with each weight's name; None = `torch.initial_seed()`, what
    `torch.manual_seed` was given. name: of the adapter.

    When nothing matches: 0, a `VeneerWarning`, and the model as it was. Raises `VeneerError`, with the model as it was,
    when a pattern hits a module that is neither a linear layer nor one of stacked experts, or one that is adapted.
    """
    peft_config.check()
    model = unwrap(model)
    matched = matching(model, peft_config)
    if not matched:
        warnings.warn(_no_match(model, peft_config), VeneerWarning, stacklevel=2)
        return 0
    thawed = [param for param in model.parameters() if param.requires_grad] if skip_freeze else []
    weights = scan(model)
    chosen = methods_for(model, peft_config, matched, {n: w for w in weights for p in w.places for n in p.names})
    lay_on(model, weights, chosen, name, torch.initial_seed() if seed is None else seed)
    for module in matched.values():
        show(module, peft_config.use_triton)
    for param in thawed:
        param.requires_grad_(True)
    return len(matched)


def matching(model: nn.Module, config: PeftConfig) -> dict[str, nn.Module]:
    """The modules that the config means, by name. Raises `VeneerError` when one of them cannot be adapted."""
    matcher = ModuleMatcher(config.target_modules, config.exclude_modules, config.match_all_linear,
                            is_causal_lm(model))
    found = {name: module for name, module in base_modules(model) if matcher.match(module, name)}
    for name, module in found.items():
        if not is_linear(module) and not expert_parameters(module):
            raise VeneerError(f"target_modules={config.target_modules!r} hit {name or 'the model itself'!r}, a "
                              f"{type(module).__name__}, which is no linear layer. Name linear layers only "
                              "('*_proj', say), or give match_all_linear=True")
    return found


def methods_for(model: nn.Module, config: PeftConfig, matched: dict[str, nn.Module],
                weights: dict[str, Weight]) -> dict[str, Method]:
    """What each matched parameter gets, by its full name. weights: all of the model's, by all of their names."""
    chosen: dict[str, Method] = {}
    experts: list[str] = []
    for name, module in matched.items():
        prefix = f"{name}." if name else ""
        if is_linear(module):
            weight = weights.get(f"{prefix}weight")
            if weight is None:
                raise VeneerError(f"{name!r} is a {type(module).__name__} whose weight cannot be read")
            chosen[f"{prefix}weight"] = config.method(weight.dtype)
        else:
            experts += [f"{prefix}{param}" for param in expert_parameters(module)]
    if experts:
        check_experts(config, experts)
        dim = expert_dim(config, model)
        chosen |= {full: config.method(weights[full].dtype, dim, dropout=False) for full in experts}
    elif config.moe_rank_scaling:
        warnings.warn("moe_rank_scaling=True has no effect: no stacked experts are among the modules that are adapted",
                      VeneerWarning, stacklevel=3)
    return chosen


def lay_on(model: nn.Module, weights: list[Weight], chosen: dict[str, Method], name: str, seed: int) -> None:
    """Attach the methods, and leave all other weights alone on purpose."""
    if name in adapter_names(model):
        raise VeneerError(f"this model has LoRA already (adapter {name!r}); veneer.detach(model) takes it off, and "
                          "another name= puts one beside it")
    rules: dict[str, Method | None] = {}
    for weight in weights:
        hit = [full for place in weight.places for full in place.names if full in chosen]
        if hit:
            rules |= {full: chosen[full] for full in dict.fromkeys(hit)}
        elif not weight.layout.shape.is_vector:
            rules[weight.places[0].names[-1]] = None
    attach(model, resolve(model, weights, rules), name, seed)


def _no_match(model: nn.Module, config: PeftConfig) -> str:
    linear = [name for name, module in base_modules(model) if is_linear(module)]
    asked = config.target_modules or f"all but {config.exclude_modules!r}"
    word = asked if isinstance(asked, str) else asked[0]
    if is_causal_lm(model) and "lm_head" in word:
        return "no module was adapted: the lm_head of a causal language model is left alone, as in NeMo"
    text = f"no module was adapted: {asked!r} matches none of this model's {len(linear)} linear layers"
    last = {name.rpartition(".")[2]: name for name in reversed(linear)}
    near = difflib.get_close_matches(word.replace("*", "").rpartition(".")[2], last, n=1, cutoff=0.3)
    return f"{text}; nearest: {last[near[0]]!r}. A pattern matches whole names: '*{near[0]}'" if near else text
