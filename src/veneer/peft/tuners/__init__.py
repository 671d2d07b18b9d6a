"""PEFT's tuners of the LoRA family: configs, the modules that hold them, and views of layers."""

from __future__ import annotations

from typing import Any

from veneer.peft.config import config_class
from veneer.peft.tuner import BaseTuner
from veneer.peft.tuners.adalora.model import AdaLoraModel
from veneer.peft.tuners.loha.model import LoHaModel
from veneer.peft.tuners.lokr.model import LoKrModel
from veneer.peft.tuners.lora.model import LoraModel
from veneer.peft.tuners.randlora.model import RandLoraModel
from veneer.peft.tuners.vblora.model import VBLoRAModel
from veneer.peft.tuners.vera.model import VeraModel
from veneer.peft.types import PeftType

PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type[BaseTuner]] = {
    PeftType.LORA: LoraModel, PeftType.ADALORA: AdaLoraModel, PeftType.LOHA: LoHaModel, PeftType.LOKR: LoKrModel,
    PeftType.VERA: VeraModel, PeftType.VBLORA: VBLoRAModel, PeftType.RANDLORA: RandLoraModel}


def tuner_class(peft_type: Any) -> type[BaseTuner]:
    """The tuner of a method. Raises `NotInVeneerError` for PEFT's methods outside the LoRA family."""
    config_class(peft_type)
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType(peft_type)]
