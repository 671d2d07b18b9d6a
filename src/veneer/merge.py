"""merge, unmerge: the adapted weights written over the base weights, and taken back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from veneer.attached import hosts, known_names, refuse_merged, refuse_split_ties, routes
from veneer.hosts import Host
from veneer.method import VeneerError, without_autocast


def merge(model: nn.Module, names: str | Iterable[str] | None = None, keep: bool = True) -> nn.Module:
    """Write the adapted weights over the base weights; `names` defaults to the live adapters.

    Computed in fp32 or wider and rounded once. With `keep` the base's own values are kept (costing their
    memory) so that `unmerge` gives their bits back; without, the merge is final.
    Raises `VeneerError`, with nothing changed, when a merged weight would not be finite, when something is
    merged already, or when a live adapter that is left out would start from the merged weights and change.
    """
    refuse_merged(model, "merge")
    refuse_split_ties(model, "merge")
    if names is None:
        names = [n for each in routes(model) for n in each.live]
    wanted = known_names(model, [names] if isinstance(names, str) else names)
    if not wanted:
        raise VeneerError("merge: no adapter is live; name the ones to merge")
    _no_dependents(model, wanted)
    done: dict[int, Any] = {}
    todo = [(host, _merged_values(module, host, wanted, done)) for module, host in hosts(model)]
    for host, values in todo:
        for param, value in values.items():
            host.write(param, value, keep)
        host.veneer.merged = tuple(n for n in wanted if n in host.adapters)
    return model


def _no_dependents(model: nn.Module, wanted: Sequence[str]) -> None:
    for name, host in hosts(model):
        for param in host.veneer.layouts:
            left = [n for n in host.veneer.route.live if n not in wanted]
            for other, adapter in ((n, a) for n in left for a in host.live(param, [n])):
                if host.live(param, wanted) and adapter.method is not None and not adapter.method.additive:
                    raise VeneerError(f"merge: {other!r} is live on {name}.{param} too, and its {adapter.method} "
                                      "starts from the base weight, so merging only the others would change it; "
                                      "merge all of them, or activate only what is to be merged")


@torch.no_grad()
def _merged_values(name: str, host: Host, wanted: Sequence[str], done: dict[int, Any]) -> dict[str, torch.Tensor]:
    """New values by parameter name; a tied tensor is merged once, in its first place."""
    values: dict[str, torch.Tensor] = {}
    for param in host.veneer.layouts:
        stored = host.carrier(param)
        adapters = host.live(param, wanted)
        if not adapters or stored is None or id(stored) in done:
            continue
        done[id(stored)] = True
        with without_autocast(stored):
            values[param] = host.adapted_weight(param, adapters, wide=True).to(host.weight_dtype(param))
    added = [a.bias_delta() for a in host.live("weight", wanted)] if "weight" in host.veneer.layouts else []
    extra = [d for d in added if d is not None]
    if extra:
        bias = values.get("bias", host.carrier("bias"))
        total = torch.stack([d.to(torch.promote_types(d.dtype, torch.float32)) for d in extra]).sum(0)
        values["bias"] = (total if bias is None else bias + total).to(host.weight_dtype("weight"))
    for param, value in values.items():
        if not torch.isfinite(value).all():
            raise VeneerError(f"merge: {name}.{param} would hold NaN or infinite values; nothing was merged")
    return values


def unmerge(model: nn.Module) -> nn.Module:
    """Give the base weights their own bits back, after any number of cycles.

    Raises `VeneerError` when nothing is merged, or when the originals were not kept.
    """
    merged = [host for _, host in hosts(model) if host.veneer.merged]
    if not merged:
        raise VeneerError("unmerge: nothing is merged")
    refuse_split_ties(model, "unmerge")
    if not any(host.veneer.kept for host in merged):
        raise VeneerError("unmerge: the merge was made with keep=False, so the base's own values are gone")
    for host in merged:
        for param in list(host.veneer.kept):
            host.restore(param)
        host.veneer.merged = ()
    return model
