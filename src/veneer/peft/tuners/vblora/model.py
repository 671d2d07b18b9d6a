"""`VBLoRAModel`: VB-LoRA adapters on a model, and the bank of vectors that the weights of each share."""

from __future__ import annotations

from torch import nn

from veneer.attached import shared_states
from veneer.peft.layers.family import VBLoRALayer
from veneer.peft.saving import get_peft_model_state_dict
from veneer.peft.tuner import BaseTuner


class VBLoRAModel(BaseTuner):
    """PEFT's `VBLoRAModel`."""

    prefix = "vblora_"
    tuner_layer_cls = VBLoRALayer
    uses_shared_state = True

    @property
    def vblora_vector_bank(self) -> nn.ParameterDict:
        """The banks (num_vectors, vector_length) by adapter name. Among the model's parameters each is found in the
        first layer that uses it."""
        return nn.ParameterDict({name: state.bank for name in self.peft_config
                                 for state in shared_states(self.model, name)})

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """Numbers in the file: of the bank and, for each sub-vector, of its top-k weights and indices; and the total
        of others."""
        tensors = get_peft_model_state_dict(self, adapter_name=adapter)
        mine = sum(tensor.numel() for key, tensor in tensors.items() if "vblora_" in key)
        return mine, sum(tensor.numel() for tensor in tensors.values()) - mine
