"""How a layer with adapters prints: as PEFT's layers do, with the layer itself inside as `base_layer`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from veneer.hosts import Host
from veneer.hosts.parameter import ParameterHost
from veneer.peft.shown import bare, tree

#: what PEFT prints of every LoRA, empty or not, by name of the part
_ALWAYS: dict[str, type[nn.Module]] = {
    "lora_A": nn.ModuleDict, "lora_B": nn.ModuleDict, "lora_embedding_A": nn.ParameterDict,
    "lora_embedding_B": nn.ParameterDict, "lora_magnitude_vector": nn.ModuleDict}


def describe(host: Host) -> str:
    """The text of `repr(layer)` for a layer that a face lies over.

    It starts with PEFT's name of the layer and lists the layer without adapters and what it shows of them; where
    several parameters of one module are adapted, one wrapper stands in another. Of a module with others inside, those
    stand in `base_layer`, as they are.
    """
    faces: tuple[type[Host], ...] = type(host).veneer_key[3]  # type: ignore[attr-defined]
    title = " + ".join(_title(face, host) for face in faces)
    return _block(title, repr(bare(host)), tree(host), _adapted(host))


def _block(title: str, base: str, shown: Mapping[str, nn.Module], params: Sequence[str]) -> str:
    """params: those that wrappers are around, the innermost first."""
    nested = shown.get("base_layer")
    if nested is not None and any(True for _ in nested.children()):
        inner = {name: part for name, part in nested._modules.items() if part is not None}
        base = _block(title, base, inner, params[:-1])
    rows = {"original_module" if title == "ModulesToSaveWrapper" else "base_layer": base}
    rows |= {name: repr(part) for name, part in shown.items() if name.endswith("_dropout")}
    if title.startswith("lora."):
        rows |= {name: repr(shown[name] if name in shown else kind()) for name, kind in _ALWAYS.items()}
    rows |= {name: repr(part) for name, part in shown.items() if name not in rows}
    lines = [f"parameter_name={params[-1]!r},"] if params else []
    lines += [f"({name}): {text}" for name, text in rows.items()]
    return "\n".join([f"{title}(", *map(_indented, lines), ")"])


def _adapted(host: Host) -> list[str]:
    """The parameters that PEFT would lay wrappers around; empty where the adapters differ in that."""
    if not isinstance(host, ParameterHost):
        return []
    found = {tuple(name for name in host._parameters if name in slots)  # type: ignore[operator]
             for slots in host.adapters.values()}
    return list(found.pop()) if len(found) == 1 else []


def _title(face: type[Host], host: Host) -> str:
    """PEFT's name of a layer: the method's module and the layer's class there."""
    group, kind = face.__module__.rpartition(".")[2], face.__name__
    if group == "whole":
        return kind
    if group == "family":  # one class for all kinds of layers, and PEFT has one for each
        base = type(host).veneer_base.__name__  # type: ignore[attr-defined]
        return f"{kind.removesuffix('Layer').lower()}.{'Linear' if base == 'Conv1D' else base}"
    return f"{group}.{kind}"


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.split("\n"))
