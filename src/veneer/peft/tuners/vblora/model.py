"""`VBLoRAModel`: VB-LoRA adapters on a model, and the bank of vectors that the weights of each share."""

from __future__ import annotations

from torch import nn

from veneer.peft.layers.family import VBLoRALayer
from veneer.peft.tuner import BaseTuner, shared_parameter


class VBLoRAModel(BaseTuner):
    """PEFT's `VBLoRAModel`. vblora_vector_bank: (num_vectors, vector_length) by adapter name."""

    prefix = "vblora_"
    tuner_layer_cls = VBLoRALayer
    uses_shared_state = True

    def _own_shared(self, name: str) -> None:
        bank = shared_parameter(self.model, name, "bank")
        if bank is not None:
            if "vblora_vector_bank" not in self._modules:
                self.vblora_vector_bank = nn.ParameterDict()
            self.vblora_vector_bank[name] = bank

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        del self.vblora_vector_bank[adapter_name]

    def unload(self) -> nn.Module:
        if "vblora_vector_bank" in self._modules:
            del self.vblora_vector_bank
        return super().unload()

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """Numbers in the file: of the bank and, for each sub-vector, of its top-k weights and indices; and the total
        of others."""
        from veneer.peft.saving import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(self, adapter_name=adapter)
        mine = sum(tensor.numel() for key, tensor in tensors.items() if "vblora_" in key)
        return mine, sum(tensor.numel() for tensor in tensors.values()) - mine
