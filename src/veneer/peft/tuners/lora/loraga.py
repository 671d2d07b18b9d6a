"""LoRA-GA's first step (Wang et al. 2024, arXiv:2407.05000) under PEFT's name: look at the gradients of what is to be
adapted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.inits import LoRAGA
from veneer.peft.lora_config import LoraConfig
from veneer.peft.saving import base_of
from veneer.peft.tuners.lora.collected import collect, from_files
from veneer.peft.tuners.lora.from_data import rules_from_config
from veneer.wrappers import unwrap

__all__ = ["preprocess_loraga"]


def preprocess_loraga(model: nn.Module, lora_config: LoraConfig, train_step: Callable[[], Any],
                      cache_file: str | Path | None = None) -> None:
    """Collect the gradient of every weight that the config adapts, for the `get_peft_model` that follows.

    train_step: runs forwards and their backwards, as many as it likes; their gradients are added up, of which LoRA-GA
    uses the directions. No parameter needs a gradient for this or gets one, so that the base may be quantised.
    cache_file: where they are written, and read instead of running if it is there, as safetensors (".safetensors" is
    put behind another name).

    Raises `ValueError` without a lora_ga_config, where nothing fits the config, and where a weight gets no gradient.
    """
    settings = lora_config.lora_ga_config
    if settings is None:
        raise ValueError("If you want to use LoRA-GA, please initialize the LoraConfig with init_lora_weights="
                         "'lora_ga' and lora_ga_config=LoraGAConfig(...).")
    base = base_of(unwrap(model))
    if from_files(base, "lora_ga", [cache_file]):
        return

    def run() -> Tensor:
        train_step()
        return torch.zeros((), requires_grad=True)  # its backward passes have been run by the step itself

    collect(base, base, "lora_ga", rules_from_config(base, lora_config, LoRAGA(gamma=settings.stable_gamma)), run,
            [cache_file])
