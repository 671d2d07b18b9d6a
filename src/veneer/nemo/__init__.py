"""NVIDIA NeMo AutoModel's LoRA, by its names, over Veneer's engine. See docs/coming-from-nemo.md."""

from veneer.nemo.apply import apply_lora_to_linear_modules
from veneer.nemo.config import PeftConfig
from veneer.nemo.files import load_adapter, read_config, save_adapter
from veneer.nemo.linear import LinearLoRA, LoRATritonFunction, TritonLinearLoRA, patch_linear_module
from veneer.nemo.match import ModuleMatcher, wildcard_match

__all__ = [
    "LinearLoRA", "LoRATritonFunction", "ModuleMatcher", "PeftConfig", "TritonLinearLoRA",
    "apply_lora_to_linear_modules", "load_adapter", "patch_linear_module", "read_config", "save_adapter",
    "wildcard_match",
]
