"""The hosts: what a weight is and how it is applied. The first that claims a parameter has it."""

from __future__ import annotations

from torch import nn

from veneer.hosts.attention import AttentionHost, OutProjHost
from veneer.hosts.base import Host, Layout
from veneer.hosts.conv import ConvHost
from veneer.hosts.embedding import EmbeddingHost
from veneer.hosts.linear import Conv1DHost, LinearHost
from veneer.hosts.packed import PackedHost
from veneer.hosts.parameter import ParameterHost

HOSTS: tuple[type[Host], ...] = (
    OutProjHost, PackedHost, LinearHost, Conv1DHost, ConvHost, EmbeddingHost, AttentionHost, ParameterHost)


def host_of(module: nn.Module) -> tuple[type[Host], dict[str, Layout]]:
    """The host for a module's own parameters and how each of them is laid out; empty when it has none."""
    if isinstance(module, Host):
        base, host, _, _ = type(module).veneer_key  # type: ignore[attr-defined]
        return host, host.claims(module, base)
    for host in HOSTS:
        found = host.claims(module, type(module))
        if found:
            return host, found
    return ParameterHost, {}


__all__ = ["HOSTS", "Host", "Layout", "host_of"]
