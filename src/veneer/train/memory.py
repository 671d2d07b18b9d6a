"""An estimate of the memory that a training run needs, before it starts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from veneer.plan import Plan
from veneer.storage import packed_storage
from veneer.train.encode import Encoded
from veneer.train.measure import float_dtype
from veneer.train.settings import Settings
from veneer.weights import Weight, scan


def estimate(
    model: nn.Module, plan: Plan, train: Sequence[Encoded], settings: Settings
) -> list[tuple[str, int]]:
    """Rows (what, bytes). Weights, adapter and optimizer are counted; activations and logits are estimated.

    Activations: every matrix keeps its input and output for the backward pass, for the tokens of the largest batch;
    with checkpointing only a tenth of that. Logits: once for the values and once for the gradient, in fp32, for the
    tokens that carry loss. Of packed weights, the largest is there as numbers at a time, and what
    `model.keep_dense_mb` keeps.
    """
    training, found = settings.training, scan(model)
    matrices = [w for w in found if w.is_linear and not w.is_head]
    weights = weight_bytes(model)
    dtype = float_dtype(model)
    width = max(dtype.itemsize, torch.float32.itemsize)
    parameters = plan.trainable_parameters
    largest = sorted(train, key=len)[-training.batch_size :]
    tokens = len(largest) * len(largest[-1])
    per_token = sum(w.layout.shape.in_ + w.layout.shape.out for w in matrices) * dtype.itemsize
    activations = tokens * per_token // (10 if training.gradient_checkpointing else 1)
    rows = [
        ("base weights", weights),
        ("adapter", parameters * width),
        ("gradients of the adapter", parameters * width),
        ("AdamW's two moments", 2 * parameters * width),
        (f"activations of {tokens} tokens", activations),
    ]
    dense = _dense_at_a_time(matrices, int(settings.model.keep_dense_mb * 2**20), dtype)
    if dense:
        rows.append(("packed weights as numbers, at a time", dense))
    answers = sum(e.trained_tokens for e in largest)
    rows += [(f"logits of {answers} tokens", answers * head.layout.shape.out * 4 * 2) for head in found
             if head.is_head and not head.layout.shape.is_vector]
    rows.append(("all", sum(count for _, count in rows)))
    return rows


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers, packed weights as they are held."""
    found: dict[int, int] = {}
    for module in model.modules():
        storage = packed_storage(module)
        if storage is None:
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            found |= {id(tensor): tensor.nbytes for tensor in own}
        else:
            found[id(module)] = storage.nbytes(module)
    return sum(found.values())


def _dense_at_a_time(matrices: Sequence[Weight], kept: int, dtype: torch.dtype) -> int:
    packed = [weight.numel() * dtype.itemsize for weight in matrices if weight.storage is not None]
    return min(max(packed) + kept, sum(packed)) if packed else 0
