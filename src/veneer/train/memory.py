"""An estimate of the memory that a training run needs, before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from veneer.plan import Plan
from veneer.train.encode import Encoded
from veneer.train.settings import TrainingSettings


def estimate(
    model: nn.Module, plan: Plan, train: Sequence[Encoded], training: TrainingSettings
) -> list[tuple[str, int]]:
    """Rows (what, bytes). Weights, adapter and optimizer are counted; activations and logits are estimated.

    Activations: every matrix keeps its input and output for the backward pass, for the tokens of the largest batch;
    with checkpointing only a tenth of that. Logits: once for the values and once for the gradient, in fp32, for the
    tokens that carry loss.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    dtype = next(model.parameters()).dtype
    width = max(dtype.itemsize, torch.float32.itemsize)
    parameters = plan.trainable_parameters
    largest = sorted(train, key=len)[-training.batch_size :]
    tokens = len(largest) * len(largest[-1])
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear)]
    ask = getattr(model, "get_output_embeddings", None)
    head = ask() if callable(ask) else None
    per_token = sum(m.in_features + m.out_features for m in matrices if m is not head) * dtype.itemsize
    activations = tokens * per_token // (10 if training.gradient_checkpointing else 1)
    rows = [
        ("base weights", weights),
        ("adapter", parameters * width),
        ("gradients of the adapter", parameters * width),
        ("AdamW's two moments", 2 * parameters * width),
        (f"activations of {tokens} tokens", activations),
    ]
    if isinstance(head, nn.Linear):
        answers = sum(e.trained_tokens for e in largest)
        rows.append((f"logits of {answers} tokens", answers * head.out_features * 4 * 2))
    rows.append(("all", sum(count for _, count in rows)))
    return rows


def size(count: int) -> str:
    """`1536000` → `1.5 MB`."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
