"""layer_replication: a model with some of its decoder layers several times over, each time with adapters of its own.

The copies hold the numbers of the original: parameters of their own over the same storage, which take no memory while
the model stays where it is.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from veneer.attached import hosts
from veneer.method import VeneerError
from veneer.storage import packed_storage
from veneer.wrappers import unwrap

#: where the list of layers hangs, below `model` and `bert`
_PLACES = ("layers", "encoder.layer", "h")
#: attribute of a list of layers that was replicated: by which ranges. Plain, so that it is copied and pickled along
_MARK = "_veneer_replicated"


def replicate_layers(model: nn.Module, layer_map: Sequence[Sequence[int]]) -> Callable[[], None]:
    """Put the layers of the ranges [start, end) of `layer_map`, one after the other, in place of the model's layers.

    `[[0, 4], [2, 5]]` makes layers 0, 1, 2, 3, 2, 3, 4. The model's config then has their number. Done once: the same
    map on the same model, or on a copy of it, again changes nothing.

    Returns what puts all that was changed here back: the list of layers, their numbers, the config. It is to be called
    before anything is attached to the new layers; after the first time it does nothing.

    Raises `VeneerError`, with the model as it was, where the layers are not found, a range is none of the model's, the
    model has adapters or another map already, or a layer is held in fewer bits.
    """
    ranges = [_range(entry) for entry in layer_map]
    bare = unwrap(model)
    owner, name, layers = _find(bare)
    if _has(layers, ranges):
        return contextlib.ExitStack().close
    if next(iter(hosts(bare)), None) is not None:
        raise VeneerError(f"layer_replication={ranges}: this model has adapters on its layers already; unload them "
                          "first")
    order = _order(ranges)
    if not order or min(order) < 0 or max(order) >= len(layers):
        raise VeneerError(f"layer_replication={ranges} must name layers from 0 to {len(layers)}, the end not included, "
                          f"since the model has {len(layers)}")
    for index in sorted(set(order)):
        _check(layers[index], index)
    with contextlib.ExitStack() as undo:
        found = _ordered(layers, order)
        _number(found, undo)
        _tell_config(getattr(owner, "config", None) or getattr(bare, "config", None), order, len(layers), undo)
        deeper = nn.ModuleList(found)
        deeper.training = layers.training
        vars(deeper)[_MARK] = ranges
        _set(owner, name, deeper, undo)
        return undo.pop_all().close


@contextlib.contextmanager
def replicated(model: nn.Module, config: Any) -> Iterator[None]:
    """Inside, and after it, `model` has its layers as the `layer_replication` of `config` says, if there is one; after
    an exception inside they are as they were."""
    ranges = getattr(config, "layer_replication", None)
    undo = replicate_layers(model, ranges) if ranges else None
    try:
        yield
    except BaseException:
        if undo is not None:
            undo()
        raise


def check_replicated(model: nn.Module, layer_map: Sequence[Sequence[int]]) -> None:
    """Raise `VeneerError` unless the layers of `model` were replicated by this map."""
    ranges = [_range(entry) for entry in layer_map]
    if not _has(_find(unwrap(model))[2], ranges):
        raise VeneerError(f"layer_replication={ranges}: the layers of this model are not replicated yet; call "
                          "replicate_layers(model, layer_replication) first")


def _has(layers: nn.ModuleList, ranges: list[tuple[int, int]]) -> bool:
    """Whether these are layers replicated by the ranges. Raises `VeneerError` where they are so by others."""
    done = vars(layers).get(_MARK)
    if done is not None and _order(done) != _order(ranges):
        raise VeneerError(f"layer_replication={ranges}: the layers of this model were replicated by {done} already; "
                          "load it anew for another map")
    return done is not None


def _order(ranges: Sequence[tuple[int, int]]) -> list[int]:
    return [i for start, end in ranges for i in range(start, end)]


def _set(owner: Any, name: str, value: Any, undo: contextlib.ExitStack) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _range(entry: Sequence[int]) -> tuple[int, int]:
    found = tuple(entry) if isinstance(entry, (list, tuple)) else ()
    if len(found) != 2 or any(isinstance(n, bool) or not isinstance(n, int) for n in found):
        raise VeneerError(f"layer_replication is a list of ranges [start, end], got {entry!r} in it")
    return found


def _find(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module whose attribute the list of layers is, the attribute's name, and the list."""
    inner = model
    while isinstance(getattr(inner, "model", None), nn.Module):
        inner = inner.model  # type: ignore[assignment]
    for step in ("transformer", "bert"):
        below = getattr(inner, step, None)
        inner = below if isinstance(below, nn.Module) else inner
    for path in _PLACES:
        parent, _, name = path.rpartition(".")
        owner = getattr(inner, parent, None) if parent else inner
        layers = getattr(owner, name, None)
        if isinstance(owner, nn.Module) and isinstance(layers, nn.ModuleList):
            return owner, name, layers
    raise VeneerError(f"layer_replication: no list of layers was found in this {type(model).__name__}; looked for "
                      f"{', '.join(_PLACES)} below model, transformer and bert")


def _check(layer: nn.Module, index: int) -> None:
    for name, module in layer.named_modules():
        if packed_storage(module) is not None:
            raise VeneerError(f"layer_replication: {name!r} in layer {index} is held in fewer bits, and such a layer "
                              "is not replicated; load the base in ordinary numbers")


def _ordered(layers: nn.ModuleList, order: Sequence[int]) -> list[nn.Module]:
    """The layers in their new order: the first use is the layer itself, others are copies."""
    used: set[int] = set()
    found = []
    for index in order:
        layer = _copy(layers[index]) if index in used else layers[index]
        used.add(index)
        found.append(layer)
    return found


def _number(layers: Sequence[nn.Module], undo: contextlib.ExitStack) -> None:
    """Tell each layer its number, by which it finds its place in a cache."""
    for number, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                _set(module, "layer_idx", number, undo)


def _copy(layer: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for param in layer.parameters():
        memo[id(param)] = nn.Parameter(param.detach(), param.requires_grad)
    for module in layer.modules():  # one config for the whole model, as before
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, (nn.Module, torch.Tensor)):
            memo[id(config)] = config
    return copy.deepcopy(layer, memo)


def _tell_config(config: Any, order: Sequence[int], before: int, undo: contextlib.ExitStack) -> None:
    if getattr(config, "num_hidden_layers", None) is None:
        return
    types = getattr(config, "layer_types", None)
    _set(config, "num_hidden_layers", len(order), undo)
    if isinstance(types, list) and len(types) == before:
        _set(config, "layer_types", [types[i] for i in order], undo)
