"""NVIDIA ModelOpt's PEFT mode, by its names, over Veneer's engine. See docs/coming-from-modelopt.md."""

from veneer.modelopt.config import ExportPEFTConfig, PEFTAttributeConfig, PEFTConfig
from veneer.modelopt.convert import update_model
from veneer.modelopt.files import export, restore, save
from veneer.modelopt.state import is_peft_model
from veneer.modelopt.switch import disable_adapters, enable_adapters, freeze_lora_weights, unfreeze_lora_weights
from veneer.modelopt.tensors import load_peft_state_dict, peft_state_dict

__all__ = [
    "ExportPEFTConfig", "PEFTAttributeConfig", "PEFTConfig", "disable_adapters", "enable_adapters", "export",
    "freeze_lora_weights", "is_peft_model", "load_peft_state_dict", "peft_state_dict", "restore", "save",
    "unfreeze_lora_weights", "update_model",
]
