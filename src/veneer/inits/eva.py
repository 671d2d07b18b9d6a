"""EVA (Paischer et al. 2024, arXiv:2410.07170): A is the directions in which a weight's inputs vary most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from veneer.inits.base import Evidence, Started, register_init
from veneer.inits.data import FromData, check_number
from veneer.inits.random import check_choice
from veneer.method import Need, VeneerError


@register_init("eva")
@dataclass(frozen=True, kw_only=True)
class EVA(FromData):
    """A = the leading principal components of the weight's inputs, B = 0. The ranks of all weights with one method are
    dealt out anew among them, by the share of its inputs' variance that each component explains.

    rho: no weight gets more than rho times the rank; 1 deals out nothing.
    tau: the pass over the data may end when every component that is used has a cosine above it with what it was a batch
    before.
    whiten: rows of A divided by the standard deviation of the inputs along them, so that A x has the identity as its
    covariance.
    adjust_scaling: a weight that gets another rank keeps its scale (its alpha follows); False: it keeps its alpha.
    """

    needs = "inputs"
    rho: float = 2.0
    tau: float = 0.99
    whiten: bool = False
    adjust_scaling: bool = True

    def __post_init__(self) -> None:
        check_number("init 'eva'", "rho", self.rho, 1)
        check_number("init 'eva'", "tau", self.tau, 0, 1)
        for name in ("whiten", "adjust_scaling"):
            check_choice("init 'eva'", name, getattr(self, name), (True, False))

    @property
    def keeps_scale(self) -> bool:  # type: ignore[override]
        return self.adjust_scaling

    def need(self, rank: int) -> Need:
        return Need("inputs", self._most(rank), rank, self.tau)

    def _most(self, rank: int) -> int:
        return math.floor(rank * self.rho + 1e-9)

    def ranks(self, evidence: Mapping[str, Evidence], rank: int) -> dict[str, int]:
        """Σ of the ranks is `rank` times the number of weights. Where components explain equal shares (weights with the
        same inputs), a weight's first components come first, and then the weights in the order given."""
        entries = []
        for order, (name, found) in enumerate(evidence.items()):
            singular, total, sought = self.given(found, "singular", "total", "sought")
            most = self._most(rank)
            if len(singular) == sought < min(most, found["components"].shape[1]):
                raise VeneerError(f"the statistics hold {int(sought)} components of {name!r}, and EVA(rho={self.rho:g})"
                                  f" at rank {rank} chooses among {most}; calibrate with the same rules")
            shares = singular[:most].double().square() / max(float(total), 1e-300)
            entries += [(-share, index, order, name) for index, share in enumerate(shares.tolist())]
        budget = rank * len(evidence)
        if len(entries) < budget:
            raise VeneerError(_few_components(evidence, rank))
        ranks = dict.fromkeys(evidence, 0)
        for *_, name in sorted(entries)[:budget]:
            ranks[name] += 1
        return ranks

    def factors(self, weight: Tensor | None, shape: tuple[int, int], rank: int, scale: float,
                generator: torch.Generator, evidence: Evidence | None) -> Started:
        components, singular, count = self.given(evidence, "components", "singular", "count")
        if len(components) < rank:
            raise VeneerError(f"init='eva': {len(components)} components of the inputs were found, and the rank is "
                              f"{rank}; calibrate on more tokens, or with the same rules")
        A = components[:rank]
        if self.whiten:
            A = A * (math.sqrt(max(int(count) - 1, 1)) / singular[:rank]).unsqueeze(1)
        return Started(A.clone(), A.new_zeros(shape[0], rank))


def _few_components(evidence: Mapping[str, Evidence], rank: int) -> str:
    fewest = min(evidence, key=lambda name: len(evidence[name]["singular"]))
    return (f"init='eva': {rank * len(evidence)} ranks are to be dealt out, and the inputs have fewer directions in all"
            f" ({len(evidence[fewest]['singular'])} in the {int(evidence[fewest]['count'])} tokens of {fewest!r}); "
            "calibrate on more tokens, or take a smaller rank")
