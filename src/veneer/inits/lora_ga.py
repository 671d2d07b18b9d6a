"""LoRA-GA (Wang et al. 2024, arXiv:2407.05000): the pair starts along the gradient of the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.inits.base import Evidence, Started, register_init
from veneer.inits.data import FromData, above, check_number
from veneer.leading import triplets
from veneer.method import Need, Shape, VeneerError


@register_init("lora_ga")
@dataclass(frozen=True, kw_only=True)
class LoRAGA(FromData):
    """A = c·(the r leading right singular vectors of the gradient)ᵀ, B = c·(its next r left ones), so that the first
    step of the pair comes nearest to the first step of the whole weight. c² = √out / gamma, the paper's stable scale,
    which keeps the size of the layer's output; s is not divided out.

    gamma: γ, the paper's 16.
    """

    needs = "gradient"
    moves = True
    gamma: float = 16.0

    def __post_init__(self) -> None:
        check_number("init 'lora_ga'", "gamma", self.gamma, 0)
        if self.gamma == 0:
            raise VeneerError("init 'lora_ga': gamma must be above 0")

    def need(self, rank: int) -> Need:
        return Need("gradient", 2 * rank, 2 * rank)

    def refusal(self, shape: Shape, rank: int) -> str | None:
        return super().refusal(shape, rank) or above(self.key, 2 * rank, rank, shape)

    def ranks(self, evidence: Mapping[str, Evidence], rank: int) -> dict[str, int]:
        """The same for all; raises `VeneerError` for a weight whose gradient has a smaller rank than 2r."""
        for name, found in evidence.items():
            if "singular" in found and len(found["singular"]) < 2 * rank:
                raise VeneerError(f"{name!r}: {_few_triplets(found, rank)}")
        return super().ranks(evidence, rank)

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        if evidence is not None and "gradient" in evidence:
            left, singular, right = triplets(evidence["gradient"], 2 * rank)
        else:
            left, singular, right = self.given(evidence, "left", "singular", "right")
        if len(singular) < 2 * rank:
            raise VeneerError(f"init='lora_ga': {_few_triplets(evidence or {}, rank)}")
        c = shape[0] ** 0.25 / math.sqrt(self.gamma)
        return Started((c * right[:rank]).float(), (c * left[:, rank:2 * rank]).float())


def _few_triplets(evidence: Evidence, rank: int) -> str:
    found, sought = len(evidence.get("singular", ())), evidence.get("sought")
    if sought is not None and found == sought:
        return (f"the statistics hold {found} singular triplets of the gradient, and LoRA-GA at rank {rank} takes "
                f"{2 * rank}; calibrate with the same rules")
    return (f"the gradient has a rank below {2 * rank}, which LoRA-GA takes at rank {rank}; calibrate on more tokens, "
            "or take a smaller rank")
