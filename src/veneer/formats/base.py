"""What can be known of the base model: from what the caller gives, else from the adapter's files themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from veneer.io.checkpoint import Checkpoint
from veneer.io.checkpoint_names import skeleton
from veneer.io.manifest import read_json
from veneer.io.records import BaseMap, Site, Spot, base_map, base_weights
from veneer.io.sites import LINEAR, layout, mapped
from veneer.io.tensors import Announced, read_sizes
from veneer.method import VeneerError
from veneer.wrappers import unwrap

_FORMS = "a folder with config.json or safetensors files, or one safetensors file"
GIVE = f"Give its base model (base=, --base): {_FORMS}"
GIVE_WHOLE = "Give its base model (base=, --base): a folder with config.json, or the model itself"
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Hint:
    """What an adapter's own tensors show of a weight. shape: as stored; of a convolution whose kernel they do not show,
    that of the matrix that it is flattened to."""

    kind: str
    shape: tuple[int, ...]



@dataclass
class Known:
    """exact: the whole map, where the model's structure could be made; else sizes of its tensors by name."""

    exact: BaseMap | None = None
    sizes: dict[str, Announced] = field(default_factory=dict)

    @property
    def told(self) -> bool:
        """Whether the caller gives a base."""
        return self.exact is not None or bool(self.sizes)

    def modules(self) -> list[str]:
        """Modules that hold a weight."""
        if self.exact is not None:
            return [spot.module for site in self.exact.sites.values() for spot in site.spots
                    if spot.param == "weight" and spot.module]
        return [path.removesuffix(".weight") for path in self.sizes if path.endswith(".weight")]


def known(base: str | Path | nn.Module | None) -> Known:
    """What the caller gives: nothing, a model, a folder, or a safetensors file.

    Raises `VeneerError` for a path where there is none of these.
    """
    if base is None:
        return Known()
    if isinstance(base, nn.Module):
        model = unwrap(base)
        return Known(base_map(model, base_weights(model)))
    path = Path(base)
    if not path.exists():
        raise VeneerError(f"convert: there is no folder or file {str(path)!r} (base=, --base). Give {_FORMS}; nothing "
                          "is downloaded")
    if path.is_file():
        found = read_sizes(path)
        if not found:
            raise VeneerError(f"convert: {path} (base=, --base) has no tensors, so that it is no base model")
        return Known(sizes=found)
    if (path / "model_index.json").is_file():
        return Known(sizes=_pipeline(path))
    return _structure(path) if path.is_dir() and _is_transformers(path) else Known(sizes=_sizes(path))


def _is_transformers(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and "model_type" in read_json(config)


def _structure(folder: Path) -> Known:
    try:
        model = skeleton(folder)
    except VeneerError as error:
        try:
            return Known(sizes=_sizes(folder))  # less exact: names and shapes alone
        except VeneerError:
            raise error from None
    return Known(base_map(model, base_weights(model)))


def _pipeline(folder: Path) -> dict[str, Announced]:
    """The tensors of a pipeline of diffusers, each name behind that of its part."""
    found: dict[str, Announced] = {}
    for part in _COMPONENTS:
        if (folder / part).is_dir():
            found |= {f"{part}.{name}": size for name, size in _sizes(folder / part).items()}
    return found


def _sizes(folder: Path) -> dict[str, Announced]:
    reader = Checkpoint(folder, "convert", "convert needs their names and shapes alone; a model works too (base=model)")
    reader.close()
    return reader.tensors


# -- a map made of what is known ----------------------------------------------------------------------------
def stand_in(hints: Mapping[str, Hint], given: Known) -> BaseMap:
    """A map of the base. hints: by the full name of the parameter; those that the base lacks get no site."""
    if given.exact is not None:
        return given.exact
    if given.sizes:
        found = {path: _merged(hints.get(path), path, size) for path, size in given.sizes.items()}
    else:
        found = {path: (hint.kind, hint.shape, torch.float32) for path, hint in hints.items()}
    above = {".".join(parts[:i]) for parts in (path.split(".")[:-1] for path in found) for i in range(len(parts))}
    sites = {}
    for path, (kind, shape, dtype) in found.items():
        module, _, param = path.rpartition(".")
        name = module if module and param == "weight" and module not in above else path
        seen = layout(shape, transposed=kind == "conv1d", kernel=shape[2:] if kind == "conv" else (),
                      lookup=kind == "embedding")
        sites[name] = Site(name, (Spot(module, param, kind),), seen, dtype, kind in LINEAR, False)
    return mapped(sites, known=False, everything=bool(given.sizes))


def _merged(hint: Hint | None, path: str, size: Announced) -> tuple[str, tuple[int, ...], torch.dtype]:
    """Kind, shape and dtype of a weight: the size is the base's, the kind is what the adapter's tensors show."""
    dtype = size.dtype if size.dtype.is_floating_point else torch.float32
    if hint is None:
        return "bias" if path.endswith(".bias") else "parameter", size.shape, dtype
    kind = hint.kind
    if kind == "linear" and len(size.shape) > 2:
        kind = "conv"
    elif kind == "linear" and hint.shape != size.shape and hint.shape == size.shape[::-1]:
        kind = "conv1d"
    return kind, size.shape, dtype
