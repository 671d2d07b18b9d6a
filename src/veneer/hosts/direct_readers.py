"""Modules of torch's own that read their children's weights without calling them, or order them by sequence.

In evaluation `nn.TransformerEncoderLayer` hands all its weights to one fused kernel, and `nn.TransformerEncoder`
feeds it nested tensors that only that kernel understands: an adapted child would be passed by in silence. Both
are kept on their ordinary path for as long as something below them is adapted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from veneer.hosts.attention import AttentionHost
from veneer.hosts.base import Host
from veneer.hosts.batch import SEQUENCE_FIRST, SequenceFirst
from veneer.hosts.swap import lay


class _NestedOff:
    """Holds an encoder's `use_nested_tensor` at False until the last of `count` hosts is lifted."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        self.encoder = encoder
        self.before = encoder.use_nested_tensor
        self.count = 0
        encoder.use_nested_tensor = False

    def remove(self) -> None:
        self.count -= 1
        if not self.count:
            self.encoder.use_nested_tensor = self.before


def _nothing(module: nn.Module, args: Any) -> None:
    """A forward hook whose presence alone rules the fused kernel out."""


def guard_direct_readers(modules: Iterable[nn.Module]) -> None:
    """Make every such reader among `modules` (a model's, itself first) see the adapters below it."""
    modules = list(modules)
    for module in modules:
        if isinstance(module, nn.MultiheadAttention) and isinstance(module.out_proj, Host):
            lay(module, AttentionHost, (), module.out_proj.veneer.route)
    for module in modules:
        if isinstance(module, nn.TransformerEncoderLayer) or _may_be_read_from_above(module, modules[0]):
            for child in _unguarded(module, "layer"):
                child.veneer.guards["layer"] = child.register_forward_pre_hook(_nothing)
        if isinstance(module, nn.TransformerEncoder):
            _nested_off(module)
        _mark_sequence_first(module)


def _may_be_read_from_above(module: nn.Module, root: nn.Module) -> bool:
    # What has no forward (a list) or is a layer by itself may be part of a reader outside of the model given.
    return module is root and (isinstance(root, Host) or type(root).forward is nn.Module.forward)


def _nested_off(encoder: nn.TransformerEncoder) -> None:
    below = [child for child in encoder.modules() if isinstance(child, Host)]
    there = [child.veneer.guards.get("encoder") for child in below]
    # One guard for all attaches: a second would take the first one's False for the encoder's own value.
    guard = next((g for g in there if isinstance(g, _NestedOff) and g.encoder is encoder), None)
    for child in below:
        if "encoder" not in child.veneer.guards:
            guard = guard or _NestedOff(encoder)
            guard.count += 1
            child.veneer.guards["encoder"] = guard


def _mark_sequence_first(module: nn.Module) -> None:
    """Mark the hosts that a layer with batch_first=False calls; attention turns its own inputs round."""
    reads: list[nn.Module | None] = []
    if isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        layer: Any = module.layers[0]
        reads = [module.norm]
    else:
        layer = module
        reads = list(module.children())
    if not isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) or layer.self_attn.batch_first:
        return
    for part in reads:
        if part is not None and not isinstance(part, nn.MultiheadAttention):
            for child in _unguarded(part, SEQUENCE_FIRST):
                child.veneer.guards[SEQUENCE_FIRST] = SequenceFirst()


def _unguarded(module: nn.Module, kind: str) -> list[Host]:
    return [child for child in module.modules() if isinstance(child, Host) and kind not in child.veneer.guards]
