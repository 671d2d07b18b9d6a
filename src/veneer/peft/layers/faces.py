"""Which face of PEFT's each host of a model shows, by the methods of its adapters and by what it is."""

from __future__ import annotations

from typing import cast

from torch import nn

from veneer.attached import hosts
from veneer.hosts import Host
from veneer.hosts.attention import AttentionHost, OutProjHost
from veneer.hosts.packed import PackedHost
from veneer.hosts.parameter import ParameterHost
from veneer.hosts.swap import show
from veneer.method import Adapter, Method
from veneer.methods import AdaLoRA, DoRA, Full, LoHa, LoKr, LoRA, RandLoRA, VBLoRA, VeRA
from veneer.peft.layers import lora
from veneer.peft.layers.adalora import SVDLinear
from veneer.peft.layers.base import BaseTunerLayer
from veneer.peft.layers.family import LoHaLayer, LoKrLayer, RandLoraLayer, VBLoRALayer, VeraLayer
from veneer.peft.layers.whole import ModulesToSaveWrapper, TrainableTokensWrapper
from veneer.storage import Storage, packed_storage
from veneer.storage.bitsandbytes_4bit import BitsAndBytes4Bit
from veneer.storage.bitsandbytes_8bit import BitsAndBytes8Bit

_OF_METHOD: dict[type[Method], type[BaseTunerLayer]] = {
    AdaLoRA: SVDLinear, LoHa: LoHaLayer, LoKr: LoKrLayer, VeRA: VeraLayer, VBLoRA: VBLoRALayer,
    RandLoRA: RandLoraLayer}
_OF_STORAGE: dict[type[Storage], type[BaseTunerLayer]] = {BitsAndBytes4Bit: lora.Linear4bit,
                                                          BitsAndBytes8Bit: lora.Linear8bitLt}
_CONV = {1: lora.Conv1d, 2: lora.Conv2d, 3: lora.Conv3d}


def show_faces(model: nn.Module) -> None:
    """Lay over every host of the model the faces that fit its adapters now."""
    for _, host in hosts(model):
        faces = faces_of(host)
        if type(host).veneer_key[3] != faces:  # type: ignore[attr-defined]
            show(host, faces)


def faces_of(host: Host) -> tuple[type[BaseTunerLayer], ...]:
    """One face for each kind of adapter on the host; none where its names would hide something of the module's own."""
    found: dict[type[BaseTunerLayer], None] = {}
    for slots in host.adapters.values():
        for param, adapter in cast(nn.ModuleDict, slots).items():
            found[_face(host, param, cast(Adapter, adapter).method)] = None
    faces = list(found)
    if len(faces) > 1 and ModulesToSaveWrapper in found:  # a trained bias beside an adapted weight
        faces.remove(ModulesToSaveWrapper)
    return tuple(face for face in faces if not _hides(face, host))


def _face(host: Host, param: str, method: Method | None) -> type[BaseTunerLayer]:
    inner = method.inner if isinstance(method, DoRA) else method
    if isinstance(inner, LoRA):
        return _lora_face(host, param)
    if inner is not None and type(inner) in _OF_METHOD:
        return _OF_METHOD[type(inner)]
    return ModulesToSaveWrapper if isinstance(inner, Full) else TrainableTokensWrapper


def _lora_face(host: Host, param: str) -> type[BaseTunerLayer]:
    shape = host.veneer.layouts[param].shape
    if isinstance(host, (AttentionHost, OutProjHost)):
        return lora.MultiheadAttention
    if isinstance(host, PackedHost):
        return next((face for kind, face in _OF_STORAGE.items() if isinstance(packed_storage(host), kind)), lora.Linear)
    if shape.lookup:
        return lora.Embedding
    if shape.kernel:
        return _CONV.get(len(shape.kernel), lora.Linear)
    return lora.ParamWrapper if isinstance(host, ParameterHost) else lora.Linear


def _hides(face: type[BaseTunerLayer], host: Host) -> bool:
    """A property of the class would win over an attribute that the module itself has under the same name."""
    names = {name for kind in face.__mro__ if issubclass(kind, BaseTunerLayer) for name in vars(kind)
             if not name.startswith("_")} - _SHARED
    base = type(host).veneer_base  # type: ignore[attr-defined]
    own = {*vars(host), *(name for kind in base.__mro__ if kind is not nn.Module for name in vars(kind))}
    return bool(names & own)


#: names that a module and a face may both have, since they mean the same or are torch's own
_SHARED = {"named_children", "children", "named_modules", "state_dict", "in_features", "out_features",
           "adapter_layer_names", "other_param_names"}
