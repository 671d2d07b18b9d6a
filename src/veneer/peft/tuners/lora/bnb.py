"""PEFT's LoRA layers over those of bitsandbytes, at PEFT's place. They are there without bitsandbytes too."""

from __future__ import annotations

from veneer.peft.layers.lora import Linear4bit, Linear8bitLt

__all__ = ["Linear4bit", "Linear8bitLt"]
