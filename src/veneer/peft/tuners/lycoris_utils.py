"""What PEFT's LoHa and LoKr layers share, as a face over the engine's hosts."""

from __future__ import annotations

from typing import Any

from veneer.methods import LoHa, LoKr
from veneer.peft.tuner_layer import BaseTunerLayer


class LycorisLayer(BaseTunerLayer):
    """r, alpha and scaling by adapter name; the factors are parameters by adapter name."""

    other_param_names = ("r", "alpha", "scaling", "rank_dropout", "module_dropout")

    def _values(self, read: Any) -> dict[str, Any]:
        methods = {name: self._main(name).method for name in self.adapters}
        return {name: read(method) for name, method in methods.items() if isinstance(method, (LoHa, LoKr))}

    @property
    def r(self) -> dict[str, int]:
        return self._values(lambda method: method.rank)

    @property
    def alpha(self) -> dict[str, float]:
        return self._values(lambda method: method.rank if method.alpha is None else method.alpha)

    @property
    def scaling(self) -> dict[str, float]:
        return self._values(lambda method: (method.rank if method.alpha is None else method.alpha) / method.rank)

    @property
    def rank_dropout(self) -> dict[str, float]:
        return self._values(lambda method: method.rank_dropout)

    @property
    def module_dropout(self) -> dict[str, float]:
        return self._values(lambda method: method.module_dropout)
