"""What was collected about a model before it gets an adapter that starts from it: `preprocess_corda` and
`preprocess_loraga` in PEFT leave that with the model, for the next `get_peft_model`.

It lives beside the model and not in it: no attribute, nothing in its state dict, gone when the model is.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn

from veneer.method import VeneerError, nearest
from veneer.statistics import Statistics
from veneer.wrappers import unwrap

#: kinds, by the value of `init_lora_weights` that asks for them
KINDS = ("corda", "lora_ga")
_KEPT: WeakKeyDictionary[nn.Module, dict[str, Statistics]] = WeakKeyDictionary()


def remember(model: nn.Module, kind: str, statistics: Statistics) -> None:
    """Keep `statistics` for the next adapter of this model that starts by `kind`; replaces what was kept of it."""
    _KEPT.setdefault(unwrap(model), {})[_known(kind)] = statistics


def recall(model: nn.Module, kind: str) -> Statistics | None:
    """What was kept, or None."""
    return _KEPT.get(unwrap(model), {}).get(_known(kind))


def forget(model: nn.Module, kind: str) -> None:
    """Let go of what was kept, if anything was."""
    _KEPT.get(unwrap(model), {}).pop(_known(kind), None)


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise VeneerError(f"nothing is remembered of kind {kind!r}{nearest(kind, KINDS) or '.'} "
                          f"Kinds: {', '.join(KINDS)}")
    return kind
