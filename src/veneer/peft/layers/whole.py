"""PEFT's wrappers of what is trained as it is: whole modules (`modules_to_save`) and rows of embeddings."""

from __future__ import annotations

from torch import nn

from veneer.peft.layers.base import BaseTunerLayer
from veneer.peft.shown import bare


class AuxiliaryTrainingWrapper(BaseTunerLayer):
    """What both have."""

    @property
    def original_module(self) -> nn.Module:
        """The module with the base's own values."""
        return bare(self)


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module of which copies are trained: `modules_to_save[adapter]` has their parameters. Of a module with others
    inside, each of these is one by itself."""

    adapter_layer_names = ("modules_to_save",)

    @property
    def modules_to_save(self) -> nn.ModuleDict:
        return self._part("modules_to_save", nn.ModuleDict)


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """A module of which some rows are trained: `token_adapter.trainable_tokens_delta[adapter]`, (n, width)."""

    adapter_layer_names = ("token_adapter",)

    @property
    def token_adapter(self) -> nn.Module:
        return self._part("token_adapter", nn.Module)
