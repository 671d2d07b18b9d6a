"""Which optional libraries are installed, by PEFT's names. Looked up and remembered; nothing is imported."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch

__all__ = ["is_aqlm_available", "is_bnb_4bit_available", "is_bnb_available", "is_diffusers_available",
           "is_eetq_available", "is_gptqmodel_available", "is_hqq_available", "is_inc_available",
           "is_optimum_available", "is_te_available", "is_torch_tpu_available", "is_torchao_available",
           "is_xpu_available"]


@lru_cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_bnb_available() -> bool:
    """bitsandbytes."""
    return _installed("bitsandbytes")


def is_bnb_4bit_available() -> bool:
    """bitsandbytes, each version of which that Veneer reads has 4-bit layers."""
    return _installed("bitsandbytes")


def is_gptqmodel_available() -> bool:
    """gptqmodel, of whatever version: where PEFT raises for one that it cannot use, this is True."""
    return _installed("gptqmodel")


def is_optimum_available() -> bool:
    """optimum."""
    return _installed("optimum")


def is_aqlm_available() -> bool:
    """aqlm."""
    return _installed("aqlm")


def is_eetq_available() -> bool:
    """eetq."""
    return _installed("eetq")


def is_hqq_available() -> bool:
    """hqq."""
    return _installed("hqq")


def is_inc_available() -> bool:
    """Intel's neural_compressor."""
    return _installed("neural_compressor")


def is_torchao_available() -> bool:
    """torchao, of whatever version: where PEFT raises for one that it cannot use, this is True."""
    return _installed("torchao")


def is_diffusers_available() -> bool:
    """diffusers."""
    return _installed("diffusers")


def is_te_available() -> bool:
    """NVIDIA's transformer_engine."""
    return _installed("transformer_engine")


@lru_cache
def is_xpu_available(check_device: bool = False) -> bool:
    """An Intel GPU that torch can use. check_device: without effect, as torch looks for one anyway."""
    return torch.xpu.is_available()


def is_torch_tpu_available(check_device: bool = True) -> bool:
    """torch_xla is installed. check_device: without effect; Veneer does not start its runtime to see whether there is a
    device."""
    return _installed("torch_xla")
