"""What other libraries may build on: adapters on models that no `PeftModel` is around (PEFT's `peft.functional`)."""

from __future__ import annotations

from veneer.peft.mapping import inject_adapter_in_model
from veneer.peft.saving import get_peft_model_state_dict, set_peft_model_state_dict
from veneer.peft.tuners.tuners_utils import cast_adapter_dtype, delete_adapter, set_adapter, set_requires_grad

__all__ = ["cast_adapter_dtype", "delete_adapter", "get_peft_model_state_dict", "inject_adapter_in_model",
           "set_adapter", "set_peft_model_state_dict", "set_requires_grad"]
