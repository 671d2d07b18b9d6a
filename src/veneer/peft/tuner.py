"""`BaseTuner`: the module between a `PeftModel` and the base model. It holds the configs and drives the engine."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from veneer.attach import attach, detach
from veneer.attach import route as routed
from veneer.attached import adapter_names, attached, hosts, known_names, routes
from veneer.eva import replaced
from veneer.hosts import Host
from veneer.io.load import LoadReport, load_tensors
from veneer.io.load import load as load_adapter
from veneer.merge import unmerge
from veneer.method import VeneerError
from veneer.methods import DoRA, Full, LoRA
from veneer.peft.config import CONFIG_NAME, PeftConfig, plain
from veneer.peft.dtypes import cast_adapter_dtype, settle_new
from veneer.peft.layers.base import BaseTunerLayer, merge_instead, require_grad, set_live
from veneer.peft.layers.faces import show_faces
from veneer.peft.replicate import replicated
from veneer.peft.translate import translate
from veneer.plan import resolve
from veneer.route import Route
from veneer.storage import packed_storage
from veneer.weights import base_modules, scan


class BaseTuner(nn.Module):
    """Adapters of one kind on a model that is changed in place and keeps its own names.

    model: the base model. peft_config: one config, or one for each adapter name. Attributes not found here are those
    of the model.
    """

    prefix: ClassVar[str] = "lora_"
    tuner_layer_cls: ClassVar[type[BaseTunerLayer]] = BaseTunerLayer
    #: what `mixed` models may put side by side is any of them, so that nothing here asks for one kind
    uses_shared_state: ClassVar[bool] = False

    def __init__(self, model: nn.Module, peft_config: PeftConfig | Mapping[str, PeftConfig],
                 adapter_name: str = "default", low_cpu_mem_usage: bool = False,
                 state_dict: dict[str, Tensor] | None = None, *, empty: bool = False) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self._disabled = False
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self._off: list[Route] = []  # what this tuner has switched off
        configs = {adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config
        if not empty:
            self.add(adapter_name, configs[adapter_name], state_dict)

    # -- adding and taking away -------------------------------------------------------------------------
    def add(self, name: str, config: PeftConfig, state_dict: dict[str, Tensor] | None = None) -> None:
        """Attach a new adapter by its config. The first of this tuner becomes the active one; one of the same name that
        was there before the tuner makes place.

        state_dict: instead of the config's targets, those that have keys in it are adapted.
        """
        self._refuse_merged("add an adapter")
        with replicated(self.model, config):
            found = translate(self.model, config if state_dict is None else targets_of(config, state_dict), name)
            if not found.rules:
                raise VeneerError(f"adapter {name!r}: its config adapts nothing: no target_modules, "
                                  "target_parameters, modules_to_save, trainable_token_indices or bias")
            made = resolve(self.model, scan(self.model), found.rules)
            # Drawn from torch's generator, so that torch.manual_seed decides, as in PEFT.
            seed = int(torch.randint(2**62, (), device="cpu"))
            before = self.active_adapters
            if name in adapter_names(self.model):
                replaced(self.model, made, name, seed, found.statistics)
            else:
                attach(self.model, made, name, seed, found.statistics)
        accept_base(self.model, name)
        if state_dict is None:
            vars(config).update(vars(found.config))  # as in PEFT, the config given says what has come of it
        self.targeted_module_names = list(found.modules)
        self.targeted_parameter_names = list(found.parameters)
        self._added(name, config if state_dict is None else found.config, before)

    def load(self, name: str, path: str | Path, config: PeftConfig, given: PeftConfig | None = None, *,
             strict: bool = True, allow_pickle: bool = False) -> LoadReport:
        """Attach the adapter at a path, or give the one of this name its values. `given`: to be used instead of the
        config in the file. strict, allow_pickle: as for `veneer.load`."""
        self._refuse_merged("load an adapter")
        before, new = self.active_adapters, name not in self.peft_config
        if new and name in adapter_names(self.model):
            raise ValueError(f"this model has an adapter {name!r} already, of another PeftModel; unload() that, or "
                             "give this one another adapter_name")
        override = None if given is None else plain(given.to_dict())
        if getattr(config, "layer_replication", None):
            override = override or PeftConfig.from_json_file(Path(path) / CONFIG_NAME)
            override = {**override, "layer_replication": None}  # which has been done
        with replicated(self.model, config if new else None):
            report = load_adapter(self.model, path, name, strict, allow_pickle=allow_pickle, config=override)
        if new:
            self._added(name, copy.deepcopy(config), before)
        return report

    def load_values(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LoadReport:
        """Give an adapter the values of a state dict in PEFT's keys."""
        return load_tensors(self.model, config, tensors, name, strict=False)

    def _added(self, name: str, config: PeftConfig, before: Sequence[str]) -> None:
        first = not self.peft_config
        self.peft_config[name] = config
        show_faces(self.model)
        if self._disabled:
            self._switch_off()
        if first:
            set_live(self.model, [name])
            self._train_active(config.inference_mode)
        else:  # nothing happens to those that are there
            set_live(self.model, before)
            self._require_grad(name, name in before and not config.inference_mode)

    def _train_active(self, inference_mode: bool) -> None:
        for name in adapter_names(self.model):
            self._require_grad(name, name in self.active_adapters and not inference_mode)

    def _require_grad(self, name: str, flag: bool) -> None:
        for _, adapter in attached(self.model, name):
            require_grad(adapter, flag)

    def inject_adapter(self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True,
                       low_cpu_mem_usage: bool = False, state_dict: dict[str, Tensor] | None = None) -> None:
        """Attach the adapter whose config is in `peft_config` already."""
        config = self.peft_config.pop(adapter_name)
        self.add(adapter_name, config, state_dict)
        self.settle_dtype(adapter_name, autocast_adapter_dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off. If it was active, the first one left becomes so."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist; there are: {', '.join(self.peft_config)}")
        self._refuse_merged("delete an adapter")
        active = self.active_adapters
        detach(self.model, adapter_name)
        del self.peft_config[adapter_name]
        show_faces(self.model)
        if active == [adapter_name] and self.peft_config:
            left = next(iter(self.peft_config))
            warnings.warn(f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left}.",
                          stacklevel=3)
            self.set_adapter(left)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Make fp32 of an adapter's 16-bit parameters; nothing where `autocast_adapter_dtype` is false."""
        cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)

    def settle_dtype(self, name: str, autocast_adapter_dtype: bool) -> None:
        """Give a new adapter its dtype: its base weights', or fp32 over 16 bit with `autocast_adapter_dtype`."""
        settle_new(self.model, name, autocast_adapter_dtype)

    # -- which are active -------------------------------------------------------------------------------
    @property
    def active_adapters(self) -> list[str]:
        return list(dict.fromkeys(name for route in routes(self.model) for name in route.live))

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make these the active ones, trainable unless `inference_mode`; all others are frozen."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        present = adapter_names(self.model)
        for name in names:
            if name not in present:
                raise ValueError(f"Adapter {name} not found; there are: {', '.join(present) or 'none'}")
        if any(host.veneer.merged for _, host in hosts(self.model)):
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            self.unmerge_adapter()
        self._refuse_copies(names, "active")
        set_live(self.model, names)
        self._train_active(inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._require_grad(name, requires_grad)

    def disable_adapter_layers(self) -> None:
        """Compute what the base computes, until `enable_adapter_layers`. What is merged is unmerged for good."""
        if self._merged():
            warnings.warn("Adapters are merged into the base weights. Unmerging the model first.", stacklevel=2)
            self.unmerge_adapter()
        self._disabled = True
        self._switch_off()

    def enable_adapter_layers(self) -> None:
        self._disabled = False
        for route in self._off:
            route.disabled -= 1
        self._off.clear()
        for _, host in hosts(self.model):
            host.veneer.off.clear()

    def _switch_off(self) -> None:
        for route in routes(self.model):
            if route not in self._off:
                route.disabled += 1
                self._off.append(route)

    # -- merging ----------------------------------------------------------------------------------------
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the active adapters, or these, into the base weights; the base's own are kept for `unmerge_adapter`.

        It is always checked that what is written is finite, as `safe_merge` asks.
        """
        wanted = self._to_merge(adapter_names)
        if wanted != self._merged():
            merge_instead(self.model, self._merged(), wanted, keep=True)

    def unmerge_adapter(self) -> None:
        if self._merged():
            unmerge(self.model)
        else:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)

    def _merged(self) -> list[str]:
        return list(dict.fromkeys(name for _, host in hosts(self.model) for name in host.veneer.merged))

    def merge_and_unload(self, progressbar: bool = False, safe_merge: bool = False,
                         adapter_names: list[str] | None = None) -> nn.Module:
        """The base model with the active adapters, or these, merged for good. A quantised weight becomes an ordinary
        one of 16 bit or more (PEFT quantises it again, which loses most of what was trained).

        progressbar: without effect; it takes moments.
        """
        wanted = self._to_merge(adapter_names)
        if wanted:
            merge_instead(self.model, self._merged(), wanted, keep=False)
        base = self.unload()
        left = [name for name, module in base_modules(base) if packed_storage(module) is not None]
        if left and wanted:
            warnings.warn(f"{left[0]!r} and {len(left) - 1} other layers had no adapter and are still quantised; "
                          "before save_pretrained make ordinary ones of them, veneer.dequantize(model)", stacklevel=3)
        return base

    def _to_merge(self, names: Sequence[str] | None) -> list[str]:
        """What is merged already and the active adapters, or these. Raises `ValueError` for unknown names, and where
        several of them have copies of the same module."""
        wanted = list(dict.fromkeys([*self._merged(), *(self.active_adapters if names is None else names)]))
        known_names(self.model, wanted)
        self._refuse_copies(wanted, "merged")
        return wanted

    def _refuse_copies(self, names: Sequence[str], what: str) -> None:
        """Raise `ValueError` where several of these adapters have trained copies of one module."""
        owners: dict[str, str] = {}
        for name in names:
            for weight, adapter in attached(self.model, name):
                if isinstance(adapter.method, Full) and owners.setdefault(weight.name, name) != name:
                    raise ValueError(f"adapters {owners[weight.name]!r} and {name!r} each have a trained copy of "
                                     f"{weight.name!r} (modules_to_save), and only one of them can be {what}")

    def _refuse_merged(self, doing: str) -> None:
        merged = self._merged()
        if merged:
            raise ValueError(f"cannot {doing} while {', '.join(map(repr, merged))} "
                             f"{'is' if len(merged) == 1 else 'are'} merged; call unmerge_adapter() first")

    def unload(self) -> nn.Module:
        """The base model without adapters: the very object that was given, its classes and names as before."""
        self.enable_adapter_layers()
        detach(self.model)
        self.peft_config.clear()
        return self.model

    # -- rows of a batch --------------------------------------------------------------------------------
    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Sequence[str] | None = None,
                                   alora_offsets: Any = None, **kwargs: Any) -> Iterator[None]:
        """Inside, each row of the batch goes through the adapter that `adapter_names` names for it, or through the
        base alone for "__base__"."""
        if alora_offsets is not None:
            raise NotImplementedError("alora_offsets: Veneer has no activated LoRA (aLoRA); use Hugging Face peft")
        if adapter_names is None:
            yield
            return
        if self.model.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names must be a list with one name for each row of the batch, got "
                            f"{adapter_names!r}")
        if self._merged():
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, please call "
                             "`unmerge_adapter` first.")
        unknown = sorted({name for name in adapter_names if name != "__base__"} - set(self.peft_config))
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        with routed(self.model, [None if name == "__base__" else name for name in adapter_names]):
            yield

    # -- the rest ---------------------------------------------------------------------------------------
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` takes an adapter; every additive method has a form of lower rank."""
        found = attached(self.model, adapter_name)
        return bool(found) and all(adapter.method is None or adapter.method.additive for _, adapter in found)

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        config: Any = getattr(model, "config", {"model_type": "custom"})
        return config if isinstance(config, dict) else config.to_dict()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


def targets_of(config: PeftConfig, state_dict: Mapping[str, Tensor]) -> PeftConfig:
    """The config with the modules as its targets that have keys in a state dict."""
    marks = ("lora_", "hada_", "lokr_", "vera_", "randlora_", "vblora_")
    modules = {key.partition(f".{mark}")[0].removeprefix("base_model.model.")
               for key in state_dict for mark in marks if f".{mark}" in key}
    if not modules:
        raise VeneerError("state_dict: none of its keys belongs to an adapter; expected some like "
                          "'layers.0.q_proj.lora_A.weight'")
    found = copy.copy(config)
    found.target_modules = modules  # type: ignore[attr-defined]
    return found


def accept_base(model: nn.Module, name: str) -> None:
    """Take the base as LoftQ has left it for the base that the adapter belongs to: as in PEFT, its file is relative to
    that one, and whoever saves it saves the base model too."""
    for weight, adapter in attached(model, name):
        method = adapter.method
        inner = method.inner if isinstance(method, DoRA) else method
        if isinstance(inner, LoRA) and inner.moves_base:
            plain = dataclasses.replace(inner, init="kaiming", residual="exact")
            adapter.method = DoRA(plain) if isinstance(method, DoRA) else plain
            for place in weight.places:
                cast(Host, place.module).veneer.moved.pop(place.param, None)
