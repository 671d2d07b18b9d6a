"""EVA (Paischer et al. 2024, arXiv:2410.07170) under PEFT's names, over `veneer.calibrate` and `veneer.eva`."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.attached import attached
from veneer.calibrate import calibrate
from veneer.convert import own_dtype
from veneer.eva import first_factors, replaced
from veneer.inits import EVA
from veneer.method import Adapter, Method, VeneerError, nearest
from veneer.methods import DoRA, LoRA
from veneer.methods.dora import DoRAAdapter
from veneer.peft.errors import NotInVeneerError
from veneer.peft.layers.faces import show_faces
from veneer.peft.lora_config import EvaConfig, LoraConfig
from veneer.peft.saving import base_of, tuner_of
from veneer.peft.tuners.lora.from_data import rules_from_config, rules_with
from veneer.plan import resolve
from veneer.weights import Weight, scan
from veneer.wrappers import unwrap

__all__ = ["forward_fn_dict", "get_eva_state_dict", "initialize_lora_eva_weights",
           "prepare_layer_inputs_fn_language_modeling", "prepare_model_inputs_fn_language_modeling"]


# -- what says which rows count -------------------------------------------------------------------------------
def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """model(**inputs)"""
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """Indices (n, 2) of the positions of a batch that count: no padding and, with `use_label_mask`, a label that is
    not `label_mask_value`. Raises `TypeError` for a batch that is no dict."""
    return _language_mask(model_input, peft_config).nonzero()


def _language_mask(batch: Any, config: LoraConfig) -> Tensor:
    if not isinstance(batch, Mapping):
        raise TypeError("When using `prepare_model_inputs_fn_language_modeling` inputs must be a dictionary, got "
                        f"{type(batch).__name__}; prepare_layer_inputs_fn=None counts every position of other inputs")
    if "attention_mask" not in batch and "input_ids" not in batch:
        raise VeneerError(f"the batch has neither attention_mask nor input_ids but {', '.join(batch)}; give "
                          "prepare_layer_inputs_fn=None, so that every position counts")
    mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(batch["input_ids"]).bool()
    eva = config.eva_config or EvaConfig()
    if eva.use_label_mask and "labels" in batch:
        mask = mask & (batch["labels"] != eva.label_mask_value)
    return mask


def prepare_layer_inputs_fn_language_modeling(layer_input: Any, model_input: Tensor, layer_name: str) -> Tensor:
    """The rows (n, in) of a layer's input at the indices of `prepare_model_inputs_fn_language_modeling`."""
    found = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    if not isinstance(found, Tensor):
        raise TypeError(f"unsupported input type {type(layer_input)} for prepare_layer_inputs_fn in layer {layer_name}")
    return found[model_input.T.unbind()]


def _masking(config: LoraConfig, of_model: Callable | None, of_layer: Any) -> Callable[[Any], Tensor | None]:
    """The engine's mask for PEFT's two functions. Raises `NotInVeneerError` for a layer function of the user's own."""
    if of_layer is None or (of_layer is prepare_layer_inputs_fn_language_modeling and of_model is None):
        return lambda batch: None
    if of_layer is not prepare_layer_inputs_fn_language_modeling:
        raise NotInVeneerError("prepare_layer_inputs_fn: Veneer takes a layer's inputs as they are and leaves rows out "
                               "by a mask; give prepare_layer_inputs_fn=None for all rows, or a "
                               "prepare_model_inputs_fn that returns a boolean mask (batch, length)")
    if of_model is prepare_model_inputs_fn_language_modeling:
        return lambda batch: _language_mask(batch, config)
    assert of_model is not None
    return lambda batch: _mask_of(of_model(batch, config), batch)


def _mask_of(found: Any, batch: Any) -> Tensor:
    """A mask as it is, or indices (n, dimensions) as a mask of the batch's leading tensor's shape."""
    if isinstance(found, Tensor) and found.dtype == torch.bool:
        return found
    first = next((value for value in (batch.values() if isinstance(batch, Mapping) else batch)
                  if isinstance(value, Tensor)), None)
    if not isinstance(found, Tensor) or found.is_floating_point() or found.dim() != 2 or first is None:
        raise VeneerError("prepare_model_inputs_fn must return a boolean mask (batch, length), or indices of the "
                          f"positions that count (n, 2), got {found!r}")
    mask = torch.zeros(first.shape[:found.shape[1]], dtype=torch.bool, device=found.device)
    mask[found.T.unbind()] = True
    return mask


# -- collecting -----------------------------------------------------------------------------------------------
def get_eva_state_dict(model: nn.Module, dataloader: Iterable[Any], peft_config: LoraConfig | None = None,
                       forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
                       prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
                       prepare_layer_inputs_fn: Callable | Mapping[str, Callable] | None =
                       prepare_layer_inputs_fn_language_modeling, adapter_name: str = "default",
                       gather_distributed_inputs: bool = True, show_progress_bar: bool = True) -> dict[str, Tensor]:
    """The A (r, in) that EVA gives each adapted layer, by the layer's name in `model`; r differs between layers and is
    0 for one that gets no rank. One pass over the data, which ends early when every component that is used has settled.

    model: a `PeftModel`, or a bare model with a `peft_config`. forward_fn: (model, batch) → anything.
    prepare_model_inputs_fn: (batch, config) → a boolean mask (batch, length) of the positions that count, or their
    indices. prepare_layer_inputs_fn: the default, or None where every position counts. gather_distributed_inputs:
    merge what the processes of a distributed run have found.

    Ranks are dealt out among layers of the same rank; those with a rank_pattern of their own are a group of their own.
    Raises `ValueError` for no config, no data, data without a usable position, and `NotInVeneerError` for another
    prepare_layer_inputs_fn.
    """
    base, tuner = base_of(unwrap(model)), tuner_of(unwrap(model))
    config: Any = peft_config
    if config is None:
        if tuner is None:
            raise ValueError("peft_config is required if model is not a PeftModel")
        config = tuner.peft_config[adapter_name]
    start = _start(config)
    if tuner is not None and adapter_name in tuner.peft_config:
        methods = {weight.places[0].names[-1]: adapter.method for weight, adapter in attached(base, adapter_name)
                   if adapter.method is not None}
        rules = rules_with(base, methods, start)
    else:
        rules = rules_from_config(base, config, start)
    made = resolve(base, scan(base), rules)
    statistics = calibrate(base, dataloader, made, forward=lambda _, batch: forward_fn(model, batch),
                           mask=_masking(config, prepare_model_inputs_fn, prepare_layer_inputs_fn),
                           progress=show_progress_bar)
    if gather_distributed_inputs:
        statistics = statistics.gathered()
    factors = first_factors(made, statistics)
    prefix = "" if tuner is None else "base_model.model."
    return {prefix + _module(entry.weight): _on_device(factors.get(entry.name), entry.weight) for entry in made.entries}


def _start(config: LoraConfig) -> EVA:
    found = config.eva_config or EvaConfig()
    return EVA(rho=found.rho, tau=found.tau, whiten=found.whiten, adjust_scaling=found.adjust_scaling_factors)


def _module(weight: Weight) -> str:
    return weight.places[0].module_name


def _on_device(A: Tensor | None, weight: Weight) -> Tensor:
    return (torch.empty(0, weight.layout.shape.in_) if A is None else A).to(weight.tensor.device)


# -- starting -------------------------------------------------------------------------------------------------
def initialize_lora_eva_weights(model: nn.Module, dataloader: Iterable[Any] | None = None,
                                eva_state_dict: Mapping[str, Tensor] | None = None,
                                forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
                                prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
                                prepare_layer_inputs_fn: Callable | Mapping[str, Callable] | None =
                                prepare_layer_inputs_fn_language_modeling, adapter_name: str = "default",
                                gather_distributed_inputs: bool = True, show_progress_bar: bool = True) -> None:
    """Start an adapter with init_lora_weights="eva" anew: A from `eva_state_dict`, or from what `get_eva_state_dict`
    finds in the dataloader, B zero. A layer that gets no rank loses its adapter. The adapter's parameters are new ones,
    so call this before the optimizer is made; its config has the new ranks.

    Raises `ValueError` for a model that is no `PeftModel`, several active adapters, another start, neither data nor
    state dict, and a state dict of other layers; the adapter is then what it was.
    """
    tuner = tuner_of(unwrap(model))
    if tuner is None:
        raise ValueError("model must be a PeftModel")
    if len(tuner.active_adapters) > 1:
        raise ValueError("`initialize_lora_eva_weights` currently only works with a single active adapter")
    config: Any = tuner.peft_config[adapter_name]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ValueError("`initialize_lora_eva_weights` can only be used with `init_lora_weights='eva'`")
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError("dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar)
    found = {name.removeprefix("base_model.model."): A for name, A in eva_state_dict.items()}
    _put(tuner.model, config, adapter_name, found)


def _put(base: nn.Module, config: LoraConfig, name: str, found: Mapping[str, Tensor]) -> None:
    """Attach the adapter again with the ranks that it gets now, and give it its A."""
    before = attached(base, name)
    missing = _check(before, found)
    keep_scale = (config.eva_config or EvaConfig()).adjust_scaling_factors
    methods = {weight.name: _of_rank(adapter.method, found.get(_module(weight)), keep_scale)
               for weight, adapter in before}
    rules: dict[Any, Method | None] = {}
    for weight in scan(base):
        full = weight.places[0].names[-1]
        if methods.get(weight.name) is not None or full.endswith(".bias"):
            rules[full] = methods.get(weight.name)
    replaced(base, resolve(base, scan(base), rules), name, int(torch.randint(2**62, (), device="cpu")), None)
    old = {weight.name: adapter for weight, adapter in before}
    for weight, adapter in attached(base, name):
        _give(adapter, old[weight.name], found.get(_module(weight)))
    show_faces(base)
    _note(config, attached(base, name))
    if missing:
        warnings.warn("the following layers were initialized with init_lora_weights=True because they were not found "
                      f"in the eva state_dict: {missing}. EVA needs layers whose inputs are seen, so no embeddings",
                      stacklevel=3)


def _check(before: Iterable[tuple[Weight, Adapter]], found: Mapping[str, Tensor]) -> list[str]:
    """The LoRA layers that are not in `found`. Raises `VeneerError` for what does not fit one."""
    layers = {_module(weight): weight for weight, adapter in before if _lora(adapter.method) is not None}
    for module, A in found.items():
        if module not in layers:
            raise VeneerError(f"eva_state_dict: there is no LoRA on {module!r}{nearest(module, layers) or '.'} The "
                              f"adapter has {len(layers)} layers")
        if A.dim() != 2 or A.shape[1] != layers[module].layout.shape.in_:
            raise VeneerError(f"eva_state_dict: {module!r} needs an A of shape (rank, "
                              f"{layers[module].layout.shape.in_}), got {tuple(A.shape)}")
    return [module for module in layers if module not in found]


def _lora(method: Method | None) -> LoRA | None:
    inner = method.inner if isinstance(method, DoRA) else method
    return inner if isinstance(inner, LoRA) else None


def _of_rank(method: Method | None, A: Tensor | None, keep_scale: bool) -> Method | None:
    """The method with the rank of A; None for rank 0; itself where there is no A."""
    lora = _lora(method)
    if lora is None or A is None:
        return method
    rank, alpha = len(A), lora.rank if lora.alpha is None else lora.alpha
    if rank == 0:
        return None
    if rank != lora.rank and keep_scale:
        alpha = lora.scale * (math.sqrt(rank) if lora.rank_stabilized else rank)
    new = dataclasses.replace(lora, rank=rank, alpha=alpha)
    return DoRA(new) if isinstance(method, DoRA) else new


@torch.no_grad()
def _give(adapter: Adapter, old: Adapter, A: Tensor | None) -> None:
    """A pair begins by A, or as any other; what is no pair keeps what it had. dtype and freezing are the old ones."""
    if _lora(old.method) is None:
        adapter.unpack(old.packed())
    elif A is not None:
        pair: Any = adapter.inner if isinstance(adapter, DoRAAdapter) else adapter
        pair.A.copy_(A)
    adapter.to(own_dtype(old))
    adapter.requires_grad_(any(param.requires_grad for param in old.parameters()))


def _note(config: LoraConfig, now: Iterable[tuple[Weight, Adapter]]) -> None:
    """Write into the config which layers are left, with which ranks and alphas."""
    loras = {_module(weight): lora for weight, adapter in now if (lora := _lora(adapter.method)) is not None}
    alphas = {module: lora.rank if lora.alpha is None else lora.alpha for module, lora in loras.items()}
    config.target_modules = set(loras)  # type: ignore[assignment]
    config.rank_pattern = {module: lora.rank for module, lora in loras.items() if lora.rank != config.r}
    config.alpha_pattern = {module: alpha for module, alpha in alphas.items() if alpha != config.lora_alpha}
