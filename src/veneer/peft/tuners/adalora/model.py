"""`AdaLoraModel`: AdaLoRA adapters on a model."""

from __future__ import annotations

from veneer.allocate import update_and_allocate
from veneer.peft.config import PeftConfig
from veneer.peft.layers.adalora import AdaLoraLayer
from veneer.peft.tuner import BaseTuner


class AdaLoraModel(BaseTuner):
    """PEFT's `AdaLoraModel`.

    Steps of torch's optimizers are seen without `update_and_allocate`, which forgets nothing if it is not called. The
    term that keeps the factors orthogonal is added to the gradients as the optimizer steps, not to the loss.
    """

    prefix = "lora_"
    tuner_layer_cls = AdaLoraLayer

    @property
    def trainable_adapter_name(self) -> str | None:
        """The one adapter that is trained, if there is one."""
        return next((name for name, config in self.peft_config.items() if not config.inference_mode), None)

    def add(self, name: str, config: PeftConfig, state_dict: dict | None = None) -> None:
        trained = self.trainable_adapter_name
        if trained is not None and not config.inference_mode:
            raise ValueError(f"AdaLoraModel supports only one adapter that is trained, and {trained!r} is. Set "
                             "inference_mode=True in the other configs")
        super().add(name, config, state_dict)

    def update_and_allocate(self, global_step: int) -> None:
        """Tell of an optimizer step, for loops whose optimizer is none of torch's; see `veneer.update_and_allocate`."""
        name = self.trainable_adapter_name
        if name is None:
            raise ValueError("update_and_allocate: no adapter of this model is trained (inference_mode)")
        update_and_allocate(self.model, global_step, name)
