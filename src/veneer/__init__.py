"""Veneer: thin trainable layers over a frozen PyTorch model."""
