"""Adapters as state dicts and files: PEFT's functions over the engine's save and load."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys as LoadResult

from veneer.attached import attached, hosts
from veneer.hosts import Host
from veneer.io.dialects import hf
from veneer.io.dialects.hf_base import PREFIX
from veneer.io.dialects.hf_names import is_target
from veneer.io.dialects.hf_types import file_type
from veneer.io.records import BaseMap, Record, base_map, base_weights, records_of
from veneer.io.save import Dress
from veneer.io.tensors import read_tensors
from veneer.method import VeneerError, nearest
from veneer.peft.config import PeftConfig, plain
from veneer.peft.hub import local_folder
from veneer.peft.shown import parts
from veneer.peft.tuner import BaseTuner
from veneer.wrappers import unwrap

#: keys of a config that say which weights are adapted, and those that say nothing of what a file computes
_WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")
_WORDS = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "modules_to_save",
          "trainable_token_indices")
#: settings of starts, and what they are where a start has none
_STARTS: dict[str, Any] = {"loftq_config": {}, "eva_config": None, "corda_config": None, "lora_ga_config": None}
_ROUNDED = "would be rounded"


def base_of(model: nn.Module) -> nn.Module:
    """The model that adapters lie on, out of a `PeftModel` or a tuner."""
    tuner = tuner_of(model)
    return unwrap(model) if tuner is None else tuner.model


def tuner_of(model: nn.Module) -> BaseTuner | None:
    """The tuner of a `PeftModel`, compiled or not; None for a model without one."""
    model = unwrap(model)
    if isinstance(model, BaseTuner):
        return model
    inner = model._modules.get("base_model")
    return inner if isinstance(inner, BaseTuner) else None


def get_peft_model_state_dict(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None,
                              adapter_name: str = "default", unwrap_compiled: bool = False,
                              save_embedding_layers: str | bool = "auto") -> dict[str, Tensor]:
    """The tensors of an adapter by PEFT's keys, without the adapter's name, as its files have them.

    An adapter that began at BA ≠ 0 (PiSSA, OLoRA, …) is given as the plain LoRA of twice the rank that it is.
    state_dict: take the values from there, by the keys of `model.state_dict()`. save_embedding_layers: True adds the
    base's embeddings; "auto" and False do not, as no byte of the base belongs in an adapter's file.
    Raises `ValueError` for an unknown adapter, and for one that PEFT's files cannot hold.
    """
    base = base_of(model)
    found = _encoded(base, adapter_name, values_by_part(model, state_dict, adapter_name))[1]
    if save_embedding_layers is True:
        found |= _embeddings(base)
    if tuner_of(model) is None:  # injected: the model's own names
        found = {key.removeprefix(PREFIX): tensor for key, tensor in found.items()}
    return found


def _encoded(base: nn.Module, name: str, values: Mapping[str, Mapping[str, Tensor]]) -> tuple[
        dict[str, Any], dict[str, Tensor], list[str]]:
    records = records_of(base, name)
    if not records:
        raise ValueError(f"no adapter {name!r} on this model")
    plain = []
    for record in records:
        tensors = {**record.tensors, **values.get(record.name, {})}
        method, tensors = record.method.plain(tensors)  # type: ignore[assignment]
        plain.append(Record(record.name, method, dict(tensors)))
    try:
        return hf.encode(plain, base_map(base, base_weights(base)))
    except hf.Inexpressible as no:
        raise VeneerError(f"PEFT's files cannot hold the adapter {name!r}: {no}") from None


def warn_unsavable(base: nn.Module, name: str) -> None:
    """Warn as an adapter is made, and not only as it is saved, of what PEFT's files cannot hold."""
    try:
        _encoded(base, name, {})
    except VeneerError as no:
        warnings.warn(f"{no}. It can be trained; save it with veneer.save(model.get_base_model(), path, {name!r}), and "
                      "load it with veneer.load", stacklevel=4)


def values_by_part(model: nn.Module, state_dict: Mapping[str, Tensor] | None,
                   name: str) -> dict[str, dict[str, Tensor]]:
    """Weight → part of its adapter → tensor, out of a state dict of the whole model. Raises `ValueError` where that
    lacks some."""
    if state_dict is None:
        return {}
    base, missing = base_of(model), []
    prefix = "" if tuner_of(model) is None else PREFIX
    found: dict[str, dict[str, Tensor]] = {}
    for weight, part, key in _keys(base, name, prefix):
        if key in state_dict:
            found.setdefault(weight, {})[part] = state_dict[key]
        else:
            missing.append(key)
    if missing:
        raise ValueError(f"the state dict given lacks {missing[0]!r}{nearest(missing[0], state_dict)} and "
                         f"{len(missing) - 1} others of adapter {name!r}; give that of the whole model, or none")
    return found


def _keys(base: nn.Module, name: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    """(weight, part of its adapter, key in the state dict) of everything that is trained in an adapter."""
    names = {id(adapter): weight.name for weight, adapter in attached(base, name)}
    for path, host in hosts(base):
        for part in parts(host):
            _, owner, param, inside = part.path.split(".", 3)
            adapter = cast(nn.ModuleDict, host.adapters[owner])[param]
            if owner == name and id(adapter) in names:
                yield names[id(adapter)], inside, ".".join(filter(None, (prefix.rstrip("."), path, part.shown)))


def _embeddings(base: nn.Module) -> dict[str, Tensor]:
    found = {}
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(base, ask)() if callable(getattr(base, ask, None)) else None
        path = next((name for name, module in base.named_modules() if module is layer), None)
        if layer is not None and path is not None:
            adapted = isinstance(layer, Host)
            found[f"base_model.model.{path}{'.base_layer' if adapted else ''}.weight"] = layer.weight.detach()
    return found


def set_peft_model_state_dict(model: nn.Module, peft_model_state_dict: Mapping[str, Tensor],
                              adapter_name: str = "default", ignore_mismatched_sizes: bool = False,
                              low_cpu_mem_usage: bool = False) -> LoadResult:
    """Give the adapter the values that `get_peft_model_state_dict`, or PEFT's, gave. What is missing keeps its value.

    What is missing and what nothing wants is listed in the answer. Raises `VeneerError` for tensors of another shape
    unless `ignore_mismatched_sizes`; nothing is changed then. low_cpu_mem_usage: without effect, nothing is made twice.
    """
    base = base_of(model)
    config, own, _ = _encoded(base, adapter_name, {})
    given = {key if key in own or PREFIX + key not in own else PREFIX + key: tensor
             for key, tensor in peft_model_state_dict.items()}
    wrong = [key for key, tensor in given.items() if key in own and tensor.shape != own[key].shape]
    if wrong and not ignore_mismatched_sizes:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise VeneerError(f"set_peft_model_state_dict: wrong shape: {wrong[0]!r} is {tuple(given[wrong[0]].shape)} and "
                          f"must be {tuple(own[wrong[0]].shape)}{more}; nothing was loaded. "
                          "ignore_mismatched_sizes=True loads the others")
    good = {key: tensor for key, tensor in given.items() if key not in wrong}
    tuner = tuner_of(model) or BaseTuner(base, {}, adapter_name, empty=True)
    report = tuner.load_values(adapter_name, config, {**own, **good})
    for text in report.problems:
        if not text.startswith(("missing", "unexpected")):
            warnings.warn(text.replace(_ROUNDED, "was rounded"), stacklevel=2)
    known = {*file_type(config).repeated, *(name for name, _ in base.named_parameters(remove_duplicate=False))}
    return LoadResult([key for key in own if key not in given],
                      [key for key in given if key not in own and not {key.rpartition(".")[2], _of_base(key)} & known])


def _of_base(key: str) -> str:
    """A key of PEFT's as the name of a base parameter, of which its files may have some (embeddings)."""
    return re.sub(r"\.(base_layer|original_module)(?=\.)", "", key.removeprefix(PREFIX))


def dressed(config: PeftConfig) -> Dress:
    """How `veneer.save` is to word the config: as the user gave it, but for what has become of ranks and targets."""

    def dress(found: dict[str, Any], records: list[Record], base: BaseMap) -> tuple[dict[str, Any], dict[str, str]]:
        mine = plain({**config.to_dict(), "inference_mode": True})
        del mine["peft_version"]
        kept = {key: mine[key] for key in _WORDS if mine.get(key) is not None}
        if found["peft_type"] != mine["peft_type"]:  # made another method of since (veneer.to_lora)
            return {**found, **kept}, {}
        kept |= {"task_type": mine["task_type"]}  # None too: the model is to come back as the class that it is
        if _targets(mine, base) == _targets(found, base):
            kept |= {key: mine[key] for key in _WHERE if key in mine}
        else:
            kept |= {key: None for key in _WHERE if key in mine and key not in found}
        began = {key: empty for key, empty in _STARTS.items() if key in mine}  # what is saved is plain LoRA
        return {**mine, **found, **kept, **began}, {}

    return dress


def _targets(config: Mapping[str, Any], base: BaseMap) -> set[str]:
    return {module for module in base.modules if is_target(config, module)}


def load_peft_weights(model_id: str, device: str | None = None, key_mapping: dict[str, str] | None = None,
                      **hf_hub_download_kwargs: Any) -> dict[str, Tensor]:
    """The tensors of an adapter's file, as they are. A pickle file is read as tensors alone."""
    folder = local_folder(model_id, **hf_hub_download_kwargs)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ValueError(f"no adapter_model.safetensors in {folder}; a .bin file is read by "
                         "PeftModel.from_pretrained(…, allow_pickle=True) alone")
    tensors, _ = read_tensors(folder / "adapter_model.safetensors")
    for pattern, new in (key_mapping or {}).items():
        tensors = {re.sub(pattern, new, key): tensor for key, tensor in tensors.items()}
    return {key: tensor.to(device or "cpu") for key, tensor in tensors.items()}

