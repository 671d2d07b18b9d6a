"""`BaseTunerLayer`: what all of PEFT's layers have, as a face over the engine's hosts."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from veneer.attached import adapter_names, routes
from veneer.hosts import Host
from veneer.merge import merge, unmerge
from veneer.method import Adapter
from veneer.methods.dora import DoRAAdapter
from veneer.peft.printed import describe
from veneer.peft.shown import bare, parts, tree


class BaseTunerLayer(Host):
    """A face over a host: it is the module that it was, and shows its adapters as PEFT's layers do.

    What it shows below itself (`lora_A`, `lora_B`, …) is made anew at each look, of the adapters' own parameters: read
    and write those, but do not expect hooks or attributes set on `module.lora_A["default"]` to stay.
    """

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    other_param_names: ClassVar[tuple[str, ...]] = ()

    # -- the tree of names ------------------------------------------------------------------------------
    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        seen: set[nn.Module] = set()
        for name, module in [*self._modules.items(), *tree(self).items()]:
            if module is not None and name != "adapters" and module not in seen:
                seen.add(module)
                yield name, module

    def children(self) -> Iterator[nn.Module]:
        # Those that are there: whoever moves, casts or switches a model goes by this.
        yield from dict.fromkeys(module for module in self._modules.values() if module is not None)

    def named_modules(self, memo: set[nn.Module] | None = None, prefix: str = "",
                      remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
        memo = set() if memo is None else memo
        if self in memo:
            return
        if remove_duplicate:
            memo.add(self)
        yield prefix, self
        # The adapters themselves come last, so that their parameters go by PEFT's names; wrappers that put other
        # tensors in the place of parameters must find every module that holds one.
        for name, module in [*self.named_children(), ("adapters", self.adapters)]:
            yield from module.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        state = super().state_dict(*args, **kwargs)
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        for part in parts(self):
            if prefix + part.path in state:
                state[prefix + part.shown] = state.pop(prefix + part.path)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for part in parts(self):
            if prefix + part.shown in state_dict:
                state_dict[prefix + part.path] = state_dict.pop(prefix + part.shown)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __setattr__(self, name: str, value: Any) -> None:
        new = isinstance(value, nn.Module) and name not in self._modules and "veneer" in self.__dict__
        if new and name in tree(self):
            return  # wrappers that walk a model put back what they do not wrap
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return describe(self)

    def _part(self, name: str, kind: type[nn.Module]) -> Any:
        """One of the dicts by adapter name, empty where no adapter has such a part."""
        found = tree(self).get(name)
        return kind() if found is None else found

    def _main(self, name: str) -> Adapter:
        """The adapter on the module's weight, or on the first parameter that has one."""
        if name not in self.adapters:
            raise ValueError(f"no adapter {name!r} on this layer; it has: {', '.join(self.adapters) or 'none'}")
        slots = cast(nn.ModuleDict, self.adapters[name])
        return cast(Adapter, slots["weight"] if "weight" in slots else next(iter(slots.values())))

    # -- the base ---------------------------------------------------------------------------------------
    @property
    def base_layer(self) -> nn.Module:
        """The layer without its adapters, over the same weight."""
        return bare(self)

    def get_base_layer(self) -> nn.Module:
        return bare(self)

    # -- which adapters ---------------------------------------------------------------------------------
    def _get_available_adapters(self) -> set[str]:
        return set(self.adapters)

    @property
    def merged(self) -> bool:
        return bool(self.veneer.merged)

    @property
    def merged_adapters(self) -> list[str]:
        return list(self.veneer.merged)

    @property
    def active_adapters(self) -> list[str]:
        return [name for name in self.veneer.route.live if name not in self.veneer.off]

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    @property
    def disable_adapters(self) -> bool:
        return bool(self.veneer.route.disabled) or self.veneer.off >= set(self.adapters)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters of this layer alone."""
        if enabled:
            self.veneer.off.clear()
        else:
            self.veneer.off |= set(self.adapters)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these the active adapters. What is active holds for the whole model here, not for one layer; what is
        trainable is set for this layer."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.veneer.route.live = tuple(names)
        for name in self.adapters:
            self.set_requires_grad(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            if name in self.adapters:
                require_grad(cast(nn.ModuleDict, self.adapters[name]), requires_grad)

    # -- the weight -------------------------------------------------------------------------------------
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapted weight over the base weight of this layer. It is always checked to be finite."""
        names = [name for name in adapter_names or self.active_adapters if name in self.adapters]
        merged = list(self.veneer.merged)
        if not set(names) - set(merged):
            return
        merge_instead(self, merged, list(dict.fromkeys([*merged, *names])), keep=True)

    def unmerge(self) -> None:
        if not self.veneer.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        unmerge(self)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """ΔW as the base weight is stored, (out, in) for a linear layer, in the adapter's dtype; under DoRA that of the
        pair, before the lengths."""
        main = self._main(adapter)
        param = next(p for p, each in cast(nn.ModuleDict, self.adapters[adapter]).items() if each is main)
        change = main.inner if isinstance(main, DoRAAdapter) else main
        return self.veneer.layouts[param].stored(change.delta())


def require_grad(module: nn.Module, flag: bool) -> None:
    """Make everything trainable in adapters trainable, or freeze it; with what they share with others."""
    states = [part.shared_state() for part in module.modules() if isinstance(part, Adapter)]
    for each in [module, *(state for state in states if state is not None)]:
        for param in each.parameters():
            param.requires_grad_(flag)


def merge_instead(model: nn.Module, merged: Sequence[str], wanted: Sequence[str], keep: bool) -> None:
    """Merge adapters in place of those that are merged, which are merged again where that fails."""
    if merged:
        unmerge(model)
    try:
        merge(model, wanted, keep)
    except BaseException:  # also where memory runs out, or somebody interrupts
        if merged:
            merge(model, merged)
        raise


def check_adapters_to_merge(module: BaseTunerLayer, adapter_names: list[str] | None = None) -> list[str]:
    """The names that are not merged yet; by default of the active ones."""
    names = module.active_adapters if adapter_names is None else adapter_names
    if isinstance(names, str):
        raise ValueError(f"adapter_names should be a list of strings, got {names!r}.")
    return [name for name in names if name not in module.merged_adapters]


def set_live(model: nn.Module, names: Iterable[str]) -> None:
    """Which adapters are live, without a look at whether the model has them everywhere."""
    present = adapter_names(model)
    for route in routes(model):
        route.live = tuple(name for name in names if name in present)


def onload_layer(layer: nn.Module) -> Any:
    """For code that wraps reads of offloaded layers in PEFT's context; accelerate's own hooks do that work here."""
    return contextlib.nullcontext()
