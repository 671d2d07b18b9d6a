"""prepare_for_kbit_training: what a quantised base wants before adapters are trained over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.method import VeneerError, nearest
from veneer.weights import base_modules
from veneer.wrappers import unwrap

_NARROW = (torch.float16, torch.bfloat16)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
#: where a model notes what `unprepare` is to bring back
_NOTE, _GIVEN = "_veneer_kbit", "_veneer_given"


def prepare_for_kbit_training(model: nn.Module, *, norms: str | None = "float32",
                              gradient_checkpointing: bool | Mapping[str, Any] = True) -> nn.Module:
    """Freeze the base, run its norms in fp32, and turn on gradient checkpointing, in place; returns the same model.

    For a model that is quantised and about to get adapters, which `attach` freezes by itself; whatever of this a model
    has already stays, so that a second call changes nothing.

    norms: "float32" holds the numbers of 16-bit norms (LayerNorm, RMSNorm and the like, by class or name) in fp32 and
    computes them so; each still gives the dtype that it is given, so that the layers around it notice nothing. None
    leaves them as they are.
    gradient_checkpointing: True, or options of `torch.utils.checkpoint` such as {"use_reentrant": True} (default
    False), turns on the model's own; its input embeddings then give outputs that require gradients, without which a
    reentrant checkpoint has none. False leaves the model as it is.

    `unprepare` takes it back. Raises `VeneerError`, with nothing changed, for another value of `norms`, and for
    checkpointing on a model that has none.
    """
    bare: Any = unwrap(model)
    if norms not in (None, "float32"):
        raise VeneerError(f"prepare_for_kbit_training: norms must be 'float32' or None, got {norms!r}"
                          f"{nearest(str(norms), ['float32'])}")
    switch, embeddings = _checkpointing(bare) if gradient_checkpointing else (None, [])
    note = bare.__dict__.setdefault(_NOTE, {"thawed": set(), "norms": {}, "checkpointing": False})
    for path, module in base_modules(bare):
        note["thawed"] |= {f"{path}.{name}" if path else name for name, param in module._parameters.items()
                           if param is not None and param.requires_grad}
        for param in module._parameters.values():
            if param is not None and param.requires_grad:
                param.requires_grad = False
    for path, module in _narrow_norms(bare) if norms else ():
        note["norms"][path] = _dtype(module)
        _widen(module)
    for module in embeddings:
        if not _hooked(module._forward_hooks, _require_grad):
            module.register_forward_hook(_require_grad)
    if switch is not None and not _is_on(bare):
        given = dict(gradient_checkpointing) if isinstance(gradient_checkpointing, Mapping) else {}
        switch({"use_reentrant": False, **given})
        note["checkpointing"] = True
    return model


def unprepare(model: nn.Module) -> nn.Module:
    """Take back what `prepare_for_kbit_training` did: norms have their dtype again (and their bits, unless they were
    trained), parameters their `requires_grad`, checkpointing is off if that turned it on. A model that was not prepared
    stays as it is."""
    bare: Any = unwrap(model)
    note = bare.__dict__.pop(_NOTE, None)
    if note is None:
        return model
    for path, module in base_modules(bare):
        _unhook(module)
        module.__dict__.pop(_GIVEN, None)
        if path in note["norms"]:
            _cast(module, note["norms"][path])
        for name, param in module._parameters.items():
            if param is not None and (f"{path}.{name}" if path else name) in note["thawed"]:
                param.requires_grad = True
    if note["checkpointing"]:
        _method(bare, "activation_checkpointing_disable", "gradient_checkpointing_disable")()
    return model


# -- norms ------------------------------------------------------------------------------------------------
def _narrow_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in base_modules(model):
        leaf = all(name == "adapters" or child is None for name, child in module._modules.items())
        named = leaf and "norm" in type(module).__name__.lower()
        if (named or isinstance(module, _NORMS)) and _dtype(module) in _NARROW:
            yield path, module


def _dtype(module: nn.Module) -> torch.dtype | None:
    """Of its own parameters, where they are vectors of one dtype, as a norm's are."""
    own = [param for param in module._parameters.values() if param is not None]
    kinds = {param.dtype for param in own}
    return kinds.pop() if len(kinds) == 1 and all(param.dim() <= 1 for param in own) else None


def _widen(module: nn.Module) -> None:
    _cast(module, torch.float32)
    if not _hooked(module._forward_pre_hooks, _up):
        module.register_forward_pre_hook(_up, with_kwargs=True)
        module.register_forward_hook(_down)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for param in module._parameters.values():
        if param is not None:
            param.data = param.data.to(dtype)  # the parameter stays the object it is


def _up(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The input in the dtype of the norm's numbers, where that is wider; `_down` gives the output its dtype."""
    x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    wide = next((param.dtype for param in module._parameters.values() if param is not None), None)
    module.__dict__[_GIVEN] = None if x is None else x.dtype
    if x is None or wide is None or x.dtype == wide or torch.promote_types(x.dtype, wide) != wide:
        return None
    new = x.to(wide)
    return tuple(new if a is x else a for a in args), {key: new if a is x else a for key, a in kwargs.items()}


def _down(module: nn.Module, args: tuple, output: Any) -> Any:
    dtype = module.__dict__.get(_GIVEN)
    return output.to(dtype) if isinstance(output, Tensor) and dtype is not None else output


# -- checkpointing ----------------------------------------------------------------------------------------
def _checkpointing(model: Any) -> tuple[Callable, list[nn.Module]]:
    """What turns it on, and the modules that embed the inputs."""
    kind = type(model).__name__
    switch = _method(model, "activation_checkpointing_enable", "gradient_checkpointing_enable")
    if switch is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise VeneerError(f"prepare_for_kbit_training: a {kind} has no gradient checkpointing of its own; pass "
                          "gradient_checkpointing=False, and wrap its blocks in torch.utils.checkpoint where you want")
    ask = _method(model, "get_input_embeddings")
    found = ask() if ask is not None else None
    if not isinstance(found, nn.Module):
        raise VeneerError(f"prepare_for_kbit_training: a {kind} does not say which module embeds its inputs "
                          "(get_input_embeddings), whose outputs are to require gradients; pass "
                          "gradient_checkpointing=False")
    return switch, [found]


def _method(model: Any, *names: str) -> Any:
    """The first of these methods that the model has; transformers has renamed its own."""
    return next((method for name in names if callable(method := getattr(model, name, None))), None)


def _is_on(model: Any) -> bool:
    new = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", False) if new is None else new)


def _require_grad(module: nn.Module, args: tuple, output: Any) -> None:
    if isinstance(output, Tensor) and output.is_floating_point() and torch.is_grad_enabled():
        output.requires_grad_()


# -- hooks ------------------------------------------------------------------------------------------------
def _hooked(hooks: Mapping[int, Callable], ours: Callable) -> bool:
    """By the function itself: copies and pickles of a model have the hook and no handle of it."""
    return ours in hooks.values()


def _unhook(module: nn.Module) -> None:
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_up, _down, _require_grad)]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
