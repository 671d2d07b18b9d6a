"""Adapters of several methods on one model."""

from veneer.peft.tuners.mixed.model import COMPATIBLE_TUNER_TYPES, MixedModel

__all__ = ["COMPATIBLE_TUNER_TYPES", "MixedModel"]
