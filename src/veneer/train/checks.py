"""What a run proves about its own adapter: it reloads bit for bit, and it merges within the bar."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import veneer
from veneer.train.model import Loaded, load_model
from veneer.train.report import Check
from veneer.train.settings import Settings

# Largest difference of logits by merging, as a share of the largest logit. The merged model rounds W + ΔW once and
# then sums in another order than the adapted one, so differences of a few rounding steps per layer are due. fp32 and
# fp64 have room for that (rounding step 1.2e-7 and 2.2e-16). In 16 bits the rounding of every weight itself (3.9e-3
# for bf16, 4.9e-4 for fp16) reaches the logits: there the bar only catches a merge that went wrong.
MERGE_BAR = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


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
        equal = torch.equal(trained, again)
        detail = f"{trained.numel():,} logits of a fresh model with the saved adapter are "
        detail += "bit-equal" if equal else f"NOT equal: largest difference {_relative(again, trained):.3g}"
        found.append(Check(name="reload", passed=equal, detail=detail))
    if settings.output.check_merge:
        veneer.merge(fresh, name)
        difference = _relative(logits(fresh, probe), again)
        bar = MERGE_BAR[next(fresh.parameters()).dtype]
        detail = f"largest logit difference {difference:.2e} of the largest logit (bar {bar:.0e})"
        found.append(Check(name="merge", passed=difference <= bar, detail=detail))
    return found


def logits(model: Any, probe: dict[str, Tensor]) -> Tensor:
    """Logits (batch, length, vocabulary) of the probe in eval mode."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    with torch.inference_mode():
        out = model(**{key: value.to(device) for key, value in probe.items()}, use_cache=False)["logits"]
    model.train(training)
    return out


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max())
