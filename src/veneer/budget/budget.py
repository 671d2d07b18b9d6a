"""AdaLoRA's budget over its adapters: what happens at a step of a given number, and what is kept from step to step.

Who counts the steps is in `allocator`, the arithmetic in `arithmetic`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.budget.arithmetic import Averages, Schedule, importance, keep_best, observe, wide
from veneer.budget.member import Member
from veneer.method import VeneerError

if TYPE_CHECKING:
    from veneer.methods.adalora import AdaLoRA

#: an adapter's parameters, of each of which averages are kept
PARTS = ("A", "E", "B")


class Budget:
    """The adapters of one method in one attach, which it knows weakly, and the last step they were taken to."""

    def __init__(self, method: AdaLoRA) -> None:
        self.method = method
        self.step = 0
        self.members: weakref.WeakValueDictionary[int, Member] = weakref.WeakValueDictionary()

    def add(self, adapter: Member, place: int | None) -> int:
        """Know one more adapter; returns its place among them, which a copy of it keeps."""
        place = len(self.members) if place is None else place
        self.members[place] = adapter
        return place

    def adapters(self) -> list[Member]:
        """In the order of the plan."""
        return [self.members[place] for place in sorted(self.members)]

    def trained(self) -> list[Member]:
        """Those that share the budget; a frozen one is left alone."""
        return [adapter for adapter in self.adapters() if adapter.E.requires_grad]

    def _sharers(self) -> list[Member]:
        return self.trained() or self.adapters()  # all of them once they are frozen together

    def schedule(self) -> Schedule:
        found = self.method.schedule
        if found is None:
            raise VeneerError("AdaLoRA cuts its ranks by a schedule, for which it must know how many optimizer steps "
                              "there will be: give AdaLoRA(total_step=…), or use `veneer train`, which fills it in")
        return found

    def triplets(self, rank: int) -> int:
        """How many they are with `rank` in every matrix."""
        return sum(a.E.numel() for a in self._sharers()) // self.method.init_r * rank

    def kept(self) -> int:
        """How many are kept now."""
        return sum(int(a.mask.sum()) for a in self._sharers())

    # -- a step -----------------------------------------------------------------------------------------
    def advance(self, step: int, judged: bool = False) -> None:
        """Take up optimizer step `step`, whose gradients are still there; `judged`: they have been looked at."""
        schedule, trained = self.schedule(), self.trained()
        first, last = self.triplets(self.method.init_r), self.triplets(self.method.target_r)
        unjudged = self.step < schedule.end and not any(a.averages for a in trained)  # the very first step is the last
        if not judged and (step < schedule.end or unjudged):
            self._observe(trained)
        if schedule.allocates(step):
            self._allocate(trained, schedule.budget(step, first, last))
        elif step >= schedule.end > self.step:
            self._allocate(trained, last)
        elif step >= schedule.end:  # momentum moves what was cut
            for adapter in trained:
                adapter.cut()
        if step >= schedule.end:
            for adapter in trained:
                adapter.averages = {}
        self.step = step

    def _observe(self, trained: Sequence[Member]) -> None:
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        averages: list[Averages] = []
        for adapter in trained:
            for name in PARTS:
                p = adapter.get_parameter(name)
                if p.grad is None or not p.requires_grad:
                    continue
                if name not in adapter.averages:
                    adapter.averages[name] = (torch.zeros_like(p, dtype=wide(p)), torch.zeros_like(p, dtype=wide(p)))
                mean, stray = adapter.averages[name]
                adapter.averages[name] = (mean.to(p.device), stray.to(p.device))
                parameters.append(p)
                gradients.append(p.grad)
                averages.append(adapter.averages[name])
        observe(parameters, gradients, averages, self.method.beta1, self.method.beta2)

    def _allocate(self, trained: Sequence[Member], budget: int) -> None:
        masks = keep_best([importance(a.E, a.averages) for a in trained], budget)
        for adapter, mask in zip(trained, masks, strict=True):
            adapter.mask.copy_(mask)
            adapter.cut()

    # -- what a user may ask ----------------------------------------------------------------------------
    def is_final(self) -> bool:
        """Ranks have been cut down to the target."""
        return self.method.target_r < self.method.init_r and self.kept() == self.triplets(self.method.target_r)

    def notes(self) -> list[str]:
        """What whoever saves the adapters now should know."""
        target = self.triplets(self.method.target_r)
        if not self.step or (kept := self.kept()) == target:
            return []
        return [f"AdaLoRA's schedule was not through: after step {self.step} of {self.method.total_step}, {kept} of "
                f"{self.triplets(self.method.init_r)} triplets are left, and {target} are to be in the end"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "members": None}  # copies of the adapters add themselves

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, members=weakref.WeakValueDictionary())
