"""PEFT's layers of this method, at PEFT's place."""

from __future__ import annotations

from veneer.peft.layers.adalora import AdaLoraLayer, SVDLinear

__all__ = ["AdaLoraLayer", "SVDLinear"]
