"""Hugging Face PEFT's LoRA family over Veneer's engine: `from veneer.peft import …` where it said `from peft import …`."""

from veneer.peft.config import PeftConfig
from veneer.peft.family_configs import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from veneer.peft.lora_config import CordaConfig, EvaConfig, LoftQConfig, LoraConfig, LoraRuntimeConfig
from veneer.peft.mapping import get_peft_config, get_peft_model, inject_adapter_in_model
from veneer.peft.mixed_model import PeftMixedModel
from veneer.peft.model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from veneer.peft.saving import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from veneer.peft.types import PeftType, TaskType
