"""What an adapter needs to share a budget of ranks with others."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from veneer.budget.arithmetic import Averages
from veneer.budget.changes import watch
from veneer.method import Adapter, Shape, Shared
from veneer.sharding import spread_like


class Guardian(Shared):
    """The side of a shared budget that its members see."""

    def add(self, member: Member, place: int | None = None) -> int:
        """Know one more adapter, weakly; returns its place among them, by which it adds itself again."""
        raise NotImplementedError(f"{type(self).__name__} must define add")

    def values_set(self) -> None:
        """E may have other values now, which no step has made."""

    def saw_backward(self, E: Tensor) -> None:
        """A backward pass has reached the E of a member."""


class Member(Adapter):
    """ΔW = s·B·diag(E)·A with A (*batch, r, in), E (*batch, r), B (*batch, out, r), of whose triplets a budget keeps
    those in `mask` (*batch, r). A subclass makes these and then calls `use`."""

    A: nn.Parameter
    E: nn.Parameter
    B: nn.Parameter
    mask: Tensor

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__(shape, dropout)
        self.averages: dict[str, Averages] = {}  # of the sensitivity of A, E and B, kept here for the budget
        self.place: int | None = None

    @property
    def weight_name(self) -> str:
        return self.seed_key.partition("/")[2]

    def cut(self) -> None:
        """E is 0 in all triplets but those in the mask."""
        self.E.masked_fill_(spread_like(~self.mask, self.E), 0)

    def guardian(self) -> Guardian | None:
        found = self.shared_state()
        return found if isinstance(found, Guardian) else None

    def use(self, shared: Shared) -> None:
        super().use(shared)
        self._join()

    def _join(self) -> None:
        """Be known to the budget, and have it told of backward passes: when new, copied, or with a new E."""
        guardian = self.guardian()
        if guardian is None:
            return
        self.place = guardian.add(self, self.place)
        if self._cache.get("watched") is not self.E:
            watch(self.E, functools.partial(_tell, weakref.ref(self)))
            self._cache["watched"] = self.E

    def _apply(self, fn: Callable, recurse: bool = True) -> Member:
        super()._apply(fn, recurse)
        self._join()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._join()
        if (guardian := self.guardian()) is not None:
            guardian.values_set()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._join()


def _tell(member: weakref.ref[Member], E: Tensor) -> None:
    owner = member()
    guardian = None if owner is None else owner.guardian()
    if guardian is not None:
        guardian.saw_backward(E)
