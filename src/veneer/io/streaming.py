"""The tensors of a merged model, made one at a time out of the files of its base."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from veneer.io.checkpoint import Checkpoint
from veneer.io.checkpoint_names import Group, Names
from veneer.io.structure import Structure, listed
from veneer.io.tensors import Announced
from veneer.method import VeneerError, nearest
from veneer.weights import Weight

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Merger:
    """`announced`: dtype and shape of every tensor that `tensor` will give."""

    def __init__(self, checkpoint: Checkpoint, names: Names, dtype: torch.dtype | None) -> None:
        self.checkpoint, self.names, self.structure = checkpoint, names, Structure(names.model)
        self._group_of = {key: group for group in names.groups for key in group.keys}
        self.announced = {key: Announced(self._dtype(key, each.dtype, dtype), each.shape)
                          for key, each in checkpoint.tensors.items()}
        self._ready: dict[str, Tensor] = {}
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
            weight = self.structure.weights.get(group.params[0])
            if weight is None or group.converter is not None or len(group.keys) > 1:
                continue
            dtype, shape = self.announced[group.keys[0]]
            if tuple(weight.tensor.shape) != shape:
                wrong.append(f"{group.keys[0]!r} is {shape} in the files and {tuple(weight.tensor.shape)} by the "
                             "model's config")
            elif dtype.is_floating_point:
                weight.tensor.data = weight.tensor.data.to(dtype)
        if wrong:
            raise VeneerError(listed(f"merge_checkpoint: {self.checkpoint.folder} does not fit its own config "
                                     f"({len(wrong)} tensors)", wrong))

    def take(self, path: str | Path, strict: bool, allow_pickle: bool) -> None:
        """Read the adapter at `path`. Raises `VeneerError` as `load` does, and where the files have not what it is to
        be merged into."""
        self.structure.take(path, strict, allow_pickle, self._value, self.checkpoint.folder)
        made = {param: group for group in self.names.groups for param in group.params}
        wrong = []
        for spot in dict.fromkeys(self.structure.spots.values()):
            paths = [path for path, each in self.structure.spots.items() if each is spot]
            groups = [made[path] for path in paths if path in made]
            if not groups:
                wrong.append(f"{paths[0]!r} is not in the files{nearest(paths[0], self.checkpoint.tensors)}")
            wrong += [f"{paths[0]!r}: {reason}" for group in groups if (reason := self._refusal(group)) is not None]
            if len(groups) > 1 and not self._equal(groups):
                wrong.append(f"{' and '.join(map(repr, paths))} are one weight by the config (tie_word_embeddings), "
                             "and the files have different values for them")
        if wrong:
            raise VeneerError(listed(f"merge_checkpoint: {len(wrong)} adapted weights cannot be merged in the files of "
                                     f"{self.checkpoint.folder}; nothing was written", wrong))

    def _value(self, weight: Weight) -> Tensor | None:
        """A base weight out of the files, for what an adapter's file carries of it; None where they have it not."""
        paths = {place.names[-1] for place in weight.places}
        found = ((group, param) for group in self.names.groups for param in group.params if param in paths)
        return next((self._loaded(group)[param] for group, param in found), None)

    def _refusal(self, group: Group) -> str | None:
        for key in group.keys:
            if self.announced[key].dtype not in _FLOATS:
                return f"it is held as {self.announced[key].dtype}"
        return self.names.refusal(group)

    def _equal(self, groups: list[Group]) -> bool:
        first, *others = ([self.checkpoint.read(key) for key in group.keys] for group in groups)
        return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))

    def tensor(self, key: str) -> Tensor:
        """A tensor of the merged model, to be asked for once."""
        if key in self._ready:
            return self._ready.pop(key)
        group = self._group_of[key]
        if not any(param in self.structure.spots for param in group.params):
            tensor = self._read(key)
            if group.converter is None:
                self.structure.check(group.params[0], tensor)
            return tensor
        params = self._loaded(group)
        for param in list(params):
            params[param] = self.structure.changed(param, params[param])
        made = {k: t.to(self.announced[k].dtype) for k, t in self.names.store(group, params).items()}
        found = made.pop(key)
        self._ready |= made
        return found

    def _read(self, key: str) -> Tensor:
        return self.checkpoint.read(key).to(self.announced[key].dtype)

    def _loaded(self, group: Group) -> dict[str, Tensor]:
        return self.names.load(group, {key: self._read(key) for key in group.keys})
