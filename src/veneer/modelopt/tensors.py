"""The tensors of adapters by ModelOpt's names: `<layer>.lora_a_<adapter>.weight`, and `lora_b_` for B."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from veneer.attached import hosts
from veneer.method import VeneerError, nearest
from veneer.modelopt.state import state_of
from veneer.wrappers import unwrap

_OURS = re.compile(r"(?:.*\.)?lora_[ab]_[^.]+\.weight")


def peft_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapter, as `state_dict` of a ModelOpt model would name them; not copied."""
    return {key: tensor.detach() for key, tensor in _factors(model)}


def load_peft_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy A and B of every adapter out of a ModelOpt model's state dict; what else is in it is not looked at.

    Raises `VeneerError`, with the model as it was, for adapters' tensors that are missing, not expected, or of another
    shape.
    """
    own = dict(_factors(model))
    problems = [f"missing: {key!r}" for key in own if key not in state]
    problems += [f"unexpected: {key!r}{nearest(key, own)}" for key in state if key not in own and _OURS.fullmatch(key)]
    problems += [f"wrong shape: {key!r} is {tuple(state[key].shape)} and should be {tuple(tensor.shape)}"
                 for key, tensor in own.items() if key in state and state[key].shape != tensor.shape]
    if problems:
        raise VeneerError("\n  ".join(["load_peft_state_dict: these are not this model's adapters", *problems[:20]]))
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(state[key])


def _factors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    state = state_of(model)
    ours = state.configs if state is not None else {}
    for name, host in hosts(unwrap(model)):
        for adapter, slots in host.adapters.items():
            for param, one in slots.items():  # type: ignore[operator]
                if id(one) in seen or adapter not in ours:
                    continue
                seen.add(id(one))  # a tied weight has one adapter in two places
                layer = ".".join(part for part in (name, "" if param == "weight" else param) if part)
                for letter, factor in (("a", "A"), ("b", "B")):
                    yield f"{layer}{'.' if layer else ''}lora_{letter}_{adapter}.weight", one.get_parameter(factor)
