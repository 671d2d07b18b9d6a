"""`get_peft_model`, at PEFT's place."""

from __future__ import annotations

from veneer.peft.mapping import get_peft_model

__all__ = ["get_peft_model"]
