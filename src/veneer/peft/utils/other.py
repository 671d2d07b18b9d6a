"""PEFT's helpers around a model: made ready for training over few bits, cast, and what old scripts import from here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from veneer.hosts import Host
from veneer.kbit import prepare_for_kbit_training
from veneer.method import VeneerError, nearest
from veneer.peft.layers.whole import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from veneer.peft.utils.constants import (
    CONFIG_NAME,
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    SAFETENSORS_WEIGHTS_NAME,
    TOKENIZER_CONFIG_NAME,
    TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING,
    TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING,
    WEIGHTS_NAME,
)
from veneer.storage import packed_storage
from veneer.storage.base import own_class
from veneer.weights import base_modules
from veneer.wrappers import unwrap

__all__ = ["CONFIG_NAME", "INCLUDE_LINEAR_LAYERS_SHORTHAND", "SAFETENSORS_WEIGHTS_NAME", "TOKENIZER_CONFIG_NAME",
           "TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING",
           "TRANSFORMERS_MODELS_TO_LOHA_TARGET_MODULES_MAPPING", "TRANSFORMERS_MODELS_TO_LOKR_TARGET_MODULES_MAPPING",
           "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
           "TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING",
           "TRANSFORMERS_MODELS_TO_VBLORA_TARGET_MODULES_MAPPING", "TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING",
           "WEIGHTS_NAME", "AuxiliaryTrainingWrapper", "ModulesToSaveWrapper", "TrainableTokensWrapper",
           "cast_mixed_precision_params", "fsdp_auto_wrap_policy", "id_tensor_storage", "infer_device",
           "prepare_model_for_kbit_training", "shift_tokens_right", "transpose"]


def prepare_model_for_kbit_training(model: nn.Module, use_gradient_checkpointing: bool = True,
                                    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
                                    auto_clear_cache: bool = True) -> nn.Module:
    """Freeze the base, run its norms in fp32, and turn on gradient checkpointing where the model is quantised; in
    place. See `veneer.prepare_for_kbit_training`.

    PEFT also holds embeddings and the head of a 16-bit model in fp32, which costs memory and changes no result by
    more than rounding; Veneer does not. gradient_checkpointing_kwargs: options of `torch.utils.checkpoint`;
    "use_reentrant" is False where it is not given. auto_clear_cache: without effect, as nothing large is copied.
    Raises `ValueError` for checkpointing on a quantised model that has none.
    """
    checkpointing: bool | Mapping[str, Any] = False
    if use_gradient_checkpointing and _is_quantised(unwrap(model)):
        checkpointing = dict(gradient_checkpointing_kwargs or {}) or True
    return prepare_for_kbit_training(model, gradient_checkpointing=checkpointing)


def _is_quantised(model: Any) -> bool:
    marks = ("is_loaded_in_8bit", "is_loaded_in_4bit", "hqq_quantized", "quantization_method")
    return any(getattr(model, mark, None) for mark in marks) or any(
        packed_storage(module) is not None for _, module in base_modules(model))


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is frozen to `dtype` and what is trained to fp32, in the same parameters. Weights held in fewer bits
    stay as they are. Raises `ValueError` for a dtype that is none of floating point."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise VeneerError(f"cast_mixed_precision_params: dtype must be torch.float16 or torch.bfloat16, got {dtype!r}")
    packed = {id(storage.carrier(module)) for _, module in base_modules(model)
              if (storage := packed_storage(module)) is not None}
    for param in model.parameters():
        if param.is_floating_point() and id(param) not in packed:
            param.data = param.data.to(torch.float32 if param.requires_grad else dtype)


def infer_device() -> str:
    """The type of the device at hand: "cuda", "mps", "xpu", or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "xpu" if torch.xpu.is_available() else "cpu"


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The transposed weight where `fan_in_fan_out`; a parameter gives a parameter."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def shift_tokens_right(input_ids: Tensor, pad_token_id: int, decoder_start_token_id: int) -> Tensor:
    """A decoder's inputs (batch, length) for these labels: begun with `decoder_start_token_id`, the last one dropped,
    and `pad_token_id` where a label is -100. Raises `ValueError` without a `pad_token_id`."""
    if pad_token_id is None:
        raise ValueError("shift_tokens_right needs a pad_token_id, which self.model.config.pad_token_id should give")
    start = torch.full_like(input_ids[:, :1], decoder_start_token_id)
    shifted = torch.cat([start, input_ids[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)


# -- what scripts that shard or walk a model use --------------------------------------------------------------
def fsdp_auto_wrap_policy(model: nn.Module) -> Callable[..., bool]:
    """A policy for torch's `FullyShardedDataParallel(model, auto_wrap_policy=…, use_orig_params=True)`: a unit for each
    block, which is a class in the model's own `_no_split_modules` or, where that is set, in the environment variable
    FSDP_TRANSFORMER_CLS_TO_WRAP (names with commas between them).

    The policy takes (module, recurse, nonwrapped_numel) and returns a bool. A block has frozen and trained parameters,
    so that `use_orig_params=True` is needed; PEFT's policy also makes units of single trained layers, for training
    without it. Methods that share trained state (AdaLoRA, VB-LoRA) cannot be sharded. Raises `TypeError` where the
    model has no module of such a class.
    """
    variable = "FSDP_TRANSFORMER_CLS_TO_WRAP"
    given = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
    names = given or list(getattr(model, "_no_split_modules", None) or ())
    classes = {own_class(module).__name__: own_class(module) for module in model.modules()}
    found = {classes[name] for name in names if name in classes}
    missing = [name for name in given if name not in classes]
    if missing or not found:
        why = (f"{variable} names {missing[0]!r}, which no module of the model is{nearest(missing[0], classes)}"
               if missing else f"its _no_split_modules is {names or None}; name the class of its blocks in the "
                               f"environment variable {variable}")
        raise TypeError(f"Could not find the transformer layer class to wrap in the model: {why}")
    blocks = tuple(found)

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int = 0) -> bool:
        # Nothing below a layer with adapters is wrapped: what it shows there is made anew at each look.
        return not isinstance(module, Host) if recurse else isinstance(module, blocks)

    return policy


def id_tensor_storage(tensor: Tensor) -> tuple[torch.device, int, int]:
    """What two tensors over the same memory have in common: device, address and size of the storage in bytes."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """The module above, the module itself and the last part of its name; for scripts that replace modules."""
    above, _, name = key.rpartition(".")
    return model.get_submodule(above), model.get_submodule(key), name
