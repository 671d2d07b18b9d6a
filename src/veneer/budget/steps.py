"""Seeing an optimizer's steps, whoever takes them, without being told: for state that has to follow training.

Two hooks on all optimizers, laid once when the first such state comes to life. They cost a look into a table where an
optimizer holds none of its parameters. An optimizer that is no `torch.optim.Optimizer` runs no hooks: see `changes`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from veneer.budget.changes import Changes
from veneer.method import Shared

#: a gradient and its version, by which one backward pass is told from the next
Token = tuple[Tensor, int]


@dataclass(eq=False)
class Loop:
    """What is known of the training loop that runs now; neither copied nor saved."""

    inside: tuple[weakref.ref[Optimizer], Token | None] | None = None  # whose step is being taken
    changes: Changes = field(default_factory=Changes)  # of a parameter, that no step explains


class Follower(Shared):
    """Shared state that acts before and after the steps of the optimizer that holds its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = Loop()

    # -- what a subclass defines ------------------------------------------------------------------------
    def parameters_followed(self) -> Iterable[Tensor]:
        """The parameters whose optimizer is followed."""
        raise NotImplementedError(f"{type(self).__name__} must define parameters_followed")

    def token(self) -> Token | None:
        """Some gradient that every step uses, or None before there is one."""
        raise NotImplementedError(f"{type(self).__name__} must define token")

    def before_step(self, held: set[int], scale: Tensor | None) -> None:
        """held: the ids of all parameters of the optimizer; scale: what gradients are still to be divided by."""

    def after_step(self, held: set[int]) -> None:
        """The step is taken; gradients are still there, unscaled."""

    # -- shared machinery -------------------------------------------------------------------------------
    def follow(self) -> None:
        """From now on the steps of optimizers are seen; also to be called when parameters were replaced."""
        _lay_hooks()
        _followers.add(self)
        _strangers.clear()

    def enter(self, optimizer: Optimizer, held: set[int], scale: Tensor | None) -> None:
        token, inside = self.token(), self.loop.inside
        if inside is not None and inside[0]() not in (None, optimizer) and same(inside[1], token):
            return  # an optimizer within another one's step (Lookahead, ZeRO): the outer one's step is what counts
        self.loop.inside = (weakref.ref(optimizer), token)
        self.before_step(held, scale)

    def leave(self, optimizer: Optimizer, held: set[int]) -> None:
        inside = self.loop.inside
        if inside is not None and inside[0]() is optimizer:
            self.loop.inside = None
            self.after_step(held)

    def step_seen(self) -> None:
        self.loop.changes = Changes()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loop": Loop()}


def same(a: Token | None, b: Token | None) -> bool:
    return a is not None and b is not None and a[0] is b[0] and a[1] == b[1]


_followers: weakref.WeakSet[Follower] = weakref.WeakSet()
_strangers: weakref.WeakKeyDictionary[Optimizer, tuple] = weakref.WeakKeyDictionary()  # that hold nothing of ours
_laid = False


def _lay_hooks() -> None:
    global _laid
    if not _laid:
        _laid = True
        register_optimizer_step_pre_hook(_before)
        register_optimizer_step_post_hook(_after)


def _found(optimizer: Optimizer) -> tuple[list[Follower], set[int]]:
    """The followers of this optimizer, and the ids of its parameters."""
    if not _followers:
        return [], set()
    lists = [group["params"] for group in optimizer.param_groups]
    ends = tuple((len(params), id(params[0]), id(params[-1])) for params in lists if params)
    if _strangers.get(optimizer) == ends:
        return [], set()
    held = {id(p) for params in lists for p in params}
    found = [f for f in list(_followers) if any(id(p) in held for p in f.parameters_followed())]
    if not found:
        _strangers[optimizer] = ends
    return found, held


def _scaling(optimizer: Optimizer) -> tuple[Tensor | None, bool]:
    """What a GradScaler has told an optimizer that unscales by itself: the scale, and whether it will skip the step.

    Other optimizers get unscaled gradients, and no step is called that is to be skipped.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return getattr(optimizer, "grad_scale", None), found_inf is not None and bool(found_inf)


def _before(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    found, held = _found(optimizer)
    if not found:
        return None
    scale, skipped = _scaling(optimizer)
    if skipped:
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        for follower in found:
            follower.enter(optimizer, held, scale)
        return None

    def after_closure(*inputs: Any) -> Any:  # gradients are made in there, perhaps many times in one step
        loss = closure(*inputs)
        for follower in found:
            follower.enter(optimizer, held, scale)
        return loss

    rest = {key: value for key, value in kwargs.items() if key != "closure"}
    return (args[0], after_closure, *args[2:]), rest


def _after(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
    found, held = _found(optimizer)
    for follower in found:
        follower.leave(optimizer, held)
