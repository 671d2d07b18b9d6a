"""merge, unmerge: the adapted weights written over the base weights, and taken back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from veneer.attached import hosts, known_names, refuse_merged, refuse_split_ties, routes
from veneer.hosts import Host
from veneer.merged_values import Values, new_values, refuse_dependents
from veneer.method import VeneerError
from veneer.storage import packed_storage
from veneer.storage.quantizer_flags import forget_quantizer
from veneer.storage.requantise import Requantised, surviving
from veneer.weights import base_modules, foreign
from veneer.wrappers import unwrap

_ALTERNATIVES = ("merge into ordinary 16-bit numbers (requantize=False), quantise those into more bits than before, or "
                 "leave the adapter beside the packed weights; at_least=… accepts a smaller share")


@dataclass(frozen=True)
class RequantizeReport:
    """What is left of a trained change after quantising the merged weights again.

    changes: packed weight → ‖ΔW‖² and ‖(W′ − W) − ΔW‖², with W and W′ what the packed weight is read as before and
    after (Frobenius). A share is 1 minus the second over the first.
    """

    changes: Mapping[str, tuple[float, float]]

    @property
    def share(self) -> float:
        """Over all packed weights together."""
        return surviving(*(sum(values) for values in zip(*self.changes.values(), strict=True)))

    @property
    def weights(self) -> dict[str, float]:
        """The share of each packed weight by name, the smallest first."""
        return dict(sorted(((n, surviving(*c)) for n, c in self.changes.items()), key=lambda item: item[1]))

    def __str__(self) -> str:
        worst = [f"{name!r} {_percent(share)}" for name, share in list(self.weights.items())[:3]]
        return (f"{_percent(self.share)} of the trained change survives quantising {len(self.changes)} merged weights "
                f"again; least: {', '.join(worst)}")


def _percent(share: float) -> str:
    """Below 0 more went wrong than was to change."""
    text = f"{100 * share:.1f}%" if math.isfinite(share) else ""
    return text if share >= 0 else f"none ({text})" if text else "none"


def merge(model: nn.Module, names: str | Iterable[str] | None = None, keep: bool = True, requantize: bool = False,
          at_least: float = 0.9) -> nn.Module:
    """Write the adapted weights over the base weights; `names` defaults to the live adapters.

    Computed in fp32 or wider and rounded once. With `keep` the base's own values are kept (costing their
    memory) so that `unmerge` gives their bits back; without, the merge is final.

    A packed weight becomes ordinary numbers in the dtype that it is read as (with `keep` beside the packed one, which
    stays). requantize: pack it again instead, with its own settings. Rounding to a few bits takes a small change away,
    so what is left of it is measured over all packed weights, and less than `at_least` (a share, 1 = all of it) is
    refused; `veneer.inspect.requantized(model)` has the figures, before a merge as well as after it.

    Raises `VeneerError`, with nothing changed, when a merged weight would not be finite, when something is
    merged already, when a live adapter that is left out would start from the merged weights and change; with
    requantize also where no adapted weight is packed, or one is held in a form that cannot be written.
    """
    if not isinstance(at_least, (int, float)) or isinstance(at_least, bool) or not at_least <= 1:
        raise VeneerError(f"merge: at_least is the share of the trained change that must survive, at most 1, "
                          f"got {at_least!r}")
    wanted = _wanted(model, names, "merge")
    todo = list(new_values(model, wanted, requantize))
    if requantize:
        report = RequantizeReport(_changes(todo))
        if not report.share >= at_least:
            raise VeneerError(f"merge: {report}. That is below at_least={at_least}, so nothing was merged. Instead: "
                              f"{_ALTERNATIVES}")
    packed = any(packed_storage(host) is not None for _, host, values in todo if "weight" in values)
    for _, host, values in todo:
        for param, value in values.items():
            host.write(param, value, keep)
        host.veneer.merged = tuple(n for n in wanted if n in host.adapters)
    if packed and not keep and not any(packed_storage(m) for _, m in base_modules(model)) and not foreign(model):
        forget_quantizer(unwrap(model))
    return model


def requantized(model: nn.Module, names: str | Iterable[str] | None = None) -> RequantizeReport:
    """How much of a trained change is left after `merge(..., requantize=True)`: of the one that was made, while it is
    there; else of one of `names` (default: the live adapters), which is tried and not made.

    Raises `VeneerError` as that merge does, but not for a small share.
    """
    made = {name or "weight": host.veneer.requantised for name, host in hosts(model)
            if host.veneer.merged and host.veneer.requantised is not None}
    if made:
        return RequantizeReport(made)
    changes: dict[str, tuple[float, float]] = {}
    for found in new_values(model, _wanted(model, names, "requantized"), True, only_packed=True):
        changes |= _changes([found])  # and what was packed for it is gone again
    return RequantizeReport(changes)


def _wanted(model: nn.Module, names: str | Iterable[str] | None, doing: str) -> list[str]:
    refuse_merged(model, doing)
    refuse_split_ties(model, doing)
    if names is None:
        names = [n for each in routes(model) for n in each.live]
    wanted = known_names(model, [names] if isinstance(names, str) else names)
    if not wanted:
        raise VeneerError(f"{doing}: no adapter is live; name the ones to merge")
    refuse_dependents(model, wanted)
    return wanted


def _changes(todo: Iterable[tuple[str, Host, Values]]) -> dict[str, tuple[float, float]]:
    return {name or "weight": (value.change, value.lost) for name, _, values in todo for value in values.values()
            if isinstance(value, Requantised)}


def unmerge(model: nn.Module) -> nn.Module:
    """Give the base weights their own bits back, after any number of cycles.

    Raises `VeneerError` when nothing is merged, when the originals were not kept, or when a weight that was packed
    again has been moved to another device since.
    """
    found = {name: host for name, host in hosts(model) if host.veneer.merged}
    merged = list(found.values())
    if not merged:
        raise VeneerError("unmerge: nothing is merged")
    refuse_split_ties(model, "unmerge")
    if not any(host.veneer.kept for host in merged):
        raise VeneerError("unmerge: the merge was made with keep=False, so the base's own values are gone")
    for name, host in found.items():
        reason = host.unrestorable()
        if reason is not None:
            raise VeneerError(f"unmerge: the weight of {name or 'this module'!r} cannot be put back: {reason}")
    for host in merged:
        for param in list(host.veneer.kept):
            host.restore(param)
        host.veneer.merged = ()
    return model
