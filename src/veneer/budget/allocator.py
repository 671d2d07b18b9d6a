"""Who drives AdaLoRA's budget: an allocator that sees the optimizer's steps itself, or is told of them by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from veneer.budget import state
from veneer.budget.budget import Budget
from veneer.budget.changes import UNSEEN
from veneer.budget.member import Guardian, Member
from veneer.budget.orthogonality import add_orthogonality
from veneer.budget.steps import Follower, Token, same
from veneer.method import VeneerError

if TYPE_CHECKING:
    from veneer.methods.adalora import AdaLoRA

_BY_HAND = "veneer.update_and_allocate(model, step) after every step, before its gradients are set to None"
#: so many steps, or one interval of the schedule, may go by without a call in a loop that allocates by hand
_SILENT = 10


@dataclass(eq=False)
class Calls:
    """How the loop that runs now allocates; neither copied nor saved."""

    by_hand: bool = False
    silent: int = 0  # steps since the last call by hand
    without_E: int = 0  # steps of optimizers that hold A or B, since the last of one that holds E
    trusted: bool = False  # a step has been seen
    before: state.Snapshot | None = None  # from before the only step so far
    counted: Token | None = None  # the gradient of the last step that was counted unasked
    added: Token | None = None  # the gradient that has the orthogonality term already


class Allocator(Follower, Guardian):
    """The budget of the adapters of one method in one attach. They own it; it knows them weakly."""

    def __init__(self, method: AdaLoRA) -> None:
        super().__init__()
        self.budget = Budget(method)
        self.calls = Calls()

    def reset(self) -> None:
        self.budget.step = 0

    def get_extra_state(self) -> Tensor:
        """The step, for a model's state dict: one that is loaded brings its place in the schedule along."""
        return torch.tensor(self.budget.step)

    def set_extra_state(self, state: Tensor) -> None:
        self.budget.step = int(state)
        self.calls = Calls()

    def add(self, member: Member, place: int | None = None) -> int:
        self.follow()
        return self.budget.add(member, place)

    # -- steps that are seen ----------------------------------------------------------------------------
    def parameters_followed(self) -> Iterator[Tensor]:
        return (p for adapter in self.budget.adapters() for p in (adapter.E, adapter.A, adapter.B))

    def token(self) -> Token | None:
        grads = (adapter.E.grad for adapter in self.budget.trained())
        return next(((grad, grad._version) for grad in grads if grad is not None), None)

    @torch.no_grad()
    def before_step(self, held: set[int], scale: Tensor | None) -> None:
        trained = self.budget.trained()
        missing = [adapter.weight_name for adapter in trained if id(adapter.E) not in held]
        if 0 < len(missing) < len(trained):
            raise VeneerError(
                f"AdaLoRA: the optimizer holds E of {len(trained) - len(missing)} weights and not that of "
                f"{missing[0]!r}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "") + ", but they share "
                "one budget: give it all of veneer.trainable(model), and freeze E of what is not to be trained")
        if not missing and self.token() is not None:
            self.budget.schedule()
        self.calls.added = add_orthogonality(self.budget.adapters(), held, self.budget.method.orth_reg_weight, scale,
                                             self.calls.added)

    @torch.no_grad()
    def after_step(self, held: set[int]) -> None:
        calls, trained, token = self.calls, self.budget.trained(), self.token()
        if trained and id(trained[0].E) not in held:
            self._count_without_E()
        elif token is not None:  # else nothing of this method was live
            self.step_seen()
            calls.without_E = 0
            if calls.by_hand:
                return self._count_silent()
            if self.budget.step == 0 and self.budget.is_final():  # loaded and trained on: its ranks stay as they are
                self.budget.step = self.budget.schedule().end
            calls.before = None if calls.trusted else state.Snapshot(self.budget)
            self.budget.advance(self.budget.step + 1)
            calls.trusted, calls.counted = True, token

    # -- steps told of by hand --------------------------------------------------------------------------
    @torch.no_grad()
    def advance(self, step: int) -> bool:
        """From the first call on, no step is counted unasked; one that was is taken back or not counted twice."""
        calls = self.calls
        if self.token() is None and step < self.budget.schedule().end:
            raise VeneerError(f"AdaLoRA: at step {step} no E has a gradient to judge by: call {_BY_HAND}")
        if calls.before is not None:
            calls.before.restore()
            calls.before = calls.counted = None
        self.step_seen()
        calls.by_hand, calls.trusted, calls.silent = True, True, 0
        self.budget.advance(step, judged=same(calls.counted, self.token()))
        return True

    # -- a budget that does not move --------------------------------------------------------------------
    def values_set(self) -> None:
        self.step_seen()

    def saw_backward(self, E: Tensor) -> None:
        if self.loop.changes.backward(E, quick=self.calls.trusted):
            raise VeneerError(
                f"AdaLoRA: its budget has not moved: E has changed between backward passes {UNSEEN} times, but no step "
                "of a torch.optim.Optimizer that holds it was seen. Use such an optimizer or, where parameters are "
                f"updated in another way, call {_BY_HAND}")

    def _count_without_E(self) -> None:
        if self.calls.trusted:  # the optimizer of E has been seen, and may step less often
            return
        self.calls.without_E += 1
        if self.calls.without_E >= UNSEEN and self.token() is not None:
            raise VeneerError(
                f"AdaLoRA: its budget has not moved: {UNSEEN} steps were taken by optimizers with A or B and not E: "
                "give E to one too (all of veneer.trainable(model)), or freeze it")

    def _count_silent(self) -> None:
        self.calls.silent += 1
        plan = self.budget.schedule()
        if self.calls.silent > max(_SILENT, plan.every) and self.budget.step < plan.end:
            raise VeneerError(
                f"AdaLoRA: its budget has not moved: the last call by hand was for step {self.budget.step}, and "
                f"{self.calls.silent} steps have followed: call {_BY_HAND}, or never, to have it done unasked")

    # -- what is kept -----------------------------------------------------------------------------------
    def progress(self) -> dict[str, Tensor]:
        return state.progress(self.budget)

    def resume(self, progress: Mapping[str, Tensor]) -> None:
        state.resume(self.budget, progress)
        self.step_seen()
        self.calls = Calls()

    def notes(self) -> list[str]:
        return self.budget.notes()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "calls": Calls()}
