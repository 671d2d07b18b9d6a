"""The loss of a causal language model over the tokens of its mask, and over no others.

Two savings matter for small models with a large vocabulary: logits are computed only for positions that predict a
masked token of some row (`logits_to_keep`, where the model offers it), and the cross-entropy keeps no second copy of
the logits for its backward pass.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from veneer.train.encode import IGNORED

_ROWS = 64  # rows of logits handled at once: 64 × 50,000 in fp32 are 13 MB


class _SummedCrossEntropy(torch.autograd.Function):
    """Σ (logsumexp(z) − z[target]) over rows, in fp32 whatever the dtype of z (rows, vocabulary)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        norms = torch.cat([part.to(wide).logsumexp(dim=1) for part in logits.split(_ROWS)])
        picked = logits.gather(1, targets[:, None])[:, 0].to(wide)
        ctx.save_for_backward(logits, targets, norms)
        return (norms - picked).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        parts = zip(
            gradient.split(_ROWS), logits.split(_ROWS), targets.split(_ROWS), norms.split(_ROWS), strict=True
        )
        for out, z, target, norm in parts:
            probability = torch.exp(z.to(norm.dtype) - norm[:, None])
            probability[torch.arange(len(target), device=z.device), target] -= 1
            out.copy_(probability.mul_(grads[0]))
        return gradient, None


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ cross-entropy of `logits` (rows, vocabulary) against `targets` (rows,), a scalar in fp32 (fp64 for fp64)."""
    return _SummedCrossEntropy.apply(logits, targets)


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model's forward takes `logits_to_keep`."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def masked_loss(model: nn.Module, inputs: dict[str, Tensor], keep: bool) -> tuple[Tensor, int, Any]:
    """(summed loss, number of predicted tokens, the model's outputs) for one padded batch.

    `inputs` has `input_ids`, `attention_mask`, `labels`, each (batch, length); label t is predicted from position t−1.
    """
    labels = inputs["labels"]
    wanted = labels[:, 1:] != IGNORED
    extra: dict[str, Any] = {"use_cache": False}
    positions = torch.arange(wanted.shape[1], device=labels.device)
    if keep:
        positions = wanted.any(dim=0).nonzero()[:, 0]
        extra["logits_to_keep"] = positions
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **extra)
    logits = outputs["logits"] if keep else outputs["logits"][:, :-1]
    chosen = wanted[:, positions]
    total = summed_cross_entropy(logits[chosen], labels[:, 1:][:, positions][chosen])
    return total, int(chosen.sum()), outputs
