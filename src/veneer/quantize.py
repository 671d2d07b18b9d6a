"""quantize: hold a model's linear weights in fewer bits, in place, before adapters are laid over them; dequantize."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from veneer.hosts import Host
from veneer.method import VeneerError, nearest
from veneer.plan import Pattern, hits, no_hit
from veneer.storage import STORAGES, Storage, packed_storage
from veneer.storage.recent import RECENT
from veneer.weights import Weight, base_modules, scan


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` did. skipped: one sentence for each weight that was left as it is."""

    scheme: str
    weights: int
    bytes_before: int
    bytes_after: int
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.weights} weights held as {self.scheme}: {self.bytes_before:,} bytes before, "
                 f"{self.bytes_after:,} after"]
        return "\n".join(lines + [f"left as it is: {text}" for text in self.skipped])


def schemes() -> dict[str, Storage]:
    """The names that `quantize` takes, and the storage behind each."""
    return {scheme: storage for storage in STORAGES for scheme in storage.schemes}


@torch.no_grad()
def quantize(model: nn.Module, scheme: str = "nf4", targets: Pattern | Sequence[Pattern] | None = None,
             **options: Any) -> QuantizeReport:
    """Hold linear weights as `scheme`, in place; every linear weight but the output head, or what `targets` name.

    scheme: "nf4", "nf2", "nf8" (ours, in plain PyTorch; options: block=64, double=True), or one of a library's, such as
    "bnb-nf4", "bnb-int8", "torchao-int8", "hqq-4", "gguf-q8_0" (see docs/quantised.md and `schemes()`).
    Only what is exactly an `nn.Linear`, not tied and of a fitting size is packed; the report says what was left. The
    weights' own numbers are gone afterwards.

    Raises `VeneerError` for an unknown scheme or option, a pattern that hits no linear weight, a missing library, or a
    model that has adapters: quantise first, then attach.
    """
    known = schemes()
    if scheme not in known:
        raise VeneerError(f"unknown scheme {scheme!r}{nearest(str(scheme), known) or '.'} Known: {', '.join(known)}")
    if any(isinstance(module, Host) for _, module in base_modules(model)):
        raise VeneerError("quantize: this model has adapters, which would start from other weights; quantise first, "
                          "then attach (LoRA(init=\"loftq\") quantises the weights it lies on by itself)")
    storage, chosen = known[scheme], _chosen(model, targets)
    done, skipped, before, after = 0, [], 0, 0
    storage.check(scheme, options)
    for weight in chosen:
        reason = _refusal(weight) or storage.unfit(scheme, weight.places[0].module, options)
        if reason is not None:
            skipped.append(f"{weight.name!r}: {reason}")
            continue
        place = weight.places[0]
        before += _bytes(place.module)
        made = storage.pack(scheme, place.module, options)
        after += storage.nbytes(made)
        if made is not place.module:
            parent, _, child = place.module_name.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
        done += 1
    if not done:
        raise VeneerError("quantize: nothing to quantise here. " + "; ".join(skipped[:3]))
    return QuantizeReport(scheme, done, before, after, tuple(skipped))


@torch.no_grad()
def dequantize(model: nn.Module) -> int:
    """Hold packed weights as ordinary numbers again, in the dtype that they are read as, in place; returns how many.

    What quantising lost stays lost. Raises `VeneerError` where adapters are on the model: merge or detach them first.
    """
    if any(isinstance(module, Host) for _, module in base_modules(model)):
        raise VeneerError("dequantize: this model has adapters; merge them for good (veneer.merge(model, keep=False)) "
                          "and detach them first")
    done = 0
    for _, module in list(base_modules(model)):
        storage = packed_storage(module)
        if storage is not None:
            module.__class__ = storage.unpack(module, storage.read(module))
            RECENT.forget(module)
            done += 1
    return done


def _chosen(model: nn.Module, targets: Pattern | Sequence[Pattern] | None) -> list[Weight]:
    weights = scan(model)
    if targets is None:
        return [weight for weight in weights if weight.is_linear and not weight.is_head]
    found: dict[Weight, None] = {}
    for pattern in [targets] if isinstance(targets, str) or not isinstance(targets, Sequence) else targets:
        hit = [weight for weight in weights if hits(pattern, weight) and not weight.layout.shape.is_vector]
        if not hit:
            raise VeneerError(f"quantize: {no_hit(pattern, weights)}")
        found |= dict.fromkeys(hit)
    return list(found)


def _refusal(weight: Weight) -> str | None:
    place = weight.places[0]
    if weight.storage is not None:
        return f"it is held as {weight.storage.name} already"
    if len(weight.places) > 1:
        return f"it is tied ({', '.join(repr(p.names[0]) for p in weight.places)})"
    if type(place.module) is not nn.Linear or place.param != "weight":
        return f"it is the {place.param} of a {type(place.module).__name__}, and only an nn.Linear is packed"
    if not place.module_name:
        return "it is the model itself; quantise a module around it"
    return "it is on the meta device and has no values yet" if weight.tensor.is_meta else None


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
