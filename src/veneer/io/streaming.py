"""Merging an adapter into tensors that pass by one at a time: the model is there only as its structure.

The adapter is attached to the structure, which lies on the meta device, and given its values. When a weight comes by it
is put into its place, merged there by the code that merges a loaded model, and taken out again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.attached import attached, hosts
from veneer.hosts import Host
from veneer.io.checkpoint import Checkpoint
from veneer.io.checkpoint_names import Group, Names
from veneer.io.fingerprint import Fingerprint, compare
from veneer.io.load import attach_records, fill, fill_adapter, is_started
from veneer.io.reading import read_records
from veneer.io.records import SHOWN, Record
from veneer.io.tensors import Announced
from veneer.merged_values import merged_value
from veneer.method import Adapter, VeneerError, nearest
from veneer.weights import Weight, base_modules, scan

_NAME = "merged"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Spot(NamedTuple):
    """A parameter that merging changes: where it is, and the weight it is if an adapter lies on it."""

    module: str
    host: Host
    param: str
    weight: Weight | None


class Merger:
    """`announced`: dtype and shape of every tensor that `tensor` will give."""

    def __init__(self, checkpoint: Checkpoint, names: Names, dtype: torch.dtype | None) -> None:
        self.checkpoint, self.names = checkpoint, names
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.merged = 0
        self._group_of = {key: group for group in names.groups for key in group.keys}
        self.announced = {key: Announced(self._dtype(key, each.dtype, dtype), each.shape)
                          for key, each in checkpoint.tensors.items()}
        self._ready: dict[str, Tensor] = {}
        self._spots: dict[str, Spot] = {}
        self._started: dict[str, tuple[Adapter, Record]] = {}
        self._weights = {place.names[-1]: weight for weight in scan(names.model) for place in weight.places}
        self._fingerprint: Fingerprint | None = None
        self._fit_structure()

    def _dtype(self, key: str, own: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
        if dtype is None or not own.is_floating_point:
            return own
        wide = any(self.names.wide(param, dtype) for param in self._group_of[key].params)
        return torch.promote_types(dtype, torch.float32) if wide else dtype

    def _fit_structure(self) -> None:
        """Give the structure's parameters the dtypes that the files' tensors will have; their sizes must agree."""
        wrong = []
        for group in self.names.groups:
            weight = self._weights.get(group.params[0])
            if weight is None or group.converter is not None or len(group.keys) > 1:
                continue
            dtype, shape = self.announced[group.keys[0]]
            if tuple(weight.tensor.shape) != shape:
                wrong.append(f"{group.keys[0]!r} is {shape} in the files and {tuple(weight.tensor.shape)} by the "
                             "model's config")
            elif dtype.is_floating_point:
                weight.tensor.data = weight.tensor.data.to(dtype)
        if wrong:
            raise VeneerError(_list(f"merge_checkpoint: {self.checkpoint.folder} does not fit its own config "
                                    f"({len(wrong)} tensors)", wrong))

    # -- the adapter ------------------------------------------------------------------------------------
    def take(self, path: str | Path, strict: bool, allow_pickle: bool) -> None:
        """Lay the adapter at `path` over the structure, with its values. Raises `VeneerError` as `load` does."""
        model = self.names.model
        stored, weights, records, problems = read_records(model, path, allow_pickle, self._value)
        if problems and (strict or not records):
            raise VeneerError(_list(f"merge_checkpoint: {stored.file} does not fit the model in "
                                    f"{self.checkpoint.folder} ({len(problems)} problems); nothing was written. "
                                    "strict=False merges what fits", problems))
        self.problems, self.notes, self._fingerprint = problems, stored.notes, stored.fingerprint
        self._strict = strict
        attach_records(model, weights, records, _NAME, stored)
        for adapter in _distinct(model):
            adapter.to_empty(device="cpu")
        fill(model, _NAME, records)
        self._find_spots({record.name: record for record in records})

    def _value(self, weight: Weight) -> Tensor | None:
        """A base weight out of the files, for what an adapter's file carries of it; None where they have it not."""
        paths = {place.names[-1] for place in weight.places}
        found = ((group, param) for group in self.names.groups for param in group.params if param in paths)
        return next((self._loaded(group)[param] for group, param in found), None)

    def _find_spots(self, records: Mapping[str, Record]) -> None:
        by_module = dict(hosts(self.names.model))
        for weight, adapter in attached(self.names.model, _NAME):
            record = records[weight.name]
            if is_started(record):
                self._started[weight.name] = adapter, record
            first = weight.places[0]
            spot = Spot(first.module_name, by_module[first.module_name], first.param, weight)
            for place in weight.places:
                self._spots[place.names[-1]] = spot
                if adapter.bias_delta() is not None:
                    self._add_bias(place.module_name, by_module[place.module_name])
        self._check_spots()

    def _add_bias(self, name: str, host: Host) -> None:
        path = f"{name}.bias" if name else "bias"
        if host.carrier("bias") is None:
            raise VeneerError(f"merge_checkpoint: the adapter adds a bias to {name!r}, and the model has none there, "
                              "so that it would be lost on loading. Merge into the loaded model in memory")
        self._spots.setdefault(path, Spot(name, host, "bias", None))

    def _check_spots(self) -> None:
        """Every parameter to be changed must come out of the files and be able to go back into them."""
        made = {param: group for group in self.names.groups for param in group.params}
        wrong = []
        for spot in dict.fromkeys(self._spots.values()):
            paths = [path for path, each in self._spots.items() if each is spot]
            groups = [made[path] for path in paths if path in made]
            if not groups:
                wrong.append(f"{paths[0]!r} is not in the files{nearest(paths[0], self.checkpoint.tensors)}")
            wrong += [f"{paths[0]!r}: {reason}" for group in groups if (reason := self._refusal(group)) is not None]
            if len(groups) > 1 and not self._equal(groups):
                wrong.append(f"{' and '.join(map(repr, paths))} are one weight by the config (tie_word_embeddings), "
                             "and the files have different values for them")
        if wrong:
            raise VeneerError(_list(f"merge_checkpoint: {len(wrong)} adapted weights cannot be merged in the files of "
                                    f"{self.checkpoint.folder}; nothing was written", wrong))

    def _refusal(self, group: Group) -> str | None:
        for key in group.keys:
            if self.announced[key].dtype not in _FLOATS:
                return f"it is held as {self.announced[key].dtype}"
        return self.names.refusal(group)

    def _equal(self, groups: list[Group]) -> bool:
        first, *others = ([self.checkpoint.read(key) for key in group.keys] for group in groups)
        return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))

    # -- the tensors ------------------------------------------------------------------------------------
    def tensor(self, key: str) -> Tensor:
        """A tensor of the merged model, to be asked for once."""
        if key in self._ready:
            return self._ready.pop(key)
        group = self._group_of[key]
        known = [param for param in group.params if param in self._weights]
        if not any(param in self._spots for param in known):
            tensor = self._read(key)
            if known and group.converter is None:
                self._compare(known[0], tensor)
            return tensor
        params = self._loaded(group)
        for param in list(params):
            params[param] = self._changed(param, params[param])
        made = {k: t.to(self.announced[k].dtype) for k, t in self.names.store(group, params).items()}
        found = made.pop(key)
        self._ready |= made
        return found

    def _read(self, key: str) -> Tensor:
        return self.checkpoint.read(key).to(self.announced[key].dtype)

    def _loaded(self, group: Group) -> dict[str, Tensor]:
        return self.names.load(group, {key: self._read(key) for key in group.keys})

    def _changed(self, param: str, value: Tensor) -> Tensor:
        """One parameter merged, or itself."""
        self._compare(param, value)
        spot = self._spots.get(param)
        if spot is None:
            return value
        host = spot.host
        empty = host._parameters[spot.param]
        if spot.weight is not None and spot.weight.name in self._started:
            value = self._begun(spot.weight, value)
        host._parameters[spot.param] = nn.Parameter(value, requires_grad=False)
        try:
            new = merged_value(spot.module, host, spot.param, [_NAME])
        finally:
            host._parameters[spot.param] = empty
        assert new is not None
        self.merged += 1
        return new

    def _begun(self, weight: Weight, value: Tensor) -> Tensor:
        """The base weight as training began with it, where the adapter's start rewrites it."""
        adapter, record = self._started[weight.name]
        moved = adapter.initialise(weight.layout.matrix(value))
        fill_adapter(adapter, record)
        return value if moved is None else weight.layout.stored(moved.matrix).to(value.dtype)

    def _compare(self, param: str, value: Tensor) -> None:
        """Whether a base weight is the one that the adapter was trained on, as far as its file knows."""
        weight = self._weights.get(param)
        sample = None if weight is None or self._fingerprint is None else self._fingerprint.samples.get(weight.name)
        if weight is None or sample is None:
            return
        only = dataclasses.replace(self._fingerprint, samples={weight.name: sample})  # type: ignore[type-var]
        empty, weight.tensor = weight.tensor, value
        try:
            found = compare(only, [weight])
        finally:
            weight.tensor = empty
        if found and self._strict:
            raise VeneerError(f"merge_checkpoint: another base model: {found[0]}; nothing was written. strict=False "
                              "merges all the same")
        self.problems += [text for text in found if text not in self.problems]

    def finish(self) -> None:
        """All tensors have been asked for."""
        assert not self._ready, list(self._ready)


def _distinct(model: nn.Module) -> list[Adapter]:
    """Every adapter that is on the meta device, each once."""
    found = {id(part): part for _, module in base_modules(model) if isinstance(module, Host)
             for part in module.adapters.modules() if isinstance(part, Adapter)}
    return [adapter for adapter in found.values() if adapter.on_meta()]


def _list(title: str, problems: list[str]) -> str:
    more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return "\n  ".join([title, *problems[:SHOWN], *more])
