"""An adapter on a model that is there only as its structure, and the weights that it is merged into, one at a time.

The adapter is attached on the meta device and given its values. When a weight comes by it is put into its place, merged
there by the code that merges a loaded model, and taken out again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from veneer.attached import attached, hosts
from veneer.hosts import Host
from veneer.io.fingerprint import Fingerprint, begun_elsewhere, compare
from veneer.io.load import attach_records, fill, fill_adapter, is_started
from veneer.io.reading import read_records
from veneer.io.records import SHOWN, Record
from veneer.merged_values import merged_value
from veneer.method import Adapter, VeneerError
from veneer.weights import Weight, base_modules, scan

_NAME = "merged"


class Spot(NamedTuple):
    """A parameter that merging changes: where it is, and the weight it is if an adapter lies on it."""

    module: str
    host: Host
    param: str
    weight: Weight | None


class Structure:
    """`weights`: the model's, by every path of a parameter; `spots`: those that merging changes, likewise."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.weights = {place.names[-1]: weight for weight in scan(model) for place in weight.places}
        self.spots: dict[str, Spot] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.merged = 0
        self._strict = True
        self._started: dict[str, tuple[Adapter, Record]] = {}
        self._fingerprint: Fingerprint | None = None

    # -- the adapter ------------------------------------------------------------------------------------
    def take(self, path: str | Path, strict: bool, allow_pickle: bool, values: Callable[[Weight], Tensor | None],
             where: Path) -> None:
        """Lay the adapter at `path` over the structure, with its values. values: of a base weight; where: the model's
        folder, for messages. Raises `VeneerError` as `load` does."""
        stored, weights, records, problems = read_records(self.model, path, allow_pickle, values)
        if problems and (strict or not records):
            raise VeneerError(listed(f"merge_checkpoint: {stored.file} does not fit the model in {where} "
                                     f"({len(problems)} problems); nothing was written. strict=False merges what fits",
                                     problems))
        self.problems, self.notes, self._fingerprint, self._strict = problems, stored.notes, stored.fingerprint, strict
        attach_records(self.model, weights, records, _NAME, stored)
        for adapter in _unfilled(self.model):
            adapter.to_empty(device="cpu")
        fill(self.model, _NAME, records)
        self._find_spots({record.name: record for record in records})

    def _find_spots(self, records: Mapping[str, Record]) -> None:
        by_module = dict(hosts(self.model))
        for weight, adapter in attached(self.model, _NAME):
            record = records[weight.name]
            if is_started(record):
                self._started[weight.name] = adapter, record
            first = weight.places[0]
            spot = Spot(first.module_name, by_module[first.module_name], first.param, weight)
            for place in weight.places:
                self.spots[place.names[-1]] = spot
                if adapter.bias_delta() is not None:
                    self._add_bias(place.module_name, by_module[place.module_name])

    def _add_bias(self, name: str, host: Host) -> None:
        if host.carrier("bias") is None:
            raise VeneerError(f"merge_checkpoint: the adapter adds a bias to {name!r}, and the model has none there, "
                              "so that it would be lost on loading. Merge into the loaded model in memory")
        self.spots.setdefault(f"{name}.bias" if name else "bias", Spot(name, host, "bias", None))

    # -- the weights ------------------------------------------------------------------------------------
    def changed(self, param: str, value: Tensor) -> Tensor:
        """A parameter merged, or itself."""
        self.check(param, value)
        spot = self.spots.get(param)
        if spot is None:
            return value
        if spot.weight is not None and spot.weight.name in self._started:
            value = self._begun(spot.weight, value)
        empty = spot.host._parameters[spot.param]
        spot.host._parameters[spot.param] = nn.Parameter(value, requires_grad=False)
        try:
            new = merged_value(spot.module, spot.host, spot.param, [_NAME])
        finally:
            spot.host._parameters[spot.param] = empty
        assert new is not None
        self.merged += 1
        return new

    def _begun(self, weight: Weight, value: Tensor) -> Tensor:
        """The base weight as training began with it, where the adapter's start rewrites it."""
        adapter, record = self._started[weight.name]
        moved = adapter.initialise(weight.layout.matrix(value))
        fill_adapter(adapter, record)
        return value if moved is None else weight.layout.stored(moved.matrix).to(value.dtype)

    def check(self, param: str, value: Tensor) -> None:
        """Whether a base weight is the one that the adapter was trained on, as far as its file knows."""
        weight, saved = self.weights.get(param), self._fingerprint
        if weight is None or saved is None or weight.name not in saved.samples:
            return
        only = dataclasses.replace(saved, samples={weight.name: saved.samples[weight.name]})
        empty, weight.tensor = weight.tensor, value
        try:
            found = compare(only, [weight])
            if weight.name in self._started:
                found += begun_elsewhere(only, [weight])
        finally:
            weight.tensor = empty
        if found and self._strict:
            raise VeneerError(f"merge_checkpoint: another base model: {found[0]}. Nothing was written; strict=False "
                              "merges all the same")
        self.problems += [text for text in found if text not in self.problems]


def _unfilled(model: nn.Module) -> list[Adapter]:
    """Every adapter that is on the meta device, each once."""
    found = {id(part): part for _, module in base_modules(model) if isinstance(module, Host)
             for part in module.adapters.modules() if isinstance(part, Adapter)}
    return [adapter for adapter in found.values() if adapter.on_meta()]


def listed(title: str, problems: list[str]) -> str:
    """A message with the first of many problems below it."""
    more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join([title, *problems[:SHOWN], *more])
