"""What `veneer.calibrate` found about the inputs or gradients of weights, and its file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.calibration import covariance, gradients, inputs
from veneer.io.files import write_all
from veneer.io.fingerprint import Fingerprint, compare, fingerprint
from veneer.io.tensors import read_tensors, write_tensors
from veneer.method import VeneerError
from veneer.weights import Weight, scan

_META, _FORMAT = "veneer_statistics", 1
_Tensors = dict[str, Tensor]
#: kind → how several statistics of one weight become one
MERGED: dict[str, Callable[[Sequence[_Tensors]], _Tensors]] = {
    "inputs": inputs.merged, "covariance": covariance.merged, "gradient": gradients.merged}


class Statistics(Mapping[str, Mapping[str, Tensor]]):
    """Statistics by weight name, and by their own names, all on the CPU in fp32 (counts: int64 or a float).

    Kind "inputs": components (k, in) with orthonormal rows and singular (k,) of the inputs around their mean (in,),
    total () = Σ‖x − mean‖², count (), and sought (), the most components there could be. Kind "covariance": covariance
    (in, in) = XᵀX, count (). Kind "gradient": gradient (out, in), or its leading triplets left (out, k), singular (k,),
    right (k, in), and sought (); count (). Weights with the same inputs have the same tensors.

    kinds: weight name → kind. tokens: how many positions were seen. base: by what the model is known again.
    """

    def __init__(self, tensors: Mapping[str, Mapping[str, Tensor]], kinds: Mapping[str, str], tokens: int = 0,
                 base: Fingerprint | None = None) -> None:
        self._tensors = {name: dict(found) for name, found in tensors.items()}
        self.kinds, self.tokens, self.base = dict(kinds), tokens, base

    def __getitem__(self, name: str) -> Mapping[str, Tensor]:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        kinds = ", ".join(f"{sum(k == kind for k in self.kinds.values())} of {kind!r}" for kind in MERGED
                          if kind in self.kinds.values())
        return f"Statistics({kinds}; {self.tokens:,} tokens, {self.size() / 2**20:.1f} MiB)"

    def size(self) -> int:
        """Bytes, what weights share counted once."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._distinct()[0].values())

    def check(self, model: nn.Module) -> None:
        """Raise `VeneerError`, listing the differences, when these were made for another model. A base held in fewer
        bits, or in another dtype, is the same model."""
        if self.base is None:
            return
        found = compare(self.base, scan(model), "these statistics were made for")
        if found:
            more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
            raise VeneerError(f"these statistics are of another model: {'; '.join(found[:3])}{more}. Collect them on "
                              "this one with veneer.calibrate")

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all; its directory is made if need be."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise VeneerError(f"Statistics.save writes one file whose name ends in .safetensors, got {path}")
        tensors, keys = self._distinct()
        about = {"format": _FORMAT, "kinds": self.kinds, "tokens": self.tokens, "tensors": keys,
                 "base": None if self.base is None else self.base.to_dict()}
        write_all(path.parent, [(path.name, lambda file: write_tensors(file, tensors, {_META: json.dumps(about)}))])
        return path

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read what `save` wrote. Raises `VeneerError` when there is none, when the file is cut off, or is another."""
        path = Path(path)
        if not path.is_file():
            raise VeneerError(f"there is no statistics file at {path}; veneer.calibrate(…).save(path) writes one")
        tensors, meta = read_tensors(path)
        if _META not in meta:
            raise VeneerError(f"{path} holds no statistics of veneer.calibrate"
                              f"{' but an adapter' if any('lora_' in key for key in tensors) else ''}")
        about = json.loads(meta[_META])
        if about["format"] > _FORMAT or set(about["kinds"].values()) - set(MERGED):
            raise VeneerError(f"{path} was written by a newer version of Veneer (format {about['format']}; this one "
                              f"reads up to {_FORMAT})")
        found = {name: {own: tensors[key] for own, key in keys.items()} for name, keys in about["tensors"].items()}
        base = None if about["base"] is None else Fingerprint.from_dict(about["base"])
        return cls(found, about["kinds"], about["tokens"], base)

    @classmethod
    def merged(cls, parts: Sequence[Statistics]) -> Statistics:
        """Statistics of all the data behind several of them (what the processes of a data-parallel run found, say), the
        same bits for the same order. Covariances and whole gradients add up exactly; components of inputs and triplets
        of gradients are those of what each part kept.

        Raises `VeneerError` when the parts are of different kinds or models.
        """
        if not parts:
            raise VeneerError("Statistics.merged needs at least one")
        kinds: dict[str, str] = {}
        for part in parts:
            for name, kind in part.kinds.items():
                if kinds.setdefault(name, kind) != kind:
                    raise VeneerError(f"{name!r} has the statistic {kinds[name]!r} in one part and {kind!r} in another")
            _same_base(parts[0], part)
        made: dict[tuple, _Tensors] = {}
        tensors = {}
        for name, kind in kinds.items():
            own = [part._tensors[name] for part in parts if name in part]
            shared = tuple(id(tensor) for each in own for tensor in each.values())
            if shared not in made:
                made[shared] = MERGED[kind](own)
            tensors[name] = made[shared]
        bases = (part.base for part in parts if part.base is not None)
        return cls(tensors, kinds, sum(part.tokens for part in parts), next(bases, None))

    def gathered(self, group: Any = None) -> Statistics:
        """These, merged with those of all other processes of `torch.distributed`: the first merges and sends the result
        to the others, so that all have the same bits. Itself where there is one process."""
        dist = torch.distributed
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
            return self
        first = dist.get_global_rank(group, 0) if group is not None else 0
        mine = dist.get_rank() == first
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.gather_object(self, parts if mine else None, dst=first, group=group)
        result = [Statistics.merged(parts) if mine else None]
        dist.broadcast_object_list(result, src=first, group=group)
        assert result[0] is not None
        return result[0]

    def _distinct(self) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
        """Every tensor once, by a key made of the first weight that has it, and each weight's tensors by key."""
        keys: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        for name, found in self._tensors.items():
            for own, tensor in found.items():
                if id(tensor) not in keys:
                    keys[id(tensor)] = f"{name}/{own}"
                    tensors[f"{name}/{own}"] = tensor
        return tensors, {name: {own: keys[id(t)] for own, t in found.items()} for name, found in self._tensors.items()}


def base_of(weights: Sequence[Weight]) -> Fingerprint:
    """By what the weights that have statistics are known again."""
    return fingerprint(list(weights), {})


def _same_base(first: Statistics, other: Statistics) -> None:
    if first.base is None or other.base is None:
        return
    theirs = other.base.samples
    for name, sample in first.base.samples.items():
        there = theirs.get(name)
        same = there is None or (there.shape == sample.shape and there.dtype == sample.dtype)
        if there is not None and same and there.values is not None and sample.values is not None:
            same = torch.equal(there.values, sample.values)
        if not same:
            raise VeneerError(f"these statistics are of different models: {name!r} differs")
