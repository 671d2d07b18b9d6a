"""PEFT's models, at PEFT's place."""

from __future__ import annotations

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

__all__ = ["PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering",
           "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification", "PeftModelForTokenClassification",
           "TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"]
