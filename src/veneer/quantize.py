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
from veneer.storage.quantizer_flags import forget_quantizer
from veneer.storage.recent import RECENT
from veneer.weights import Weight, base_modules, foreign, scan
from veneer.wrappers import unwrap


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
    weights' own numbers are gone afterwards. Where a library's own class of layer takes the module's place, it does so
    under every name the module has.

    Raises `VeneerError`, with nothing changed, for an unknown scheme or option, a pattern that hits no linear weight, a
    missing library, a weight that is not finite, or a model that has adapters: quantise first, then attach.
    """
    known = schemes()
    if scheme not in known:
        raise VeneerError(f"unknown scheme {scheme!r}{nearest(str(scheme), known) or '.'} Known: {', '.join(known)}")
    if any(isinstance(module, Host) for _, module in base_modules(model)):
        raise VeneerError("quantize: this model has adapters, which would start from other weights; quantise first, "
                          "then attach (LoRA(init=\"loftq\") quantises the weights it lies on by itself)")
    storage, chosen = known[scheme], _chosen(model, targets)
    storage.check(scheme, options)
    reasons = {weight: _refusal(weight, storage) or storage.unfit(scheme, weight.places[0].module, options)
               for weight in chosen}
    skipped = [f"{weight.name!r}: {reason}" for weight, reason in reasons.items() if reason is not None]
    todo = [weight for weight, reason in reasons.items() if reason is None]
    if not todo:
        raise VeneerError("quantize: nothing to quantise here. " + "; ".join(skipped[:3]))
    _check_finite(todo)
    before = after = 0
    names = _all_names(model)
    for weight in todo:
        module = weight.places[0].module
        before += _bytes(module)
        made = storage.pack(scheme, module, options)
        after += storage.nbytes(made)
        if made is not module:
            _replace(model, names[module], made)
    return QuantizeReport(scheme, len(todo), before, after, tuple(skipped))


@torch.no_grad()
def dequantize(model: nn.Module) -> int:
    """Hold packed weights as ordinary numbers again, in the dtype that they are read as, in place; returns how many.

    What quantising lost stays lost. Raises `VeneerError`, with nothing changed, where adapters are on the model (merge
    or detach them first) or a packed weight is in a form that cannot be read.
    """
    if any(isinstance(module, Host) for _, module in base_modules(model)):
        raise VeneerError("dequantize: this model has adapters; merge them for good (veneer.merge(model, keep=False)) "
                          "and detach them first")
    found = [(name, module, packed_storage(module)) for name, module in base_modules(model)]
    packed = [(name, module, storage) for name, module, storage in found if storage is not None]
    reasons = [f"{name or 'this module'!r}: {reason}" for name, module, storage in packed
               if (reason := storage.refusal(module)) is not None]
    if reasons:
        raise VeneerError(f"dequantize: {len(reasons)} of {len(packed)} packed weights cannot be read, so nothing was "
                          f"changed. {'; '.join(reasons[:3])}")
    for _, module, storage in packed:
        module.__class__ = storage.unpack(module, storage.read(module))
        RECENT.forget(module)
    if packed and not foreign(model):
        forget_quantizer(unwrap(model))
    return len(packed)


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


def _check_finite(weights: Sequence[Weight]) -> None:
    """Before the first is packed: half a quantised model is of no use."""
    for weight in weights:
        if not bool(torch.isfinite(weight.tensor).all()):
            raise VeneerError(f"quantize: {weight.name!r} has numbers that are not finite (NaN or infinite); nothing "
                              "was quantised")


def _all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every name of every module: one module may hang in several places."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in unwrap(model).named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def _replace(model: nn.Module, names: Sequence[str], made: nn.Module) -> None:
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(unwrap(model).get_submodule(parent), child, made)


def _refusal(weight: Weight, storage: Storage) -> str | None:
    place = weight.places[0]
    if weight.storage is not None:
        return f"it is held as {weight.held_as} already"
    if len(weight.places) > 1:
        return f"it is tied ({', '.join(repr(p.names[0]) for p in weight.places)})"
    if type(place.module) is not nn.Linear or place.param != "weight":
        return f"it is the {place.param} of a {type(place.module).__name__}, and only an nn.Linear is packed"
    if not place.module_name:
        return "it is the model itself; quantise a module around it"
    if storage.replaces and _hooked(place.module):
        return (f"another layer would take its place, as {storage.name} does it, without the hooks (or the forward of "
                "its own) that it has; take them off, quantise, and put them on again")
    return "it is on the meta device and has no values yet" if weight.tensor.is_meta else None


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()
