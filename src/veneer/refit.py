"""Refitting LoRA to a base that is quantised already: the pair makes up for what quantising lost, as one step of LoftQ
does (Li et al. 2023, arXiv:2310.08659), from the weights that the base had before."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from veneer.attach import Attached, adapter_names, attached, hosts
from veneer.inits.quant import nearest_pair
from veneer.io.originals import Originals, Source, open_originals
from veneer.method import VeneerError, nearest, without_autocast
from veneer.methods.lora import LoRAAdapter
from veneer.weights import Weight

Accept = Callable[[nn.Module, str], bool]
_OWNER = "replace_lora_weights_loftq"


@dataclass(frozen=True)
class RefitWeight:
    """One weight. before, after: ‖W₀ − (W + s·BA)‖ (Frobenius) with W₀ the original and W the base; where `accept` said
    no, `after` is what the refused pair would have given, and `replaced` is False."""

    name: str
    before: float
    after: float
    replaced: bool


@dataclass(frozen=True)
class RefitReport:
    """What was refitted. left: weights with an adapter of this name that were not, and why."""

    weights: tuple[RefitWeight, ...]
    left: dict[str, str] = field(default_factory=dict)

    @property
    def replaced(self) -> list[str]:
        return [weight.name for weight in self.weights if weight.replaced]

    @property
    def error_before(self) -> float:
        """Over all weights together, the root of the sum of squares."""
        return math.hypot(*(weight.before for weight in self.weights))

    @property
    def error_after(self) -> float:
        return math.hypot(*(weight.after if weight.replaced else weight.before for weight in self.weights))

    def __str__(self) -> str:
        share = self.error_after / self.error_before if self.error_before else 1.0
        lines = [f"{len(self.replaced)} of {len(self.weights)} LoRA weights refitted: distance to the originals "
                 f"{self.error_before:.4g} before, {self.error_after:.4g} after ({share:.1%})"]
        return "\n".join([*lines, *(f"left as it was: {name}: {why}" for name, why in self.left.items())])


class _Fit(NamedTuple):
    weight: Weight
    adapter: LoRAAdapter
    key: str  # the original's name


def replace_lora_weights_loftq(model: nn.Module, originals: Source, name: str = "default",
                               accept: Accept | None = None) -> RefitReport:
    """Set A, B of each LoRA called `name` so that s·BA is the nearest of its rank to W₀ − W: the original weight less
    what the model's base holds now. For a base in any storage; call it after `attach` and before training.

    originals: the checkpoint that was quantised, as a folder, one .safetensors file, or a mapping from names to
    tensors. It is read one tensor at a time. Names may have another prefix than in the model.
    accept: called as accept(model, weight name) with the new pair in place, after each weight; unless it returns True
    the old pair is put back. Several passes may accept more than one does.

    Returns a report. Raises `VeneerError`, with every pair as it was, for an unknown or merged adapter, originals of
    another model (names, shapes, values), where no LoRA can be refitted, and where the base holds its original values.
    """
    before: list[tuple[LoRAAdapter, Tensor, Tensor]] = []
    fits, left = _fits(model, name)
    with open_originals(originals, _OWNER) as source:
        todo = [_Fit(weight, adapter, _find(source, weight)) for weight, adapter in fits]
        done = []
        try:
            for fit in todo:
                found = _refit(model, fit, source, accept, before)
                if found is None:
                    left[fit.weight.name] = "its base holds the original values"
                else:
                    done.append(found)
        except BaseException:
            for adapter, A, B in before:
                _put(adapter, A, B)
            raise
    if not done:
        raise VeneerError(f"{_OWNER}: the base holds its original values in all {len(todo)} weights, so there is "
                          "nothing to make up for; quantise it first (veneer.quantize), or attach "
                          "LoRA(init=\"loftq\"), which quantises by itself")
    return RefitReport(tuple(done), left)


def _fits(model: nn.Module, name: str) -> tuple[list[tuple[Weight, LoRAAdapter]], dict[str, str]]:
    """The weights to refit, and those with another adapter of this name, with the reason."""
    known = adapter_names(model)
    if name not in known:
        hint = nearest(str(name), known) or "."
        raise VeneerError(f"{_OWNER}: no adapter named {name!r} on this model{hint} It has: "
                          f"{', '.join(map(repr, known)) or 'none'}")
    merged = sorted({each for _, host in hosts(model) for each in host.veneer.merged})
    if merged:
        raise VeneerError(f"{_OWNER}: adapter {', '.join(map(repr, merged))} is merged into the base weights; call "
                          "veneer.unmerge(model) first")
    fits, left = [], {}
    for weight, adapter in attached(model, name):
        reason = _refusal(Attached(weight, adapter))
        if reason is None:
            assert isinstance(adapter, LoRAAdapter)
            fits.append((weight, adapter))
        else:
            left[weight.name] = reason
    if not fits:
        first = next(iter(left))
        raise VeneerError(f"{_OWNER}: adapter {name!r} has no LoRA that could be refitted; {first!r}: {left[first]}")
    return fits, left


def _refusal(one: Attached) -> str | None:
    adapter = one.adapter
    if not isinstance(adapter, LoRAAdapter):
        return f"it has {adapter.method}, and only LoRA's pair can be refitted"
    if adapter.form().A.shape != adapter.A.shape:
        return (f"its {adapter.method} subtracts the pair it starts from; attach a LoRA that starts at zero, such as "
                "init=\"kaiming\"")
    if one.weight.tensor.is_meta or adapter.on_meta():
        return "it is on the meta device and has no values yet"
    return f"its {adapter.method} has a scale of 0" if adapter.scale == 0 else None


def _names(weight: Weight) -> list[str]:
    """What the weight may be called in a checkpoint: its full name in each of its places."""
    return [f"{place.module_name}.{place.param}" if place.module_name else place.param for place in weight.places]


def _find(source: Originals, weight: Weight) -> str:
    key = source.find(_names(weight))
    if source.shapes[key] != weight.layout.native:
        raise VeneerError(f"{source.title}: {key!r} is {source.shapes[key]}, and the model's weight is "
                          f"{weight.layout.native}; are the originals of another model?")
    return key


def _refit(model: nn.Module, fit: _Fit, source: Originals, accept: Accept | None,
           before: list[tuple[LoRAAdapter, Tensor, Tensor]]) -> RefitWeight | None:
    """Refit one weight; what it had goes to `before`. None where there is nothing to make up for."""
    weight, adapter, _ = fit
    with torch.no_grad():
        missing = _missing(fit, source)
        if missing is None:
            return None
        old = _distance(missing, adapter)
        saved = (adapter, adapter.A.clone(), adapter.B.clone())
        pairs = [nearest_pair(one, adapter.A.shape[-2], adapter.scale, adapter.generator())
                 for one in missing.reshape(-1, *missing.shape[-2:])]
        before.append(saved)
        _put(adapter, *(torch.stack(side).view_as(own)
                        for side, own in zip(zip(*pairs, strict=True), (adapter.A, adapter.B), strict=True)))
        new = _distance(missing, adapter)
        del missing
    keep = accept is None or _answer(accept, model, weight.name)
    if not keep:
        _put(*saved)
    return RefitWeight(weight.name, old, new, keep)


def _missing(fit: _Fit, source: Originals) -> Tensor | None:
    """W₀ − W (*batch, out, in) in fp32, or None where the two are equal in the dtype that the base is read as."""
    layout, base = fit.weight.layout, fit.weight.read()
    there = source.get(fit.key).to(base.device)
    if torch.equal(there.to(base.dtype), base):
        return None
    there, base = layout.matrix(there).float(), layout.matrix(base).float()
    if not there.isfinite().all():
        raise VeneerError(f"{source.title}: {fit.key!r} holds NaN or infinite values")
    alike = float(torch.nn.functional.cosine_similarity(there.flatten(), base.flatten(), dim=0))
    if alike < 0.1:  # 2 bits a number leave 0.8; unrelated weights are near 0
        raise VeneerError(f"{source.title}: {fit.key!r} has nothing in common with the weight that the model holds (a "
                          f"cosine of {alike:.2f}); the originals are of another model")
    return there - base


def _distance(missing: Tensor, adapter: LoRAAdapter) -> float:
    A, B = adapter.A.float(), adapter.B.float()
    with without_autocast(missing):
        return float(torch.linalg.vector_norm(missing - adapter.scale * (B @ A)))


def _put(adapter: LoRAAdapter, A: Tensor, B: Tensor) -> None:
    with torch.no_grad():
        adapter.A.copy_(A)
        adapter.B.copy_(B)


def _answer(accept: Accept, model: nn.Module, name: str) -> bool:
    answer = accept(model, name)
    if answer is None:
        raise VeneerError(f"{_OWNER}: accept returned None for {name!r}; it must return True, to keep the new pair, or "
                          "False")
    return bool(answer)
