"""Modules of torch's own that read their children's weights without calling them.

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
    """Make every such reader among `modules` see the adapters below it."""
    modules = list(modules)
    for module in modules:
        if isinstance(module, nn.MultiheadAttention) and isinstance(module.out_proj, Host):
            lay(module, AttentionHost, (), module.out_proj.veneer.route)
    for module in modules:
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in _unguarded(module, "layer"):
                child.veneer.guards["layer"] = child.register_forward_pre_hook(_nothing)
        elif isinstance(module, nn.TransformerEncoder):
            below = _unguarded(module, "encoder")
            guard = _NestedOff(module) if below else None
            for child in below:
                assert guard is not None
                guard.count += 1
                child.veneer.guards["encoder"] = guard


def _unguarded(module: nn.Module, kind: str) -> list[Host]:
    return [child for child in module.modules() if isinstance(child, Host) and kind not in child.veneer.guards]
