"""What LoHa and LoKr share, at PEFT's place."""

from __future__ import annotations

from veneer.peft.family_configs import LycorisConfig
from veneer.peft.layers.family import LycorisLayer

__all__ = ["LycorisConfig", "LycorisLayer"]
