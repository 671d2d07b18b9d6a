"""Which adapters are on and which are trained, by patterns of layers and of adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from veneer.attach import activate
from veneer.attached import adapter_names, hosts, routes
from veneer.hosts import Host
from veneer.method import VeneerError, VeneerWarning
from veneer.modelopt.state import is_peft_model

Patterns = str | bytes | Callable[[str], Any] | Iterable[Any] | None
Match = tuple[str, Host, str]


def disable_adapters(model: nn.Module, layers_to_disable: Patterns = None,
                     adapters_to_disable: Patterns = None) -> None:
    """Switch adapters off; the model goes on without them.

    Patterns of whole names (wildcards; for layers also callables) say which layers and which adapters; None means all.
    What matches nothing is a `VeneerWarning`. Raises `VeneerError` for a model without adapters.
    """
    _refuse_bare(model, "disable_adapters")
    for _, host, adapter in matching(model, "disable_adapters", layers_to_disable, adapters_to_disable):
        host.veneer.off.add(adapter)


def enable_adapters(model: nn.Module, layers_to_enable: Patterns = None, adapters_to_enable: Patterns = None) -> None:
    """The inverse of `disable_adapters`, with the same patterns."""
    _refuse_bare(model, "enable_adapters")
    found = matching(model, "enable_adapters", layers_to_enable, adapters_to_enable)
    live = {name for route in routes(model) for name in route.live}
    asleep = {adapter for _, _, adapter in found} - live  # veneer.activate has left them out
    for _, host in hosts(model):
        host.veneer.off |= {adapter for adapter in asleep if adapter in host.adapters}
    for _, host, adapter in found:
        host.veneer.off.discard(adapter)
    if asleep:
        activate(model, [name for name in adapter_names(model) if name in live | asleep])


def freeze_lora_weights(model: nn.Module, *, layer_patterns: Patterns = None,
                        adapter_patterns: Patterns = None) -> None:
    """No longer train the adapters that both patterns name; None means all, nothing matching is a `VeneerWarning`."""
    for match in matching(model, "freeze_lora_weights", layer_patterns, adapter_patterns):
        train(match, False)


def unfreeze_lora_weights(model: nn.Module, *, layer_patterns: Patterns = None,
                          adapter_patterns: Patterns = None) -> None:
    """Train the adapters that both patterns name; None means all, nothing matching is a `VeneerWarning`."""
    for match in matching(model, "unfreeze_lora_weights", layer_patterns, adapter_patterns):
        train(match, True)


def train(match: Match, wanted: bool) -> None:
    """Train one adapter on one layer, or not."""
    _, host, adapter = match
    for param in host.adapters[adapter].parameters():
        param.requires_grad_(wanted)


def matching(model: nn.Module, doing: str, layer_patterns: Patterns = None,
             adapter_patterns: Patterns = None) -> list[Match]:
    """(layer, host, adapter) of what both patterns name. Warns where that is nothing."""
    layers = _listed(layer_patterns, "layer", True)
    adapters = _listed(adapter_patterns, "adapter", False)
    found = [(name, host, adapter) for name, host in hosts(model) if _names(layers, name)
             for adapter in host.adapters if _names(adapters, adapter)]
    if not found:
        have = ", ".join(map(repr, adapter_names(model))) or "none"
        warnings.warn(f"{doing}: nothing matches layers {layer_patterns!r} and adapters {adapter_patterns!r}; patterns "
                      f"match whole names, such as '*attention*'. Adapters here: {have}", VeneerWarning, stacklevel=3)
    return found


def _names(patterns: list[Any] | None, name: str) -> bool:
    return patterns is None or any(fnmatchcase(name, p) if isinstance(p, str) else p(name) for p in patterns)


def _listed(patterns: Patterns, of: str, callables: bool) -> list[Any] | None:
    if patterns is None:
        return None
    single = isinstance(patterns, (str, bytes)) or not isinstance(patterns, Iterable)
    given: Iterable[Any] = [patterns] if single else patterns  # type: ignore[assignment]
    found = [each.decode() if isinstance(each, bytes) else each for each in given]
    for each in found:
        if not isinstance(each, str) and not (callables and callable(each)):
            what = "a string or a callable" if callables else "a string"
            raise VeneerError(f"a pattern of {of} names is {what}, or a list of them; got {each!r}")
    return found


def _refuse_bare(model: nn.Module, doing: str) -> None:
    if not is_peft_model(model):
        raise VeneerError(f"{doing}: the model must be a PEFT model; call update_model(model, config) first")
