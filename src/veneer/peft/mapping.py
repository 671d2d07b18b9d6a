"""`get_peft_model` and `inject_adapter_in_model`, and which class is for which method and task."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from veneer.hosts import Host
from veneer.method import VeneerError
from veneer.peft.config import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, config_class
from veneer.peft.mixed_model import PeftMixedModel
from veneer.peft.model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel, model_class
from veneer.peft.tuners import PEFT_TYPE_TO_TUNER_MAPPING, tuner_class
from veneer.peft.tuners.mixed import COMPATIBLE_TUNER_TYPES
from veneer.weights import base_modules

#: of the methods whose adapters may lie side by side (`mixed=True`)
PEFT_TYPE_TO_MIXED_MODEL_MAPPING = {kind: PEFT_TYPE_TO_TUNER_MAPPING[kind] for kind in COMPATIBLE_TUNER_TYPES}
PEFT_TYPE_TO_PREFIX_MAPPING = {kind: tuner.prefix for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}

__all__ = ["MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
           "PEFT_TYPE_TO_PREFIX_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "get_peft_config", "get_peft_model",
           "inject_adapter_in_model", "model_class"]


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The config that a dict with its `peft_type` describes."""
    if "peft_type" not in config_dict:
        raise VeneerError("get_peft_config: the dict has no peft_type, such as 'LORA'")
    return config_class(config_dict["peft_type"])(**config_dict)


def get_peft_model(model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", mixed: bool = False,
                   autocast_adapter_dtype: bool = True, revision: str | None = None,
                   low_cpu_mem_usage: bool = False) -> PeftModel | PeftMixedModel:
    """Lay an adapter over the model, in place, and return a `PeftModel` of the class for the config's task.

    mixed: adapters of several methods may be added. autocast_adapter_dtype: adapters over a 16-bit base are fp32.
    revision: of the base model, to be written into the config. low_cpu_mem_usage: without effect, nothing is made
    twice. A `PeftModel` stands for its base model; an adapter of the same name makes place for the new one, and others
    stay, but are not active. Raises `ValueError` where the config does not fit the model, which is then as it was.
    """
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config must be a config of veneer.peft, such as LoraConfig; got a "
                        f"{type(peft_config).__module__}.{type(peft_config).__name__}")
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    _note_base(model, peft_config, revision)
    if any(isinstance(module, Host) for _, module in base_modules(model)):
        warnings.warn("You are trying to modify a model with PEFT for a second time. If you want to reload the model "
                      "with a different config, make sure to call `.unload()` before.", stacklevel=2)
    if mixed:
        return PeftMixedModel(model, peft_config, adapter_name=adapter_name)
    kind = PeftModel if peft_config.task_type is None else model_class(peft_config.task_type)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def _note_base(model: nn.Module, config: PeftConfig, revision: str | None) -> None:
    """Write which base model it is into the config."""
    old, new = config.base_model_name_or_path, model.__dict__.get("name_or_path") or None
    config.base_model_name_or_path = new
    if old is not None and old != new:
        warnings.warn(f"The PEFT config's `base_model_name_or_path` was renamed from '{old}' to '{new}'. Please ensure "
                      "that the correct base model is loaded when loading this checkpoint.", stacklevel=3)
    if revision is not None:
        if config.revision is not None and config.revision != revision:
            warnings.warn(f"peft config has already set base model revision to {config.revision}, overwriting with "
                          f"revision {revision}", stacklevel=3)
        config.revision = revision


def inject_adapter_in_model(peft_config: PeftConfig, model: nn.Module, adapter_name: str = "default",
                            low_cpu_mem_usage: bool = False,
                            state_dict: dict[str, Tensor] | None = None) -> nn.Module:
    """Lay an adapter over the model, in place, and return the model itself.

    state_dict: adapt what has keys in it, instead of the config's targets; its values are not used.
    Raises `ValueError` for methods whose weights share trained or frozen state, as PEFT does.
    """
    kind = tuner_class(peft_config.peft_type)
    if kind.uses_shared_state:
        raise ValueError(f"`inject_adapter_in_model` does not support {peft_config.peft_type} because it uses shared "
                         "state stored on the tuner. Please use `get_peft_model` instead.")
    tuner = kind(model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage, state_dict)
    tuner._cast_adapter_dtype(adapter_name)
    known = vars(model).get("peft_config")
    model.peft_config = {**(known if isinstance(known, dict) else {}), **tuner.peft_config}  # type: ignore[assignment]
    return tuner.model
