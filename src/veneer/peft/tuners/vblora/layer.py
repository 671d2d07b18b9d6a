"""PEFT's layers of this method, at PEFT's place."""

from __future__ import annotations

from veneer.peft.layers.family import VBLoRALayer

__all__ = ["VBLoRALayer"]
