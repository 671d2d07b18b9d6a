"""Read-only reports on a model and its adapters."""

from veneer.inspect.explain import explain
from veneer.inspect.summary import adapters, trainable, update_norms

__all__ = ["adapters", "explain", "trainable", "update_norms"]
