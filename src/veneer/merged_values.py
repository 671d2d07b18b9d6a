"""What merging makes of each weight; changes nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from veneer.attached import hosts
from veneer.hosts import Host
from veneer.method import VeneerError, without_autocast
from veneer.storage import packed_storage
from veneer.storage.requantise import Requantised

Values = dict[str, Tensor | Requantised]


def refuse_dependents(model: nn.Module, wanted: Sequence[str]) -> None:
    """Refuse to change the base under a live adapter that starts from it and is not merged."""
    for name, host in hosts(model):
        for param in host.veneer.layouts:
            left = [n for n in host.veneer.route.live if n not in wanted]
            for other, adapter in ((n, a) for n in left for a in host.live(param, [n])):
                if host.live(param, wanted) and adapter.method is not None and not adapter.method.additive:
                    raise VeneerError(f"merge: {other!r} is live on {name}.{param} too, and its {adapter.method} "
                                      "starts from the base weight, so merging only the others would change it; "
                                      "merge all of them, or activate only what is to be merged")


def new_values(model: nn.Module, wanted: Sequence[str], requantize: bool,
                only_packed: bool = False) -> Iterator[tuple[str, Host, Values]]:
    """(module name, host, new values by parameter); a tied tensor is merged once, in its first place."""
    if requantize:
        _check_writable(model, wanted)
    done: set[int] = set()
    for name, host in hosts(model):
        values: Values = {}
        for param in [*host.veneer.layouts, *([] if "bias" in host.veneer.layouts else ["bias"])]:
            stored = host.carrier(param)
            if stored is not None and id(stored) in done:
                continue
            if requantize and param == "weight" and packed_storage(host) is not None:
                new: Tensor | Requantised | None = _packed_again(name, host, wanted)
            else:
                new = None if only_packed else merged_value(name, host, param, wanted)
            if new is not None:
                values[param] = new
                done |= set() if stored is None else {id(stored)}
        yield name, host, values


@torch.no_grad()
def merged_value(name: str, host: Host, param: str, wanted: Sequence[str]) -> Tensor | None:
    """What a parameter of the host called `name` becomes by merging (stored layout, its own dtype), or None where it
    stays. Raises `VeneerError` where that would not be finite."""
    stored = host.carrier(param)
    adapters = host.live(param, wanted) if stored is not None and param in host.veneer.layouts else []
    added = host.added_bias(wanted) if param == "bias" else None
    if not adapters and added is None:
        return None
    with without_autocast(added if stored is None else stored):  # type: ignore[arg-type]
        new = host.adapted_weight(param, adapters, wide=True) if adapters else stored
    if added is not None:
        new = added if new is None else new + added
    assert new is not None
    dtype = host.weight_dtype("weight") if stored is None else _dtype(host, param, stored)
    new = new.to(dtype)
    _check_finite(f"{name}.{param}" if name else param, bool(torch.isfinite(new).all()))
    return new


def _dtype(host: Host, param: str, stored: Tensor) -> torch.dtype:
    return stored.dtype if param == "bias" else host.weight_dtype(param)


@torch.no_grad()
def _packed_again(name: str, host: Host, wanted: Sequence[str]) -> Requantised | None:
    adapters = host.live("weight", wanted) if "weight" in host.veneer.layouts else []
    if not adapters:
        return None
    new = host.requantised("weight", adapters)
    assert new is not None
    _check_finite(f"{name}.weight" if name else "weight", math.isfinite(new.change))
    return new


def _check_finite(path: str, finite: bool) -> None:
    if not finite:
        raise VeneerError(f"merge: {path} would hold NaN or infinite values; nothing was merged")


def _check_writable(model: nn.Module, wanted: Sequence[str]) -> None:
    found = {name or "weight": storage for name, host in hosts(model)
             if (storage := packed_storage(host)) is not None and "weight" in host.veneer.layouts
             and host.live("weight", wanted)}
    if not found:
        raise VeneerError("merge: requantize=True, and no adapted weight is packed; leave it out to merge into the "
                          "weights as they are")
    fixed = {name: storage for name, storage in found.items() if not storage.writable}
    for name, storage in fixed.items():
        more = f" and {len(fixed) - 1} more" if len(fixed) > 1 else ""
        raise VeneerError(f"merge: {name!r}{more} cannot be quantised again: nothing here writes {storage.name}. "
                          "Merge into ordinary numbers (requantize=False)")
