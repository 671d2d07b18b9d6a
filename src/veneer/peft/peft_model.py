"""PEFT's models, at PEFT's place."""

from __future__ import annotations

from veneer.peft.config import PeftConfig
from veneer.peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from veneer.peft.model import PeftModel
from veneer.peft.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from veneer.peft.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from veneer.peft.types import PeftType, TaskType
from veneer.peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    WEIGHTS_NAME,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)

__all__ = ["PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING",
           "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME", "PeftConfig", "PeftModel", "PeftModelForCausalLM",
           "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM",
           "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "PeftType",
           "TaskType", "TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status",
           "get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"]
