"""Hot-swapping: another LoRA's values in the place of one that is there, in the very same parameters, so that a
compiled model is not compiled again."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from veneer.attached import adapter_names, attached, hosts
from veneer.convert import own_dtype
from veneer.hosts import Host
from veneer.io.load import fill_adapter
from veneer.io.reading import records_in
from veneer.io.records import Record
from veneer.io.store import Stored
from veneer.method import Adapter, Method, VeneerError, nearest
from veneer.methods import DoRA, LoRA
from veneer.methods.dora import DoRAAdapter
from veneer.methods.lora import LoRAAdapter
from veneer.peft import hub
from veneer.peft.config import PeftConfig, plain
from veneer.peft.lora_config import LoraConfig
from veneer.peft.saving import base_of, load_peft_weights, tuner_of
from veneer.peft.types import PeftType
from veneer.weights import Weight
from veneer.wrappers import unwrap

__all__ = ["CONFIG_KEYS_TO_CHECK", "check_hotswap_configs_compatible", "hotswap_adapter",
           "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap"]

#: fields in which two adapters must agree, beside what their tensors say
CONFIG_KEYS_TO_CHECK = {PeftType.LORA: ["use_rslora", "lora_dropout", "alpha_pattern", "use_dora"]}
_PREPARE = "prepare_model_for_compiled_hotswap(model, target_rank=…)"


# -- before compiling -----------------------------------------------------------------------------------------
def prepare_model_for_compiled_hotswap(model: nn.Module, *, target_rank: int | None = None,
                                       config: LoraConfig | Mapping[str, LoraConfig] | None = None,
                                       check_compiled: str = "error") -> None:
    """Give every LoRA of the model the rank `target_rank`, filled up with zeros, so that adapters of that rank or less
    can be swapped in later. Call it with the first adapter loaded and before compiling; parameters are new ones.

    An adapter that subtracts the pair it began at (PiSSA and the like) becomes the plain LoRA of twice the rank that
    its file would hold. Scales need no preparation: `hotswap_adapter` folds another one into B.
    config: one config or several by name, whose ranks are set to `target_rank`. check_compiled: what to do where the
    model is compiled already, "error", "warn" or "ignore".

    Raises `ValueError` for a compiled model, one without LoRA, and a rank that is larger than the target.
    """
    _check_compiled(model, check_compiled)
    base = base_of(unwrap(model))
    found = [(name, weight, adapter) for name in adapter_names(base) for weight, adapter in attached(base, name)
             if _pair(adapter) is not None]
    if not found:
        raise ValueError("No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` "
                         "after loading the first adapter and before loading the second adapter.")
    with torch.no_grad():
        made = [(name, weight, _padded(weight, adapter, target_rank)) for name, weight, adapter in found]
    for name, weight, new in made:
        for place in weight.places:
            cast(nn.ModuleDict, cast(Host, place.module).adapters[name])[place.param] = new
    if target_rank is None or config is None:
        return
    for each in config.values() if isinstance(config, Mapping) else [config]:
        each.r = target_rank
        each.rank_pattern = dict.fromkeys(each.rank_pattern or {}, target_rank)


def _check_compiled(model: nn.Module, how: str) -> None:
    if getattr(model, "_compiled_call_impl", None) is None and "_orig_mod" not in model._modules:
        return
    if how == "error":
        raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
    if how == "warn":
        warnings.warn("prepare_model_for_compiled_hotswap was called with a model that is already compiled, which will "
                      "be compiled anew. Call the function before compiling the model.", stacklevel=3)
    elif how != "ignore":
        raise ValueError(f"check_compiled should be one of 'error', 'warn', or 'ignore', got {how!r} instead")


def _pair(adapter: Adapter) -> LoRAAdapter | None:
    inner = adapter.inner if isinstance(adapter, DoRAAdapter) else adapter
    return inner if isinstance(inner, LoRAAdapter) else None


def _padded(weight: Weight, old: Adapter, rank: int | None) -> Adapter:
    """The adapter as a plain one of this rank; the same one where nothing is to be done."""
    pair = _pair(old)
    assert pair is not None
    assert old.method is not None
    if pair.start_A is None and rank in (None, pair.rank):
        return old
    method, tensors = old.method.plain(old.packed())
    lora = cast(LoRA, method.inner if isinstance(method, DoRA) else method)
    missing = (rank or lora.rank) - lora.rank
    if missing < 0:
        raise ValueError(f"Trying to pad the adapter of {weight.name!r} to the target rank {rank}, but its rank is "
                         f"larger ({lora.rank}). Give target_rank={lora.rank} or more")
    root = (lora.rank + missing) ** (0.5 if lora.rank_stabilized else 1)
    lora = dataclasses.replace(lora, rank=lora.rank + missing, alpha=lora.scale * root)
    method = DoRA(lora) if isinstance(method, DoRA) else lora
    with torch.device(weight.tensor.device):
        new = method.build(weight.layout.shape, own_dtype(old))
    new.unpack({key: _wider(key.rpartition(".")[2], tensor, missing) for key, tensor in tensors.items()})
    new.method, new.seed_key = method, old.seed_key
    for key, param in new.named_parameters():
        param.requires_grad_(old.get_parameter(key).requires_grad)
    return new.to(own_dtype(old)).train(old.training)


def _wider(part: str, tensor: Tensor, missing: int) -> Tensor:
    """A with rows of zeros behind it, B with columns."""
    if part == "A":
        return nn.functional.pad(tensor, (0, 0, 0, missing))
    return nn.functional.pad(tensor, (0, missing)) if part == "B" else tensor


# -- swapping -------------------------------------------------------------------------------------------------
def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Raise `ValueError` unless adapters of these two configs can take each other's place: both LoRA, and alike in
    `CONFIG_KEYS_TO_CHECK`."""
    if config0.peft_type != config1.peft_type:
        raise ValueError(f"Incompatible PEFT types found: {PeftType(config0.peft_type).value} and "
                         f"{PeftType(config1.peft_type).value}")
    if config0.peft_type not in CONFIG_KEYS_TO_CHECK:
        raise ValueError(f"Hotswapping only supports {', '.join(kind.value for kind in CONFIG_KEYS_TO_CHECK)} but "
                         f"{PeftType(config0.peft_type).value} was passed.")
    for key in CONFIG_KEYS_TO_CHECK[PeftType(config0.peft_type)]:
        first, second = getattr(config0, key), getattr(config1, key)
        if first != second:
            raise ValueError(f"Configs are incompatible: for {key}, {first} != {second}")


def hotswap_adapter(model: nn.Module, model_name_or_path: str | Path, adapter_name: str,
                    torch_device: str | None = None, **kwargs: Any) -> None:
    """Give the adapter `adapter_name` the values of another one, from a folder or the Hub, and keep everything else.

    The same parameters are written in place; see `hotswap_adapter_from_state_dict`. torch_device: without effect, an
    adapter lies where its weight does. kwargs: subfolder, and those of `huggingface_hub` for what is no local folder.
    Raises what `check_hotswap_configs_compatible` and `hotswap_adapter_from_state_dict` raise.
    """
    folder = hub.local_folder(model_name_or_path, **kwargs)
    config = PeftConfig.from_pretrained(folder)
    tuner = tuner_of(unwrap(model))
    if tuner is not None:
        if adapter_name not in tuner.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist; there are: {', '.join(tuner.peft_config)}")
        check_hotswap_configs_compatible(tuner.peft_config[adapter_name], config)
    hotswap_adapter_from_state_dict(model, load_peft_weights(str(folder)), adapter_name, config)


@torch.no_grad()
def hotswap_adapter_from_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str,
                                    config: LoraConfig, parameter_prefix: str = "lora_") -> None:
    """The same from a state dict, with the config it belongs to. Keys may have the adapter's name in them or not.

    A smaller rank than the adapter has is filled up with zeros, and layers that are not in the state dict change
    nothing afterwards. The scale stays what it is: another one in `config` is folded into B, as s'·B'·A' =
    s·(s'/s·B')·A'. parameter_prefix: without effect.

    Raises, with nothing changed: `ValueError` for an unknown or merged adapter and for a larger rank; `RuntimeError`
    for layers that the adapter is not on, and for DoRA in the place of LoRA or the other way round.
    """
    base = base_of(unwrap(model))
    there = {weight.name: (weight, adapter) for weight, adapter in attached(base, adapter_name)}
    _check_there(base, adapter_name)
    tensors = {_key(key, adapter_name): tensor for key, tensor in state_dict.items()}
    stored = Stored(Path("(a state dict)/tensors"), tensors, config=plain(config.to_dict()))
    reading = records_in(base, stored)
    problems = [text for text in reading.problems if not text.startswith("missing")]
    problems += [f"{record.name!r} is in the new adapter and not in {adapter_name!r}" for record in reading.records
                 if record.name not in there]
    if problems or not reading.records:
        raise RuntimeError("Hot swapping the adapter did not succeed, unexpected keys found: "
                           + ("; ".join(problems[:5]) or "none of them is an adapter's"))
    new = {record.name: record for record in reading.records}
    for name, (weight, adapter) in there.items():
        _check_swap(weight, adapter, new.get(name))
    for name, (weight, adapter) in there.items():
        _swap(weight, adapter, new.get(name))


def _check_there(base: nn.Module, name: str) -> None:
    present = adapter_names(base)
    if name not in present:
        raise ValueError(f"Adapter {name} does not exist{nearest(name, present) or '.'} There are: "
                         f"{', '.join(present) or 'none'}")
    if any(name in host.veneer.merged for _, host in hosts(base)):
        raise ValueError(f"Cannot hot-swap adapter '{name}' because it is currently merged into the base weights. "
                         "Please unmerge the adapter first by calling `peft_model.unmerge_adapter()`")


def _key(key: str, name: str) -> str:
    """A key as files have it: without the adapter's name."""
    key = re.sub(rf"\.(lora_\w+)\.{re.escape(name)}(?=\.|$)", r".\1", key)
    return key.removesuffix(".weight") if key.endswith("lora_magnitude_vector.weight") else key


def _lora(method: Method | None) -> LoRA | None:
    inner = method.inner if isinstance(method, DoRA) else method
    return inner if isinstance(inner, LoRA) else None


def _check_swap(weight: Weight, adapter: Adapter, record: Record | None) -> None:
    pair, title = _pair(adapter), repr(weight.name)
    if pair is None:
        if record is None or type(record.method) is not type(adapter.method):
            raise RuntimeError(f"Hot swapping the adapter did not succeed: {title} has {adapter.method}, and the new "
                               "adapter has no such thing")
        return
    if pair.start_A is not None:
        raise VeneerError(f"{title} subtracts the pair that its LoRA began at, which no other LoRA's values can take "
                          f"the place of; call {_PREPARE} first, which makes it a plain one of rank {2 * pair.rank}")
    if pair.scale == 0:
        raise VeneerError(f"{title} has a scale of 0, into which no other can be folded")
    new = None if record is None else _lora(record.method)
    if record is None:
        return
    if new is None or isinstance(record.method, DoRA) != isinstance(adapter, DoRAAdapter):
        raise RuntimeError(f"Hot swapping the adapter did not succeed: {title} is {adapter.method} and would become "
                           f"{record.method}")
    if new.rank > pair.rank:
        raise ValueError(f"Incompatible shapes found for LoRA weights {title}: rank {pair.rank} vs {new.rank}. Please "
                         f"ensure that all ranks are padded to the largest rank among all LoRA adapters by using "
                         f"{_PREPARE.replace('…', str(new.rank))} after the first is loaded")
    if new.bias and pair.bias is None:
        raise RuntimeError(f"Hot swapping the adapter did not succeed: the new one has a bias (lora_bias) on {title}")


def _swap(weight: Weight, adapter: Adapter, record: Record | None) -> None:
    pair = _pair(adapter)
    if pair is None:
        assert record is not None
        fill_adapter(adapter, record)
        return
    for param in pair.parameters():
        param.zero_()
    if record is not None:
        new = cast(LoRA, _lora(record.method))
        found = {key.removeprefix("inner."): tensor for key, tensor in record.tensors.items()}
        pair.A[..., :new.rank, :].copy_(found["A"])
        pair.B[..., :new.rank].copy_(found["B"].to(torch.promote_types(pair.B.dtype, torch.float32))
                                     * (new.scale / pair.scale))
        if pair.bias is not None and "bias" in found:
            pair.bias.copy_(found["bias"])
    if isinstance(adapter, DoRAAdapter):
        if record is not None:
            adapter.magnitude.copy_(record.tensors["magnitude"])
        else:
            place = weight.places[0]
            adapter.start(cast(Host, place.module).base_matrix(place.param))
