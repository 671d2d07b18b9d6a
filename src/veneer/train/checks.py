"""What a run proves about its own adapter: it reloads bit for bit, and it merges within the bar."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import veneer
from veneer.storage import packed_storage
from veneer.train.measure import float_dtype, kl_divergence, logits
from veneer.train.model import Loaded, load_model
from veneer.train.report import Check
from veneer.train.settings import Settings
from veneer.weights import moved, scan

# Largest difference of logits by merging, as a share of the largest logit. The merged model rounds W + ΔW once and
# then sums in another order than the adapted one, so differences of a few rounding steps per layer are due. fp32 and
# fp64 have room for that (rounding step 1.2e-7 and 2.2e-16). In 16 bits the rounding of every weight itself (3.9e-3
# for bf16, 4.9e-4 for fp16) reaches the logits: there the bar only catches a merge that went wrong.
MERGE_BAR = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Of a quantised base, the merged model in 16 bits beside the unmerged one: mean KL in nats per token.
KL_BAR = 1e-3


def check_adapter(
    model: nn.Module, loaded: Loaded, settings: Settings, path: Path, probe: dict[str, Tensor]
) -> list[Check]:
    """Reload the adapter at `path` into a fresh model and merge it there, each if the settings ask for it.

    The trained model stays as it is.
    """
    found: list[Check] = []
    if not (settings.output.check_reload or settings.output.check_merge):
        return found
    name = settings.adapter.name
    trained = logits(model, probe)
    device = next(model.parameters()).device
    fresh = load_model(settings.model, like=loaded).model.to(device)
    veneer.load(fresh, path, name=name)
    veneer.activate(fresh, name)
    again = logits(fresh, probe)
    if settings.output.check_reload:
        found.append(_reload(trained, again, _rounded(model, fresh)))
    if settings.output.check_merge:
        found.append(_merge(fresh, name, probe, again))
    return found


def _rounded(model: nn.Module, fresh: nn.Module) -> bool:
    """A start has rewritten base weights of the trained model which stay as they were in a fresh one: what it moved is
    saved, but how the rest was rounded is not."""
    there = {weight.name: moved(weight) for weight in scan(fresh)}
    return any(moved(weight) and not there.get(weight.name, False) for weight in scan(model))


def _reload(trained: Tensor, again: Tensor, rounded: bool) -> Check:
    equal, difference = torch.equal(trained, again), _relative(again, trained)
    what = f"{trained.numel():,} logits of a fresh model with the saved adapter are "
    if equal:
        return Check(name="reload", passed=True, detail=what + "bit-equal")
    detail = f"{what}NOT equal: largest difference {difference:.3g}"
    if not rounded:
        return Check(name="reload", passed=False, detail=detail)
    bar = MERGE_BAR[trained.dtype]
    return Check(name="reload", passed=difference <= bar, detail=f"{detail} of the largest logit (bar {bar:.0e}: the "
                                                                 "start rounded what it left of the base weights)")


def _merge(fresh: Any, name: str, probe: dict[str, Tensor], again: Tensor) -> Check:
    if any(packed_storage(module) is not None for module in fresh.modules()):
        return _merge_dense(fresh, name, probe, again)
    veneer.merge(fresh, name)
    difference = _relative(logits(fresh, probe), again)
    bar = MERGE_BAR[float_dtype(fresh)]
    detail = f"largest logit difference {difference:.2e} of the largest logit (bar {bar:.0e})"
    return Check(name="merge", passed=difference <= bar, detail=detail)


def _merge_dense(fresh: Any, name: str, probe: dict[str, Tensor], again: Tensor) -> Check:
    """Of a quantised base: an ordinary model in 16 bits, as it would be handed on, beside the unmerged one. Both are
    computed in fp32: what 16-bit arithmetic rounds on the way is as large as the difference looked for, merged or not.
    """
    wide = float_dtype(fresh).itemsize > 2
    reference = again if wide else logits(copy.deepcopy(fresh).float(), probe)
    veneer.merge(fresh, name, keep=False)
    veneer.detach(fresh)
    veneer.dequantize(fresh)
    dtype = torch.bfloat16 if wide else float_dtype(fresh)
    merged = logits(fresh.to(dtype).to(reference.dtype), probe)
    mask = probe["attention_mask"].bool().to(merged.device)
    distance = kl_divergence(reference[mask], merged[mask])
    detail = f"merged, dequantised and rounded to {str(dtype).removeprefix('torch.')}, KL {distance:.2e} per token " \
             f"from the unmerged model (bar {KL_BAR:.0e})"
    return Check(name="merge", passed=distance <= KL_BAR, detail=detail)


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max())
