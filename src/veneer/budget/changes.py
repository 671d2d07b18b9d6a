"""Noticing that a parameter is trained by something whose steps are not seen.

An optimizer that is no `torch.optim.Optimizer`, or an update by hand, runs no hooks of torch's. But it changes
parameters between backward passes, and backward passes can be seen.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

#: so many changes that no step explains are no accident
UNSEEN = 3


def watch(parameter: nn.Parameter, tell: Callable[[Tensor], None]) -> None:
    """Have `tell` called after every backward pass that reaches `parameter`."""
    trained = parameter.requires_grad
    parameter.requires_grad_(True)  # else no hook is taken; it stays when this is turned off again
    parameter.register_post_accumulate_grad_hook(tell)
    parameter.requires_grad_(trained)


class Changes:
    """Of the first parameter that a backward pass reaches after this was made. To be made anew when a step is seen, or
    when values were loaded."""

    def __init__(self) -> None:
        self.parameter: Tensor | None = None
        self.count = 0

    def backward(self, parameter: Tensor, quick: bool) -> bool:
        """A backward pass has reached `parameter`; True when there were too many changes.

        Values are compared, since what writes through `.data` or raw pointers leaves no other trace; `quick` leaves
        it at the parameter's version on devices where that comparison would make the host wait.
        """
        if self.parameter is None:
            self._keep(parameter)
        elif self.parameter is parameter and not self._is_kept(parameter, quick):
            self.count += 1
            self._keep(parameter)
        return self.count >= UNSEEN

    def _keep(self, parameter: Tensor) -> None:
        self.parameter, self.values, self.version = parameter, parameter.detach().clone(), parameter._version

    def _is_kept(self, parameter: Tensor, quick: bool) -> bool:
        if quick and not parameter.is_cpu:
            return parameter._version == self.version
        return torch.equal(parameter.detach(), self.values)
