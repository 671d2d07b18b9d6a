"""PEFT's LoRA layers, at PEFT's place."""

from __future__ import annotations

from veneer.peft.layers.lora import (
    Conv1d,
    Conv2d,
    Conv3d,
    Embedding,
    Linear,
    LoraLayer,
    MultiheadAttention,
    ParamWrapper,
)

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear", "LoraLayer", "MultiheadAttention", "ParamWrapper"]
