"""What of a budget outlives a step: to be taken back, or to be written down and taken up by another process."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from veneer.budget.budget import PARTS, Budget
from veneer.budget.member import Member
from veneer.method import VeneerError
from veneer.sharding import spread_like, whole

_KINDS = ("mean", "stray")


class Snapshot:
    """A budget and its adapters as they were before a step, for it to be taken back."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.step = budget, budget.step
        self.adapters = [(a, a.E.detach().clone(), a.mask.clone(),
                          {name: (mean.clone(), stray.clone()) for name, (mean, stray) in a.averages.items()})
                         for a in budget.trained()]

    def restore(self) -> None:
        self.budget.step = self.step
        for adapter, E, mask, averages in self.adapters:
            adapter.E.copy_(E)
            adapter.mask.copy_(mask)
            adapter.averages = averages


def progress(budget: Budget) -> dict[str, Tensor]:
    """The step and, by the adapters' places, the averages and what is cut away at present: a file of the adapter may
    leave it out, but it can grow again."""
    found = {"step": torch.tensor(budget.step)}
    for place, adapter in enumerate(budget.adapters()):
        found[f"{place}.mask"] = adapter.mask.clone()
        found |= {f"{place}.{side}.cut": whole(rows)[~adapter.mask] for side, rows in _sides(adapter).items()}
        found |= {f"{place}.{part}.{kind}": whole(tensor) for part, pair in adapter.averages.items()
                  for kind, tensor in zip(_KINDS, pair, strict=True)}
    return found


@torch.no_grad()
def resume(budget: Budget, kept: Mapping[str, Tensor]) -> None:
    """Take up what `progress` gave. Raises `VeneerError`, with nothing changed, when it is that of other adapters."""
    adapters = budget.adapters()
    if f"{len(adapters) - 1}.mask" not in kept or f"{len(adapters)}.mask" in kept:
        raise VeneerError(f"AdaLoRA: this progress is not that of {len(adapters)} weights with one budget")
    for place, adapter in enumerate(adapters):
        for key, like in (("mask", adapter.mask), *((f"{part}.mean", adapter.get_parameter(part)) for part in PARTS)):
            tensor = kept.get(f"{place}.{key}", like)
            if tensor.shape != like.shape:
                raise VeneerError(f"AdaLoRA: this is the progress of other weights: {key!r} is {tuple(tensor.shape)} "
                                  f"there and {tuple(like.shape)} in the adapter of {adapter.weight_name!r}")
    budget.step = int(kept["step"])
    for place, adapter in enumerate(adapters):
        adapter.mask.copy_(kept[f"{place}.mask"])
        adapter.averages = {}
        for side, rows in _sides(adapter).items():
            new = whole(rows).clone()
            new[~adapter.mask] = kept[f"{place}.{side}.cut"].to(new)
            rows.copy_(spread_like(new, rows))
        for part in PARTS:
            p = adapter.get_parameter(part)
            pair = [kept[key] for kind in _KINDS if (key := f"{place}.{part}.{kind}") in kept]
            if pair:
                mean, stray = (spread_like(tensor.clone(), p) for tensor in pair)
                adapter.averages[part] = (mean, stray)


def _sides(adapter: Member) -> dict[str, Tensor]:
    """A and Bᵀ (*batch, r, n), whose rows belong to triplets."""
    return {"A": adapter.A.detach(), "B": adapter.B.detach().mT}
