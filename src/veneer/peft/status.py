"""What state the adapters of a model are in, layer by layer and all together: PEFT's two reports."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from torch import nn

from veneer.attached import adapter_names, hosts
from veneer.hosts import Host
from veneer.method import VeneerError
from veneer.peft.counting import count_parameters
from veneer.peft.layers.faces import faces_of
from veneer.peft.layers.whole import ModulesToSaveWrapper, TrainableTokensWrapper
from veneer.storage import packed_storage
from veneer.wrappers import unwrap

Irregular = Literal["irregular"]
T = TypeVar("T", bound=Hashable)
#: names that PEFT has for what holds a weight in fewer bits; it knows the others by the names that they have here
_BACKENDS = {"bitsandbytes 4-bit": "bnb 4bit", "bitsandbytes 8-bit": "bnb 8bit"}


@dataclass
class TunerLayerStatus:
    """One adapted module. name: below the tuner, or below a model that has none; module_type: as in "lora.Linear".

    requires_grad, devices (types such as "cuda"): by adapter name. A value that is not the same for all parameters of
    an adapter is "irregular". quantization_backend: what holds the weight in fewer bits, "bnb 4bit" say, or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A whole model; what differs between its layers is "irregular". Of a model that is no `PeftModel`, the type of
    the tuner is "None", and so is nothing known of `peft_types`."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


# -- layer by layer -------------------------------------------------------------------------------------------
def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The state of every adapted module of a `PeftModel`, or of any model with adapters on it.

    A module is listed once here, whatever of it is adapted. Raises `ValueError` where there are no adapters.
    """
    model = unwrap(model)
    tuner = _tuner(model)
    base, prefix = (model, "") if tuner is None else (tuner.model, "model.")
    found = [_status(prefix + name if name else prefix.removesuffix("."), host) for name, host in hosts(base)]
    if not found:
        raise VeneerError("No adapter layers found in the model, please ensure that it's a PEFT model or that you have "
                          "PEFT adapters injected in the model.")
    return found


def _tuner(model: nn.Module) -> Any:
    """The tuner in a `PeftModel`, the model itself where it is one, or None."""
    from veneer.peft.tuner import BaseTuner

    inner = model._modules.get("base_model")
    return model if isinstance(model, BaseTuner) else inner if isinstance(inner, BaseTuner) else None


def _status(name: str, host: Host) -> TunerLayerStatus:
    state = host.veneer
    storage = packed_storage(host)
    params = {each: list(cast(nn.ModuleDict, host.adapters[each]).parameters()) for each in host.adapters}
    kind = _kind(host)
    return TunerLayerStatus(
        name=f"{name}.token_adapter" if kind == "TrainableTokensLayer" else name,
        module_type=kind,
        enabled=not (state.route.disabled or state.off >= set(host.adapters)),
        active_adapters=list(state.route.live),
        merged_adapters=list(state.merged),
        requires_grad={each: _agreed(p.requires_grad for p in found) for each, found in params.items() if found},
        available_adapters=sorted(host.adapters),
        devices={each: sorted({p.device.type for p in found}) for each, found in params.items() if found},
        quantization_backend=None if storage is None else _BACKENDS.get(storage.name, storage.held_as(host)))


def _kind(host: Host) -> str:
    """PEFT's name for the layer that it would lay there: "lora.Linear", "ModulesToSaveWrapper"."""
    faces = faces_of(host)
    if not faces:  # the module has attributes of its own under PEFT's names, which no face hides
        return type(host).__name__
    face = faces[0]
    if face is TrainableTokensWrapper:
        return "TrainableTokensLayer"
    if face is ModulesToSaveWrapper:
        return face.__name__
    name = face.__name__
    if not name.endswith("Layer"):  # LoRA's and AdaLoRA's, in modules of their name
        return f"{face.__module__.rpartition('.')[2]}.{name}"
    # The others have one face for layers of every kind, where PEFT has a class for each kind.
    kernel = next((len(layout.shape.kernel) for layout in host.veneer.layouts.values() if layout.shape.kernel), 0)
    return f"{name.removesuffix('Layer').lower()}.{f'Conv{kernel}d' if kernel else 'Linear'}"


# -- all together ---------------------------------------------------------------------------------------------
def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The state of all adapters of a `PeftModel`, or of any model with adapters on it.

    Raises `ValueError` where there are no adapters.
    """
    model = unwrap(model)
    layers = get_layer_status(model)
    tuner = _tuner(model)
    base = model if tuner is None else tuner.model
    trainable, total = _count(base, adapter_names(base) if tuner is None else tuner.peft_config)
    types = {} if tuner is None else {name: _type_name(config) for name, config in tuner.peft_config.items()}
    return TunerModelStatus(
        base_model_type=type(base).__name__ if tuner is not None or _is_pretrained(base) else "other",
        adapter_model_type="None" if tuner is None else type(tuner).__name__,
        peft_types=types,
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_agreed(layer.enabled for layer in layers),
        active_adapters=_listed(_agreed(tuple(layer.active_adapters) for layer in layers)),
        merged_adapters=_merged(layers),
        requires_grad={name: _agreed(values) for name, values in _by_adapter(layers, "requires_grad")},
        available_adapters=sorted({name for layer in layers for name in layer.available_adapters}),
        devices={name: sorted({device for devices in values for device in devices})
                 for name, values in _by_adapter(layers, "devices")},
        quantization_backend=_agreed(layer.quantization_backend for layer in layers))


def _count(base: nn.Module, names: Iterable[str]) -> tuple[int, int]:
    return count_parameters(base, names)


def _is_pretrained(model: nn.Module) -> bool:
    """One of transformers' models, told by the names of its classes, so that transformers is not imported."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def _type_name(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _by_adapter(layers: list[TunerLayerStatus], field: str) -> Iterator[tuple[str, list[Any]]]:
    """(adapter, the values that the layers which have it give for `field`)."""
    names = dict.fromkeys(name for layer in layers for name in getattr(layer, field))
    for name in names:
        yield name, [getattr(layer, field)[name] for layer in layers if name in getattr(layer, field)]


def _agreed(values: Iterable[T]) -> T | Irregular:
    """The value that all have, or "irregular"."""
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    """The adapters that are merged somewhere, if each is merged wherever it is."""
    everywhere = sorted({name for layer in layers for name in layer.merged_adapters})
    left = [set(layer.available_adapters) - set(layer.merged_adapters) for layer in layers]
    return "irregular" if any(names & set(everywhere) for names in left) else everywhere
