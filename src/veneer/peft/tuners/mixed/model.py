"""`MixedModel`: adapters of several methods on one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from veneer.peft.config import PeftConfig
from veneer.peft.tuner import BaseTuner
from veneer.peft.types import FAMILY, PeftType

#: methods whose adapters may lie side by side: all of the family, where PEFT has LORA, LOHA, LOKR and ADALORA
COMPATIBLE_TUNER_TYPES: tuple[PeftType, ...] = FAMILY


class MixedModel(BaseTuner):
    """PEFT's `MixedModel`: a tuner whose adapters need not be of one method."""

    prefix = ""

    def add(self, name: str, config: PeftConfig, state_dict: dict[str, Tensor] | None = None) -> None:
        if config.peft_type not in COMPATIBLE_TUNER_TYPES:
            raise TypeError(f"MixedModel takes configs of {', '.join(kind.value for kind in COMPATIBLE_TUNER_TYPES)}, "
                            f"got a {type(config).__name__}")
        super().add(name, config, state_dict)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Take one or several adapters off. Those of the others that were active stay so."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        unknown = sorted(set(names) - set(self.peft_config))
        if unknown:
            raise ValueError(f"Adapter(s) {unknown} not found, available adapters: {sorted(self.peft_config)}")
        for name in names:
            super().delete_adapter(name)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Not here, as in PEFT: its ways to combine are named for LoRA."""
        raise NotImplementedError(f"Weighted adapters are not supported for {type(self).__name__}. veneer.combine("
                                  "model, {'a': 1.0, 'b': 0.5}, 'both') makes one LoRA of adapters of any methods")
