"""update_and_allocate: telling adapters that share a budget of ranks of an optimizer step, by hand."""

from __future__ import annotations

from torch import nn

from veneer.attached import adapter_names, shared_states
from veneer.method import VeneerError, nearest
from veneer.wrappers import unwrap


def update_and_allocate(model: nn.Module, global_step: int, name: str = "default") -> None:
    """Judge the triplets of the adapter `name` by the gradients of optimizer step `global_step`, and cut its ranks
    where its schedule says so.

    Only for loops whose optimizer is no `torch.optim.Optimizer`, or that number their steps in a way of their own:
    steps of torch's optimizers are seen without this. From the first call on they are not counted any more. Call it
    after every step, while its gradients are still there; steps count from 1.

        loss.backward()
        optimizer.step()
        veneer.update_and_allocate(model, step)
        optimizer.zero_grad()

    Raises `VeneerError` for an unknown name, an adapter without a budget, a step that is no whole number, missing
    gradients, and a method that does not know how many steps there will be.
    """
    model = unwrap(model)
    present = adapter_names(model)
    if name not in present:
        raise VeneerError(f"update_and_allocate: no adapter named {name!r} on this model"
                          f"{nearest(str(name), present) or '.'} It has: {', '.join(map(repr, present)) or 'none'}")
    if isinstance(global_step, bool) or not isinstance(global_step, int) or global_step < 0:
        raise VeneerError(f"update_and_allocate: global_step must be a whole number of at least 0, got {global_step!r}")
    if not any([state.advance(global_step) for state in shared_states(model, name)]):
        raise VeneerError(f"update_and_allocate: adapter {name!r} has no budget of ranks to allocate, as AdaLoRA has")
