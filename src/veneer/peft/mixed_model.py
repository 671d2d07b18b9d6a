"""`PeftMixedModel`: a base model with adapters of several methods, several of them active at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from veneer.peft import hub
from veneer.peft.config import PeftConfig
from veneer.peft.model import PeftModel, require_input_grads
from veneer.peft.tuners.mixed import COMPATIBLE_TUNER_TYPES, MixedModel


class PeftMixedModel(PeftModel):
    """A `PeftModel` whose adapters may be of any of the family's methods: LoRA on one weight and LoHa on the same, say.

    Active adapters add up, in whatever order they were loaded. Made by `get_peft_model(…, mixed=True)`. As in PEFT the
    model as a whole is not saved; each adapter can be, by `veneer.save`.
    """

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default",
                 autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False, *, empty: bool = False) -> None:
        nn.Module.__init__(self)
        _check_type(peft_config)
        self.base_model = MixedModel(model, {adapter_name: peft_config}, adapter_name, empty=empty)
        if not empty:
            self.base_model.settle_dtype(adapter_name, autocast_adapter_dtype)
        require_input_grads(model)

    def _check_type(self, config: PeftConfig) -> None:
        _check_type(config)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make this adapter, or these together, the active ones, trainable unless `inference_mode`."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_names(names)
        self.base_model.set_adapter(names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Take one or several adapters off."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_names(names)
        for name in names:
            self.base_model.delete_adapter(name)

    def _check_names(self, names: Sequence[str]) -> None:
        unknown = sorted(set(names) - set(self.peft_config))
        if unknown:
            raise ValueError(f"Adapter(s) {unknown} not found, available adapters: {sorted(self.peft_config)}")

    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: str | Path, adapter_name: str = "default",
                        is_trainable: bool = False, config: PeftConfig | None = None,
                        autocast_adapter_dtype: bool = True, ephemeral_gpu_offload: bool = False,
                        low_cpu_mem_usage: bool = False, key_mapping: dict[str, str] | None = None,
                        **kwargs: Any) -> PeftMixedModel:
        """The model with the adapter of a folder, or of a repository of the Hub, whatever its task; see
        `PeftModel.from_pretrained`. Load others beside it with `load_adapter`."""
        if config is not None and not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {config.__class__}")
        folder = hub.local_folder(model_id, **kwargs)
        found = PeftConfig.from_pretrained(folder) if config is None else config
        found.inference_mode = not is_trainable
        made = cls(model, found, adapter_name, empty=True)
        made._load(folder, adapter_name, is_trainable, found, config, autocast_adapter_dtype, key_mapping)
        return made

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> NoReturn:
        """Not here, as in PEFT."""
        raise NotImplementedError(f"Saving is not supported for {type(self).__name__}. Save its adapters one by one: "
                                  "veneer.save(model.get_base_model(), path, name)")

    def create_or_update_model_card(self, output_dir: str) -> NoReturn:
        """Not here, as in PEFT."""
        raise NotImplementedError(f"Model card creation is not supported for {type(self).__name__}")


def _check_type(config: PeftConfig) -> None:
    if config.peft_type not in COMPATIBLE_TUNER_TYPES:
        known = ", ".join(kind.value for kind in COMPATIBLE_TUNER_TYPES)
        raise ValueError(f"The provided `peft_type` {getattr(config.peft_type, 'value', config.peft_type)!r} is not "
                         f"compatible with the `PeftMixedModel`. Compatible types are: {known}")
