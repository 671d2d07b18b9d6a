"""Read-only reports on a model and its adapters."""

from veneer.inspect.explain import explain
from veneer.inspect.summary import adapters, trainable, update_norms
from veneer.merge import requantized

__all__ = ["adapters", "explain", "requantized", "trainable", "update_norms"]
