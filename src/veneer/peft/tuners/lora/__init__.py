"""LoRA and what is said in its terms: configs, tuner, layers, starts from data, conversion."""

from veneer.peft.layers.lora import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    Linear4bit,
    Linear8bitLt,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)
from veneer.peft.lora_config import CordaConfig, EvaConfig, LoftQConfig, LoraConfig, LoraGAConfig, LoraRuntimeConfig
from veneer.peft.submodules import lazily
from veneer.peft.tuners.lora.conversion import convert_to_lora, save_as_lora
from veneer.peft.tuners.lora.corda import preprocess_corda
from veneer.peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from veneer.peft.tuners.lora.loraga import preprocess_loraga
from veneer.peft.tuners.lora.model import LoraModel

__all__ = ["Conv1d", "Conv2d", "Conv3d", "CordaConfig", "Embedding", "EvaConfig", "Linear", "Linear4bit",
           "Linear8bitLt", "LoftQConfig", "LoraConfig", "LoraGAConfig", "LoraLayer", "LoraModel", "LoraRuntimeConfig",
           "MultiheadAttention", "ParamWrapper", "convert_to_lora", "get_eva_state_dict",
           "initialize_lora_eva_weights", "preprocess_corda", "preprocess_loraga", "save_as_lora"]

__getattr__ = lazily(__name__, "bnb", "config", "dora", "layer")
