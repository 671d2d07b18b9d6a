"""What LoHa and LoKr drop of their change in training: single outputs, or all of it (LyCORIS, arXiv:2309.14859)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.method import Shape, check_probability
from veneer.methods.options import check_bool, check_number


@dataclass(frozen=True)
class Drops:
    """rank_dropout: probability of zeroing one output of ΔW; rescale: what stays is divided by the share that
    stays; module_dropout: probability of leaving out all of ΔW, never rescaled."""

    rank_dropout: float
    rescale: bool
    module_dropout: float

    def draw(self, shape: Shape, device: torch.device) -> Tensor | None:
        """A factor for every output of ΔW (out,), or (in,) of an embedding, or for all (1,); None: nothing drops.

        Drawn from torch's global generator, as any dropout is. Left-out adapters are multiplied by zero and not
        skipped, so that every parameter has a gradient in every step (DDP waits for all of them).
        """
        if not (self.rank_dropout or self.module_dropout):
            return None
        keep = torch.ones(1, device=device)
        if self.rank_dropout:
            outputs = shape.in_ if shape.lookup else shape.out
            keep = (torch.rand(outputs, device=device) >= self.rank_dropout).float()
            if self.rescale:
                keep = keep / keep.mean().clamp_min(1 / outputs)
        if self.module_dropout:
            keep = keep * (torch.rand(1, device=device) >= self.module_dropout)
        return keep


def check_drops(owner: str, rank_dropout: float, rescale: bool, module_dropout: float) -> None:
    """Raise `VeneerError` unless both are probabilities and `rescale` is a bool."""
    for field, value in (("rank_dropout", rank_dropout), ("module_dropout", module_dropout)):
        check_number(owner, field, value)
        check_probability(owner, field, value)
    check_bool(owner, "rank_dropout_scale", rescale)
