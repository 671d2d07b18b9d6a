"""Names of files, and which modules are adapted by default; the names are PEFT's.

The tables are those that are looked into where a config has no targets: what is added to one counts.
"""

from __future__ import annotations

from veneer.peft.architectures import targets_by_architecture
from veneer.peft.config import CONFIG_NAME
from veneer.peft.targets import ALL_LINEAR as INCLUDE_LINEAR_LAYERS_SHORTHAND
from veneer.peft.types import SEQ_CLS_HEADS, PeftType

WEIGHTS_NAME = "adapter_model.bin"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = list(SEQ_CLS_HEADS)

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = targets_by_architecture(PeftType.LORA)
TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING = targets_by_architecture(PeftType.ADALORA)
TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING = targets_by_architecture(PeftType.LOHA)
TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING = targets_by_architecture(PeftType.LOKR)
TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING = targets_by_architecture(PeftType.VERA)
TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING = targets_by_architecture(PeftType.VBLORA)
TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING = targets_by_architecture(PeftType.RANDLORA)

__all__ = ["CONFIG_NAME", "EMBEDDING_LAYER_NAMES", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SAFETENSORS_WEIGHTS_NAME",
           "SEQ_CLS_HEAD_NAMES", "TOKENIZER_CONFIG_NAME", "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING",
           "TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING", "TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING",
           "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
           "TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING",
           "TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING", "TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING",
           "WEIGHTS_NAME"]
