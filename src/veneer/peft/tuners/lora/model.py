"""`LoraModel`: LoRA and DoRA adapters on a model, and new ones made of several."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from veneer.combine import combine
from veneer.method import nearest
from veneer.peft.layers.base import set_live
from veneer.peft.layers.faces import show_faces
from veneer.peft.layers.lora import LoraLayer
from veneer.peft.tuner import BaseTuner

#: PEFT's names of ways to combine: ours, and whether the result is cut to a rank
_WAYS = {"linear": ("sum", False), "cat": ("cat", False), "svd": ("svd", True), "ties": ("ties", True),
         "ties_svd": ("ties", True), "dare_linear": ("dare", True), "dare_linear_svd": ("dare", True),
         "dare_ties": ("dare_ties", True), "dare_ties_svd": ("dare_ties", True),
         "magnitude_prune": ("magnitude_prune", True), "magnitude_prune_svd": ("magnitude_prune", True)}


class LoraModel(BaseTuner):
    """PEFT's `LoraModel`."""

    prefix = "lora_"
    tuner_layer_cls = LoraLayer

    def add_weighted_adapter(self, adapters: list[str], weights: list[float], adapter_name: str,
                             combination_type: str = "svd", svd_rank: int | None = None, svd_clamp: float | None = None,
                             svd_full_matrices: bool = True, svd_driver: str | None = None,
                             density: float | None = None, majority_sign_method: str = "total") -> None:
        """A new adapter whose ΔW is Σ weightᵢ · ΔWᵢ, thinned out before where the way says so. It is not made active.
        Nothing happens where there is an adapter of that name.

        Everything is done on ΔW and not on the factors, in which PEFT's "linear" and the ways without "_svd" work: a
        sum of factors is not the factors of the sum. "linear" and "cat" are exact, of the ranks' sum; the others are
        cut to `svd_rank`, by default the largest of the ranks. svd_full_matrices, svd_driver: how PEFT computes what is
        computed without a dense ΔW here; without effect.

        Raises `ValueError` for unknown adapters and ways, and settings that do not go together.
        """
        if adapter_name in self.peft_config:
            return
        self._refuse_merged("add an adapter")
        self._check_weighted(adapters, weights, combination_type, svd_clamp)
        how, cut = _WAYS[combination_type]
        ranks = [self._largest_rank(name) for name in adapters]
        before = self.active_adapters
        factors: dict[str, float] = {}
        for name, weight in zip(adapters, weights, strict=True):
            factors[name] = factors.get(name, 0.0) + weight
        trained = {id(param) for param in self.model.parameters() if param.requires_grad}
        combine(self.model, factors, adapter_name, how,
                (svd_rank or max(ranks)) if cut else None, density=density,
                majority_sign=majority_sign_method if "ties" in how else "total")
        show_faces(self.model)
        self._note_weighted(adapters, adapter_name)
        set_live(self.model, before)
        for param in self.model.parameters():  # the new one is frozen, and the others are what they were
            param.requires_grad_(id(param) in trained)

    def _note_weighted(self, adapters: Sequence[str], name: str) -> None:
        """The config of a new adapter: that of the first, with the ranks that came out, of which alpha is the same."""
        config: Any = copy.deepcopy(self.peft_config[adapters[0]])
        ranks = {path: layer.r[name] for path, layer in self._layers() if name in layer.r}
        config.r = config.lora_alpha = max(ranks.values())
        config.rank_pattern = {path: rank for path, rank in ranks.items() if rank != config.r}
        config.alpha_pattern = dict(config.rank_pattern)
        config.use_rslora, config.init_lora_weights = False, True
        config.target_modules = set(ranks)
        self.peft_config[name] = config

    def _layers(self) -> list[tuple[str, LoraLayer]]:
        return [(name, module) for name, module in self.model.named_modules() if isinstance(module, LoraLayer)]

    def _largest_rank(self, name: str) -> int:
        return max(layer.r[name] for _, layer in self._layers() if name in layer.r)

    def _check_weighted(self, adapters: Sequence[str], weights: Sequence[float], way: str,
                        svd_clamp: float | None) -> None:
        for name in adapters:
            if name not in self.peft_config:
                raise ValueError(f"Adapter {name} does not exist{nearest(str(name), self.peft_config) or '.'} There "
                                 f"are: {', '.join(self.peft_config)}")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"add_weighted_adapter needs one weight for each adapter, got {len(adapters)} adapters "
                             f"and {len(weights)} weights")
        if way not in _WAYS:
            raise ValueError(f"Invalid combination_type: {way!r}{nearest(str(way), _WAYS) or '.'} Possible: "
                             f"{', '.join(_WAYS)}")
        if svd_clamp is not None:
            raise NotImplementedError("svd_clamp cuts off the largest entries of the factors, which changes ΔW; Veneer "
                                      "does not do that. Leave it out")
        for name in adapters:
            config: Any = self.peft_config[name]
            if config.use_dora or config.modules_to_save:
                what = "use_dora, and lengths" if config.use_dora else "modules_to_save, and copies of modules"
                raise ValueError(f"add_weighted_adapter: adapter {name!r} has {what} cannot be added up; only changes "
                                 "that are added to a weight can")
