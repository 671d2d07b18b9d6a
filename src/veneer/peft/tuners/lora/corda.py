"""CorDA's first step (Yang et al. 2024, arXiv:2406.05223) under PEFT's name: look at the inputs of what is to be
adapted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from veneer.inits import CorDA
from veneer.peft.lora_config import LoraConfig
from veneer.peft.saving import base_of
from veneer.peft.tuners.lora.collected import collect, from_files
from veneer.peft.tuners.lora.from_data import rules_from_config
from veneer.wrappers import unwrap

__all__ = ["preprocess_corda"]


def preprocess_corda(model: nn.Module, lora_config: LoraConfig, run_model: Callable[[], Any] | None = None,
                     hooked_model: nn.Module | None = None) -> None:
    """Collect XᵀX of the inputs X of every layer that the config adapts, for the `get_peft_model` that follows.

    run_model: runs the model over samples, in as many forwards as it likes; all positions count. hooked_model: the one
    that it runs, where that is not `model`; their weights must have the same names.
    Of `lora_config.corda_config`: corda_method is used when the adapter is made; cache_file, covariance_file: where the
    sums are written, and read instead of running if they are there, as safetensors (".safetensors" is put behind
    another name); verbose: show the progress. use_float16_for_covariance, prune_temporary_fields: without effect; sums
    are in fp32, and nothing is left on the model.

    Raises `ValueError` without a corda_config, and without run_model where there is no file.
    """
    settings = lora_config.corda_config
    if settings is None:
        raise ValueError("preprocess_corda: lora_config.corda_config is not set; give LoraConfig(init_lora_weights="
                         "'corda', corda_config=CordaConfig())")
    base = base_of(unwrap(model))
    files = (settings.cache_file, settings.covariance_file)
    if from_files(base, "corda", files):
        return
    if run_model is None:
        raise ValueError("run_model must be specified when covariance file and cache file aren't built.")
    hooked = base if hooked_model is None else base_of(unwrap(hooked_model))
    rules = rules_from_config(hooked, lora_config, CorDA(mode=settings.corda_method))
    collect(base, hooked, "corda", rules, run_model, files, settings.verbose)
