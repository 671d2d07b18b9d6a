"""PEFT's tuners of the LoRA family: configs, the modules that hold them, and views of layers."""

from __future__ import annotations

from typing import Any

from veneer.peft.config import config_class
from veneer.peft.submodules import lazily
from veneer.peft.tuner import BaseTuner
from veneer.peft.tuners.adalora import AdaLoraConfig, AdaLoraModel
from veneer.peft.tuners.loha import LoHaConfig, LoHaModel
from veneer.peft.tuners.lokr import LoKrConfig, LoKrModel
from veneer.peft.tuners.lora import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraModel,
    LoraRuntimeConfig,
    convert_to_lora,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
    save_as_lora,
)
from veneer.peft.tuners.mixed import MixedModel
from veneer.peft.tuners.randlora import RandLoraConfig, RandLoraModel
from veneer.peft.tuners.vblora import VBLoRAConfig, VBLoRAModel
from veneer.peft.tuners.vera import VeraConfig, VeraModel
from veneer.peft.types import PeftType

__all__ = ["PEFT_TYPE_TO_TUNER_MAPPING", "AdaLoraConfig", "AdaLoraModel", "CordaConfig", "EvaConfig", "LoHaConfig",
           "LoHaModel", "LoKrConfig", "LoKrModel", "LoftQConfig", "LoraConfig", "LoraGAConfig", "LoraModel",
           "LoraRuntimeConfig", "MixedModel", "RandLoraConfig", "RandLoraModel", "VBLoRAConfig", "VBLoRAModel",
           "VeraConfig", "VeraModel", "convert_to_lora", "get_eva_state_dict", "initialize_lora_eva_weights",
           "preprocess_corda", "preprocess_loraga", "save_as_lora", "tuner_class"]

__getattr__ = lazily(__name__, "lycoris_utils", "tuners_utils")

PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type[BaseTuner]] = {
    PeftType.LORA: LoraModel, PeftType.ADALORA: AdaLoraModel, PeftType.LOHA: LoHaModel, PeftType.LOKR: LoKrModel,
    PeftType.VERA: VeraModel, PeftType.VBLORA: VBLoRAModel, PeftType.RANDLORA: RandLoraModel}


def tuner_class(peft_type: Any) -> type[BaseTuner]:
    """The tuner of a method. Raises `NotInVeneerError` for PEFT's methods outside the LoRA family."""
    config_class(peft_type)
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType(peft_type)]
