"""The method that a config gives to one target: a layer, an attention module's projections, or a single parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from veneer.inits import CorDA, Init, KaimingBoth, LoftQ, LoRAGA, TorchInit
from veneer.io.dialects import hf_lora_read
from veneer.io.dialects.hf_family import Family, layer_of
from veneer.io.dialects.hf_types import file_type
from veneer.io.records import BaseMap, Site, Spot
from veneer.method import Method, VeneerError
from veneer.methods import DoRA, LoRA
from veneer.peft.errors import NotInVeneerError, UnsupportedLayerError
from veneer.peft.lora_config import LoraConfig
from veneer.peft.targets import model_type
from veneer.peft.types import PeftType

#: kinds of weights that PEFT has LoRA on, by module
_LORA_KINDS = ("linear", "conv1d", "conv", "embedding")
_LORA_LAYERS = "Linear, Embedding, Conv1d, Conv2d, Conv3d, transformers' Conv1D and MultiheadAttention"
#: of these, some layers are read by kernels that never call them (peft/tuners/tuners_utils.py)
_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
_MAMBA_UNREAD = {"out_proj", "conv1d"}
#: where an embedding starts: A from N(0, 1), B zero (peft/tuners/lora/layer.py)
_EMBEDDING, _EMBEDDING_BOTH = (TorchInit(a="torch.nn.init.normal_", b=f"torch.nn.init.{b}_")
                               for b in ("zeros", "normal"))


class Targeted:
    """Methods for the targets of one config on one model. given: the values come from elsewhere, nothing starts."""

    def __init__(self, model: nn.Module, base: BaseMap, config: Any, given: bool) -> None:
        self.model, self.base, self.config, self.given = model, base, config, given
        self.names = frozenset(base.modules)
        self.kind = file_type({"peft_type": config.peft_type.value})
        self.options: dict[str, Any] = {**vars(config), "init_lora_weights": True}
        for key in ("rank_pattern", "alpha_pattern"):
            self.options[key] = self.options.get(key) or {}

    def module(self, name: str) -> dict[str, Method]:
        """Weight name → method for the module `name`. Raises `UnsupportedLayerError` where PEFT has none for it."""
        site = self.base.by_path.get(f"{name}.weight") or self.base.by_path.get(f"{name}.in_proj_weight")
        spot = None if site is None else next(spot for spot in site.spots if spot.module == name)
        self._check_mamba(name)
        if isinstance(self.kind, Family):
            return self._of_family(self.kind, name, site, spot)
        if site is None or spot is None or not self._is_lora_layer(name, spot):
            raise self._unsupported(name, "LoRA", _LORA_LAYERS)
        if spot.kind == "attention":
            return self._attention(name, site)
        if site.unusual:
            raise NotInVeneerError(f"target_modules hit {name!r}, a convolution with {', '.join(site.unusual)}; PEFT's "
                                   "LoRA on it is no change of its weight, and no file of PEFT's can hold Veneer's. "
                                   "Use exclude_modules, or veneer.attach, which adapts it in its own way")
        if spot.kind in ("embedding", "parameter") and self.config.lora_bias:
            raise VeneerError(f"lora_bias=True is not supported for embeddings, and target_modules hit {name!r}")
        first = site.spots[0] if len(site.spots) > 1 else spot  # one adapter for all places of a tied weight
        return {site.name: self._lora(first.module, first.kind)}

    def parameter(self, path: str) -> dict[str, Method]:
        """The same for a parameter by its full name."""
        config, site = self.config, self.base.by_path[path]
        for field in ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora"):
            if getattr(config, field):
                raise VeneerError(f"target_parameters ({path!r}) does not work with {field}={getattr(config, field)!r}:"
                                  " a parameter is adapted by its weight alone; leave it at its default")
        if len(site.layout.native) not in (2, 3):
            raise VeneerError(f"target_parameters: {path!r} has {len(site.layout.native)} dimensions, and only 2 and 3 "
                              "are supported")
        return {site.name: self._lora(path, "parameter")}

    # -- LoRA -------------------------------------------------------------------------------------------
    def _is_lora_layer(self, name: str, spot: Spot) -> bool:
        """An embedding with a forward of its own is a parameter to Veneer, and an embedding to PEFT."""
        if spot.kind == "parameter":
            return isinstance(self.model.get_submodule(name), (nn.Linear, nn.Embedding))
        return spot.kind in (*_LORA_KINDS, "attention")

    def _attention(self, name: str, site: Site) -> dict[str, Method]:
        out = self.base.by_path.get(f"{name}.out_proj.weight")
        if self.config.use_dora or self.config.lora_bias:
            raise VeneerError(f"target_modules hit {name!r}, an nn.MultiheadAttention, which has neither DoRA nor "
                              "lora_bias in PEFT; use exclude_modules, or set use_dora and lora_bias to False")
        both = [one for one in (site, out) if one is not None]
        return {one.name: self._lora(name, "attention") for one in both}

    def _lora(self, name: str, kind: str) -> Method:
        method = hf_lora_read.method_for(self.options, name, dora=False, bias=bool(self.config.lora_bias))
        assert isinstance(method, LoRA)
        if kind not in ("linear", "conv1d", "conv"):  # PEFT has no dropout on what it does not give an input
            method = dataclasses.replace(method, dropout=0.0)
        if not self.given:
            method = self._started(method, name, lookup=kind == "embedding" or self._is_embedding(name))
        return DoRA(method) if self.config.use_dora else method

    def _is_embedding(self, name: str) -> bool:
        return name in self.names and isinstance(self.model.get_submodule(name), nn.Embedding)

    def _started(self, method: LoRA, name: str, lookup: bool) -> LoRA:
        start = self.config.start
        if start == "False":
            return dataclasses.replace(method, init=_EMBEDDING_BOTH if lookup else KaimingBoth(), residual="none")
        if lookup:  # whatever is asked for, as in PEFT
            return dataclasses.replace(method, init=_EMBEDDING)
        return dataclasses.replace(method, init=init_of(self.config))

    # -- the family -------------------------------------------------------------------------------------
    def _of_family(self, kind: Family, name: str, site: Site | None, spot: Spot | None) -> dict[str, Method]:
        title, layers = kind.method.__name__, ", ".join(kind.layers)
        if site is None or spot is None or layer_of(site, spot) not in kind.layers:
            raise self._unsupported(name, title, layers)
        method = kind.method_for(self.options, name)
        if not self.given and not self._starts_at_zero():
            method = dataclasses.replace(method, init="random")  # type: ignore[call-arg]
        odd = ", ".join(text for text in site.unusual if text.partition("=")[0] not in kind.carried)
        reason = f"it is a convolution with {odd}, on which PEFT's {title} is another function" if odd else \
            kind.refusal(method, site, ())
        if reason is not None:
            raise VeneerError(f"target_modules hit {name!r}, and {reason}. Use exclude_modules or other "
                              "target_modules, or veneer.attach, which has no such limit")
        return {site.name: method}

    def _starts_at_zero(self) -> bool:
        """By init_weights, or AdaLoRA's init_lora_weights; VB-LoRA has neither and begins in one way."""
        field = "init_lora_weights" if self.config.peft_type == PeftType.ADALORA else "init_weights"
        return bool(getattr(self.config, field, True))

    # -- what cannot be ---------------------------------------------------------------------------------
    def _unsupported(self, name: str, title: str, layers: str) -> UnsupportedLayerError:
        module = self.model.get_submodule(name)
        kind = getattr(type(module), "veneer_base", type(module)).__name__
        unread = ("; an nn.MultiheadAttention reads its out_proj without calling it: target the attention module, "
                  "which covers both" if name.endswith("out_proj") and f"{name}.weight" in self.base.by_path else "")
        return UnsupportedLayerError(f"Target module {name!r} ({kind}) is not supported by {title}, which adapts "
                                     f"{layers}{unread}. Name layers of these kinds in target_modules, or take it out "
                                     "by exclude_modules")

    def _check_mamba(self, name: str) -> None:
        kind, last = model_type(self.model), name.rpartition(".")[2]
        if kind in _MAMBA and last in _MAMBA_UNREAD:
            raise VeneerError(f"Module {name!r} is incompatible with model_type {kind!r}: its kernels read "
                              f"{' and '.join(sorted(_MAMBA_UNREAD))} without calling them, so that an adapter there "
                              "would do nothing. Take it out of target_modules")


def init_of(config: LoraConfig) -> str | Init:
    """The start that `init_lora_weights` means for a matrix; "kaiming" for "eva", which gets its A later."""
    start = config.start
    if start == "loftq":
        found: Mapping[str, Any] = config.loftq_config  # type: ignore[assignment]
        return LoftQ(bits=found.get("loftq_bits", 4), iterations=found.get("loftq_iter", 1), packed=False)
    if start == "corda":
        return CorDA(mode=config.corda_config.corda_method if config.corda_config else "ipm")
    if start == "lora_ga":
        return _lora_ga(config)
    return "kaiming" if start in ("True", "eva") else start


def _lora_ga(config: LoraConfig) -> Init:
    found = config.lora_ga_config
    if found is None:
        raise VeneerError("init_lora_weights='lora_ga' needs `lora_ga_config`; give LoraGAConfig()")
    for field, value in (("direction", "ArB2r"), ("scale", "stable")):
        if getattr(found, field) != value:
            raise NotInVeneerError(f"LoraGAConfig: {field}={getattr(found, field)!r} is not in Veneer, which has the "
                                   f"paper's {value!r}")
    return LoRAGA(gamma=found.stable_gamma)
