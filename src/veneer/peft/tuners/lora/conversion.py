"""Adapters of the other methods as files of LoRA, under PEFT's names."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import IO, Any

from torch import Tensor, nn

from veneer.attached import adapter_names, attached
from veneer.convert import check_rank, converted
from veneer.io.dialects import hf
from veneer.io.files import write_all
from veneer.io.records import Record, base_map, base_weights
from veneer.io.tensors import write_tensors
from veneer.method import VeneerError
from veneer.peft.config import CONFIG_NAME, plain
from veneer.peft.lora_config import LoraConfig
from veneer.peft.saving import base_of
from veneer.peft.types import PeftType
from veneer.peft.utils.constants import SAFETENSORS_WEIGHTS_NAME
from veneer.wrappers import unwrap

__all__ = ["convert_to_lora", "save_as_lora"]


def convert_to_lora(model: nn.Module, rank: float, adapter_name: str = "default", progressbar: bool = False,
                    compile_kwargs: Any = None) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and tensors of the LoRA nearest to an adapter, by PEFT's keys and with a scale of 1; the model is not
    changed. See `veneer.to_lora`, which puts it in the adapter's place.

    rank: an int is the most a weight gets (never more than is exact); a float above 0 keeps that share of ‖ΔW‖² in
    each weight, 1.0 all of it. progressbar, compile_kwargs: without effect.
    Raises `TypeError` for a model without adapters, and `ValueError` for a rank that cannot be.
    """
    base = base_of(unwrap(model))
    if not adapter_names(base):
        raise TypeError("Could not detect any layer that supports LoRA conversion: the model has no adapter")
    _check(base, rank, adapter_name)
    own = getattr(model, "peft_config", {}).get(adapter_name)
    if own is not None and own.peft_type == PeftType.LORA:
        warnings.warn("Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need "
                      "for that.", stacklevel=2)
    pieces, _ = converted(base, adapter_name, "exact" if isinstance(rank, float) and rank == 1 else rank)
    records = [Record(piece.weight.name, piece.method, dict(piece.tensors)) for piece in pieces]
    try:
        config, tensors, _ = hf.encode(records, base_map(base, base_weights(base)))
    except hf.Inexpressible as no:
        raise VeneerError(f"PEFT's files cannot hold the adapter {adapter_name!r} as LoRA: {no}") from None
    about = {key: getattr(own, key, None) for key in ("base_model_name_or_path", "task_type", "revision")}
    found = LoraConfig.from_peft_type(**{**config, **{key: value for key, value in about.items() if value is not None}})
    return found, {key: tensor.detach().contiguous() for key, tensor in tensors.items()}


def _check(base: nn.Module, rank: float, name: str) -> None:
    if isinstance(rank, float) and not 0 < rank <= 1:
        raise ValueError(f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got "
                         f"{rank}.")
    if rank == 0:
        raise ValueError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    if rank != 1.0:
        check_rank("convert_to_lora", rank)
    for weight, adapter in attached(base, name) if isinstance(rank, int) else ():
        shape = weight.layout.shape
        if adapter.method is not None and adapter.method.additive and rank > min(shape.out, shape.in_):
            raise ValueError(f"The chosen rank {rank} is larger than the weight shape of {weight.name!r} "
                             f"({shape.out}, {shape.in_}), please choose a lower rank.")


def save_as_lora(path: str | Path, model: nn.Module, rank: float, adapter_name: str = "default",
                 progressbar: bool = False, compile_kwargs: Any = None) -> None:
    """Write what `convert_to_lora` gives into a folder, which is made if need be; whole or not at all."""
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    text = json.dumps(plain({**config.to_dict(), "inference_mode": True}), indent=2, sort_keys=True).encode()

    def write_config(file: IO[bytes]) -> None:
        file.write(text)

    write_all(Path(path), [(SAFETENSORS_WEIGHTS_NAME, lambda file: write_tensors(file, tensors, {"format": "pt"})),
                           (CONFIG_NAME, write_config)])
