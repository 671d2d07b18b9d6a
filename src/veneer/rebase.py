"""What starts make of base weights: prepared while nothing has changed, then written, all of them or none."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from veneer.hosts import Host
from veneer.hosts.packed import PackedHost
from veneer.method import NewBase, VeneerError
from veneer.plan import PlanEntry
from veneer.storage import dense, packed
from veneer.storage.base import own_class
from veneer.storage.recent import RECENT
from veneer.weights import Weight


@dataclass(eq=False)
class Rewrite:
    """A weight's new base, as it will be held: an encoded matrix, or numbers in the stored layout, dtype and device.

    loose: why what a start gave packed is held as ordinary numbers, or None.
    """

    weight: Weight
    held: Any = None
    numbers: Tensor | None = None
    loose: str | None = None


def prepare(entry: PlanEntry, base: NewBase) -> Rewrite:
    """Everything about a rewrite that can fail or takes memory in fp32. Raises `VeneerError` for a packed weight that
    cannot hold what the start made as it is: packing that once more would round it again."""
    weight, storage = entry.weight, entry.weight.storage
    if storage is not None:
        if not storage.takes(weight.places[0].module, base.packed):
            raise VeneerError(f"attach: the start of {entry.method} rewrites the base weight, and {entry.name!r} is "
                              f"held as {weight.held_as} already, which would round what it writes. Load the model in "
                              "ordinary numbers, or attach with a plain start and then use "
                              "veneer.replace_lora_weights_loftq(model, originals)")
        return Rewrite(weight, base.packed)
    loose = None if base.packed is None else _unpackable(weight)
    if base.packed is not None and loose is None:
        return Rewrite(weight, base.packed)
    numbers = weight.layout.stored(base.matrix).to(weight.tensor.device, weight.tensor.dtype)
    return Rewrite(weight, None, numbers, loose if weight.is_linear else None)


def write(rewrites: Sequence[Rewrite]) -> None:
    """Put the new bases in. Where one cannot be, those before it get back what they had, and its error goes on."""
    undo: list[Callable[[], object]] = []
    try:
        for rewrite in rewrites:
            _write(rewrite, undo)
    except BaseException:
        for back in reversed(undo):
            back()
        raise


def _write(rewrite: Rewrite, undo: list[Callable[[], object]]) -> None:
    place = rewrite.weight.places[0]
    module, storage = place.module, place.storage
    if rewrite.held is None:
        stored, numbers = module._parameters[place.param], rewrite.numbers
        assert stored is not None
        assert numbers is not None
        undo.append(functools.partial(dense.swap, stored, stored.data))
        dense.swap(stored, numbers)  # one parameter, in all its places
        return
    undo.append(_as_it_is(module))
    if storage is not None:
        storage.swap(module, rewrite.held)
        RECENT.forget(module)
    else:
        _pack(module, rewrite.held)


def _unpackable(weight: Weight) -> str | None:
    """Why this weight, which is one of ordinary numbers, cannot be held packed; None where it can."""
    if len(weight.places) > 1:
        return "it is tied"  # a packed layer's parameter is its own
    kind = own_class(weight.places[0].module)
    return None if kind is nn.Linear else f"only an nn.Linear itself is packed, and this is a {kind.__name__}"


def _pack(module: Any, held: Any) -> None:
    adapted: Any = type(module) if isinstance(module, Host) else None  # with adapters on its bias
    if adapted is None:
        packed.install(module, held)
        return
    module.__class__ = own_class(module)
    packed.install(module, held)
    module.__class__ = adapted
    module.become(packed.PackedLinear, PackedHost)  # the host goes on over the layer's new class


def _as_it_is(module: nn.Module) -> Callable[[], None]:
    """What gives the module its present class, attributes, parameters and buffers back."""
    kind, own = type(module), dict(module.__dict__)
    tables: list[tuple[dict, dict]] = [(table, dict(table)) for table in (module._parameters, module._buffers)]
    loose = set(module._non_persistent_buffers_set)

    def back() -> None:
        module.__class__ = kind
        module.__dict__.clear()
        module.__dict__.update(own)
        for table, before in tables:
            table.clear()
            table.update(before)
        module._non_persistent_buffers_set = loose
        RECENT.forget(module)

    return back
