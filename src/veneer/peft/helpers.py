"""PEFT's helpers: other scales for a while, signatures, and contexts that the engine has no need of."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from types import MethodType, TracebackType
from typing import Any

from torch import nn

from veneer.attached import hosts
from veneer.methods.adalora import AdaLoRAAdapter
from veneer.methods.lora import LoRAAdapter
from veneer.peft.config import PeftConfig
from veneer.peft.errors import NotInVeneerError
from veneer.peft.saving import base_of
from veneer.wrappers import unwrap

_METHODS = ("forward", "generate")


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside, the scale of every LoRA and AdaLoRA on the model is `multiplier` times what it was.

    With a multiplier between 0 and 1 that is WiSE-FT (Wortsman et al. 2021, arXiv:2109.01903) between the base and what
    was trained. Raises `TypeError` for what is no number, and `ValueError` for one that is not finite and for a model
    without such adapters.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    if not math.isfinite(multiplier):
        raise ValueError(f"a scale must be finite, got the multiplier {multiplier}")
    pairs = {part: part.scale for _, host in hosts(base_of(unwrap(model))) for part in host.adapters.modules()
             if isinstance(part, (LoRAAdapter, AdaLoRAAdapter))}
    if not pairs:
        raise ValueError("scaling is only supported for models with `LoraLayer`s, and this one has none")
    try:
        for pair, scale in pairs.items():
            pair.scale = scale * multiplier
        yield
    finally:
        for pair, scale in pairs.items():
            pair.scale = scale


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Changes nothing, inside or out: Veneer's layers never cast their input, so there is nothing to switch off."""
    yield


class DoraCaching(contextlib.AbstractContextManager):
    """Changes nothing: without gradients DoRA's norms are kept anyway, for as long as they hold. A context or, when
    called, a switch, as in PEFT."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        return None


def check_if_peft_model(model_name_or_path: str | Path) -> bool:
    """Whether there is an adapter's config at a path or in a repository of the Hub, of any of PEFT's methods."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except NotInVeneerError:
        return True
    except (ValueError, OSError):
        return False
    return True


# -- signatures -----------------------------------------------------------------------------------------------
def update_forward_signature(model: nn.Module) -> None:
    """Show the base model's signature and docstring at `model.forward`, where that takes (*args, **kwargs)."""
    _show_signature(model, "forward")


def update_generate_signature(model: nn.Module) -> None:
    """Show the base model's signature and docstring at `model.generate`, if it has one."""
    _show_signature(model, "generate")


def update_signature(model: nn.Module, method: str = "all") -> None:
    """Both of them, or one: method is "forward", "generate" or "all"."""
    if method not in (*_METHODS, "all"):
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    for name in _METHODS if method == "all" else [method]:
        _show_signature(model, name)


def _show_signature(model: Any, name: str) -> None:
    own = getattr(type(model), name, None)
    theirs = getattr(type(model.get_base_model()), name, None)
    if own is None or theirs is None:
        return
    kinds = {parameter.kind for parameter in list(inspect.signature(own).parameters.values())[1:]}
    if kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return own(self, *args, **kwargs)

        model.__dict__[name] = MethodType(functools.update_wrapper(call, theirs, updated=()), model)
