"""Logits of a few examples, and how far two models' answers lie apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_ROWS = 256  # of logits at once: 256 × 50,000 in fp64 are 100 MB


def logits(model: Any, probe: Mapping[str, Tensor]) -> Tensor:
    """Logits (batch, length, vocabulary) of the probe in eval mode."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        out = model(**{key: value.to(device) for key, value in probe.items()}, use_cache=False)["logits"]
    model.train(training)
    return out


def kl_divergence(reference: Tensor, other: Tensor) -> float:
    """Mean KL(p ‖ q) in nats over rows, p and q being the softmax of `reference` and `other` (rows, vocabulary)."""
    total = 0.0
    for a, b in zip(reference.split(_ROWS), other.split(_ROWS), strict=True):
        p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    return total / max(len(reference), 1)


def float_dtype(model: nn.Module) -> torch.dtype:
    """Of the first parameter that holds numbers as such; packed weights are bytes."""
    return next(param.dtype for param in model.parameters() if param.is_floating_point())
