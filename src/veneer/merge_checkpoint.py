"""merge_checkpoint: an adapter merged into a model's files, one weight in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from veneer.attached import adapter_names
from veneer.io.checkpoint import INDEX, Checkpoint, companions, config_in, index_of, parse_size, shards
from veneer.io.checkpoint_names import names_of, quantised, skeleton
from veneer.io.folder import check_free_name, new_folder
from veneer.io.streaming import Merger
from veneer.io.tensors import Announced, write_made
from veneer.method import VeneerError, parse_dtype
from veneer.wrappers import unwrap

_OWNER = "merge_checkpoint"


@dataclass(frozen=True)
class MergeReport:
    """What `merge_checkpoint` did. weights: how many tensors of the model were merged. problems: what a strict merge
    would have refused."""

    path: Path
    weights: int
    files: tuple[str, ...]
    bytes: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"merged {self.weights} weights into {self.path}: {len(self.files)} files of weights, "
                 f"{self.bytes:,} bytes"]
        lines += [f"problem: {text}" for text in self.problems]
        return "\n".join(lines + [f"note: {text}" for text in self.notes])


@torch.no_grad()
def merge_checkpoint(base: str | Path, adapter: str | Path, out: str | Path, *,
                     dtype: torch.dtype | str | None = None, max_shard_size: int | str | None = None,
                     overwrite: bool = False, strict: bool = True, model: nn.Module | None = None,
                     allow_pickle: bool = False, progress: Callable[[str], None] | None = None,
                     finish: Callable[[Path], None] | None = None) -> MergeReport:
    """Write the folder `out`: the model in the folder `base` with the adapter at `adapter` merged into it.

    base: a local Hugging Face folder (safetensors, in one file or in shards, and config.json), which is read one
    tensor at a time: what is in memory at once is the adapter, one weight, and the temporaries of merging it. The
    merged tensors have the names and files of the base's; config, tokenizer and whatever else is there are copied.
    The weights have the bits that loading the model (in `dtype`), `load` and `merge(keep=False)` would give them.

    dtype: cast floating tensors to it first; default: each keeps its own. max_shard_size: bytes, or "5GB", in each file
    of weights; default: the base's files. overwrite: replace a model's folder that is at `out`. strict: as for `load`;
    the base's values are compared as they are read. model: the structure (parameters on the meta device, named as in
    the files; used up by the call), for a model that transformers does not build. progress: is given a sentence for
    each file written. finish: is given the whole folder before it has its name, to change or add files that are no
    weights.

    `out` appears whole or not at all. Raises `VeneerError` where `load` would; for a base that is not there, not whole
    or quantised; for adapted weights that the files have not; for a bias the model has no place for; for a full disk.
    """
    base, out, limit = Path(base), Path(out), parse_size(max_shard_size, _OWNER)
    dtype = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not dtype.is_floating_point:
        raise VeneerError(f"{_OWNER}: dtype is what floating numbers are cast to, got {dtype}")
    check_free_name(out, _OWNER, overwrite)
    _check_apart(base, Path(adapter), out)
    method = quantised(base)
    if method is not None:
        raise VeneerError(f"{_OWNER}: the weights in {base} are quantised ({method}), and a change is lost in so few "
                          "bits. Give the 16-bit checkpoint that they were made from; or load the model, veneer.load, "
                          "veneer.merge(model, keep=False) into ordinary numbers, and save it")
    checkpoint = Checkpoint(base, _OWNER)
    try:
        structure = skeleton(base) if model is None else _checked(model)
        merger = Merger(checkpoint, names_of(structure, list(checkpoint.tensors)), dtype)
        merger.take(adapter, strict, allow_pickle)
        sizes = {key: each.nbytes for key, each in merger.announced.items()}
        _check_space(out, sum(sizes.values()))
        files = shards(checkpoint, sizes, limit)
        with new_folder(out, _OWNER, overwrite) as folder:
            _copy(base, folder, dtype)
            for i, (file, keys) in enumerate(files.items()):
                _write(folder / file, {key: merger.announced[key] for key in keys}, merger,
                       checkpoint.metadata.get(file) or {"format": "pt"})
                if progress is not None:
                    progress(f"{file} is written ({i + 1} of {len(files)})")
            index = index_of(checkpoint, files, sizes)
            if index is not None:
                _write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
            if finish is not None:
                finish(folder)
    finally:
        checkpoint.close()
    done = merger.structure
    return MergeReport(out, done.merged, tuple(files), sum(sizes.values()), tuple(done.problems), tuple(done.notes))


def _checked(model: nn.Module) -> nn.Module:
    if not all(param.is_meta for param in model.parameters()) or adapter_names(model):
        raise VeneerError(f"{_OWNER}: model is the structure alone, without adapters and with its parameters on the "
                          "meta device: with torch.device('meta'): model = MyModel()")
    return unwrap(model)


def _check_apart(base: Path, adapter: Path, out: Path) -> None:
    target = out.resolve()
    for what, path in (("the base", base.resolve()), ("the adapter", adapter.resolve())):
        if path == target or target in path.parents:
            raise VeneerError(f"{_OWNER}: {str(out)!r} holds {what}, which is read from there; take another folder")


def _check_space(out: Path, needed: int) -> None:
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise VeneerError(f"{_OWNER}: the merged weights take {needed:,} bytes, and {free:,} are free at {there}")


def _copy(base: Path, folder: Path, dtype: torch.dtype | None) -> None:
    for name in companions(base):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if dtype is not None and name == Path("config.json"):
            _write_text(target, config_in((base / name).read_text(encoding="utf-8"), dtype))
        else:
            shutil.copyfile(base / name, target)


def _write(path: Path, tensors: Mapping[str, Announced], merger: Merger, metadata: Mapping[str, str]) -> None:
    def make(key: str) -> Tensor:
        return merger.tensor(key)

    with open(path, "xb") as file:
        write_made(tensors, make, file, metadata)
        file.flush()
        os.fsync(file.fileno())


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
