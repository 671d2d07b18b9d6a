"""Which layers of a model a PEFTConfig means, and the LoRA that each gets."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from veneer.inits.quant import SVDQuant
from veneer.inits.random import TorchInit
from veneer.method import Method, VeneerWarning
from veneer.methods import LoRA
from veneer.modelopt.config import DTYPES, PEFTAttributeConfig, PEFTConfig, attributes, dotted, hits
from veneer.weights import Weight


def names_of(weight: Weight) -> dict[str, bool]:
    """The names of the layers that a weight makes → whether `*` alone means them: it means linear layers and stacked
    experts. Of a parameter with a name of its own that name counts too, as a module may have several."""
    found: dict[str, bool] = {}
    for place in weight.places:
        linear = place.host.is_linear or isinstance(place.module, nn.Linear)
        own = () if place.param == "weight" else (place.names[-1],)
        for name in (place.module_name, *own):
            found[name] = found.get(name, False) or linear or bool(weight.layout.shape.batch)
    return found


def rules_for(config: PEFTConfig, weights: list[Weight]) -> dict[str, Method | None]:
    """A method, or None, for every matrix of a model by its full name. Warns of patterns that mean no layer."""
    matrices = [weight for weight in weights if not weight.layout.shape.is_vector]
    names = {weight: names_of(weight) for weight in matrices}
    idle = [pattern for pattern in config.adapter_cfg if not any(hits(pattern, each) for each in names.values())]
    if idle:
        warnings.warn(f"update_model: {', '.join(map(repr, idle))} of adapter_cfg match no layer of this model; "
                      "patterns match whole names, such as '*attention*'", VeneerWarning, stacklevel=3)
    said = {weight: attributes(config.adapter_cfg, each) for weight, each in names.items()}
    return {weight.places[0].names[-1]: lora(given, weight.dtype) if given is not None and given.enable else None
            for weight, given in said.items()}


def lora(said: PEFTAttributeConfig, weight_dtype: torch.dtype) -> LoRA:
    """The method of one layer; its dtype is the layer's where none is given."""
    dtype = weight_dtype if said.lora_dtype is None else DTYPES[said.lora_dtype]
    start: Any = TorchInit(a=dotted(said.lora_a_init), b=dotted(said.lora_b_init))
    if said.lora_init_method == "svdquant":
        start = SVDQuant()
        given = [field for field in ("lora_a_init", "lora_b_init") if field in said.model_fields_set]
        if given:
            warnings.warn(f"update_model: {' and '.join(given)} have no effect with lora_init_method='svdquant'",
                          VeneerWarning, stacklevel=4)
    return LoRA(rank=said.rank, alpha=alpha_of(said.scale, said.rank), init=start, residual="none",
                dtype=None if dtype == torch.promote_types(weight_dtype, torch.float32) else dtype)


def alpha_of(scale: float, rank: int) -> float:
    """The alpha by which alpha/rank is the scale as it was given, or next to it where no float is."""
    middle = scale * rank
    near = (middle, math.nextafter(middle, math.inf), math.nextafter(middle, -math.inf))
    return next((alpha for alpha in near if alpha / rank == scale), middle)


def written_out(config: PEFTConfig, weights: list[Weight]) -> PEFTConfig:
    """The config with each callable pattern as the names it hits, with what they have got by then: so it can be kept in
    files."""
    if all(isinstance(pattern, str) for pattern in config.adapter_cfg):
        return config.model_copy(deep=True)
    layers = [names_of(weight) for weight in weights if not weight.layout.shape.is_vector]
    patterns: dict[Any, PEFTAttributeConfig] = {}
    for pattern, given in config.adapter_cfg.items():
        if isinstance(pattern, str):
            patterns[pattern] = given
            continue
        for names in layers:
            if hits(pattern, names):
                so_far = attributes({**patterns, pattern: given}, names)
                assert so_far is not None
                name = next(name for name in names if pattern(name))
                patterns.pop(name, None)  # it counts as the last one
                patterns[name] = so_far
    fields: Mapping[str, Any] = {name: getattr(config, name) for name in config.model_fields_set}
    return PEFTConfig(**{**fields, "adapter_cfg": copy.deepcopy(patterns)})
