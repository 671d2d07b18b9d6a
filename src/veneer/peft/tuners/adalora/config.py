"""PEFT's config of this method, at PEFT's place."""

from __future__ import annotations

from veneer.peft.family_configs import AdaLoraConfig

__all__ = ["AdaLoraConfig"]
