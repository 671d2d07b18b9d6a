"""Hugging Face PEFT's LoRA family over Veneer's engine: `from veneer.peft import …` instead of `from peft import …`.

`__version__` is that of the PEFT whose interface this is, for scripts that ask; Veneer's own is `veneer.__version__`.
"""

from types import ModuleType

from veneer.method import nearest
from veneer.peft.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from veneer.peft.config import PeftConfig
from veneer.peft.errors import NoMatchingPeftModuleError, PeftError, PeftWarning
from veneer.peft.family_configs import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from veneer.peft.lora_config import (
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
)
from veneer.peft.mapping import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    get_peft_config,
    get_peft_model,
    inject_adapter_in_model,
)
from veneer.peft.mixed_model import PeftMixedModel
from veneer.peft.model import PeftModel
from veneer.peft.outside import OUTSIDE
from veneer.peft.status import get_layer_status, get_model_status
from veneer.peft.submodules import lazily
from veneer.peft.tasks import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from veneer.peft.tuners.adalora import AdaLoraModel
from veneer.peft.tuners.loha import LoHaModel
from veneer.peft.tuners.lokr import LoKrModel
from veneer.peft.tuners.lora import (
    LoraModel,
    convert_to_lora,
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_loraga,
    save_as_lora,
)
from veneer.peft.tuners.randlora import RandLoraModel
from veneer.peft.tuners.vblora import VBLoRAModel
from veneer.peft.tuners.vera import VeraModel
from veneer.peft.types import PeftType, TaskType
from veneer.peft.utils import (
    cast_mixed_precision_params,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    prepare_model_for_kbit_training,
    replace_lora_weights_loftq,
    set_base_model_state_dict,
    set_peft_model_state_dict,
    shift_tokens_right,
)

__version__ = "0.21.2"

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "AdaLoraConfig",
    "AdaLoraModel",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "CordaConfig",
    "EvaConfig",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "NoMatchingPeftModuleError",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "RandLoraConfig",
    "RandLoraModel",
    "TaskType",
    "VBLoRAConfig",
    "VBLoRAModel",
    "VeraConfig",
    "VeraModel",
    "cast_mixed_precision_params",
    "convert_to_lora",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "prepare_model_for_kbit_training",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
]


_SUBMODULES = ("functional", "helpers", "import_utils", "mapping_func", "optimizers", "peft_model")
_submodule = lazily(__name__, *_SUBMODULES)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return _submodule(name)
    if name in OUTSIDE:
        raise AttributeError(f"veneer.peft has no {name}: Veneer has the LoRA family (LoRA, DoRA, AdaLoRA, LoHa, LoKr, "
                             "VeRA, VB-LoRA, RandLoRA); for PEFT's other methods use the original, `from peft import "
                             f"{name}`")
    raise AttributeError(f"module 'veneer.peft' has no attribute {name!r}{nearest(name, __all__)}")
